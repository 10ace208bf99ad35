"""Records of runs: their names, their files, and the table made of them.

A record is one JSON file named by the `key` of its run's config. It is written whole or not at all, by the process
that did the run.
"""

import hashlib
import json
import math
import os
import re
import reprlib
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from fsp.files import replacing
from fsp.paths import COMMITTED
from fsp.runs.tables import OWN_COLUMNS, value_of

EXCLUDED = frozenset({"device", "threads", "workers", "verbose", "out_dir", "root", "download"})
SCHEMA = 3  # of the records; a change of EXCLUDED or of `key` is a change of schema
KINDS = ("exception", "timeout", "non-finite", "out of memory", "worker died")
CODE_DIGITS = 12  # of the digest of its code, in a table
ADDED = {1: {"kind", "digest"}, 2: {"digest"}}  # fields that records of an older schema do not have yet


def key(config: dict) -> str:
    """Name of a run: SHA-256 of the canonical JSON of its config.

    Entries are sorted, `EXCLUDED` ones dropped (they say where and how a run is done, not what it is), ``1.0``
    counts as ``1`` and a tuple as a list. The seed is an entry like any other.

    Parameters
    ----------
    config : dict
        Names to None, bool, int, finite float, str, or lists, tuples and dicts of these.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    TypeError
        If `config` is no dict, a name is no string, or a value is of another type (named in the message).
    ValueError
        If a number is nan or infinite.

    Examples
    --------
    >>> key({"density": 1.0, "widths": (8, 8)}) == key({"widths": [8, 8], "density": 1, "device": "cuda"})
    True
    """
    if not isinstance(config, dict):
        raise TypeError(f"config is {config!r}: expected a dict of names and values")
    named = {name: plain(value, name) for name, value in config.items() if name not in EXCLUDED}
    identity = json.loads(json.dumps(named), parse_float=_number)
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(path: str | Path) -> dict:
    """Record of one run.

    Parameters
    ----------
    path : path
        ``<key>.json`` in a store.

    Returns
    -------
    dict
        ``schema``, ``key``, ``config``, ``status`` ("finished" or "failed"), ``rows`` (missing metrics are nan),
        ``kind`` (of failure, one of `KINDS`, or None), ``error`` (traceback or None), ``provenance``, ``started``
        (UTC, ISO 8601), ``wall_s`` (seconds), ``peak_memory_bytes`` (of the process so far: a bound for the run),
        ``peak_cuda_bytes`` (of the run, on its fullest GPU; None without) and ``digest`` (SHA-256 of all the others).

    Raises
    ------
    ValueError
        If the file is damaged, was edited, belongs to another config than its name says, or has a schema not known
        here.

    Notes
    -----
    Records of schema 1, which had no ``kind``, are read as if their failures were of kind "exception".  Before schema 3
    there was no ``digest``, and an edited number is not noticed.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
        _check_record(record)
        if record["key"] != path.stem or key(record["config"]) != path.stem:
            raise ValueError("its config does not fit its name")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole run record: {error}") from error
    rows = [{name: math.nan if value is None else value for name, value in row.items()} for row in record["rows"]]
    return {**record, "kind": record.get("kind", None if rows else "exception"), "rows": rows}


def write_record(path: Path, record: dict, *, replace: bool) -> dict:
    """Write a record atomically, unless a result is there that it may not replace; the record that counts.

    A failure never replaces a result. Without `replace` nothing does: the first process to finish a run wins.

    Raises
    ------
    OSError
        If the file cannot be written, as on a full disk; what was there stays.
    """
    earlier = whole_record(path) if record["status"] == "failed" or not replace else None
    if earlier is not None and earlier["status"] == "finished":
        return record if replace else earlier
    text = json.dumps(record | {"digest": _digest(record)}, indent=1, allow_nan=False)
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        message = f"this record cannot be written ({error.strerror}); those before it are kept: make space, then sweep"
        raise OSError(error.errno, f"{message} again", str(path)) from error
    return read_record(path)


def whole_record(path: Path) -> dict | None:
    """Record of a run, finished or failed, if there is one; a damaged file is set aside with a warning."""
    try:
        return read_record(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        warnings.warn(f"{error}; set aside as {path.name}.corrupt, the run is done again", stacklevel=3)
        with suppress(FileNotFoundError):  # another process may have set it aside first
            os.replace(path, f"{path}.corrupt")
        return None


def record_paths(store: str | Path) -> list[Path]:
    """Files of a store that are named as records are."""
    return [path for path in Path(store).glob("*.json") if re.fullmatch("[0-9a-f]{64}", path.stem)]


def load(store: str | Path | None = None) -> pd.DataFrame:
    """Table of all records in a store, oldest first, with the columns of `fsp.runs.sweep`.

    Parameters
    ----------
    store : path, optional
        Folder of the records; default the repository's own, ``data/runs``. A folder that does not exist is empty.

    Raises
    ------
    ValueError
        If a record is damaged or of an unknown schema; a sweep that meets it sets it aside.
    """
    records = [read_record(path) for path in record_paths(COMMITTED.runs if store is None else store)]
    records.sort(key=lambda record: (record["started"], record["key"]))
    return frame([r["config"] for r in records], [r["key"] for r in records], records)


def code_of(run: dict) -> str | None:
    """First digits of the digest of the code that made a run; None if its record does not say."""
    code = run["provenance"].get("run_code")
    return None if code is None else code[:CODE_DIGITS]


def frame(configs: list[dict], keys: list[str], runs: list[dict]) -> pd.DataFrame:
    """Tidy table: config entries, metrics, status, key and code, each column with the type its values give it."""
    entries = [name for config in configs for name in config if name not in EXCLUDED]
    metrics = [name for run in runs for row in run["rows"] for name in row]
    lines = []
    for config, name, run in zip(configs, keys, runs, strict=True):
        own = {entry: _cell(config[entry], entry) for entry in config if entry not in EXCLUDED}
        about = {"status": run["status"], "key": name, "code": code_of(run)}
        lines += [own | row | about for row in run["rows"] or [{}]]
    columns = dict.fromkeys([*entries, *metrics, *OWN_COLUMNS])  # unique, in order of first appearance
    return pd.DataFrame({column: _column([line.get(column) for line in lines]) for column in columns})


def plain(value: object, name: str) -> object:
    """JSON twin of a config value, tuples as lists; raises on what JSON cannot hold exactly."""
    if not isinstance(name, str):
        raise TypeError(f"config entry {name!r}: expected a name of type str")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"config entry {name!r} is {value}: expected a finite number, or None if not set")
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        if strange := [entry for entry in value if not isinstance(entry, str)]:
            raise TypeError(f"config entry {name!r} holds a name {strange[0]!r}: expected str")
        return {entry: plain(item, f"{name}.{entry}") for entry, item in value.items()}
    raise TypeError(
        f"config entry {name!r} is {value!r} of type {type(value).__name__}: expected None, bool, int, float, str, "
        "or a list, tuple or dict of these"
    )


def stored(value: object, name: str) -> object:
    """JSON twin of a config value for the record; `EXCLUDED` ones may be anything and are kept as text."""
    try:
        return plain(value, name)
    except (TypeError, ValueError):
        return str(value)


# ---- what a record holds -----------------------------------------------------------------------------------------


def _is_amount(value: object) -> bool:
    """Whether this is a finite number of at least 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_memory(value: object) -> bool:
    """Whether this is a number of bytes, or None."""
    return value is None or (_is_amount(value) and isinstance(value, int))


def _is_time(value: object) -> bool:
    """Whether this is a time with its zone, ISO 8601."""
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _is_provenance(value: object) -> bool:
    """Whether this is a dict of texts and some numbers, with a digest if there is one."""
    if not isinstance(value, dict) or not all(type(value[name]) is NUMBERS.get(name, str) for name in value):
        return False
    return re.fullmatch("[0-9a-f]*", value.get("run_code", "")) is not None


def _is_rows(value: object) -> bool:
    """Whether this is a list of rows."""
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


NUMBERS = {"threads": int, "process": int}  # in provenance; all else is text
FIELDS: dict[str, Callable[[object], bool]] = {
    "schema": lambda value: type(value) is int and value in (*ADDED, SCHEMA),
    "key": lambda value: isinstance(value, str),
    "config": lambda value: isinstance(value, dict),
    "status": lambda value: value in ("finished", "failed"),
    "rows": _is_rows,
    "kind": lambda value: value is None or value in KINDS,
    "error": lambda value: value is None or isinstance(value, str),
    "provenance": _is_provenance,
    "started": _is_time,
    "wall_s": _is_amount,
    "peak_memory_bytes": _is_memory,
    "peak_cuda_bytes": _is_memory,
    "digest": lambda value: isinstance(value, str),
}


def _digest(record: dict) -> str:
    """SHA-256 of what a record says, whatever the order of its entries."""
    said = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _check_record(record: object) -> None:
    """Raise a ValueError or a TypeError on anything that `fsp.runs` has not written in this form."""
    if not isinstance(record, dict) or not FIELDS["schema"](record.get("schema")):
        raise ValueError(f"expected a record of schema {', '.join(map(str, (*ADDED, SCHEMA)))}")
    if set(record) != set(FIELDS) - ADDED.get(record["schema"], set()):
        raise ValueError("its entries are not those of its schema")
    if wrong := [name for name in record if not FIELDS[name](record[name])]:
        raise ValueError(f"{wrong[0]!r} is {reprlib.repr(record[wrong[0]])}")
    if "digest" in record and record["digest"] != _digest(record):
        raise ValueError("its digest is not that of what it says: it was edited after the run")
    finished = record["status"] == "finished"
    told = [record.get("kind", record["error"]), record["error"]]  # of a failure
    if finished != bool(record["rows"]) or [text is None for text in told] != [finished, finished]:
        raise ValueError(f"status {record['status']!r} does not fit its rows, kind and error")
    for row in record["rows"]:
        for name in row:
            _check_metric(name, row[name], record["config"], set(record["config"]))


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; raises if a name is there twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    """Raise for NaN and Infinity, which are no JSON."""
    raise ValueError(f"{constant} is no JSON")


def check_rows(result: object, config: dict, entries: set[str]) -> list[dict]:
    """Rows that `function` returned, nan as None; raises on what a record or a table cannot hold."""
    rows: list[Any] = result if isinstance(result, list) else [result]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"run {config!r} returned {result!r}: expected a dict or a list of at least one dict")
    return [{name: _check_metric(name, row[name], config, entries) for name in row} for row in rows]


def _check_metric(name: object, value: object, config: dict, entries: set[str]) -> object:
    """JSON twin of a metric; raises on what a record or a table cannot hold."""
    where = f"run {config!r} returned {name!r}: {value!r}"
    if not isinstance(name, str) or not isinstance(value, None | bool | int | float | str):
        raise TypeError(f"{where}, a {type(value).__name__}: expected str: int, float, bool, str or None")
    if name in entries or name in OWN_COLUMNS:
        raise ValueError(f"{where}, but a config entry or a column of the table has that name: rename it")
    if isinstance(value, str) and not (value.isprintable() and isinstance(value_of(value), str)):
        raise ValueError(f"{where}: expected printable text that a CSV file does not turn into a number")
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"{where}: expected a finite number, or nan where it is undefined")
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(text: str) -> int | float:
    """A JSON float, as an int where it is whole."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _cell(value: object, name: str) -> object:
    """A config value as a scalar; what is nested or breaks lines becomes compact JSON."""
    value = plain(value, name)
    scalar = value.isprintable() if isinstance(value, str) else not isinstance(value, list | dict)
    return value if scalar else json.dumps(value, separators=(",", ":"))


def _column(values: list) -> pd.Series:
    """Series whose type depends on the values alone, not on the order or the source of the rows."""
    values = [math.nan if value is None else value for value in values]
    kinds = {type(value) for value in values}
    if kinds <= {bool}:
        return pd.Series(values, dtype=bool)
    if kinds <= {bool, int}:
        return pd.Series([int(value) for value in values])
    if kinds <= {bool, int, float}:
        return pd.Series(values, dtype="float64")
    return pd.Series(values)
