"""The full-spectrum coordinate of layers, fast: what `population` and `coordinates` run on.

The quantities are those of `fsp.spectrum.quantities`; only the way to the singular values differs.  Left vertices are
sorted by degree once, so that every nested subgraph is a slice of one sparse matrix.  Each left vertex lies in
exactly one nested subgraph: all of them together cost no more than the whole layer.  Of each graph only the two largest
singular values are needed; for large sparse graphs an iteration finds them, for all of them at once.
"""

import math
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from fsp.spectrum.graph import Rules, Wiring, blocks, cheeger_factor, dense_enough
from fsp.spectrum.lanczos import two_largest
from fsp.spectrum.quantities import mean

# Seconds on one core of a current server, for choosing the cheaper way; results do not depend on them.
PER_EDGE, PER_ROW, PER_GRAPH, PER_ITERATION = 1.0e-7, 6e-7, 6e-5, 4e-3
PER_GRAM_FLOP, PER_EIGENVALUES = 1.5e-11, 8.6e-9


class Layer(NamedTuple):
    """A layer to be measured.

    Attributes
    ----------
    mask : Tensor of bool, a layer's shape, on the CPU
    weight : Tensor, same shape, on the CPU
    wiring : Wiring
    """

    mask: Tensor
    weight: Tensor
    wiring: Wiring


def measured(layers: list[Layer], rules: Rules) -> list[tuple[float, float, float, float]]:
    """Ramanujan gap, weighted gap, IMDB and IMSG of some layers; `nan` where undefined.

    Parameters
    ----------
    layers : list of Layer
        Their graphs are iterated on together: a few small layers cost little more than one.
    rules : Rules

    Returns
    -------
    list of tuples of four floats
    """
    graphs = [_graphs(layer, rules) for layer in layers]
    # whole layers converge last: nested subgraphs are done before them
    whole = iter(top_two([K for found, _ in graphs for K in found[:2]]))
    nested = iter(top_two([K for found, _ in graphs for K in found[2:]]))
    return [
        _assembled(found, [*islice(whole, 2), *islice(nested, len(found) - 2)], factors, rules)
        for found, factors in graphs
    ]


def _graphs(layer: Layer, rules: Rules) -> tuple[list[sparse.csr_array | None], list[float]]:
    """Mask and weights of the whole layer and of each nested subgraph, None where not valid; Cheeger factors."""
    B, W, degrees = _sorted_by_degree(*layer)
    first = int(np.searchsorted(degrees, 1))
    whole, heavy = _slice(B, first, len(degrees)), _without_zeros(_slice(W, first, len(degrees)))
    graphs = [K if dense_enough(K.nnz, *K.shape, rules, left=rules.whole_left) else None for K in (whole, heavy)]
    factors = []
    kinds, starts, sizes = np.unique(degrees[first:], return_index=True, return_counts=True)
    for degree, start, size in zip(kinds, starts + first, sizes, strict=True):
        if size < rules.group_size or degree < rules.left_degree:
            continue
        K = _slice(B, start, start + size)
        if dense_enough(K.nnz, *K.shape, rules):
            W_K = _without_zeros(_slice(W, start, start + size))
            graphs += [K, W_K if dense_enough(W_K.nnz, *W_K.shape, rules) else None]
            factors.append(cheeger_factor(*K.shape) if rules.cheeger else 1.0)
    return graphs, factors


def _assembled(
    graphs: list[sparse.csr_array | None],
    spectra: list[tuple[float, float] | None],
    factors: list[float],
    rules: Rules,
) -> tuple[float, float, float, float]:
    """The four quantities from the two singular values of each graph."""
    gaps = [
        math.nan if K is None else _bound(K) - sigma[1] if K.data.dtype == bool else sigma[0] - sigma[1]
        for K, sigma in zip(graphs, spectra, strict=True)
    ]
    weighted = [c * gap for c, gap in zip(factors, gaps[3::2], strict=True)]
    if rules.zero_weights == "drop":
        weighted = [gap for gap in weighted if not math.isnan(gap)]
    return gaps[0], gaps[1], mean([c * gap for c, gap in zip(factors, gaps[2::2], strict=True)]), mean(weighted)


def top_two(graphs: list[sparse.csr_array | None]) -> list[tuple[float, float] | None]:
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
    found: list[tuple[float, float] | None] = [None] * len(graphs)
    present = [i for i, K in enumerate(graphs) if K is not None]
    large = [i for i in present if _saved(graphs[i]) > 0]
    if sum(_saved(graphs[i]) for i in large) > PER_ITERATION:
        for i, pair in zip(large, _together([graphs[i] for i in large]), strict=True):
            found[i] = pair
    for i in present:
        if found[i] is None:
            found[i] = _alone(graphs[i])
    return found


def _saved(K: sparse.csr_array) -> float:
    """Seconds saved by iterating on a graph instead of taking all eigenvalues of its Gram matrix."""
    small, large = sorted(K.shape)
    direct = PER_GRAM_FLOP * large * small**2 + PER_EIGENVALUES * small**2.25
    return direct - (PER_EDGE * K.nnz + PER_ROW * small + PER_GRAPH) if small > 1 else 0


def _alone(K: sparse.csr_array) -> tuple[float, float]:
    """Two largest singular values of one graph, from the dense Gram matrix of its smaller side."""
    m, n = K.shape
    if min(m, n) == 1:
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


def _together(graphs: list[sparse.csr_array]) -> list[tuple[float, float] | None]:
    """Two largest singular values of many graphs by one iteration on all; None where not certified."""
    graphs = [K if K.shape[0] <= K.shape[1] else K.T.tocsr() for K in graphs]
    rows, columns = np.array([K.shape for K in graphs]).T
    edges = np.array([K.nnz for K in graphs])
    right, behind = (np.cumsum(counts) - counts for counts in (columns, edges))
    indices = np.concatenate([K.indices for K in graphs]) + np.repeat(right, edges).astype(np.int32)
    ends = np.concatenate([[0]] + [K.indptr[1:] + offset for K, offset in zip(graphs, behind, strict=True)])
    data = np.concatenate([K.data for K in graphs]).astype(np.float64)
    wide = sparse.csr_array((data, indices, ends.astype(np.int32)), shape=(rows.sum(), columns.sum()))
    tall = wide.T.tocsr()
    values = np.sqrt(two_largest(lambda x: wide @ (tall @ x), rows)).tolist()
    return [None if math.isnan(pair[0]) else tuple(pair) for pair in values]


def _sorted_by_degree(
    mask: Tensor, weight: Tensor, wiring: Wiring
) -> tuple[sparse.csr_array, sparse.csr_array, np.ndarray]:
    """Biadjacency matrices of the mask and of its absolute weights, left vertices by degree, and the degrees."""
    kept = blocks(mask, wiring)
    groups, outputs, inputs = kept.shape
    flat = np.flatnonzero(kept.numpy())
    strengths = np.abs(blocks(weight.detach(), wiring).flatten()[torch.from_numpy(flat)].double().numpy())
    left = (flat % inputs if groups == 1 else flat % inputs + flat // (outputs * inputs) * inputs).astype(np.int32)
    ends = np.searchsorted(flat, np.arange(groups * outputs + 1) * inputs).astype(np.int32)
    degrees = np.bincount(left, minlength=groups * inputs)
    order = np.argsort(degrees, kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    by_output = sparse.csr_array((strengths, rank[left], ends), shape=(groups * outputs, len(order)))
    by_output = by_output.tocsc()  # its columns are the left vertices: read as rows, the transposed matrix
    shape = (len(order), groups * outputs)
    W = sparse.csr_array((by_output.data, by_output.indices, by_output.indptr), shape=shape)
    B = sparse.csr_array((np.ones(by_output.nnz, bool), by_output.indices, by_output.indptr), shape=shape)
    return B, W, degrees[order]


def _slice(M: sparse.csr_array, start: int, stop: int) -> sparse.csr_array:
    """Some rows of a matrix, without the columns that they do not touch."""
    first, last = M.indptr[start], M.indptr[stop]
    touched = np.zeros(M.shape[1], np.int32)
    touched[M.indices[first:last]] = 1
    new = np.cumsum(touched, dtype=np.int32)
    columns = new[M.indices[first:last]] - 1
    n_right = int(new[-1]) if len(new) else 0
    return sparse.csr_array(
        (M.data[first:last], columns, M.indptr[start : stop + 1] - first), shape=(stop - start, n_right)
    )


def _without_zeros(M: sparse.csr_array) -> sparse.csr_array:
    """The matrix without stored zeros, and without the rows and columns that then are empty."""
    if M.data.all():
        return M
    M = M.copy()
    M.eliminate_zeros()
    rows = np.flatnonzero(np.diff(M.indptr))
    return _slice(sparse.csr_array(M[rows]), 0, len(rows))


def _bound(K: sparse.csr_array) -> float:
    """Ramanujan bound of a graph without isolated vertices."""
    return math.sqrt(K.nnz / K.shape[0] - 1) + math.sqrt(K.nnz / K.shape[1] - 1)
