"""Intervals, correlations, paired comparisons, and verdicts on claims.

Every estimate comes with an interval and its n: Student's t for means, a percentile bootstrap over observations for
correlations.  Resampling is seeded, so that a number is the same in every run.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata, t

RESAMPLES = 10_000
LEAST = 3  # observations that decide a claim
CLAIM_COLUMNS = ("claim", "paper", "section", "measured", "low", "high", "n", "published", "holds", "note")


class Estimate(NamedTuple):
    """A value with its interval and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self):
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.n})"


def mean(values: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean with Student's t interval.

    Parameters
    ----------
    values : array, shape (n,)
        Undefined values (nan) are left out; n says how many remain.
    confidence : float, in (0, 1)

    Returns
    -------
    Estimate
        Interval ``nan`` for fewer than two values.

    Notes
    -----
    Not a bootstrap: resampling the handful of seeds that an experiment has gives intervals that are too narrow
    (about 83 % coverage for 95 % asked, at n = 5).

    Examples
    --------
    >>> print(mean([1.0, 2.0, 3.0]))
    2.00 [-0.48, 4.48] (n = 3)
    """
    _check_confidence(confidence)
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    n = len(values)
    if n < 2:
        return Estimate(float(values[0]) if n else math.nan, math.nan, math.nan, n)
    value, half = float(values.mean()), float(t.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Estimate(value, value - half, value + half, n)


def paired_difference(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean of a - b over pairs (the same seed with two methods), with Student's t interval.

    Parameters
    ----------
    a, b : array, shape (n,)
        Pairs with an undefined member are left out.
    confidence : float, in (0, 1)

    Returns
    -------
    Estimate
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"pairs are needed, there are {a.size} and {b.size} values")
    return mean(a - b, confidence=confidence)


def pearson(x: ArrayLike, y: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Pearson correlation with a percentile bootstrap interval.

    Parameters
    ----------
    x, y : array, shape (n,)
        Pairs with an undefined member are left out.
    confidence : float, in (0, 1)

    Returns
    -------
    Estimate
        ``nan`` where x or y is constant.
    """
    return _bootstrapped(_correlation, [x, y], None, confidence)


def spearman(x: ArrayLike, y: ArrayLike, *, within: ArrayLike | None = None, confidence: float = 0.95) -> Estimate:
    r"""Spearman rank correlation with a percentile bootstrap interval, ranks taken anew in every resample.

    Parameters
    ----------
    x, y : array, shape (n,)
        Pairs with an undefined member are left out.
    within : array, shape (n,), optional
        Group of each pair, such as its density: the result is the mean over groups of the correlation within each,
        :math:`\frac1G \sum_g \rho_g`, and pairs are resampled within groups.
    confidence : float, in (0, 1)

    Returns
    -------
    Estimate
        ``nan`` where x or y is constant (in every group).

    Examples
    --------
    >>> spearman([1, 2, 3, 4], [1, 4, 9, 16]).value
    1.0
    >>> spearman([1, 2, 3, 11, 12, 13], [3, 2, 1, 13, 12, 11], within=[0, 0, 0, 1, 1, 1]).value
    -1.0
    """
    return _bootstrapped(_rank_correlation, [x, y], within, confidence)


def spearman_difference(
    a: ArrayLike, b: ArrayLike, y: ArrayLike, *, within: ArrayLike | None = None, confidence: float = 0.95
) -> Estimate:
    """How much better a ranks y than b does: the difference of their Spearman correlations with y.

    Parameters
    ----------
    a, b, y : array, shape (n,)
        Triples with an undefined member are left out, and resampled together.
    within : array, shape (n,), optional
        As for `spearman`.
    confidence : float, in (0, 1)

    Returns
    -------
    Estimate
    """

    def difference(a, b, y):
        return _rank_correlation(a, y) - _rank_correlation(b, y)

    return _bootstrapped(difference, [a, b, y], within, confidence)


def verdict(estimate: Estimate, *, above: float | None = None, below: float | None = None) -> str:
    """Whether an estimate's whole interval lies on the claimed side of a bound.

    Parameters
    ----------
    estimate : Estimate
    above, below : float
        Exactly one of them: the claim is that the quantity is greater, or smaller, than this.

    Returns
    -------
    {"yes", "no", "not decided"}
        "no" if the whole interval lies on the other side; "not decided" if it holds the bound or is undefined, and
        for fewer than `LEAST` observations, whatever their interval.

    Examples
    --------
    >>> verdict(Estimate(0.8, 0.7, 0.9, 30), above=0.5), verdict(Estimate(0.8, 0.4, 0.9, 30), above=0.5)
    ('yes', 'not decided')
    """
    if (above is None) == (below is None):
        raise ValueError("a claim has one bound: pass above=... or below=...")
    if estimate.n < LEAST:
        return "not decided"
    low, high = (estimate.low, estimate.high) if below is None else (-estimate.high, -estimate.low)
    bound = above if below is None else -below
    return "yes" if low > bound else "no" if high < bound else "not decided"


def claim(
    text: str,
    estimate: Estimate,
    holds: str,
    *,
    paper: str,
    section: str = "",
    published: str = "",
    note: str = "",
) -> dict:
    """One row of a notebook's claims table.

    Parameters
    ----------
    text : str
        The claim, one sentence.
    estimate : Estimate
        What is measured here.
    holds : {"yes", "no", "not decided"}
        From `verdict`, or from several of them.
    paper, section : str
        Who claims it, and where.
    published : str
        Their number, if it is known.
    note : str
        What is measured and what limits it.

    Returns
    -------
    dict
        With the entries `CLAIM_COLUMNS`.
    """
    if holds not in ("yes", "no", "not decided"):
        raise ValueError(f'holds is "yes", "no" or "not decided", not {holds!r}')
    entries = (text, paper, section, *estimate, published, holds, note)
    return dict(zip(CLAIM_COLUMNS, entries, strict=True))


def _check_confidence(confidence: float) -> None:
    """Raise a ValueError unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence!r} is not in (0, 1): it is a probability, such as 0.95")


def _correlation(x, y):
    """Pearson correlation along the last axis; nan where one side is constant."""
    varies = (np.ptp(x, -1) > 0) & (np.ptp(y, -1) > 0)  # a rounded mean can leave a constant side a tiny variance
    x = x - x.mean(-1, keepdims=True)
    y = y - y.mean(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(varies, (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1)), math.nan)


def _rank_correlation(x, y):
    """Spearman correlation along the last axis."""
    return _correlation(rankdata(x, axis=-1), rankdata(y, axis=-1))


def _bootstrapped(statistic, samples: list[ArrayLike], groups: ArrayLike | None, confidence: float) -> Estimate:
    """Statistic of complete cases, averaged over groups, with the percentile interval of its bootstrap."""
    _check_confidence(confidence)
    groups = np.zeros(np.shape(samples[0]), int) if groups is None else np.asarray(groups)
    shapes = {np.shape(s) for s in (*samples, groups)}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"one-dimensional samples of one length are needed, not of shapes {sorted(shapes)}")
    table = np.array(samples, dtype=float)
    complete = ~np.isnan(table).any(0) & (groups == groups)  # nan is the one group that differs from itself
    table, groups = table[:, complete], groups[complete]
    rng = np.random.default_rng(0)
    values, resampled = [], []
    for group in np.unique(groups):
        cases = table[:, groups == group]
        values.append(statistic(*cases))
        chosen = rng.integers(cases.shape[1], size=(RESAMPLES, cases.shape[1]))
        resampled.append(statistic(*cases[:, chosen]))  # (RESAMPLES,), whole cases drawn together
    value, distribution = _defined_mean(values), _defined_mean(resampled)
    # resamples in which one side is constant have no correlation: left out, not counted as 0
    distribution = distribution[~np.isnan(distribution)]
    if len(distribution) == 0:
        return Estimate(float(value), math.nan, math.nan, table.shape[1])
    low, high = np.quantile(distribution, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(value), float(low), float(high), table.shape[1])


def _defined_mean(values: list) -> np.ndarray:
    """Mean over the first axis of what is not nan; nan where nothing is."""
    values = np.array(values, dtype=float)
    if not len(values):
        return np.array(math.nan)
    counts = (~np.isnan(values)).sum(0)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, np.nansum(values, 0) / counts, math.nan)
