"""Random masks that keep something of other masks: how many weights they keep, or every degree of their graphs."""

from collections.abc import Mapping
from numbers import Real

import numpy as np
import torch
from torch import Tensor, nn

from fsp.checks import check_generator, check_tensors, plain_settings
from fsp.masks.algebra import EVERYWHERE, Masks, check_masks, check_scope, keep_counts, number_kept, unflattened
from fsp.masks.wiring import PLAIN, blocks, joined, wiring_of

ROUNDS = 32  # of trades; see the notes of `rewire`
SMALL = 2**17  # entries up to which all of them are put in random order, which takes a millisecond or two


@plain_settings()
def draw(among: Mapping[str, Tensor], counts: int | Mapping[str, int], *, generator: torch.Generator) -> Masks:
    """Masks of given counts, every choice of positions as likely as any other.

    Parameters
    ----------
    among : Masks
        What may be kept.
    counts : int or dict of name to int
        How many to keep: in all tensors together, or in each.
    generator : torch.Generator on the CPU

    Returns
    -------
    Masks
        New tensors on the devices of `among`.

    Raises
    ------
    ValueError
        If more are to be kept than may be, a mask is not bool, or the generator is not on the CPU.

    Notes
    -----
    Positions are drawn until there are enough different ones, so the time is that of the weights kept.  Where `among`
    has at most 2^17 entries in all, they are ranked by normal random numbers instead.

    Examples
    --------
    >>> masks = draw({"w": torch.ones(4, 5).bool()}, 7, generator=torch.Generator().manual_seed(0))
    >>> int(masks["w"].sum())
    7
    """
    check_generator(generator)
    _check_bool(among)
    if sum(mask.numel() for mask in among.values()) <= SMALL:
        scores = {}
        for name, mask in among.items():
            drawn = torch.randn(mask.shape, generator=generator, dtype=torch.float32, device="cpu")
            scores[name] = drawn.to(mask.device).masked_fill(~mask, -torch.inf)
        if isinstance(counts, Mapping):
            return keep_counts(scores, counts, generator)
        together = torch.cat([score.flatten() for score in scores.values()])
        return unflattened(keep_counts({EVERYWHERE: together}, {EVERYWHERE: counts}, generator)[EVERYWHERE], among)
    if isinstance(counts, Mapping):
        return {name: _scattered(mask, counts[name], generator, name) for name, mask in among.items()}
    together = torch.cat([mask.flatten() for mask in among.values()])
    return unflattened(_scattered(together, counts, generator, EVERYWHERE), among)


@plain_settings()
def shuffle(
    masks: Mapping[str, Tensor], *, scope: str = "layer", generator: torch.Generator, share: float = 1.0
) -> Masks:
    r"""Masks with their entries permuted at random: the topology goes, the counts stay.

    Parameters
    ----------
    masks : Masks
    scope : {"layer", "global"}
        Permute within each tensor (keeps its count), or over all tensors together (keeps the total).
    generator : torch.Generator on the CPU
    share : float, in [0, 1]
        Of the kept entries, rounded to a whole number: so many, drawn at random, are put anywhere but where the others
        are.  Where more than half are kept it is a share of the pruned entries.  0 changes nothing.

    Returns
    -------
    Masks
        New tensors on the devices of the old ones.

    Raises
    ------
    ValueError
        For an unknown scope, a share outside [0, 1], a mask that is not bool, or a generator that is not on the CPU.

    Notes
    -----
    An entry may be put back where it was, so a share s moves :math:`s (1 - \delta) / (1 - \delta + s \delta)` of the
    entries on average, :math:`\delta \le 1/2` being their fraction of all: s itself where masks are sparse.

    References
    ----------
    Frankle et al., Pruning neural networks at initialization: why are we missing the mark? ICLR 2021, section 5.
    """
    check_generator(generator)
    _check_share(share)
    _check_bool(masks)
    if scope == "layer":
        return {name: _permuted_part(m.flatten(), share, generator).view_as(m) for name, m in masks.items()}
    check_scope(scope)
    flat = _permuted_part(torch.cat([m.flatten() for m in masks.values()]), share, generator)
    return unflattened(flat, masks)


@plain_settings()
def rewire(
    masks: Mapping[str, Tensor], *, generator: torch.Generator, share: float = 1.0, model: nn.Module | None = None
) -> Masks:
    r"""Masks drawn uniformly among all that have every degree of these: each vertex keeps its number of edges.

    The control for what a spectrum knows beyond degrees.  In the graph of a layer (`fsp.spectrum.biadjacency`) each
    output keeps as many weights as it had, and so does each unrolled input; which input meets which output is random.

    Parameters
    ----------
    masks : Masks
        Tensors of shape (outputs, inputs, \*kernel); of grouped and transposed convolutions only with `model`.
    generator : torch.Generator on the CPU
    share : float, in [0, 1]
        Of the edges of each layer, rounded to a whole number: so many, drawn at random, are rewired among themselves,
        and the others stay where they are.  Where more than half of the edges that there could be are
        there, it is a share of the missing ones.  0 changes nothing.
    model : nn.Module, optional
        Says which masks are of grouped or transposed convolutions.  The groups of a layer are rewired each by itself.
        Without a model a mask is rewired as the matrix (first dimension, all others).  For a grouped convolution that
        keeps the degrees of outputs, but of inputs only their sums over the groups; for a transposed one neither.

    Returns
    -------
    Masks
        New tensors on the devices of the old ones.

    Raises
    ------
    ValueError
        If a mask is not bool, has fewer than two dimensions or no entries, or does not fit the model; for a share
        outside [0, 1] or a generator that is not on the CPU.

    Examples
    --------
    With two weights in each row and column, only which rows share their columns is left to chance:

    >>> kept = {"w": torch.eye(4).bool() | torch.eye(4).bool().roll(1, dims=1)}
    >>> new = rewire(kept, generator=torch.Generator().manual_seed(0))["w"]
    >>> new.sum(0).tolist(), new.sum(1).tolist(), bool((new != kept["w"]).any())
    ([2, 2, 2, 2], [2, 2, 2, 2], True)

    Notes
    -----
    *Method.*  Global curveball trades [1]_: all outputs are paired at random, and each pair deals the inputs that only
    one of the two has out again at random, as many to each as before.  Then the inputs trade outputs in the same way.
    Every trade is as likely as its reversal and any graph can be reached, so all graphs with these degrees are equally
    likely in the limit [2]_.  One round is a trade on both sides: after trades on one side alone a hub on it would
    take as many rounds as there are vertices to forget its neighbours.

    *Rounds.*  Of the overlap with the original beyond that of independent draws a round leaves about a third.  On
    layers from 10 × 256 to 512 × 4608, with equal degrees, with those of SNIP, GraSP and SynFlow masks at densities
    .02 and .05, with power laws on both sides and with nested neighbourhoods, nothing of it is left after 8 to 16
    rounds; there are 32.

    *Partial rewiring.*  Edges that are put at risk may come back to where they were, so somewhat less than `share`
    moves, about as for `shuffle` where degrees are even.  Edges that stay are obstacles; the draw is uniform among the
    graphs that trades reach around them.

    References
    ----------
    .. [1] Carstens, Hamann, Meyer, Penschuck, Tran, Wagner: Parallel and I/O-efficient randomisation of massive
       networks using global curveball trades.  ESA 2018.
    .. [2] Carstens: Proof of uniform sampling of binary matrices with fixed row sums and column sums for the fast
       curveball algorithm.  Physical Review E 91, 2015.  The trades are of Strona et al., Nature Communications 2014.
    """
    check_generator(generator)
    _check_share(share)
    _check_bool(masks)
    if model is not None:
        check_masks(model, masks)
    wirings = {} if model is None else wiring_of(model)
    new = {}
    for name, mask in masks.items():
        wiring = wirings.get(name, PLAIN)
        matrices = [_rewired(matrix, share, generator) for matrix in blocks(mask.cpu(), wiring)]
        new[name] = joined(torch.stack(matrices), mask.shape, wiring).to(mask.device)
    return new


@plain_settings()
def scattered(
    masks: Mapping[str, Tensor], model: nn.Module, *, generator: torch.Generator
) -> tuple[Masks, dict[str, Tensor]]:
    """Random masks with the same count in every layer, and the kept weights in random order on them.

    The control for a topology: neither densities nor the distribution of weights change, only positions.

    Parameters
    ----------
    masks : Masks
    model : nn.Module
        Gives the weights; it is not changed.
    generator : torch.Generator on the CPU

    Returns
    -------
    masks : Masks
    weights : dict of name to Tensor
        Zero off the new masks.

    Raises
    ------
    ValueError
        If a mask fits no parameter of the model.
    """
    new, weights = shuffle(masks, generator=generator), {}
    for name, parameter in check_masks(model, masks).items():
        weight = parameter.detach()
        kept = permuted(weight[masks[name]], generator)
        weights[name] = torch.zeros_like(weight).masked_scatter_(new[name], kept)
    return new, weights


def permuted(flat: Tensor, generator: torch.Generator) -> Tensor:
    """Entries in random order, the order drawn on the CPU."""
    return flat[torch.randperm(len(flat), generator=generator, device="cpu").to(flat.device)]


def _check_bool(masks: Mapping[str, Tensor]) -> None:
    """Raise a ValueError naming a mask that is no tensor of bool."""
    check_tensors("mask", masks)
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"mask {name!r} is {mask.dtype}: expected bool, as {name!r} != 0 would be")


# ---- positions ---------------------------------------------------------------------------------------------------


def _scattered(among: Tensor, count: int, generator: torch.Generator, where: str) -> Tensor:
    """So many of the True entries, drawn at random."""
    room = number_kept(among)
    if not 0 <= count <= room:
        raise ValueError(f"{where}: {count} weights are to be kept, only {room} may be; lower the density")
    chosen = _drawn(room, count, generator).to(among.device)
    if room == among.numel():
        return chosen.view_as(among)
    return among.masked_scatter(among, chosen)


def _drawn(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Which of n are in a set of a given size, all such sets being equally likely; on the CPU.

    Numbers are drawn until so many different ones have come, never more at a time than are missing: so it makes no
    difference that they are drawn many at a time.
    """
    if 2 * count > n:
        return ~_drawn(n, n - count, generator)
    found = np.zeros(n, dtype=bool)
    while missing := count - int(np.count_nonzero(found)):
        found[torch.randint(n, (missing,), generator=generator, dtype=torch.int64, device="cpu").numpy()] = True
    return torch.from_numpy(found)


# ---- a share of the entries --------------------------------------------------------------------------------------


def _check_share(share: object) -> None:
    """Raise a ValueError unless 0 <= share <= 1."""
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:  # type: ignore[operator]  # mypy knows no order of the numbers of `numbers`
        raise ValueError(f"share={share!r}: expected a number in [0, 1], the share of the entries that are drawn anew")


def _free(flat: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Where entries may be drawn anew: everywhere but at the kept ones that stay, of which there are few enough.

    `flat` is bool, at most half of it True.
    """
    kept = flat.nonzero()[:, 0]
    staying = len(kept) - round(share * len(kept))
    free = torch.ones_like(flat)
    free[permuted(kept, generator)[:staying]] = False
    return free


def _is_thick(mask: Tensor) -> bool:
    """Whether more entries are True than not: then those that are not are the ones to draw, being fewer."""
    return 2 * number_kept(mask) > mask.numel()


def _permuted_part(flat: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Entries in random order, but for those that stay."""
    if share == 1 and len(flat) > SMALL:
        return _drawn(len(flat), number_kept(flat), generator).to(flat.device)
    if share == 1:
        return permuted(flat, generator)
    free = _free(~flat if _is_thick(flat) else flat, share, generator)
    new = flat.clone()
    new[free] = permuted(flat[free], generator)
    return new


# ---- trades ------------------------------------------------------------------------------------------------------


def _rewired(matrix: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A bool matrix drawn anew with the same sums of rows and columns."""
    if _is_thick(matrix):
        return ~_rewired(~matrix, share, generator)
    kept, free = matrix.numpy(), _free(matrix.flatten(), share, generator).view_as(matrix).numpy()
    moving = kept & free
    if not moving.any():
        return matrix.clone()
    # vertices without an edge that may move would only be partners with nothing to trade
    inside = np.ix_(moving.any(1), moving.any(0))
    right, left = kept[inside].nonzero()
    movable = free[inside][right, left]
    for _ in range(ROUNDS):
        right, left, movable = _traded(right, left, movable, generator)
        left, right, movable = _traded(left, right, movable, generator)
    drawn = np.zeros_like(kept[inside])
    drawn[right, left] = True
    new = kept.copy()
    new[inside] = drawn
    return torch.from_numpy(new)


def _traded(
    own: np.ndarray, other: np.ndarray, free: np.ndarray, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges after one trade in which every vertex of a side takes part, or all but one.

    Parameters
    ----------
    own, other : ndarray of int64, shape (edges,)
        The two ends of each edge; `own` are on the side that trades, numbered from 0 without gaps.
    free : ndarray of bool, shape (edges,)
        False for edges that stay where they are.
    generator : torch.Generator on the CPU

    Returns
    -------
    own, other, free : ndarray
        The edges in another order.
    """
    vertices = _order(int(own.max()) + 1, generator)  # the first two are partners, the next two ...
    place = np.empty_like(vertices)
    place[vertices] = np.arange(len(vertices))
    # An edge is one whole number, (pair, other, which of the pair, free): sorted, what both partners have is adjacent.
    width = int(other.max()) + 1
    pair, which = np.divmod(place[own], 2)
    key = np.sort(4 * (pair * width + other) + 2 * which + free)
    meeting, which, free = key >> 2, (key >> 1) & 1, (key & 1).astype(bool)
    pair, other = np.divmod(meeting, width)
    shared = meeting[1:] == meeting[:-1]
    dealt = free.copy()
    dealt[1:] &= ~shared
    dealt[:-1] &= ~shared
    dealt = dealt.nonzero()[0]
    # in each pair the edges to deal in random order take over the partners of the same edges in the old order
    lot = _order(len(dealt), generator)
    lot = lot[np.sort(pair[dealt[lot]] * len(lot) + np.arange(len(lot))) % max(1, len(lot))]
    which[dealt[lot]] = which[dealt]
    return vertices[2 * pair + which], other, free


def _order(n: int, generator: torch.Generator) -> np.ndarray:
    """The numbers from 0 to n - 1 in random order."""
    return torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu").numpy()
