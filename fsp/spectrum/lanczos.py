r"""Two largest eigenvalues of many symmetric matrices at once, by two Lanczos iterations in lockstep.

The matrices are the diagonal blocks of one, so that one product advances all of them.  The first iteration finds a unit
vector y close to the leading eigenvector of each block.  The second stays orthogonal to y and keeps no orthogonal
basis: until its largest Ritz value has converged, its vectors are orthogonal by themselves [1]_.

With :math:`\theta = y^\top A y`, :math:`r = \lVert A y - \theta y \rVert` and :math:`\mu < \theta` the largest
eigenvalue of A orthogonally to y, interlacing and the trace give

.. math:: 0 \le \lambda_1 - \theta \le \frac{r^2}{\theta - \mu}, \qquad
          0 \le \mu - \lambda_2 \le \frac{r^2}{\theta - \mu},

so y need not be as exact as the eigenvalues.  A start with random entries lets no multiple or clustered value escape:
where :math:`\lambda_2` is too close to :math:`\lambda_1`, the bound is large and the block is not certified.

In single precision only the vectors are found.  Values and residuals, and with them the certificate, are then taken
from these vectors by products in double precision: rounding on the way can cost the certificate, never its truth.

References
----------
.. [1] Paige: The computation of eigenvalues and eigenvectors of very large sparse matrices. PhD thesis, London 1971.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from scipy.linalg import lapack


class Precision(NamedTuple):
    """How exact an iteration is to be.

    Attributes
    ----------
    dtype : type
        Of its vectors.
    certified : float
        Largest error bound, relative to the second eigenvalue, that certifies a block; of its square root, a singular
        value, it is half of that.
    converged : float
        Residual asked of the second iteration, relative to the second eigenvalue.
    leading : float
        Residual asked of the leading vectors, relative to the eigenvalue; it enters the bound squared.
    first, second : tuple of int
        After how many steps of each iteration to look whether a block has converged.
    rounding : float
        Entries of the tridiagonal matrix that are smaller, relative to the first eigenvalue, are rounding.
    """

    dtype: type
    certified: float
    converged: float
    leading: float
    first: tuple[int, ...]
    second: tuple[int, ...]
    rounding: float


PRECISIONS = {
    "float64": Precision(
        np.float64, 1e-8, 5e-9, 1e-6, (8, 12, 16, 24, 32), (32, 42, 52, 64, 84, 110, 140), rounding=1e-13
    ),
    "float32": Precision(
        np.float32, 2e-5, 5e-6, 1e-4, (6, 8, 12, 16, 24, 32), (16, 24, 32, 40, 50, 64, 84, 110), rounding=1e-6
    ),
}

Three = tuple[np.ndarray, np.ndarray, np.ndarray]


class Matrix(Protocol):
    """A positive semidefinite matrix of diagonal blocks, known by its products."""

    sizes: np.ndarray  # rows of the blocks, in order, each >= 2

    def product(self, x: np.ndarray) -> np.ndarray:
        """The matrix times a vector of ``sum(sizes)``, a new array, both of the iteration's dtype."""

    def exact(self, x: np.ndarray) -> np.ndarray:
        """The same in float64."""


class Blocks:
    """Segments of a long vector: sums over each, and a number for each spread over it.

    Parameters
    ----------
    sizes : sequence of int, each >= 1
    """

    def __init__(self, sizes):
        self.sizes = np.asarray(sizes)
        self.starts = np.cumsum(self.sizes) - self.sizes

    def spread(self, numbers: np.ndarray) -> np.ndarray:
        """One number a block, repeated over its segment."""
        return np.repeat(numbers, self.sizes)

    def alike(self, values: np.ndarray) -> np.ndarray:
        """The first entries of some values in each segment: what a block gets does not depend on the others."""
        return values[np.arange(self.sizes.sum()) - self.spread(self.starts)]

    def dot(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Inner products of the segments of two vectors."""
        return np.add.reduceat(x * y, self.starts)

    def unit(self, x: np.ndarray) -> np.ndarray:
        """The vector with each segment scaled to length 1."""
        return x / self.spread(np.sqrt(self.dot(x, x)))


def two_largest(matrix: Matrix, precision: Precision) -> np.ndarray:
    """The two largest eigenvalues of each diagonal block of a positive semidefinite matrix.

    Parameters
    ----------
    matrix : Matrix
        Of B blocks.
    precision : Precision

    Returns
    -------
    ndarray, shape (B, 2), float64
        Descending; both ``nan`` for a block whose values are not certified.
    """
    blocks = Blocks(matrix.sizes)
    longest = int(blocks.sizes.max())
    positive = blocks.alike((1 + np.random.default_rng(1).random(longest)).astype(precision.dtype))
    steps = _lanczos(matrix, blocks, precision, positive)
    _, _, leading = _largest(steps, blocks, precision.first, precision.leading, keep=True)
    y = blocks.unit(leading.astype(np.float64))
    image = matrix.exact(y)
    first = blocks.dot(y, image)
    residual = image - blocks.spread(first) * y
    square = blocks.dot(residual, residual)

    mixed = blocks.alike(np.random.default_rng(0).standard_normal(longest).astype(precision.dtype))
    steps = _lanczos(matrix, blocks, precision, mixed, y.astype(precision.dtype), first.astype(precision.dtype))
    single = precision.dtype != np.float64
    second, error, x = _largest(steps, blocks, precision.second, precision.converged, keep=single)
    if single:
        x = x.astype(np.float64)
        with np.errstate(invalid="ignore"):  # of a block of rank one nothing may be left: its values are not certified
            x = blocks.unit(x - blocks.spread(blocks.dot(y, x)) * y)
        image = matrix.exact(x)
        second = blocks.dot(x, image)
        rest = image - blocks.spread(blocks.dot(y, image)) * y - blocks.spread(second) * x
        error = np.sqrt(blocks.dot(rest, rest))
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = error + square / (first - second)
        # a second value a million times smaller has lost its digits in the rounding of the first
        good = (first > second) & (second > 1e-6 * first) & (bound <= precision.certified * second)
    return np.where(good[:, None], np.stack([first, second], 1), np.nan)


def _lanczos(
    matrix: Matrix,
    blocks: Blocks,
    precision: Precision,
    x: np.ndarray,
    away: np.ndarray | None = None,
    scale: np.ndarray | None = None,
) -> Iterator[Three]:
    """Lanczos vectors of all blocks, orthogonal to `away`, each with its alpha and beta; zeros after the last."""
    if away is not None:
        x = x - away * blocks.spread(blocks.dot(away, x))
    x = blocks.unit(x)
    before = beta = None
    while True:
        y = matrix.product(x)
        alpha = blocks.dot(x, y)
        y -= blocks.spread(alpha) * x
        if before is not None:
            before *= blocks.spread(beta)
            y -= before
        if away is not None:
            y -= blocks.spread(blocks.dot(away, y)) * away
        beta = np.sqrt(blocks.dot(y, y))
        scale = alpha if scale is None else scale
        beta[beta < precision.rounding * scale] = 0  # nothing but rounding is left of the block
        yield x, alpha, beta
        y *= blocks.spread(np.divide(1, beta, out=np.zeros_like(beta), where=beta > 0))
        before, x = x, y


def _ritz(diagonal: np.ndarray, off: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Largest Ritz value of a block, its vector in the Lanczos basis, and its residual."""
    steps, last = len(diagonal), off[-1]  # which is overwritten
    # what scipy.linalg.eigh_tridiagonal calls, at a third of its cost
    _, value, vector, info = lapack.dstemr(
        diagonal, off, 2, 0.0, 0.0, steps, steps, lwork=18 * steps, liwork=10 * steps
    )
    if info:
        return np.inf, np.zeros(steps), np.inf
    return value[0], vector[:, 0], abs(last * vector[-1, 0])


def _largest(
    steps: Iterator[Three], blocks: Blocks, looks: tuple[int, ...], tolerance: float, *, keep: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Largest Ritz value of each block, its residual, and its vector if they are to be kept.

    Takes steps until every residual is within `tolerance` of its value, at the latest to the last of `looks`.
    """
    number = len(blocks.sizes)
    values, residuals = np.full((2, number), np.inf)
    vectors = np.zeros((looks[-1], number))
    alphas, betas = np.empty((2, looks[-1], number))
    waiting, basis = np.arange(number), []
    for step, (x, alpha, beta) in enumerate(steps, 1):
        alphas[step - 1], betas[step - 1] = alpha, beta
        if keep:
            basis.append(x.copy())
        if step in looks:
            for block in waiting:
                found = _ritz(alphas[:step, block].copy(), betas[:step, block].copy())
                values[block], vectors[:step, block], residuals[block] = found
            waiting = waiting[residuals[waiting] > tolerance * values[waiting]]
            if not len(waiting) or step == looks[-1]:
                break
    if not keep:
        return values, residuals, None
    combined = np.zeros_like(basis[0])
    for w, x in zip(vectors, basis, strict=False):
        x *= blocks.spread(w.astype(x.dtype))
        combined += x
    return values, residuals, combined
