"""What differs between results and the committed ones: of tables row by row, of claims one by one."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from scipy.stats import t

from fsp import paths
from fsp.compendium.claims import MEASURED, contradictions, measured, read_claims
from fsp.runs import tables

# On another processor a training rounds otherwise. Masks, spectra and accuracies move little by that:
OF_RANGE = 0.1  # of the range of a column
ACCURACY = 0.03  # of accuracies, at least: in a column of good methods alone the range is less than an image
# But what else is read off the outputs and layers of a trained network moves as from seed to seed:
READ_OFF = ("nll", "brier", "ece", "temperature", "corrupted_", "logits_", "kl", "disagreement", "r2")
READ_OFF += ("spectrum_distance", "validation_losses")
CONFIDENCE = 0.999  # with which two runs that differ in their seed alone are as close as two processors may be in these
LEAST_SEEDS = 5  # fewer say too little of how far that is
RTOL = 1e-6  # numbers closer than this, relative to the committed one, count as the same
# How a claim can differ from the committed one, the worst first.
CHANGES = ("decided otherwise", "committed in error", "stated otherwise", "missing here", "not committed")
CHANGES += ("value outside the committed interval", "decided only here", "no longer decided")
MOVED = (CHANGES[0], *CHANGES[-3:])  # the same claim, another number
MEANING = ("kind", "paper", "section", "bound")  # what a claim says, beside its sentence


class RowComparison(NamedTuple):
    """Two tables matched row by row: counts of rows, what differs by column, and columns of wall time, left out."""

    compared: int
    missing: int
    added: int
    differing: dict[str, str]
    times: list[str]

    def __str__(self):
        rows = f"{self.compared} of {self.compared + self.missing} committed rows compared, {self.added} rows are new"
        return f"{rows}: {self.differences() or 'same to the printed digits'}"

    def differences(self) -> str:
        """What differs, by column; "" if nothing does."""
        return "; ".join(f"`{column}`: {text}" for column, text in self.differing.items())


def compare_rows(
    ours: pd.DataFrame, committed: pd.DataFrame, *, rtol: float = RTOL, alike: Mapping[str, str] | None = None
) -> RowComparison:
    """Compare two tidy tables, rows matched by ``key`` (and by position among the rows of one key).

    Columns whose name ends in ``_s`` are wall times and left out, and so is ``code``, which is no result. A column of
    lists of numbers counts as one column for each place, ``losses[0]``, ``losses[1]`` and so on.

    Parameters
    ----------
    ours, committed : pandas.DataFrame
        Tables with a column ``key``.
    rtol : float
        Tolerance for numbers, relative to the committed one.
    alike : mapping, optional
        Says that the tables were made on two processors: for each key what its run has in common with those that
        differ from it in the seed alone. A number may then move by `OF_RANGE` of the range that its column has in the
        committed table, an accuracy by `ACCURACY` at least. Columns of `READ_OFF` may move as far as two runs lie
        apart that differ in their seed alone, with a confidence of `CONFIDENCE` by Student's t and the committed table,
        where it has `LEAST_SEEDS` of them. Columns that begin with ``bin_`` are left out: they are histograms, whose
        bins may hold one prediction or none; what is computed from them is compared.

    Returns
    -------
    RowComparison
        ``differing`` says for each column that differs in how many cells, and for numbers the largest absolute
        difference. Numbers differ beyond the tolerances, or where one is missing.

    Examples
    --------
    >>> old = pd.DataFrame({"key": ["a", "b"], "accuracy": [0.5, 0.75], "train_s": [1.0, 1.0]})
    >>> print(compare_rows(old.assign(accuracy=[0.5, 0.5], train_s=9.0), old))
    2 of 2 committed rows compared, 0 rows are new: `accuracy`: 1 differ, by at most 0.25
    """
    ours, committed = (
        _without_lists(frame).set_index(["key", frame.groupby("key").cumcount()]) for frame in (ours, committed)
    )
    common = committed.index.intersection(ours.index)
    differing = {}
    names = dict.fromkeys([*committed, *ours])
    times = [name for name in names if name.endswith("_s")]
    left_out = [*times, "code", *(name for name in names if alike is not None and name.startswith("bin_"))]
    for name in names:
        if name in left_out:
            continue
        if name not in ours or name not in committed:
            where, table = ("new", ours) if name in ours else ("committed", committed)
            if table.loc[common, name].notna().any():  # otherwise it belongs to runs that are not compared
                differing[name] = f"only in the {where} table"
            continue
        a, b = ours.loc[common, name], committed.loc[common, name]
        largest = ""
        if all(is_numeric_dtype(column) and not is_bool_dtype(column) for column in (a, b)):
            atol = 0.0 if alike is None else _movable(committed[name], common, alike)
            unequal = ~np.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
            gap = (a - b).abs()[unequal].max()
            largest = ", one is missing" if math.isnan(gap) else f", by at most {gap:.3g}"
        else:
            unequal = (a.astype(str) != b.astype(str)) & ~(a.isna() & b.isna())
        if unequal.any():
            differing[name] = f"{unequal.sum()} differ{largest}"
    return RowComparison(len(common), len(committed) - len(common), len(ours) - len(common), differing, times)


def _without_lists(table: pd.DataFrame) -> pd.DataFrame:
    """A table with columns for the numbers of each column that holds lists of them as JSON."""
    parts = [table[[name]] for name in table]
    for place, name in enumerate(table):
        cells = table[name].dropna()
        try:
            lists = [json.loads(cell) for cell in cells]
        except (TypeError, ValueError):
            continue  # neither lists nor any other JSON
        if lists and all(isinstance(entries, list) for entries in lists):
            numbers = pd.DataFrame([dict(enumerate(entries)) for entries in lists], index=cells.index)
            if all(is_numeric_dtype(column) and not is_bool_dtype(column) for _, column in numbers.items()):
                parts[place] = numbers.add_prefix(f"{name}[").add_suffix("]")
    return pd.concat(parts, axis=1)


def _movable(column: pd.Series, compared: pd.MultiIndex, alike: Mapping[str, str]) -> float | pd.Series:
    """How far the numbers of a committed column may move on another processor; see `compare_rows`."""
    name, values = str(column.name), column.dropna()
    bound = OF_RANGE * float(np.ptp(values)) if len(values) else 0.0
    if name.startswith("accuracy"):
        bound = max(bound, ACCURACY)
    if not name.startswith(READ_OFF):
        return bound
    keys, places = (column.index.get_level_values(level) for level in (0, 1))
    over_seeds = column.groupby([[alike.get(key, key) for key in keys], places])
    seeds = over_seeds.transform("count")
    apart = t.ppf((1 + CONFIDENCE) / 2, seeds - 1) * math.sqrt(2) * over_seeds.transform("std")
    return apart.where(seeds >= LEAST_SEEDS, bound)[compared]


def compare_claims(ours: pd.DataFrame, committed: pd.DataFrame, *, exact: bool = False) -> list[str]:
    """Sentences on claims that are missing, say or find something else, or whose committed verdict is wrong.

    Parameters
    ----------
    ours, committed : pandas.DataFrame
        From `read_claims`; matched by notebook and claim.
    exact : bool
        Both come from the same rows: all columns are compared, and numbers to `RTOL`. Without it a value is the same
        inside the committed interval; where there is none it is compared to `RTOL`.

    Returns
    -------
    list of str
        Empty if nothing of this is the case.
    """
    found = [f"committed: {wrong}" for _, rows in committed.groupby("notebook") for wrong in contradictions(rows)]
    ours, committed = (
        {(row["notebook"], row["claim"]): row for row in frame.to_dict("records")} for frame in (ours, committed)
    )
    found += [f"not committed: {claim}" for stem, claim in ours if (stem, claim) not in committed]
    for name, old in committed.items():
        if name not in ours:
            found.append(f"missing: {name[1]}")
            continue
        new = ours[name]
        for column in (*MEANING, "published", "note") if exact else MEANING:
            if new[column] != old[column]:
                found.append(f"{column} {new[column]!r}, committed {old[column]!r}: {name[1]}")
        if new["holds"] != old["holds"]:
            found.append(f"verdict {new['holds']!r}, committed {old['holds']!r}: {name[1]}")
        if exact:
            moved = [column for column in MEASURED if not _close(new[column], old[column])]
            found += [f"{column} {new[column]:.6g}, committed {old[column]:.6g}: {name[1]}" for column in moved]
        elif not _within(new["measured"], old):
            found.append(f"measured {new['measured']:.4g}, committed {measured(old)}: {name[1]}")
    return found


class Change(NamedTuple):
    """A claim that is not the same as committed.

    Attributes
    ----------
    stem, claim : str
        Its notebook and its sentence.
    kind : str
        One of `CHANGES`.
    what : list of str
        Sentences of `compare_claims`, without the claim.
    here, committed : dict or None
        Its two rows; None where there is none.
    """

    stem: str
    claim: str
    kind: str
    what: list[str]
    here: dict | None
    committed: dict | None


class Comparison(NamedTuple):
    """A notebook's tables beside the committed ones.

    Attributes
    ----------
    rows : RowComparison
    beyond : str
        What differs by more than another processor explains, by column; "" if nothing does.
    claims : int
        Number of claims on either side.
    changes : list of Change
    """

    rows: RowComparison
    beyond: str
    claims: int
    changes: list[Change]


def compare_committed(results: Path, stem: str, alike: Mapping[str, str] | None = None) -> Comparison | None:
    """How a notebook's tables in a folder differ from the committed ones; None if none are committed.

    `alike` as for `compare_rows`, where the committed ones are of another processor.
    """
    committed = paths.COMMITTED.results
    if not (committed / f"{stem}.csv").exists() or not (committed / f"{stem}.claims.csv").exists():
        return None
    both = [tables.read(folder / f"{stem}.csv") for folder in (results, committed)]
    rows, beyond = compare_rows(*both), compare_rows(*both, alike=alike).differences()
    ours, theirs = (read_claims(folder, [stem]) for folder in (results, committed))
    sentences = dict.fromkeys([*theirs.claim, *ours.claim])
    changes = [_change(stem, text, ours[ours.claim == text], theirs[theirs.claim == text]) for text in sentences]
    return Comparison(rows, beyond, len(sentences), [change for change in changes if change])


def _change(stem: str, claim: str, ours: pd.DataFrame, theirs: pd.DataFrame) -> Change | None:
    """What has changed of one claim, given the tables of its row; None if it is the same."""
    what = [sentence.removesuffix(f": {claim}") for sentence in compare_claims(ours, theirs)]
    if not what:
        return None
    here, committed = (next(iter(rows.to_dict("records")), None) for rows in (ours, theirs))
    if not here or not committed:
        kind = "not committed" if here else "missing here"
    elif any(sentence.startswith("committed: ") for sentence in what):
        kind = "committed in error"
    elif any(here[name] != committed[name] for name in MEANING):
        kind = "stated otherwise"
    elif here["holds"] == committed["holds"]:
        kind = "value outside the committed interval"
    elif here["holds"] == "not decided":
        kind = "no longer decided"
    else:
        kind = "decided only here" if committed["holds"] == "not decided" else "decided otherwise"
    return Change(stem, claim, kind, what, here, committed)


def _within(value: float, old: dict) -> bool:
    """Whether a value lies in a committed interval, or equals the committed value if that has none."""
    if math.isnan(old["low"]) or math.isnan(old["high"]):
        return _close(value, old["measured"])
    return old["low"] <= value <= old["high"]


def _close(value: float, committed: float) -> bool:
    """Whether two numbers are the same to `RTOL`, or both missing."""
    return bool(np.isclose(value, committed, rtol=RTOL, atol=1e-12, equal_nan=True))
