"""The full-spectrum coordinate of layers, fast: what `coordinates` and `population` run on.

The quantities are those of `fsp.spectrum.definitions`; only the way to the singular values differs.  Of each graph only
the two largest are needed.  Each left vertex lies in exactly one nested subgraph: all of them together cost no more
than the whole layer.

*Sparse*, on the CPU: left vertices are sorted by degree once, so that every nested subgraph is a slice of one sparse
matrix.  For large sparse graphs an iteration finds the two values, for all of them at once.

*Dense*, on a GPU: large batches of equal work.  Nested subgraphs of many masks of a layer are sorted by size, padded
with zero rows to the largest of their batch, and their Gram matrices and eigenvalues are computed as one batch.  Zero
rows add zero singular values only.
"""

import math
from itertools import islice

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from fsp.masks import Wiring, blocks
from fsp.spectrum.definitions import Rules, is_nested, is_valid, mean, ramanujan_bound, subgraph_factor
from fsp.spectrum.lanczos import two_largest

# Seconds on one core of a current server, for choosing the cheaper way; results do not depend on them.
PER_EDGE, PER_ROW, PER_GRAPH, PER_ITERATION = 1.0e-7, 6e-7, 6e-5, 4e-3
PER_GRAM_FLOP, PER_EIGENVALUES = 1.5e-11, 8.6e-9

GROWTH = 1.25  # graphs in one dense batch differ in size by less than this factor

Layer = tuple[Tensor, Tensor, Wiring]
Graph = sparse.csr_array  # of bool, or of weights > 0; without zero rows and columns


# ---- sparse ------------------------------------------------------------------------------------------------------


def sparse_coordinates(layers: list[Layer], rules: Rules) -> list[tuple[float, float, float, float]]:
    """Ramanujan gap, weighted gap, IMDB and IMSG of some layers; `nan` where undefined.

    Parameters
    ----------
    layers : list of (mask, weight, wiring)
        Tensors of a layer's shape on the CPU, masks of bool.  The graphs of all layers are iterated on together: a few
        small layers cost little more than one.
    rules : Rules

    Returns
    -------
    list of tuples of four floats
    """
    graphs = [_graphs(layer, rules) for layer in layers]
    # whole layers converge last: nested subgraphs are done before them
    whole = iter(_gaps([K for pair, _, _ in graphs for K in pair]))
    nested = iter(_gaps([K for _, pairs, _ in graphs for K in pairs]))
    found = []
    for _, pairs, factors in graphs:
        gaps = list(islice(nested, len(pairs)))
        structural = [c * gap for c, gap in zip(factors, gaps[::2], strict=True)]
        weighted = [c * gap for c, gap in zip(factors, gaps[1::2], strict=True)]
        if rules.zero_weights == "drop":
            weighted = [gap for gap in weighted if not math.isnan(gap)]
        found.append((next(whole), next(whole), mean(structural), mean(weighted)))
    return found


def _graphs(layer: Layer, rules: Rules) -> tuple[list[Graph | None], list[Graph | None], list[float]]:
    """Mask and weights of the whole layer, those of each nested subgraph, None where not valid; subgraph factors."""
    B, W, degrees = _sorted_by_degree(*layer)
    first = np.searchsorted(degrees, 1)
    whole = [_rows(B, first, len(degrees)), _without_zeros(_rows(W, first, len(degrees)))]
    whole = [K if is_valid(K.nnz, *K.shape, rules, left=rules.whole_left) else None for K in whole]
    nested, factors = [], []
    kinds, starts, sizes = np.unique(degrees, return_index=True, return_counts=True)
    for degree, start, end in zip(kinds, starts, starts + sizes, strict=True):
        if degree < rules.left_degree:
            continue  # never valid: saves the slice
        K = _rows(B, start, end)
        if is_nested(K.nnz, *K.shape, rules):
            W_K = _without_zeros(_rows(W, start, end))
            nested += [K, W_K if is_valid(W_K.nnz, *W_K.shape, rules) else None]
            factors.append(subgraph_factor(*K.shape, rules))
    return whole, nested, factors


def _gaps(graphs: list[Graph | None]) -> list[float]:
    """Ramanujan gap of masks, weighted gap of weights, nan of None."""
    gaps = []
    for K, sigma in zip(graphs, top_two(graphs), strict=True):
        if K is None:
            gaps.append(math.nan)
        elif K.dtype == bool:
            gaps.append(ramanujan_bound(K.nnz, *K.shape) - sigma[1])
        else:
            gaps.append(sigma[0] - sigma[1])
    return gaps


def top_two(graphs: list[Graph | None]) -> list[tuple[float, float] | None]:
    """The two largest singular values of each graph.

    Parameters
    ----------
    graphs : list of csr_array, bool or float64 > 0, or None
        Without zero rows and columns.

    Returns
    -------
    list of (sigma_1, sigma_2), or None for None
        The second value is 0 where a side has one vertex only.
    """
    saved = {i: _saved(K) for i, K in enumerate(graphs) if K is not None}
    large = [i for i, seconds in saved.items() if seconds > 0]
    found = {}
    if sum(saved[i] for i in large) > PER_ITERATION:
        found = dict(zip(large, _together([graphs[i] for i in large]), strict=True))
    return [None if K is None else found.get(i) or _alone(K) for i, K in enumerate(graphs)]


def _saved(K: Graph) -> float:
    """Seconds saved by iterating on a graph instead of taking all eigenvalues of its Gram matrix."""
    small, large = sorted(K.shape)
    direct = PER_GRAM_FLOP * large * small**2 + PER_EIGENVALUES * small**2.25
    return direct - (PER_EDGE * K.nnz + PER_ROW * small + PER_GRAPH) if small > 1 else 0


def _alone(K: Graph) -> tuple[float, float]:
    """Two largest singular values of one graph, from the dense Gram matrix of its smaller side."""
    m, n = K.shape
    if min(m, n) < 2:
        return float(np.sqrt(np.square(K.data, dtype=np.float64).sum())), 0.0
    dense = K.toarray()
    if dense.dtype == bool:  # single precision is exact for counts of common neighbours
        dense = dense.astype(np.float32 if max(m, n) < 2**24 else np.float64)
    gram = dense @ dense.T if m <= n else dense.T @ dense
    second, first = torch.linalg.eigvalsh(torch.from_numpy(gram).double())[-2:].clamp(min=0).tolist()
    if second < 1e-6 * first:  # squaring has cost too many digits
        first, second = torch.linalg.svdvals(torch.from_numpy(dense).double())[:2].tolist()
        return first, second
    return math.sqrt(first), math.sqrt(second)


def _together(graphs: list[Graph]) -> list[tuple[float, float] | None]:
    """Two largest singular values of many graphs by one iteration on all; None where not certified."""
    graphs = [K if K.shape[0] <= K.shape[1] else K.T.tocsr() for K in graphs]
    # scipy's block_diag gives the same matrix and takes twice as long
    columns = np.array([K.shape[1] for K in graphs])
    before = (np.cumsum(columns) - columns).astype(np.int32)
    indices = np.concatenate([K.indices for K in graphs]) + np.repeat(before, [K.nnz for K in graphs])
    ends = np.cumsum(np.concatenate([[0], *(np.diff(K.indptr) for K in graphs)]), dtype=np.int32)
    data = np.concatenate([K.data for K in graphs]).astype(np.float64)
    wide = sparse.csr_array((data, indices, ends), shape=(len(ends) - 1, columns.sum()))
    tall = wide.T.tocsr()
    values = np.sqrt(two_largest(lambda x: wide @ (tall @ x), [K.shape[0] for K in graphs])).tolist()
    return [None if math.isnan(pair[0]) else tuple(pair) for pair in values]


def _sorted_by_degree(mask: Tensor, weight: Tensor, wiring: Wiring) -> tuple[Graph, Graph, np.ndarray]:
    """Biadjacency matrices of the mask and of its absolute weights, left vertices by degree, and the degrees."""
    kept = blocks(mask, wiring)
    groups, outputs, inputs = kept.shape
    shape = groups * inputs, groups * outputs
    places = np.flatnonzero(kept.numpy())
    right = places // inputs
    left = places - (right - right // outputs) * inputs
    strengths = np.abs(blocks(weight.detach(), wiring).flatten()[torch.from_numpy(places)].double().numpy())
    degrees = np.bincount(left, minlength=shape[0])
    order = np.argsort(degrees, kind="stable")
    rank = np.argsort(order).astype(np.int32)
    W = sparse.csr_array((strengths, (rank[left], right.astype(np.int32))), shape=shape)
    B = sparse.csr_array((np.ones(W.nnz, bool), W.indices, W.indptr), shape=shape)
    return B, W, degrees[order]


def _rows(M: sparse.csr_array, start: int, stop: int) -> Graph:
    """Some rows of a matrix, without the columns that they do not touch."""
    first, last = M.indptr[start], M.indptr[stop]
    touched = np.zeros(M.shape[1], np.int32)
    touched[M.indices[first:last]] = 1
    new = np.cumsum(touched, dtype=np.int32)
    columns, ends = new[M.indices[first:last]] - 1, M.indptr[start : stop + 1] - first
    return sparse.csr_array((M.data[first:last], columns, ends), shape=(stop - start, int(new[-1])))


def touching(M: sparse.csr_array) -> Graph:
    """A matrix without its zero columns."""
    return _rows(M, 0, M.shape[0])


def _without_zeros(M: sparse.csr_array) -> Graph:
    """The matrix without stored zeros, and without the rows and columns that then are empty."""
    if M.data.all():
        return M
    M = M.copy()
    M.eliminate_zeros()
    return touching(M[np.diff(M.indptr) > 0])


# ---- dense -------------------------------------------------------------------------------------------------------


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
