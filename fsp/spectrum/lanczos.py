r"""Two largest eigenvalues of many symmetric matrices at once, by two Lanczos iterations in lockstep.

The matrices are the diagonal blocks of one, so that one product advances all of them.  The first iteration finds a unit
vector y close to the leading eigenvector of each block.  The second stays orthogonal to y and keeps no basis: until its
largest Ritz value has converged, its vectors are orthogonal by themselves [1]_.

With :math:`\theta = y^\top A y`, :math:`r = \lVert A y - \theta y \rVert` and :math:`\mu < \theta` the largest
eigenvalue of A orthogonally to y, interlacing and the trace give

.. math:: 0 \le \lambda_1 - \theta \le \frac{r^2}{\theta - \mu}, \qquad
          0 \le \mu - \lambda_2 \le \frac{r^2}{\theta - \mu},

so y need not be as exact as the eigenvalues.  A start with random entries lets no multiple or clustered value escape:
where :math:`\lambda_2` is too close to :math:`\lambda_1`, the bound is large and the block is not certified.

References
----------
.. [1] Paige: The computation of eigenvalues and eigenvectors of very large sparse matrices. PhD thesis, London 1971.
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy.linalg import eigh_tridiagonal

# Largest error bound, relative to the second eigenvalue, that certifies a block; of its square root it is half of that.
CERTIFIED = 1e-8

# Residual asked of the leading vectors, relative to the eigenvalue; it enters the bound squared.
LEADING = 1e-6

# After how many steps to look whether a block has converged.
FIRST, SECOND = (8, 12, 16, 24, 32), (32, 42, 52, 64, 84, 110, 140)

Product = Callable[[np.ndarray], np.ndarray]
Three = tuple[np.ndarray, np.ndarray, np.ndarray]


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

    def dot(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Inner products of the segments of two vectors."""
        return np.add.reduceat(x * y, self.starts)


def two_largest(product: Product, sizes) -> np.ndarray:
    """The two largest eigenvalues of each diagonal block of a positive semidefinite matrix.

    Parameters
    ----------
    product : callable
        The matrix times a vector of ``sum(sizes)`` float64.
    sizes : sequence of B int, each >= 2
        Rows of the blocks, in order.

    Returns
    -------
    ndarray, shape (B, 2), float64
        Descending; both ``nan`` for a block whose values are not certified.
    """
    blocks = Blocks(sizes)
    first, residual, leading = _leading(product, blocks)
    start = np.random.default_rng(0).standard_normal(len(leading))
    beside = _lanczos(product, blocks, start, leading, first)
    second, error, _ = _largest(beside, len(first), SECOND, CERTIFIED / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = error + residual**2 / (first - second)
        # a second value a million times smaller has lost its digits in the rounding of the first
        good = (first > second) & (second > 1e-6 * first) & (bound <= CERTIFIED * second)
    return np.where(good[:, None], np.stack([first, second], 1), np.nan)


def _lanczos(
    product: Product, blocks: Blocks, x: np.ndarray, away: np.ndarray, scale: np.ndarray | None = None
) -> Iterator[Three]:
    """Lanczos vectors of all blocks, orthogonal to `away`, each with its alpha and beta; zeros after the last."""
    before, beta = np.zeros_like(x), np.zeros(len(blocks.sizes))
    x = x - away * blocks.spread(blocks.dot(away, x))
    x = x / blocks.spread(np.sqrt(blocks.dot(x, x)))
    while True:
        y = product(x)
        alpha = blocks.dot(x, y)
        y = y - blocks.spread(alpha) * x - blocks.spread(beta) * before
        y -= away * blocks.spread(blocks.dot(away, y))
        beta = np.sqrt(blocks.dot(y, y))
        scale = alpha if scale is None else scale
        beta[beta < 1e-13 * scale] = 0  # nothing but rounding is left of the block
        yield x, alpha, beta
        before = x
        x = y * blocks.spread(np.divide(1, beta, out=np.zeros_like(beta), where=beta > 0))


def _ritz(alphas: list[np.ndarray], betas: list[np.ndarray], block: int) -> tuple[float, np.ndarray, float]:
    """Largest Ritz value of a block, its vector in the Lanczos basis, and its residual."""
    diagonal, off = np.array([a[block] for a in alphas]), np.array([b[block] for b in betas])
    last = len(diagonal) - 1
    value, vector = eigh_tridiagonal(
        diagonal, off[:-1], select="i", select_range=(last, last), check_finite=False, lapack_driver="stemr"
    )
    return value[0], vector[:, 0], abs(off[-1] * vector[-1, 0])


def _largest(
    steps: Iterator[Three], number: int, looks: tuple[int, ...], tolerance: float, basis: list[np.ndarray] | None = None
) -> Three:
    """Largest Ritz value of each of a number of blocks, its residual, and its vector in the Lanczos basis.

    Takes steps until every residual is within `tolerance` of its value, at the latest to the last of `looks`.  A list
    given as `basis` gets the Lanczos vectors.
    """
    values, residuals = np.full((2, number), np.inf)
    vectors = np.zeros((looks[-1], number))
    waiting, alphas, betas = list(range(number)), [], []
    for step, (x, alpha, beta) in enumerate(steps, 1):
        alphas.append(alpha)
        betas.append(beta)
        if basis is not None:
            basis.append(x)
        if step in looks:
            for block in waiting:
                values[block], vectors[:step, block], residuals[block] = _ritz(alphas, betas, block)
            waiting = [block for block in waiting if residuals[block] > tolerance * values[block]]
            if not waiting or step == looks[-1]:
                return values, residuals, vectors


def _leading(product: Product, blocks: Blocks) -> Three:
    """Rayleigh quotients, residuals and unit vectors close to the leading eigenvector of each block."""
    basis = []
    start = 1 + np.random.default_rng(1).random(int(blocks.sizes.sum()))
    steps = _lanczos(product, blocks, start, np.zeros_like(start))
    _, _, vectors = _largest(steps, len(blocks.sizes), FIRST, LEADING, basis)
    y = sum(blocks.spread(w) * x for w, x in zip(vectors, basis, strict=False))
    y /= blocks.spread(np.sqrt(blocks.dot(y, y)))
    image = product(y)
    values = blocks.dot(y, image)
    rest = image - blocks.spread(values) * y
    return values, np.sqrt(blocks.dot(rest, rest)), y
