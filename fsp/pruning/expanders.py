r"""Masks whose graphs are good expanders by construction: without scores, data or weights.

A large Ramanujan gap needs no search.  Sparse random graphs in which all vertices of a side have the same degree come
close to a gap of 0 with high probability (Friedman), and finite geometries have a larger one where they fit (D54).
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from fsp.checks import check_choice
from fsp.masks import PLAIN, Masks, all_kept, blocks, joined, rewire, wiring_of
from fsp.pruning import allocate
from fsp.pruning.gradients import Batches

TRIED, DRAWN = 6, 64  # orders of planes that `ramanujan` compares, and sets D that it chooses from for each


def regular(
    model: nn.Module,
    density: float,
    *,
    generator: torch.Generator,
    batches: Batches | None = None,
    exclude: Iterable[str] = (),
    allocation: str = "erk",
    like: Masks | None = None,
) -> Masks:
    """Random masks in which all outputs of a layer keep the same number of weights, to within one, and all inputs too.

    A layer's mask is drawn uniformly from all that have its count and such degrees; of a grouped convolution, with
    the same count in each group to within one as well.

    Parameters
    ----------
    model, density, generator
        As for `fsp.pruning.prune`.
    batches
        Ignored.
    exclude : iterable of str
        Parameters or modules to leave dense, outside the masks.
    allocation : str
        How many weights each layer keeps: a key of `fsp.pruning.allocate.ALLOCATIONS` other than "ratio_of".
    like : Masks, optional
        Instead of `allocation`: masks whose layer densities are taken over, see `fsp.pruning.allocate.ratio_of`.

    Returns
    -------
    Masks

    Raises
    ------
    ValueError
        For an unknown allocation, one that cannot spend exactly the weights that `density` keeps, or a weight that
        torch prunes already.

    Examples
    --------
    >>> found = regular(nn.Linear(8, 4), 0.25, generator=torch.Generator().manual_seed(0))["weight"]
    >>> found.sum(0).tolist(), found.sum(1).tolist()
    ([1, 1, 1, 1, 1, 1, 1, 1], [2, 2, 2, 2])

    References
    ----------
    Friedman: A proof of Alon's second eigenvalue conjecture and related problems. 2008; for bipartite graphs
    Brito, Dumitriu, Harris: Spectral gap in random bipartite biregular graphs. 2022.
    """
    start = _in_each_layer(_round_robin, model, density, generator, exclude, allocation, like)
    return rewire(start, generator=generator, model=model)


def ramanujan(
    model: nn.Module,
    density: float,
    *,
    generator: torch.Generator,
    batches: Batches | None = None,
    exclude: Iterable[str] = (),
    allocation: str = "erk",
    like: Masks | None = None,
) -> Masks:
    r"""Masks of points and bundles of lines in a finite plane, with equal degrees to within one.

    The graph of a layer is a part of a geometry over the field :math:`\mathbb F_q` of prime order.  Inputs are points
    (v, y) of the plane; an output (u, x) is a bundle of w parallel lines of slope u:

    .. math:: \text{input } (v, y) \text{ meets output } (u, x) \iff y - uv - x \in D, \qquad |D| = w,

    of density w / q.  Its second singular value is known without the graph,

    .. math:: \sigma_2 \le \sqrt q\, \max_{f = 1 \dots q-1} \Big| \sum_{a \in D} e^{2 \pi i f a / q} \Big|

    with equality where all points and slopes are taken; no part has a greater one.  With w = 1 these are the lines of
    an affine plane, :math:`\sigma_2 = \sqrt q` (the array codes of Fan).

    Parameters
    ----------
    model, density, generator, batches, exclude, allocation, like
        As for `regular`.  The generator chooses slopes, abscissae v and D, and how the vertices are numbered.

    Returns
    -------
    Masks

    Raises
    ------
    ValueError
        As for `regular`.

    Notes
    -----
    *Sizes and counts that do not fit.*  Let n be the larger side of a layer and d its density (of its gaps, where more
    than half is kept).  q runs over the last prime below max(:math:`\sqrt n`, 1 / d) that has n points or more, and
    over primes from there to twice as much, the six for which w / q, w being d q rounded, comes next to d.  Of the last
    u and v only as many x and y are taken as there are vertices.  On the side with more of them D is multiplied by
    another number for every u, or v.  Then weights are taken away or added until the count is exact, each at the output
    that has the most (fewest) and there at the input that has the most (fewest), and moved from the vertex with the
    most to the one with the fewest until degrees are equal to within one.  Of the graphs for all q the one with the
    smallest :math:`\sigma_2` is taken, so these last steps are judged too.  D is the best, by the bound above, of 64
    random ones.

    *Limits.*  Equal degrees are not the way to a large gap everywhere.  With about one weight an input or less the
    graph falls apart into stars.  And the gap's bound counts mean degrees of those vertices that have an edge, so
    uniform masks, which leave vertices out, can have a larger gap in layers with few inputs or outputs (D54).

    References
    ----------
    Fan: Array codes as low-density parity-check codes. 2000.  Deterministic Ramanujan masks of other constructions
    (LPS graphs, lifts): Kalra et al., TMLR 2025.
    """
    return _in_each_layer(_geometry, model, density, generator, exclude, allocation, like)


def _in_each_layer(
    make: Callable[[int, int, int, torch.Generator], np.ndarray],
    model: nn.Module,
    density: float,
    generator: torch.Generator,
    exclude: Iterable[str],
    allocation: str,
    like: Masks | None,
) -> Masks:
    """Masks with the counts of an allocation, each group of a layer made by ``make(outputs, inputs, count, ...)``."""
    masks = all_kept(model, exclude=exclude)
    for name, mask in masks.items():
        if not mask.all():
            raise ValueError(
                f"torch prunes {name!r} already, and degrees cannot be equal around that: make it plain first, with "
                "torch.nn.utils.prune.remove, or use another method"
            )
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    if like is not None:
        densities = allocate.ratio_of(shapes, density, like=like)
    else:
        check_choice("allocation", allocation, [name for name in allocate.ALLOCATIONS if name != "ratio_of"])
        densities = allocate.ALLOCATIONS[allocation](shapes, density)
    counts, wirings = allocate.counts(densities, shapes, density), wiring_of(model)
    new = {}
    for name, mask in masks.items():
        wiring = wirings.get(name, PLAIN)
        groups, n_right, n_left = blocks(mask, wiring).shape
        each = counts[name] // groups + (_order(groups, generator) < counts[name] % groups)
        matrices = np.stack([make(n_right, n_left, int(count), generator) for count in each])
        new[name] = joined(torch.from_numpy(matrices), mask.shape, wiring).to(mask.device)
    return new


def _order(n: int, generator: torch.Generator) -> np.ndarray:
    """The numbers from 0 to n - 1 in random order."""
    return torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu").numpy()


def _renumbered(kept: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """The same graph with its vertices in random order."""
    return kept[_order(kept.shape[0], generator)][:, _order(kept.shape[1], generator)]


def _round_robin(n_right: int, n_left: int, count: int, generator: torch.Generator) -> np.ndarray:
    """A graph of equal degrees to within one: the outputs in turn take the next inputs, over and over again."""
    degrees = np.full(n_right, count // n_right)
    degrees[: count % n_right] += 1
    kept = np.zeros((n_right, n_left), dtype=bool)
    kept[np.repeat(np.arange(n_right), degrees), np.arange(count) % n_left] = True
    return _renumbered(kept, generator)  # which vertices have one edge more is random, and stays when edges trade


# ---- points and lines --------------------------------------------------------------------------------------------


def _geometry(n_right: int, n_left: int, count: int, generator: torch.Generator) -> np.ndarray:
    """Points and bundles of lines, cut to size and to the exact count: bool, shape (n_right, n_left)."""
    size = n_right * n_left
    if count == 0:
        return np.zeros((n_right, n_left), dtype=bool)
    if 2 * count > size:  # the complement of a graph of equal degrees has the same second singular value
        return ~_geometry(n_right, n_left, size - count, generator)
    best, least = None, math.inf
    for q in _orders(n_right, n_left, count / size):
        kept = _plane(n_right, n_left, q, max(1, round(q * count / size)), generator)
        kept = _with_count(_renumbered(kept, generator), count)
        sigma2 = round(_second_singular_value(kept), 6)  # rounded: ties must not be broken by the processor
        if sigma2 < least:
            best, least = kept, sigma2
    return best  # type: ignore[return-value]  # there is an order at least


def _orders(n_right: int, n_left: int, density: float) -> list[int]:
    """Primes that suit a layer: enough slopes and abscissae for all its vertices, and about its density."""
    largest = max(n_right, n_left)
    least = max(2, math.isqrt(largest - 1) + 1, math.ceil(min(1 / density, largest)))  # beyond, lines never meet
    primes = [q for q in range(2, 4 * least) if all(q % p for p in range(2, math.isqrt(q) + 1))]
    below = [q for q in primes if q < least and q * q >= largest][-1:]
    above = [q for q in primes if least <= q < 2 * least]
    return below + sorted(above, key=lambda q: abs(max(1, round(q * density)) / q - density))[:TRIED]


def _plane(n_right: int, n_left: int, q: int, w: int, generator: torch.Generator) -> np.ndarray:
    """The part of the plane of order q whose outputs and inputs are the first ones, by slope and by abscissa."""
    (i, x), (j, y) = np.divmod(np.arange(n_right), q), np.divmod(np.arange(n_left), q)
    u, v = _order(q, generator)[i], _order(q, generator)[j]
    bundles = np.zeros((DRAWN, q), dtype=bool)
    for bundle in bundles:
        bundle[_order(q, generator)[:w]] = True
    peaks = np.abs(np.fft.fft(bundles)[:, 1:]).max(1).round(6)
    bundle = bundles[peaks.argmin()]
    scale = 1 + _order(q - 1, generator)
    scale = scale[i % (q - 1)][:, None] if n_right > n_left else scale[j % (q - 1)]
    return bundle[scale * (y - u[:, None] * v - x[:, None]) % q]


def _second_singular_value(kept: np.ndarray) -> float:
    """Of a bool matrix; 0 where one side has a single vertex."""
    matrix = kept.astype(np.float64)
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(max(0.0, np.linalg.eigvalsh(gram)[-2])) if len(gram) > 1 else 0.0


def _with_count(kept: np.ndarray, count: int) -> np.ndarray:
    """A graph with so many edges and with degrees equal to within one, by the rule in `ramanujan`."""
    kept = kept.copy()
    right, left = kept.sum(1), kept.sum(0)
    while (total := int(right.sum())) != count:
        step = -1 if total > count else 1
        row = (step * right).argmin()
        columns = (kept[row] == (step < 0)).nonzero()[0]
        column = columns[(step * left[columns]).argmin()]
        kept[row, column] = step > 0
        right[row] += step
        left[column] += step
    _level(kept)
    _level(kept.T)
    return kept


def _level(kept: np.ndarray) -> None:
    """Move edges, in place, from rows with many to rows with few, along columns, until all have as many within one."""
    degrees = kept.sum(1)
    while degrees.max() - degrees.min() > 1:
        most, fewest = degrees.argmax(), degrees.argmin()
        column = (kept[most] & ~kept[fewest]).argmax()
        kept[[most, fewest], column] = False, True
        degrees[most] -= 1
        degrees[fewest] += 1
