"""Result tables as CSV files that keep every bit, and grow run by run."""

import io
import json
import math
from pathlib import Path

import pandas as pd

from fsp.paths import replacing

OWN_COLUMNS = ("status", "key")  # of every table of runs, beside config entries and metrics
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
    if missing := [name for name in OWN_COLUMNS if name not in frame]:
        raise ValueError(f"frame has no column {missing[0]!r}: expected the table that sweep returned")
    if not Path(path).exists():
        return save(frame, path)
    old = read_cells(path)
    others = old[~old["key"].isin(frame["key"])]
    # A column that only replaced rows had would stay behind empty, and tell of the file's history.
    others = others[[name for name in others if name in frame or (others[name] != "").any()]]
    new = read_cells(io.StringIO(frame.to_csv(index=False)))
    return save(pd.concat([new, others], ignore_index=True), path)


def read(path: str | Path) -> pd.DataFrame:
    """Read a CSV table with floats exact to the last bit; only an empty cell is a missing value."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""], **EXACT_FLOATS)


def read_cells(source: str | Path | io.StringIO) -> pd.DataFrame:
    """A table of runs as text, cell for cell."""
    cells = pd.read_csv(source, dtype=str, keep_default_na=False)
    if missing := [name for name in OWN_COLUMNS if name not in cells]:
        raise ValueError(f"{source} has no column {missing[0]!r}: expected a table written by fsp.tables.update")
    return cells


def rows_by_key(path: Path, entries: set[str]) -> dict[str, list[dict]]:
    """Metrics of the finished runs in a table; none if there is no table."""
    if not path.exists():
        return {}
    cells = read_cells(path)
    rows: dict[str, list[dict]] = {}
    for line in cells[cells["status"] == "finished"].to_dict("records"):
        metrics = {n: value_of(cell) for n, cell in line.items() if n not in entries and n not in OWN_COLUMNS}
        rows.setdefault(line["key"], []).append(metrics)
    return rows


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
