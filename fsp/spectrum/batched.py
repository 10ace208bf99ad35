"""The full-spectrum coordinate of one layer under many masks, dense and batched: what `population` runs on a GPU.

The same quantities as `fsp.spectrum.engine`, in large batches of equal work instead of one sparse matrix at a time:
nested subgraphs of all masks together are sorted by size, padded with zero rows to the largest of their batch, and
their Gram matrices and eigenvalues are computed as one batch.  Zero rows add zero singular values only.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fsp.spectrum.graph import Rules, Wiring, blocks

GROWTH = 1.25  # graphs in one batch differ in size by less than this factor


def layer_coordinates(masks: Tensor, weight: Tensor, rules: Rules, wiring: Wiring, max_bytes: int) -> Tensor:
    """Ramanujan gap, weighted gap, IMDB and IMSG of one layer for many masks; `nan` where undefined.

    Parameters
    ----------
    masks : Tensor of bool, shape (P, *layer)
    weight : Tensor, shape of the layer, on the same device
    rules : Rules
    wiring : Wiring
    max_bytes : int
        Bound on the memory of the intermediate tensors; at least one mask is measured at a time.

    Returns
    -------
    Tensor, shape (P, 4), float64
    """
    strength = _biadjacency(weight.detach().abs().to(torch.float64)[None], wiring)  # (1, n_left, n_right)
    # adjacency, weights, their sorted copies, one batch of padded rows and its Gram matrices
    chunk = max(1, max_bytes // (8 * 8 * strength.numel()))
    return torch.cat([_measure(_biadjacency(part, wiring), strength, rules) for part in masks.split(chunk)])


def _biadjacency(tensors: Tensor, wiring: Wiring) -> Tensor:
    """Biadjacency matrices (P, n_left, n_right) of tensors (P, *layer), groups as diagonal blocks."""
    parts = torch.stack([blocks(t, wiring) for t in tensors])  # (P, groups, outputs, inputs)
    p, groups, outputs, inputs = parts.shape
    whole = parts.new_zeros(p, groups, inputs, groups, outputs)
    for g in range(groups):
        whole[:, g, :, g] = parts[:, g].transpose(1, 2)
    return whole.view(p, groups * inputs, groups * outputs)


def _measure(kept: Tensor, strength: Tensor, rules: Rules) -> Tensor:
    """Coordinates (P, 4) of masks (P, n_left, n_right)."""
    B, W = kept.to(torch.float64), strength * kept
    gap = _whole_bound(B, rules) - _top_two(B)[:, 1]
    sigma = _top_two(W)
    weighted = sigma[:, 0] - sigma[:, 1] + 0 * _whole_bound(W, rules)  # nan where W is no valid graph
    imdb, imsg = _nested(B, W, rules)
    return torch.stack([gap, weighted, imdb, imsg], 1)


def _whole_bound(M: Tensor, rules: Rules) -> Tensor:
    """Ramanujan bounds of whole layers, nan where the validity test fails."""
    edges, n_left, n_right = (M != 0).sum((1, 2)), (M != 0).any(2).sum(1), (M != 0).any(1).sum(1)
    if rules.whole_left == "inputs":
        valid = _dense_enough(edges, n_left, n_right, rules)
    else:
        valid = _dense_enough(edges, n_right, n_left, rules)
    return _bound(edges, n_left, n_right).where(valid, math.nan)


def _nested(B: Tensor, W: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """IMDB and IMSG (P,) from the nested subgraphs of all masks together."""
    p, _, n_right = B.shape
    degrees = B.sum(2).long()
    keys = (torch.arange(p, device=B.device)[:, None] * (n_right + 1) + degrees).flatten()
    keys, order = keys.sort(stable=True)
    kinds, member, sizes = keys.unique_consecutive(return_inverse=True, return_counts=True)
    owner, degree = kinds // (n_right + 1), kinds % (n_right + 1)
    rows, heavy = B.view(-1, n_right)[order], W.view(-1, n_right)[order]
    touched = B.new_zeros(len(kinds), n_right).index_add_(0, member, rows)
    edges, reached = degree * sizes, (touched > 0).sum(1)
    valid = (sizes >= rules.group_size) & _dense_enough(edges, sizes, reached, rules)
    # the same counts for the weights, which may be zero under the mask
    weighted = B.new_zeros(len(kinds), n_right).index_add_(0, member, (heavy != 0).to(B.dtype))
    in_use = torch.zeros_like(sizes).index_add_(0, member, (heavy != 0).any(1).long())
    sound = valid & _dense_enough(weighted.sum(1).long(), in_use, (weighted > 0).sum(1), rules)
    factor = torch.maximum(sizes, reached).double() / (sizes + reached - 1).clamp(min=1) if rules.cheeger else 1.0
    gaps, light = B.new_full((2, len(kinds)), math.nan)
    starts = sizes.cumsum(0) - sizes
    for chosen in _batches(valid.nonzero()[:, 0], sizes):
        gaps[chosen] = _bound(edges, sizes, reached)[chosen] - _top_two(_padded(rows, starts, sizes, chosen))[:, 1]
    for chosen in _batches(sound.nonzero()[:, 0], sizes):
        sigma = _top_two(_padded(heavy, starts, sizes, chosen))
        light[chosen] = sigma[:, 0] - sigma[:, 1]
    counted = valid if rules.zero_weights == "published" else sound
    return _mean_by_owner(gaps * factor, owner, valid, p), _mean_by_owner(light * factor, owner, counted, p)


def _batches(chosen: Tensor, sizes: Tensor) -> Iterator[Tensor]:
    """Indices of graphs, split into batches of similar size."""
    if len(chosen):
        chosen = chosen[sizes[chosen].argsort(stable=True)]
        scale = (sizes[chosen].double().log() / math.log(GROWTH)).floor()
        yield from chosen.split(scale.unique_consecutive(return_counts=True)[1].tolist())


def _padded(rows: Tensor, starts: Tensor, sizes: Tensor, chosen: Tensor) -> Tensor:
    """Rows of the chosen graphs, (b, largest, n_right), zero rows behind those of the smaller ones."""
    offset = torch.arange(int(sizes[chosen].max()), device=rows.device)
    index = (starts[chosen, None] + offset).clamp(max=len(rows) - 1)
    return rows[index] * (offset < sizes[chosen, None])[..., None]


def _top_two(M: Tensor) -> Tensor:
    """Two largest singular values (b, 2) of a batch of matrices (b, m, n), descending, padded with 0."""
    gram = M @ M.mT if M.shape[1] <= M.shape[2] else M.mT @ M
    squares = torch.linalg.eigvalsh(gram).flip(1)[:, :2].clamp(min=0)
    found = torch.nn.functional.pad(squares.sqrt(), (0, 2 - squares.shape[1]))
    squared_away = (squares[:, -1] < 1e-6 * squares[:, 0]).nonzero()[:, 0]  # too few digits are left of the second
    if squares.shape[1] == 2 and len(squared_away):
        found[squared_away] = torch.linalg.svdvals(M[squared_away])[:, :2]
    return found


def _dense_enough(edges: Tensor, n_left: Tensor, n_right: Tensor, rules: Rules) -> Tensor:
    """`fsp.spectrum.graph.dense_enough` for tensors of counts."""
    least = rules.right_degree * n_right
    enough = edges > least if rules.right_strict else edges >= least
    return (edges > 0) & (edges >= rules.left_degree * n_left) & enough


def _bound(edges: Tensor, n_left: Tensor, n_right: Tensor) -> Tensor:
    """Ramanujan bounds of graphs; whatever for graphs without edges."""
    left, right = edges.double() / n_left.clamp(min=1), edges.double() / n_right.clamp(min=1)
    return (left - 1).clamp(min=0).sqrt() + (right - 1).clamp(min=0).sqrt()


def _mean_by_owner(values: Tensor, owner: Tensor, counted: Tensor, p: int) -> Tensor:
    """Mean of the counted values of each mask, nan of none."""
    total = values.new_zeros(p).index_add_(0, owner[counted], values[counted])
    return total / torch.bincount(owner[counted], minlength=p)
