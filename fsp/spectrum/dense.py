"""The full-spectrum coordinate of one layer for many masks, by large batches of equal work: for a GPU.

Nested subgraphs of many masks of a layer are sorted by size, padded with zero rows to the largest of their batch, and
their Gram matrices and eigenvalues are computed as one batch.  Zero rows add zero singular values only.
"""

import math

import torch
from torch import Tensor

from fsp.masks import Wiring, blocks
from fsp.spectrum.definitions import Rules, is_nested, is_valid, ramanujan_bound, subgraph_factor

GROWTH = 1.25  # graphs in one dense batch differ in size by less than this factor


def dense_coordinates(masks: Tensor, weight: Tensor, rules: Rules, wiring: Wiring, max_bytes: int) -> Tensor:
    """Ramanujan gap, weighted gap, IMDB and IMSG of one layer for many masks; `nan` where undefined.

    Parameters
    ----------
    masks : Tensor of bool, shape ``(P, *layer)``
    weight : Tensor, shape of the layer, on the same device
    rules : Rules
    wiring : Wiring
    max_bytes : int
        Bound on the memory of the intermediate tensors; at least one mask is measured at a time.

    Returns
    -------
    Tensor, shape (P, 4), float64
    """
    strength = _biadjacencies(weight.detach().abs()[None], wiring)  # (1, n_left, n_right)
    # adjacency, weights, their sorted copies, one batch of padded rows and its Gram matrices
    chunk = max(1, max_bytes // (8 * 8 * strength.numel()))
    found = []
    for part in masks.split(chunk):
        B = _biadjacencies(part, wiring)
        found.append(_measured(B, strength.where(B != 0, 0), rules))
    return torch.cat(found)


def _biadjacencies(tensors: Tensor, wiring: Wiring) -> Tensor:
    """Biadjacency matrices (P, n_left, n_right) of tensors (P, *layer), groups as diagonal blocks; float64."""
    parts = torch.stack([blocks(t, wiring) for t in tensors]).double()  # (P, groups, outputs, inputs)
    apart = parts.permute(0, 3, 2, 1).diag_embed(dim1=1, dim2=3)  # (P, groups, inputs, groups, outputs)
    return apart.flatten(3).flatten(1, 2)


def _measured(B: Tensor, W: Tensor, rules: Rules) -> Tensor:
    """Coordinates (P, 4) from biadjacency matrices of masks and of their absolute weights, (P, n_left, n_right)."""
    p, n_left, n_right = B.shape
    rows, heavy = B.flatten(0, 1), W.flatten(0, 1)
    # whole layers: the rows of a mask are one graph
    member = torch.arange(p, device=B.device).repeat_interleave(n_left)
    counts = _counts(rows, member)
    valid = is_valid(*counts, rules, left=rules.whole_left)
    sound = is_valid(*_counts(heavy, member), rules, left=rules.whole_left)
    sigma, strong = _spectra(rows, member, valid), _spectra(heavy, member, sound)
    gap, weighted = ramanujan_bound(*counts, sqrt=torch.sqrt) - sigma[:, 1], strong[:, 0] - strong[:, 1]
    # nested subgraphs: the rows of a mask that have the same degree are one graph
    keys, order = (member * (n_right + 1) + torch.count_nonzero(rows, 1)).sort(stable=True)
    kinds, member = keys.unique_consecutive(return_inverse=True)
    rows, heavy = rows[order], heavy[order]
    counts = _counts(rows, member)
    valid = is_nested(*counts, rules)
    sound = valid & is_valid(*_counts(heavy, member), rules)  # weights may be zero under the mask
    sigma, strong = _spectra(rows, member, valid), _spectra(heavy, member, sound)
    factor = subgraph_factor(*counts[1:], rules, maximum=torch.maximum)
    structural = factor * (ramanujan_bound(*counts, sqrt=torch.sqrt) - sigma[:, 1])
    light = factor * (strong[:, 0] - strong[:, 1])
    owner = kinds // (n_right + 1)
    imdb = _mean_by_owner(structural, owner, valid, p)
    imsg = _mean_by_owner(light, owner, valid if rules.zero_weights == "published" else sound, p)
    return torch.stack([gap, weighted, imdb, imsg], 1)


def _counts(rows: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Edges, left and right vertices with an edge of each graph; `member` says which graph a row is of, ascending."""
    edges = (rows != 0).double()
    met = edges.new_zeros(int(member[-1]) + 1, rows.shape[1]).index_add_(0, member, edges)
    n_left = edges.new_zeros(len(met)).index_add_(0, member, edges.amax(1))
    return met.sum(1), n_left, (met > 0).sum(1).double()


def _spectra(rows: Tensor, member: Tensor, asked: Tensor) -> Tensor:
    """Two largest singular values (graphs, 2) of the graphs asked for, nan of the others."""
    found = rows.new_full((len(asked), 2), math.nan)
    sizes = torch.bincount(member)
    starts = sizes.cumsum(0) - sizes
    chosen = asked.nonzero()[:, 0]
    chosen = chosen[sizes[chosen].argsort(stable=True)]
    scale = (sizes[chosen].double().log() / math.log(GROWTH)).floor()
    for batch in chosen.split(scale.unique_consecutive(return_counts=True)[1].tolist()):
        offset = torch.arange(int(sizes[batch].max()), device=rows.device)
        index = (starts[batch, None] + offset).clamp(max=len(rows) - 1)
        padded = rows[index] * (offset < sizes[batch, None])[..., None]  # zero rows behind those of smaller graphs
        found[batch] = _top_two(padded)
    return found


def _top_two(M: Tensor) -> Tensor:
    """Two largest singular values (b, 2) of a batch of matrices (b, m, n), descending, padded with 0."""
    gram = M @ M.mT if M.shape[1] <= M.shape[2] else M.mT @ M
    squares = torch.linalg.eigvalsh(gram).flip(1)[:, :2].clamp(min=0)
    found = torch.nn.functional.pad(squares.sqrt(), (0, 2 - squares.shape[1]))
    squared_away = (squares[:, -1] < 1e-6 * squares[:, 0]).nonzero()[:, 0]  # too few digits are left of the second
    if squares.shape[1] == 2 and len(squared_away):
        found[squared_away] = torch.linalg.svdvals(M[squared_away])[:, :2]
    return found


def _mean_by_owner(values: Tensor, owner: Tensor, counted: Tensor, p: int) -> Tensor:
    """Mean of the counted values of each mask, nan of none."""
    total = values.new_zeros(p).index_add_(0, owner[counted], values[counted])
    return total / torch.bincount(owner[counted], minlength=p)
