"""Result tables as CSV files that keep every bit, and grow run by run."""

import io
import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from fsp.files import replacing

OWN_COLUMNS = ("status", "key", "code")  # of every table of runs, beside config entries and metrics
REQUIRED = ("status", "key")  # tables written before there was the third have no more
# Since pandas 3.1 every CSV float is read exactly, and the option that asked for it is deprecated.
OLD_PANDAS = tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1)
EXACT_FLOATS = {"float_precision": "round_trip"} if OLD_PANDAS else {}


def save(frame: pd.DataFrame, path: str | Path) -> Path:
    r"""Write a table as CSV, atomically; `read` gives the same numbers back, to the last bit.

    Floats have the digits that identify them, lines end in ``\n``, a missing value is an empty cell and the
    index is left out.

    Returns
    -------
    pathlib.Path
        `path`.
    """
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
    return Path(path)


def update(frame: pd.DataFrame, path: str | Path) -> Path:
    """Put the rows of a sweep into a table that may hold other runs.

    First come the rows of `frame`, then those rows of the file whose key `frame` does not have, cell for cell as
    they were. Columns are those of `frame`, then the ones only the other rows fill.

    Parameters
    ----------
    frame : pandas.DataFrame
        What `sweep` returned.
    path : path
        CSV file; made if missing.

    Returns
    -------
    pathlib.Path
        `path`.

    Raises
    ------
    ValueError
        If `frame` or the file has no columns ``status`` and ``key``.
    """
    if missing := [name for name in REQUIRED if name not in frame]:
        raise ValueError(f"frame has no column {missing[0]!r}: expected the table that sweep returned")
    if not Path(path).exists():
        return save(frame, path)
    old = read_cells(path)
    others = old[~old["key"].isin(frame["key"])]
    # Without this line a column that only the replaced rows had would stay, with empty cells.
    others = others[[name for name in others if name in frame or (others[name] != "").any()]]
    new = read_cells(io.StringIO(frame.to_csv(index=False)))
    return save(pd.concat([new, others], ignore_index=True), path)


UNITS: dict[str, tuple[str, Callable[[pd.Series], pd.Series]]] = {
    "fraction": ("a fraction in [0, 1]", lambda v: v.between(0, 1)),
    "percent": ("a percentage in [0, 100]", lambda v: v.between(0, 100)),
    "number": ("a finite number", np.isfinite),
    "count": ("a whole number of at least 0", lambda v: (v >= 0) & (v % 1 == 0)),
}


def read_published(path: str | Path, columns: Mapping[str, str], *, optional: Collection[str] = ()) -> pd.DataFrame:
    """Read a table of published numbers, and check that its columns hold what a notebook expects.

    Parameters
    ----------
    path : path
        CSV file.
    columns : dict of column name to unit
        The columns to read, and what is in each: "text", or a key of `UNITS`: "fraction", "percent", "number" or
        "count".
    optional : collection of str
        Columns that may have empty cells.

    Returns
    -------
    pandas.DataFrame
        Of these columns, in this order.

    Raises
    ------
    ValueError
        Naming the file and the column: a column is missing, has an empty cell, or holds something that is not in its
        unit; a percent column with nothing above 1 is taken for fractions.

    Examples
    --------
    >>> from fsp.paths import PUBLISHED
    >>> columns = {"method": "text", "density": "fraction", "accuracy_percent": "percent"}
    >>> read_published(PUBLISHED / "iclr2023_accuracy.csv", columns).head(2)
      method  density  accuracy_percent
    0    erk     0.01             81.16
    1  grasp     0.01             86.16
    """
    path = Path(path)
    table = read(path)
    for name, unit in columns.items():
        if name not in table:
            raise ValueError(f"{path.name} has no column {name!r}: it has {', '.join(table)}")
        where, values = f"{path.name}, column {name!r}", table[name].dropna()
        if len(values) < len(table) and name not in optional:
            row = table[name].isna().idxmax() + 2
            raise ValueError(f"{where}: row {row} is empty, expected a value in every row")
        if unit == "text":
            continue
        if unit not in UNITS:
            raise ValueError(f"unit {unit!r} is unknown: use text, {', '.join(UNITS)}")
        expected, fits = UNITS[unit]
        if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
            raise ValueError(f"{where}: expected {expected}, found text such as {str(values.iloc[0])!r}")
        wrong = values[~fits(values)]
        if len(wrong):
            raise ValueError(f"{where}: expected {expected}, found {wrong.iloc[0]:g} in row {wrong.index[0] + 2}")
        if unit == "percent" and values.max() <= 1:
            largest = f"{values.max():g} is the largest: these look like fractions"
            raise ValueError(f"{where}: expected {expected}, but {largest}")
    return table[list(columns)]


def read(path: str | Path) -> pd.DataFrame:
    """Read a CSV table with floats exact to the last bit; only an empty cell is a missing value."""
    digits = {"code": str}  # hexadecimal ones, some of which look like numbers
    return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=digits, **EXACT_FLOATS)


def read_cells(source: str | Path | io.StringIO) -> pd.DataFrame:
    """A table of runs as text, cell for cell."""
    cells = pd.read_csv(source, dtype=str, keep_default_na=False)
    if missing := [name for name in REQUIRED if name not in cells]:
        raise ValueError(f"{source} has no column {missing[0]!r}: expected a table written by fsp.runs.tables.update")
    return cells


def rows_by_key(path: Path, entries: set[str]) -> dict[str, dict]:
    """What a table knows of its finished runs, as their records say it; none if there is no table."""
    if not path.exists():
        return {}
    cells = read_cells(path)
    runs: dict[str, dict] = {}
    for line in cells[cells["status"] == "finished"].to_dict("records"):
        metrics = {n: value_of(cell) for n, cell in line.items() if n not in entries and n not in OWN_COLUMNS}
        made_by = {"run_code": line.get("code") or None}
        run = runs.setdefault(line["key"], {"status": "finished", "rows": [], "provenance": made_by})
        run["rows"].append(metrics)
    return runs


def value_of(cell: str) -> object:
    """A metric from a cell of a CSV file."""
    if cell in ("", "True", "False"):
        return {"": math.nan, "True": True, "False": False}[cell]
    if cell[0] not in "-0123456789":
        return cell
    try:
        return json.loads(cell, parse_constant=str)
    except ValueError:
        return cell
