"""The full-spectrum coordinate of one layer, fast: what `population` and `coordinates` run on.

The quantities are those of `fsp.spectrum.quantities`; only the way to the singular values differs.  Left vertices are
sorted by degree once, so that every nested subgraph is a slice of one sparse matrix.  Each left vertex lies in
exactly one nested subgraph: all nested Gram matrices together cost no more than the one of the whole layer.  Of each
graph only the two largest singular values are needed, and a certified iteration finds them where that is cheaper.
"""

import math

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

from fsp.spectrum.graph import Rules, Wiring, blocks, cheeger_factor, dense_enough
from fsp.spectrum.quantities import mean

# Largest residual, relative to the second eigenvalue, that certifies an iteration; a tenth is asked of it.
CERTIFIED = 1e-9

# Seconds on one core of a current server, for choosing the cheaper way; results do not depend on them.
PER_MATVEC, PER_EDGE, MATVECS = 2.0e-5, 1.6e-9, 80
PER_FLOP, PER_EIGEN_FLOP = 1.3e-11, 8.0e-11


def layer_coordinate(mask: Tensor, weight: Tensor, rules: Rules, wiring: Wiring) -> tuple[float, float, float, float]:
    """Ramanujan gap, weighted gap, IMDB and IMSG of one layer; `nan` where undefined.

    Parameters
    ----------
    mask : Tensor of bool, a layer's shape, on the CPU
    weight : Tensor, same shape, on the CPU
    rules : Rules
    wiring : Wiring

    Returns
    -------
    tuple of four floats
    """
    B, W, degrees = _sorted_by_degree(mask, weight, wiring)
    first = int(np.searchsorted(degrees, 1))
    gap = weighted = math.nan
    whole = _slice(B, first, len(degrees))
    if dense_enough(whole.nnz, *whole.shape, rules, left=rules.whole_left):
        gap = _bound(whole) - top_two(whole)[1]
    heavy = _without_zeros(_slice(W, first, len(degrees)))
    if dense_enough(heavy.nnz, *heavy.shape, rules, left=rules.whole_left):
        weighted = float(np.subtract(*top_two(heavy)))
    gaps, weighted_gaps = [], []
    kinds, starts, sizes = np.unique(degrees[first:], return_index=True, return_counts=True)
    for degree, start, size in zip(kinds, starts + first, sizes, strict=True):
        if size < rules.group_size or degree < rules.left_degree:
            continue
        K = _slice(B, start, start + size)
        if not dense_enough(K.nnz, *K.shape, rules):
            continue
        factor = cheeger_factor(*K.shape) if rules.cheeger else 1.0
        gaps.append(factor * (_bound(K) - top_two(K)[1]))
        W_K = _without_zeros(_slice(W, start, start + size))
        if dense_enough(W_K.nnz, *W_K.shape, rules):
            weighted_gaps.append(factor * float(np.subtract(*top_two(W_K))))
        elif rules.zero_weights == "published":
            weighted_gaps.append(math.nan)
    return gap, weighted, mean(gaps), mean(weighted_gaps)


def top_two(K: sparse.csr_array) -> tuple[float, float]:
    """The two largest singular values of a sparse matrix without zero rows and columns.

    By eigenvalues of the dense Gram matrix of the smaller side; or, where that is cheaper and the graph is connected,
    by an implicitly restarted Lanczos iteration, kept only if certified: the leading vector has one sign, which
    for a connected graph only the leading eigenvector has, and both residuals are below `CERTIFIED`.

    Parameters
    ----------
    K : csr_array, shape (m, n), entries >= 0, float64

    Returns
    -------
    sigma_1, sigma_2 : float
        The second is 0 where a side has one vertex only.
    """
    m, n = K.shape
    small, large = sorted((m, n))
    if small == 1:
        return float(np.sqrt(np.square(K.data).sum())), 0.0
    iterating = MATVECS * (PER_MATVEC + PER_EDGE * K.nnz)
    if iterating < PER_EIGEN_FLOP * small**3 + PER_FLOP * 2 * large * small**2:
        found = _iterated(K if m <= n else K.T.tocsr())
        if found is not None:
            return found
    dense = torch.from_numpy(K.toarray())
    gram = dense @ dense.T if m <= n else dense.T @ dense
    second, first = torch.linalg.eigvalsh(gram)[-2:].clamp(min=0).tolist()
    if second < 1e-6 * first:  # squaring has cost too many digits
        first, second = torch.linalg.svdvals(dense)[:2].tolist()
        return first, second
    return math.sqrt(first), math.sqrt(second)


class _Gram(LinearOperator):
    """x -> K K^T x, without the checks that LinearOperator does at every product."""

    def __init__(self, K: sparse.csr_array, KT: sparse.csr_array):
        super().__init__(np.float64, (K.shape[0], K.shape[0]))
        self.K, self.KT = K, KT

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self.K @ (self.KT @ x)

    matvec = _matvec


def _iterated(K: sparse.csr_array) -> tuple[float, float] | None:
    """Two largest singular values by iteration, or None if they cannot be certified."""
    KT = K.T.tocsr()
    if not _connected(K, KT):
        return None
    n = K.shape[0]
    start = np.random.default_rng(0).standard_normal(n)
    try:
        values, vectors = eigsh(_Gram(K, KT), k=2, which="LA", ncv=min(n, 20), v0=start, tol=CERTIFIED / 10)
    except ArpackError:
        return None
    residuals = np.linalg.norm(K @ (KT @ vectors) - vectors * values, axis=0)
    leading = vectors[:, 1] * np.sign(vectors[:, 1].sum())
    if values[0] <= 0 or residuals.max() > CERTIFIED * values[0] or leading.min() < -1e-8:
        return None
    return math.sqrt(values[1]), math.sqrt(values[0])


def _connected(K: sparse.csr_array, KT: sparse.csr_array) -> bool:
    """Whether a bipartite graph without isolated vertices is in one piece."""
    seen = np.zeros(K.shape[0])
    seen[0] = count = 1
    while True:
        seen = (K @ (KT @ seen) > 0).astype(float)
        if seen.sum() == count:
            return count == len(seen)
        count = seen.sum()


def _sorted_by_degree(
    mask: Tensor, weight: Tensor, wiring: Wiring
) -> tuple[sparse.csr_array, sparse.csr_array, np.ndarray]:
    """Biadjacency matrices of the mask and of its absolute weights, left vertices by degree, and the degrees."""
    kept = blocks(mask, wiring)  # (groups, outputs, inputs)
    groups, outputs, inputs = kept.shape
    block, output, input_ = kept.nonzero(as_tuple=True)
    strengths = blocks(weight.detach(), wiring)[block, output, input_].abs().to(torch.float64).numpy()
    right, left = (block * outputs + output).numpy(), (block * inputs + input_).numpy()
    degrees = np.bincount(left, minlength=groups * inputs)
    order = np.argsort(degrees, kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    ends = np.cumsum(np.bincount(right, minlength=groups * outputs), dtype=np.int32)
    by_output = sparse.csr_array(
        (strengths, rank[left], np.concatenate([[0], ends]).astype(np.int32)), shape=(len(ends), len(order))
    ).tocsc()  # its columns are the left vertices: read as rows, the transposed matrix
    shape = (len(order), len(ends))
    W = sparse.csr_array((by_output.data, by_output.indices, by_output.indptr), shape=shape)
    B = sparse.csr_array((np.ones_like(by_output.data), by_output.indices, by_output.indptr), shape=shape)
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
