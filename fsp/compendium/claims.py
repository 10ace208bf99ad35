"""The papers' claims as rows of a table, each with the verdict that follows from its own numbers.

A claim is a sentence, an estimate with its interval, and the bound that the sentence puts on it.  Nobody writes a
verdict: `claim` computes it, and `contradictions` computes it again from a table.
"""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fsp.checks import check_choice
from fsp.compendium.stats import Estimate, p_value
from fsp.paths import PACKAGE

WHO = ("claim", "kind", "paper", "section")
MEASURED = ("measured", "low", "high", "n")
CLAIM_COLUMNS = (*WHO, *MEASURED, "bound", "published", "holds", "note")
KINDS = ("primary", "exploratory")
VERDICTS = ("yes", "equivalent", "no", "not decided")
LEAST = 3  # observations that decide a claim
NUMBER = r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
BOUNDS: dict[str, Callable[..., tuple[float, float]]] = {  # how a bound is written, and between what it allows values
    f"> {NUMBER}": lambda low: (float(low), math.inf),
    f"< {NUMBER}": lambda high: (-math.inf, float(high)),
    f"within {NUMBER} … {NUMBER}": lambda low, high: (float(low), float(high)),
}


def claim(
    text: str,
    estimate: Estimate,
    *,
    above: float | None = None,
    below: float | None = None,
    equivalent: float | tuple[float, float] | None = None,
    paper: str,
    section: str = "",
    published: str = "",
    kind: str = "exploratory",
    note: str = "",
) -> dict:
    """One row of a notebook's claims table, with its verdict.

    Parameters
    ----------
    text : str
        The claim, one sentence.
    estimate : Estimate
        What is measured here.
    above, below : float
        The claim is that the quantity is greater, or smaller, than this.
    equivalent : float or (float, float)
        The claim is that the quantity lies between these two, or between -e and e for one number e.
        Exactly one of `above`, `below` and `equivalent` is given.
    paper, section : str
        Who claims it, and where.
    published : str
        Their number, if it is known.
    kind : {"exploratory", "primary"}
        "primary" for a claim that was chosen before the results were seen.
    note : str
        What is measured and what limits it.

    Returns
    -------
    dict
        With the entries `CLAIM_COLUMNS`; ``bound`` is text that `verdict` reads.

    Raises
    ------
    ValueError
        If there is not exactly one bound, a bound is no finite number, or the kind is unknown.

    Examples
    --------
    >>> row = claim("A beats B", Estimate(0.8, 0.7, 0.9, 30), above=0.5, paper="P")
    >>> row["bound"], row["holds"]
    ('> 0.5', 'yes')
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: expected {' or '.join(KINDS)}")
    bound = _bound(above, below, equivalent)
    holds = verdict(estimate, bound)
    entries = (text, kind, paper, section, *estimate, bound, published, holds, note)
    return dict(zip(CLAIM_COLUMNS, entries, strict=True))


class Primary(NamedTuple):
    """A primary claim as ``docs/claims.md`` states it; every entry is text."""

    claim: str
    paper: str
    sentence: str
    measured: str
    testbed: str
    bound: str
    overturned: str


@functools.cache
def primaries(page: Path = PACKAGE.parent / "docs" / "claims.md") -> dict[str, Primary]:
    """Primary claims by their number, "P1" and so on, in the order of the page.

    Raises
    ------
    ValueError
        If an entry lacks a line, or its bound cannot be read.
    """
    found = {}
    for part in page.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, _, rest = part.partition("\n")
        entries = {}
        for item in rest.split("\n* **")[1:]:
            name, _, text = item.partition(":** ")
            entries[name.split()[0].lower()] = " ".join(text.split()).strip("`")
        try:
            found[heading.split(".")[0]] = Primary(claim=heading, **entries)
        except TypeError as error:
            raise ValueError(f"{page}, {heading!r}: expected the lines {', '.join(Primary._fields[1:])}") from error
        _limits(entries["bound"])
    return found


def primary(number: str, estimate: Estimate, *, published: str = "", note: str = "") -> dict:
    """The row of a primary claim: sentence, paper and bound are those of ``docs/claims.md``.

    Parameters
    ----------
    number : str
        Such as "P6".
    estimate : Estimate
    published, note : str
        As for `claim`.

    Returns
    -------
    dict
        With the entries `CLAIM_COLUMNS`.

    Raises
    ------
    ValueError
        If the page has no such number.
    """
    check_choice("primary claim", number, primaries())
    stated = primaries()[number]
    holds = verdict(estimate, stated.bound)
    entries = (stated.claim, "primary", stated.paper, "abstract", *estimate, stated.bound, published, holds, note)
    return dict(zip(CLAIM_COLUMNS, entries, strict=True))


def p_value_of(row: dict) -> float:
    """Two-sided p-value of a claim's row: of its bound, of two the one that the estimate is nearer to."""
    estimate = Estimate(*(row[name] for name in MEASURED))
    return max(p_value(estimate, limit) for limit in _limits(row["bound"]) if math.isfinite(limit))


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """A claims table for people: whole sentences, and numbers with three significant digits.

    Parameters
    ----------
    table : DataFrame
        With the columns `CLAIM_COLUMNS`.

    Returns
    -------
    pandas.DataFrame
        Indexed by the claim, for pandas cuts what stands in a column. An interval is not broken over two lines.

    Examples
    --------
    >>> row = claim("A beats B", Estimate(0.00042, 0.0001, 0.00074, 30), above=0, paper="P")
    >>> shown(pd.DataFrame([row])).loc["A beats B", ["bound", "holds"]].tolist()
    ['> 0', 'yes']
    """
    found = [measured(row).replace(" ", "\N{NO-BREAK SPACE}") for row in table.to_dict("records")]
    found = table.assign(**{"measured [interval]": found}).set_index("claim")
    return found[["kind", "measured [interval]", "n", "bound", "holds"]].rename_axis(index=None, columns="claim")


def verdict(estimate: Estimate, bound: str) -> str:
    """Whether an estimate's whole interval lies where a bound allows it.

    Parameters
    ----------
    estimate : Estimate
    bound : str
        "> 0.5", "< 0" or "within 0.95 … 1.05", as `claim` writes it.

    Returns
    -------
    {"yes", "equivalent", "no", "not decided"}
        "yes" if the whole interval keeps the bound, "equivalent" if the bound has two sides; "no" if the whole interval
        lies outside; "not decided" if it holds or touches a limit or is missing, and for fewer than `LEAST`
        observations, whatever their interval.

    Raises
    ------
    ValueError
        If the bound cannot be read.

    Examples
    --------
    >>> verdict(Estimate(0.8, 0.7, 0.9, 30), "> 0.5"), verdict(Estimate(0.8, 0.4, 0.9, 30), "> 0.5")
    ('yes', 'not decided')
    >>> verdict(Estimate(1.0, 0.97, 1.02, 5), "within 0.95 … 1.05")
    'equivalent'
    """
    least, most = _limits(bound)
    if not estimate.n >= LEAST or math.isnan(estimate.low) or math.isnan(estimate.high):
        return "not decided"
    if estimate.high < least or estimate.low > most:
        return "no"
    if (estimate.low > least or least == -math.inf) and (estimate.high < most or most == math.inf):
        return "yes" if math.inf in (-least, most) else "equivalent"
    return "not decided"


def contradictions(table: pd.DataFrame) -> list[str]:
    """Sentences on rows of a claims table whose verdict is not that of their own numbers, or that are there twice.

    Parameters
    ----------
    table : DataFrame
        Of one notebook, with the columns `CLAIM_COLUMNS`.

    Returns
    -------
    list of str
        Empty if all is well.
    """
    found = [f"there is more than one claim: {text}" for text in table.claim[table.claim.duplicated()].unique()]
    for row in table.to_dict("records"):
        try:
            follows = verdict(Estimate(row["measured"], row["low"], row["high"], row["n"]), row["bound"])
        except ValueError as error:
            found.append(f"{error}: {row['claim']}")
            continue
        if row["holds"] != follows:
            found.append(f"verdict {row['holds']!r} is written, {follows!r} follows from its numbers: {row['claim']}")
    return found


def measured(row: dict) -> str:
    """Value of a claim with its interval, to three significant digits.

    Examples
    --------
    >>> measured({"measured": 0.86312, "low": 0.8, "high": 0.91})
    '0.863 [0.8, 0.91]'
    """
    if math.isnan(row["low"]) or math.isnan(row["high"]):
        return f"{row['measured']:.3g}"
    return f"{row['measured']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"


def _bound(above: float | None, below: float | None, equivalent: float | tuple[float, float] | None) -> str:
    """The one bound that is given, as text."""
    given = {"> ": above, "< ": below, "within ": equivalent}
    given = {words: value for words, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError("a claim has one bound: pass above=..., below=... or equivalent=...")
    [(words, value)] = given.items()
    if words == "within " and not isinstance(value, tuple | list):
        value = (-value, value)
    numbers = value if isinstance(value, tuple | list) else [value]
    bound = words + " … ".join(repr(float(number)).removesuffix(".0") for number in numbers)
    _limits(bound)
    return bound


def _limits(bound: str) -> tuple[float, float]:
    """Least and most that a bound allows."""
    for form, limits in BOUNDS.items():
        if match := re.fullmatch(form, bound):
            least, most = limits(*match.groups())
            if least < most:
                return least, most
    raise ValueError(f'bound {bound!r}: expected "> a", "< b" or "within a … b" with finite numbers a < b')
