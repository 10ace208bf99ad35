r"""New masks out of those a pruning method has drawn: equal counts by votes, and swaps led by singular vectors.

The votes for a weight are the number of candidates that kept it.  Weights with a vote are the explored ones.
"""

import math

import torch
from torch import Tensor

from fsp.checks import check_generator
from fsp.masks import PLAIN, Masks, Wiring, blocks, keep_counts, number_kept

SHARES = 0.02, 0.3  # least and greatest part of a layer's kept weights that one proposal swaps


def resized(masks: Masks, counts: dict[str, int], votes: dict[str, Tensor], generator: torch.Generator) -> Masks:
    """Masks with given layer counts, changed where the method itself is least sure.

    A layer with too many weights loses those with the fewest votes, one with too few gains those with the most, ties
    at random.

    Parameters
    ----------
    masks : Masks
    counts : dict of name to int
    votes : dict of name to Tensor of int32
        At least 1 where `masks` keep.
    generator : torch.Generator on the CPU

    Returns
    -------
    Masks
        A layer with the right count already is the same tensor.

    Examples
    --------
    >>> masks = {"w": torch.tensor([[True, True, True, False]])}
    >>> votes = {"w": torch.tensor([[3, 1, 2, 9]])}
    >>> resized(masks, {"w": 2}, votes, torch.Generator())
    {'w': tensor([[ True, False,  True, False]])}
    """
    found = {}
    for name, mask in masks.items():
        if number_kept(mask) != counts[name]:
            rank = votes[name] + mask * (votes[name].max() + 1)  # what the mask keeps before all that it does not
            mask = keep_counts({name: rank}, counts, generator)[name]
        found[name] = mask
    return found


Pairs = tuple[Tensor, Tensor]


def leading_vectors(mask: Tensor, weight: Tensor, wiring: Wiring = PLAIN) -> tuple[Pairs, Pairs]:
    """Two leading pairs of singular vectors of a layer's mask and of its absolute kept weights, for `swapped`.

    Parameters
    ----------
    mask : Tensor of bool, a layer's shape
    weight : Tensor, same shape
    wiring : Wiring, optional

    Returns
    -------
    of_mask, of_weights : two tensors each, (groups, outputs, 2) and (groups, inputs, 2), float64
    """
    kept = blocks(mask, wiring)
    return _two_leading(kept.double()), _two_leading(blocks(weight.detach().double().abs(), wiring) * kept)


def swapped(
    mask: Tensor,
    weight: Tensor,
    explored: Tensor,
    vectors: tuple[Pairs, Pairs],
    generator: torch.Generator,
    wiring: Wiring = PLAIN,
) -> Tensor:
    r"""A layer's mask with some kept weights exchanged for explored ones that promise a larger norm.

    Each weight has a promise, with B and W the biadjacency matrices of mask and absolute kept weights,
    :math:`\bar w_{ij} = |w_{ij}|` over the layer's mean, and u, v and x, y the leading singular vectors of B and W:

    .. math:: p_{ij} = a\,|u_{1i} v_{1j}| - b\,u_{2i} v_{2j}
              + \bar w_{ij} \bigl( c\,|x_{1i} y_{1j}| - d\,x_{2i} y_{2j} \bigr)

    the first-order effects of an edge on :math:`\sigma_1(B), -\sigma_2(B), \sigma_1(W), -\sigma_2(W)`, mixed with
    coefficients drawn from the exponential distribution.  Up to a share of the kept weights, drawn log-uniformly
    between 2% and 30%, goes for as many explored ones: the least promising for the most promising, as long as a swap
    pays.  Each vertex keeps its most promising edge, so that no vertex loses its last one: without this rule the norm
    grows faster, by giving up units.

    Parameters
    ----------
    mask : Tensor of bool, a layer's shape
    weight : Tensor, same shape
    explored : Tensor of bool, same shape
        What may be kept instead.
    vectors : from `leading_vectors`
        Of this mask.
    generator : torch.Generator on the CPU
        Five numbers are drawn.
    wiring : Wiring, optional

    Returns
    -------
    Tensor of bool
        As many kept as in `mask`.
    """
    check_generator(generator)
    draws = torch.rand(5, generator=generator, dtype=torch.float64, device="cpu").tolist()
    mix = [-math.log(1 - draw) for draw in draws[:4]]
    share = SHARES[0] * (SHARES[1] / SHARES[0]) ** draws[4]
    kept = blocks(mask, wiring)  # (groups, outputs, inputs)
    promise = _promise(blocks(weight.detach().double().abs(), wiring), vectors, mix)
    ranked = promise.masked_fill(~kept, -torch.inf)
    best = torch.zeros_like(kept)
    best.scatter_(1, ranked.argmax(1, keepdim=True), True).scatter_(2, ranked.argmax(2, keepdim=True), True)
    movable = (kept & ~best).flatten().nonzero()[:, 0]
    free = (blocks(explored, wiring) & ~kept).flatten().nonzero()[:, 0]
    most = min(int(share * int(mask.count_nonzero())) + 1, len(movable), len(free))
    promise = promise.flatten()
    leaving = movable[promise[movable].argsort(stable=True)[:most]]
    coming = free[promise[free].argsort(descending=True, stable=True)[:most]]
    pays = promise[coming] > promise[leaving]
    places = blocks(torch.arange(mask.numel(), device=mask.device).view_as(mask), wiring).flatten()
    new = mask.flatten().clone()
    new[places[leaving[pays]]] = False
    new[places[coming[pays]]] = True
    return new.view_as(mask)


def _promise(strength: Tensor, vectors: tuple[Pairs, Pairs], mix: list[float]) -> Tensor:
    """First-order effect of every edge on the mixed singular values, (groups, outputs, inputs)."""
    (u, v), (x, y) = vectors
    relative = strength / strength.mean().clamp(min=torch.finfo(torch.float64).tiny)
    plain = mix[0] * _outer(u, v, 0).abs() - mix[1] * _outer(u, v, 1)
    return plain + relative * (mix[2] * _outer(x, y, 0).abs() - mix[3] * _outer(x, y, 1))


def _outer(left: Tensor, right: Tensor, k: int) -> Tensor:
    """Products of the entries of the k-th pair of vectors, in each block."""
    return left[:, :, k, None] * right[:, None, :, k]


def _two_leading(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Two leading pairs of singular vectors of each block, (groups, outputs, 2) and (groups, inputs, 2)."""
    wide = matrices.shape[1] <= matrices.shape[2]
    small = matrices if wide else matrices.transpose(1, 2)
    vectors = torch.linalg.eigh(small @ small.transpose(1, 2)).eigenvectors[:, :, -2:].flip(2)
    if vectors.shape[2] == 1:  # a side of one vertex has one singular value
        vectors = torch.cat([vectors, torch.zeros_like(vectors)], 2)
    others = small.transpose(1, 2) @ vectors
    others = others / others.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (vectors, others) if wide else (others, vectors)
