"""The full-spectrum coordinate of layers, fast: what `coordinates` and `population` run on where there is no GPU.

The quantities are those of `fsp.spectrum.definitions`; only the way to the singular values differs.  Of each graph only
the two largest are needed.  Each left vertex lies in exactly one nested subgraph: all of them together cost no more
than the whole layer.  Left vertices are sorted by degree once, so that every nested subgraph is a slice of one sparse
matrix.
"""

import math
from itertools import islice

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from fsp.masks import Wiring, blocks
from fsp.spectrum.definitions import Rules, is_nested, is_valid, mean, ramanujan_bound, subgraph_factor
from fsp.spectrum.two_values import Graph, top_two

Layer = tuple[Tensor, Tensor, Wiring]


def sparse_coordinates(layers: list[Layer], rules: Rules, precision: str) -> list[tuple[float, float, float, float]]:
    """Ramanujan gap, weighted gap, IMDB and IMSG of some layers; `nan` where undefined.

    Parameters
    ----------
    layers : list of (mask, weight, wiring)
        Tensors of a layer's shape on the CPU, masks of bool.  The graphs of all layers are iterated on together: a few
        small layers cost little more than one.
    rules : Rules
    precision : {"float64", "float32"}

    Returns
    -------
    list of tuples of four floats
    """
    graphs = [_graphs(layer, rules) for layer in layers]
    # whole layers converge last: nested subgraphs are done before them
    whole = iter(_gaps([K for pair, _, _ in graphs for K in pair], precision))
    nested = iter(_gaps([K for _, pairs, _ in graphs for K in pairs], precision))
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
    every, degrees = _sorted_by_degree(*layer)
    whole = _mask_and_weights(every, np.searchsorted(degrees, 1), len(degrees))
    whole = [K if is_valid(K.nnz, *K.shape, rules, left=rules.whole_left) else None for K in whole]
    nested, factors = [], []
    kinds, starts, sizes = np.unique(degrees, return_index=True, return_counts=True)
    for degree, start, end in zip(kinds, starts, starts + sizes, strict=True):
        if degree < rules.left_degree:
            continue  # never valid: saves the slice
        K, W = _mask_and_weights(every, start, end)
        if is_nested(K.nnz, *K.shape, rules):
            nested += [K, W if is_valid(W.nnz, *W.shape, rules) else None]
            factors.append(subgraph_factor(*K.shape, rules))
    return whole, nested, factors


def _gaps(graphs: list[Graph | None], precision: str) -> list[float]:
    """Ramanujan gap of masks, weighted gap of weights, nan of None."""
    gaps = []
    for K, sigma in zip(graphs, top_two(graphs, precision), strict=True):
        if K is None:
            gaps.append(math.nan)
        elif K.data.dtype == bool:
            gaps.append(ramanujan_bound(K.nnz, *K.shape) - sigma[1])
        else:
            gaps.append(sigma[0] - sigma[1])
    return gaps


def _sorted_by_degree(mask: Tensor, weight: Tensor, wiring: Wiring) -> tuple[Graph, np.ndarray]:
    """Biadjacency matrix of the absolute weights under a mask, zeros too, left vertices by degree, and the degrees."""
    kept = blocks(mask, wiring)
    groups, outputs, inputs = kept.shape
    places = np.flatnonzero(kept.numpy())
    right = places // inputs
    left = places - (right - right // outputs) * inputs
    strengths = np.abs(blocks(weight.detach(), wiring).flatten()[torch.from_numpy(places)].double().numpy())
    degrees = np.bincount(left, minlength=groups * inputs)
    order = np.argsort(degrees, kind="stable")
    rank = np.argsort(order).astype(np.int32)
    shape = groups * inputs, groups * outputs
    W = sparse.csr_array((strengths, (rank[left], right.astype(np.int32))), shape=shape)
    return Graph(W.data, W.indices, W.indptr, shape), degrees[order]


def _mask_and_weights(M: Graph, start: int, stop: int) -> tuple[Graph, Graph]:
    """Some rows of a matrix of weights without the columns that they do not touch: where it has entries, and these."""
    W = _rows(M, start, stop)
    return W._replace(data=np.ones(W.nnz, bool)), W if W.data.all() else _without_zeros(W)


def _rows(M: Graph, start: int, stop: int) -> Graph:
    """Some rows of a matrix, without the columns that they do not touch."""
    first, last = M.indptr[start], M.indptr[stop]
    touched = np.zeros(M.shape[1], np.int32)
    touched[M.indices[first:last]] = 1
    new = np.cumsum(touched, dtype=np.int32)
    columns = new[M.indices[first:last]] - 1
    return Graph(M.data[first:last], columns, M.indptr[start : stop + 1] - first, (stop - start, int(new[-1])))


def _without_zeros(W: Graph) -> Graph:
    """The matrix without stored zeros, and without the rows and columns that then are empty."""
    rows = np.repeat(np.arange(W.shape[0]), np.diff(W.indptr))[W.data != 0]
    degrees = np.bincount(rows)
    ends = np.cumsum([0, *degrees[degrees > 0]])
    left = Graph(W.data[W.data != 0], W.indices[W.data != 0], ends, (len(ends) - 1, W.shape[1]))
    return _rows(left, 0, len(ends) - 1)


def touching(M: sparse.csr_array) -> Graph:
    """A sparse matrix as a graph, without its zero columns."""
    return _rows(Graph(M.data, M.indices, M.indptr, M.shape), 0, M.shape[0])
