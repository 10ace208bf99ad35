"""The two largest singular values of many bipartite graphs on the CPU, by the cheapest way to each.

Small and dense graphs: all eigenvalues of the Gram matrix of the smaller side.  Large ones: two Lanczos iterations on
all of them at once (`fsp.spectrum.lanczos`), whose product is with the Gram matrix or, where that would cost more to
form than it saves, with the two sparse factors of it.  What the iteration does not certify gets all eigenvalues.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse

from fsp.spectrum.lanczos import PRECISIONS, Precision, two_largest

# Seconds on one core of a current server, for choosing the cheaper way; both are right to what is asked.
PER_EDGE, PER_ROW, PER_GRAPH, PER_ITERATION = 2.6e-9, 8e-9, 5e-7, 3e-3
PER_PRODUCT, PER_EIGENVALUES = 1.5e-6, 8.6e-9
PER_GRAM_FLOP = {np.float32: 1.2e-11, np.float64: 2.4e-11}
PER_GRAM_ENTRY = {np.float32: 6e-11, np.float64: 2e-10}
STEPS = {np.float32: 45, np.float64: 85}


class Graph(NamedTuple):
    """A matrix in compressed rows: bool, or weights > 0 in float64; without zero rows and columns.

    A tenth of the cost of an array of SciPy where there are hundreds of small ones.
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    shape: tuple[int, int]

    @property
    def nnz(self) -> int:
        """Edges."""
        return len(self.data)


def top_two(graphs: Sequence[Graph | None], precision: str = "float64") -> list[tuple[float, float] | None]:
    """The two largest singular values of each graph.

    Parameters
    ----------
    graphs : list of Graph, or None
    precision : {"float64", "float32"}
        Values are right to 1e-8 or 1e-5 of the second one; see `fsp.spectrum.lanczos`.

    Returns
    -------
    list of (sigma_1, sigma_2), or None for None
        The second value is 0 where a side has one vertex only.
    """
    chosen = PRECISIONS[precision]
    saved, dense = {}, {}
    for i, K in enumerate(graphs):
        if K is not None and min(K.shape) > 1:
            seconds, dense[i] = _saved(K, chosen.dtype)
            if seconds > 0:
                saved[i] = seconds
    found = {}
    if sum(saved.values()) > PER_ITERATION:
        found = dict(zip(saved, _together([graphs[i] for i in saved], [dense[i] for i in saved], chosen), strict=True))
    return [None if K is None else found.get(i) or _alone(K) for i, K in enumerate(graphs)]


def _saved(K: Graph, dtype: type) -> tuple[float, bool]:
    """Seconds saved by iterating on a graph instead of taking all eigenvalues, and whether on its Gram matrix."""
    small, large = sorted(K.shape)
    form = large * small**2
    eigenvalues = PER_GRAM_FLOP[np.float32 if K.data.dtype == bool else np.float64] * form
    eigenvalues += PER_EIGENVALUES * small**2.25
    gram = PER_GRAM_FLOP[np.float32 if K.data.dtype == bool else dtype] * form
    gram += STEPS[dtype] * (PER_GRAM_ENTRY[dtype] * small**2 + PER_PRODUCT)
    factors = STEPS[dtype] * PER_EDGE * K.nnz
    rest = STEPS[dtype] * (PER_ROW * small + PER_GRAPH)
    return eigenvalues - min(gram, factors) - rest, gram < factors


def _dense(K: Graph, dtype: type) -> np.ndarray:
    """The matrix with all its zeros."""
    m, n = K.shape
    flat = np.zeros(m * n, dtype)
    flat[np.repeat(np.arange(0, m * n, n), np.diff(K.indptr)) + K.indices] = K.data
    return flat.reshape(m, n)


def _gram(K: Graph, dtype: type) -> np.ndarray:
    """Gram matrix of the smaller side."""
    counts = K.data.dtype == bool and max(K.shape) < 2**24  # which single precision holds exactly
    M = _dense(K, np.float32 if counts else dtype)
    return (M @ M.T if M.shape[0] <= M.shape[1] else M.T @ M).astype(dtype, copy=False)


def _alone(K: Graph) -> tuple[float, float]:
    """Two largest singular values of one graph, from all eigenvalues of the Gram matrix of its smaller side."""
    if min(K.shape) < 2:
        return float(np.sqrt(np.square(K.data, dtype=np.float64).sum())), 0.0
    gram = _gram(K, np.float64)
    second, first = torch.linalg.eigvalsh(torch.from_numpy(gram))[-2:].clamp(min=0).tolist()
    if second < 1e-6 * first:  # squaring has cost too many digits
        first, second = torch.linalg.svdvals(torch.from_numpy(_dense(K, np.float64)))[:2].tolist()
        return first, second
    return math.sqrt(first), math.sqrt(second)


def _together(graphs: Sequence[Graph], dense: Sequence[bool], precision: Precision) -> list[tuple[float, float] | None]:
    """Two largest singular values of many graphs by one iteration on all; None where not certified."""
    order = sorted(range(len(graphs)), key=lambda i: (graphs[i].shape[0] > graphs[i].shape[1], dense[i]))
    # single precision has no room for the fourth power of very large or small weights; powers of two lose no bit
    scales = [math.frexp(graphs[i].data.max())[1] if graphs[i].data.dtype != bool else 0 for i in order]
    scaled = [
        K._replace(data=np.ldexp(K.data, -scale)) if scale else K
        for K, scale in zip((graphs[i] for i in order), scales, strict=True)
    ]
    values = np.sqrt(two_largest(_Grams(scaled, [dense[i] for i in order], precision.dtype), precision))
    values = np.ldexp(values, np.array(scales)[:, None]).tolist()
    found = dict(zip(order, values, strict=True))
    return [None if math.isnan(found[i][0]) else tuple(found[i]) for i in range(len(graphs))]


class _Grams:
    """Gram matrices of the smaller sides of some graphs, as one matrix of diagonal blocks.

    Graphs come with those first that have no more rows than columns, and of each kind last those whose Gram matrix is
    formed.
    """

    def __init__(self, graphs: list[Graph], dense: list[bool], dtype: type):
        self.sizes = np.array([min(K.shape) for K in graphs])
        ends = np.cumsum(self.sizes)
        self.formed = [
            (_gram(K, dtype), slice(end - min(K.shape), end))
            for K, end, form in zip(graphs, ends, dense, strict=True)
            if form
        ]
        wide = [K.shape[0] <= K.shape[1] for K in graphs]
        self.half = int(self.sizes[wide].sum())  # where the smaller sides begin to be columns
        self.doubles, self.factors = [], []
        for side in (True, False):
            mine = [i for i, w in enumerate(wide) if w == side]
            if not mine:
                continue
            start = 0 if side else self.half
            if dtype != np.float64:
                # (all graphs of this kind, where their smaller sides are, whether these are rows)
                every = _joined([graphs[i] for i in mine])
                self.doubles.append((every, slice(start, start + every.shape[0 if side else 1]), side))
            loose = [graphs[i] for i in mine if not dense[i]]
            if loose:
                M = _joined(loose)
                M.data = M.data.astype(dtype)
                other = M.T.tocsr()
                inner, outer = (other, M) if side else (M, other)
                self.factors.append((inner, outer, slice(start, start + len(outer.indptr) - 1)))

    def product(self, x: np.ndarray) -> np.ndarray:
        """All blocks times a vector."""
        y = np.empty_like(x)
        for inner, outer, place in self.factors:
            y[place] = outer @ (inner @ x[place])
        for gram, place in self.formed:
            np.dot(gram, x[place], out=y[place])
        return y

    def exact(self, x: np.ndarray) -> np.ndarray:
        """The same in double precision, from the graphs themselves."""
        if not self.doubles:
            return self.product(x)
        y = np.empty_like(x)
        for M, place, rows in self.doubles:
            y[place] = M @ (M.T @ x[place]) if rows else M.T @ (M @ x[place])
        return y


def _joined(graphs: list[Graph]) -> sparse.csr_array:
    """Block-diagonal matrix of some graphs, float64."""
    # scipy's block_diag gives the same matrix and takes twice as long
    columns = np.array([K.shape[1] for K in graphs])
    before = (np.cumsum(columns) - columns).astype(np.int32)
    indices = np.concatenate([K.indices for K in graphs]) + np.repeat(before, [K.nnz for K in graphs])
    ends = np.cumsum(np.concatenate([[0], *(np.diff(K.indptr) for K in graphs)]), dtype=np.int32)
    data = np.concatenate([K.data for K in graphs]).astype(np.float64)
    return sparse.csr_array((data, indices, ends), shape=(len(ends) - 1, columns.sum()))
