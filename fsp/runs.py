"""Runs, their records and their tables.

A run is one call of a function with one config, a plain dict. When it finishes it writes one JSON record named
by the config's `key`; a sweep skips what already has one, and that is all resuming means. The tidy table of a
sweep is made from the records alone, so an interrupted and an uninterrupted sweep give the same bytes.
"""

import copy
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch

from fsp.paths import replacing
from fsp.progress import bar
from fsp.provenance import provenance
from fsp.tables import OWN_COLUMNS, rows_by_key, value_of

try:
    import resource
except ImportError:  # Windows has no such module: records there hold a null peak_memory_bytes
    resource = None

EXCLUDED = frozenset({"device", "threads", "workers", "verbose", "out_dir", "root", "download"})
SCHEMA = 1  # of the records; a change of EXCLUDED or of `key` is a change of schema
FIELDS = {"schema", "key", "config", "status", "rows", "error", "provenance", "started", "wall_s"}
FIELDS |= {"peak_memory_bytes", "peak_cuda_bytes"}


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
    plain = {name: _plain(value, name) for name, value in config.items() if name not in EXCLUDED}
    identity = json.loads(json.dumps(plain), parse_float=_number)
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sweep(
    function: Callable[[dict], dict | list[dict]],
    configs: list[dict],
    *,
    store: str | Path,
    table: str | Path | None = None,
    recompute: bool = False,
    scheduler: None = None,
) -> pd.DataFrame:
    """Tidy table of `function` over `configs`, computing only the runs not done before.

    Parameters
    ----------
    function : callable
        ``function(config)`` returns the metrics of one run: a dict for one row, or a list of dicts for several (a
        trajectory). Values are int, float, bool, None or a printable str that does not read as one of these;
        nan and None both mean *missing*. It gets a copy of its config.
    configs : list of dict
        One run each; see `key`. All runs of one store must be told apart by their configs: where two functions
        share a store, give each its own entry, such as ``"experiment"``.
    store : path
        Folder of the records ``<key>.json``.
    table : path, optional
        A table written by `fsp.tables.update`, which need not exist. Its finished rows stand in for missing records.
    recompute : bool
        Compute every run. A record is replaced only when its replacement is finished; a run that fails leaves
        the finished record of before.
    scheduler : None
        Runs go one after another in this process.

    Returns
    -------
    pandas.DataFrame
        For each config in the given order its row or rows. Columns: the config's entries except `EXCLUDED` ones
        (lists, dicts and unprintable text as compact JSON), the metrics, ``status`` ("finished" or "failed"; a
        failed run has missing metrics) and ``key``. A column is bool or int where every value is, float64 where
        all are numbers or missing. ``attrs`` counts ``reused``, ``computed`` and ``failed`` runs, and the reused
        records made by another version of this package as ``other_code``.

    Raises
    ------
    TypeError
        If `function` is not callable, `configs` is no list of dicts, a config value is not JSON, or what
        `function` returned is not made of the types above.
    ValueError
        If `configs` is empty or holds one run twice, a number in a config is nan or infinite, an entry is called
        ``status`` or ``key``, `scheduler` is not None, `table` is no such table, a metric is infinite, reads
        back from a CSV file as something else, or has the name of a config entry.
    OSError
        If a run is missing and `store` cannot be written to; checked before the first run.

    Warns
    -----
    UserWarning
        For a damaged record (set aside as ``<key>.json.corrupt`` and computed again), failed runs (the sweep goes
        on; they are tried again next time) and records made by another version of this package.

    Notes
    -----
    Rows from `table` carry all its metric columns, those of other functions (all missing) included.

    Examples
    --------
    >>> frame = sweep(lambda c: {"square": c["x"] ** 2}, [{"x": 2}, {"x": 3}], store=tempfile.mkdtemp())
    >>> frame[["x", "square"]].values.tolist()
    [[2, 4], [3, 9]]
    """
    keys = _check_sweep(function, configs, scheduler)
    entries = {name for config in configs for name in config}
    store = Path(store)
    rows_in_table = {} if recompute or table is None else rows_by_key(Path(table), entries)
    records = {} if recompute else {name: _finished(store / f"{name}.json") for name in keys}
    if not all(records.get(name) or name in rows_in_table for name in keys):
        _check_writable(store)

    runs, counts = [], {"computed": 0, "reused": 0, "failed": 0}
    other_code, errors = 0, []
    label = getattr(function, "__name__", type(function).__name__)
    with bar(total=len(configs), desc=label, unit="run") as progress:
        for config, name in zip(configs, keys, strict=True):
            path = store / f"{name}.json"
            # Look again: another process may have finished this run since the sweep began.
            run = None if recompute else records[name] or _finished(path)
            if run is not None:
                _check_rows(run["rows"], config, entries)
                other_code += run["provenance"].get("code") != provenance()["code"]
                outcome = "reused"
            elif name in rows_in_table:
                run = {"status": "finished", "rows": rows_in_table[name]}
                outcome = "reused"
            else:
                run = _compute(function, config, path, entries, recompute)
                outcome = "computed" if run["status"] == "finished" else "failed"
                errors += [run["error"]] if run["error"] else []
            runs.append(run)
            counts[outcome] += 1
            progress.set_postfix(counts, refresh=False)
            progress.update()

    if errors:
        first = errors[0].strip().splitlines()[-1]
        warnings.warn(
            f"{len(errors)} of {len(configs)} runs failed, the first with {first}; tracebacks are in {store}",
            stacklevel=2,
        )
    if other_code:
        warnings.warn(
            f"{other_code} reused runs were made by another version of fsp; recompute=True redoes them",
            stacklevel=2,
        )
    frame = _frame(configs, keys, runs)
    frame.attrs = {**counts, "other_code": other_code}
    return frame


def read_record(path: str | Path) -> dict:
    """Record of one run.

    Parameters
    ----------
    path : path
        ``<key>.json`` in a store.

    Returns
    -------
    dict
        ``schema``, ``key``, ``config``, ``status``, ``rows`` (missing metrics are nan), ``error`` (traceback or
        None), ``provenance``, ``started`` (UTC, ISO 8601), ``wall_s`` (seconds), ``peak_memory_bytes`` (of the
        process so far: a bound for the run) and ``peak_cuda_bytes`` (of the run, on its fullest GPU; None
        without).

    Raises
    ------
    ValueError
        If the file is damaged, belongs to another config than its name says, or has another schema.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"expected a record of schema {SCHEMA}")
        if set(record) != FIELDS or key(record["config"]) != path.stem or record["key"] != path.stem:
            raise ValueError("its entries or its config do not fit its name")
        rows = [{name: _known(value) for name, value in row.items()} for row in record["rows"]]
        if record["status"] != ("finished" if rows else "failed"):
            raise ValueError(f"status {record['status']!r} with {len(rows)} rows")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole run record: {error}") from error
    return {**record, "rows": rows}


def load(store: str | Path) -> pd.DataFrame:
    """Table of all records in a store, oldest first, with the columns of `sweep`.

    Raises
    ------
    ValueError
        If a record is damaged or of another schema; a sweep that meets it sets it aside.
    """
    named = [path for path in Path(store).glob("*.json") if re.fullmatch("[0-9a-f]{64}", path.stem)]
    records = sorted(map(read_record, named), key=lambda record: (record["started"], record["key"]))
    return _frame([r["config"] for r in records], [r["key"] for r in records], records)


def _check_sweep(function: Callable, configs: list[dict], scheduler: None) -> list[str]:
    """Keys of the configs; raises on anything that a sweep could stumble over later."""
    if not callable(function):
        raise TypeError(f"function is {function!r}: expected a callable that takes a config")
    if scheduler is not None:
        raise ValueError(f"scheduler is {scheduler!r}: only None (runs in this process) is available")
    if not isinstance(configs, list | tuple):
        raise TypeError(f"configs is a {type(configs).__name__}: expected a list of dicts")
    if not configs:
        raise ValueError("configs is empty: expected at least one config")
    seen: dict[str, int] = {}
    for index, config in enumerate(configs):
        try:
            name = key(config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"configs[{index}]: {error}") from error
        if own := [entry for entry in OWN_COLUMNS if entry in config]:
            raise ValueError(f"configs[{index}] has an entry {own[0]!r}, a column of the table: rename it")
        if name in seen:
            raise ValueError(f"configs[{index}] is the same run as configs[{seen[name]}]: {config!r}")
        seen[name] = index
    return list(seen)


def _check_writable(store: Path) -> None:
    """Write a little into the folder, made if missing, before hours of work depend on it."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store) as file:
            file.write(bytes(65536))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        message = f"no run was started, for records cannot be written here ({error.strerror}); choose a store"
        raise OSError(error.errno, f"{message} that is writable and has space", str(store)) from error


def _compute(function: Callable, config: dict, path: Path, entries: set[str], recompute: bool) -> dict:
    """Do one run and write its record. All a run needs is in here, so that it can be done in any process."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    started, clock = datetime.now(UTC), time.perf_counter()
    result = error = None
    try:
        result = function(copy.deepcopy(config))
    except Exception:
        error = traceback.format_exc()
    wall_s = time.perf_counter() - clock
    record = {
        "schema": SCHEMA,
        "key": path.stem,
        "config": {name: _stored(value, name) for name, value in config.items()},
        "status": "failed" if error else "finished",
        "rows": [] if error else _check_rows(result, config, entries),
        "error": error,
        "provenance": provenance(),
        "started": started.isoformat(),
        "wall_s": wall_s,
        "peak_memory_bytes": _peak_memory_bytes(),
        "peak_cuda_bytes": _peak_cuda_bytes(),
    }
    # Without `recompute` the first of two processes to finish a run wins; a failure never replaces a result.
    earlier = _finished(path) if error or not recompute else None
    if earlier is not None:
        return record if recompute else earlier
    text = json.dumps(record, indent=1, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return record if error else read_record(path)


def _finished(path: Path) -> dict | None:
    """Record of a finished run, if there is one; a damaged file is set aside."""
    try:
        record = read_record(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        warnings.warn(f"{error}; set aside as {path.name}.corrupt, the run is done again", stacklevel=3)
        with suppress(FileNotFoundError):  # another process may have set it aside first
            os.replace(path, f"{path}.corrupt")
        return None
    return record if record["status"] == "finished" else None


def _peak_memory_bytes() -> int | None:
    """Most memory this process ever held."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kibibytes everywhere else


def _peak_cuda_bytes() -> int | None:
    """Most memory the run held on one GPU, or None if it used none."""
    if not torch.cuda.is_initialized():
        return None
    return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())) or None


def _number(text: str) -> int | float:
    """A JSON float, as an int where it is whole."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _plain(value: object, name: str) -> object:
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
        return [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        if strange := [entry for entry in value if not isinstance(entry, str)]:
            raise TypeError(f"config entry {name!r} holds a name {strange[0]!r}: expected str")
        return {entry: _plain(item, f"{name}.{entry}") for entry, item in value.items()}
    raise TypeError(
        f"config entry {name!r} is {value!r} of type {type(value).__name__}: expected None, bool, int, float, str, "
        "or a list, tuple or dict of these"
    )


def _stored(value: object, name: str) -> object:
    """JSON twin of a config value for the record; `EXCLUDED` ones may be anything and are kept as text."""
    try:
        return _plain(value, name)
    except (TypeError, ValueError):
        return str(value)


def _check_rows(result: object, config: dict, entries: set[str]) -> list[dict]:
    """Rows that `function` returned, nan as None; raises on what a record or a table cannot hold."""
    rows = result if isinstance(result, list) else [result]
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
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    return value


def _known(value: object) -> object:
    """A metric from a record: null is nan, and nothing is nested."""
    if isinstance(value, list | dict):
        raise ValueError(f"metric {value!r} is no scalar")
    return math.nan if value is None else value


def _frame(configs: list[dict], keys: list[str], runs: list[dict]) -> pd.DataFrame:
    """Tidy table: config entries, metrics, status and key, each column with the type its values give it."""
    entries = [name for config in configs for name in config if name not in EXCLUDED]
    metrics = [name for run in runs for row in run["rows"] for name in row]
    lines = []
    for config, name, run in zip(configs, keys, runs, strict=True):
        own = {entry: _cell(config[entry], entry) for entry in config if entry not in EXCLUDED}
        lines += [{**own, **row, "status": run["status"], "key": name} for row in run["rows"] or [{}]]
    columns = dict.fromkeys([*entries, *metrics, *OWN_COLUMNS])  # unique, in order of first appearance
    return pd.DataFrame({column: _column([line.get(column) for line in lines]) for column in columns})


def _cell(value: object, name: str) -> object:
    """A config value as a scalar; what is nested or breaks lines becomes compact JSON."""
    plain = _plain(value, name)
    scalar = plain.isprintable() if isinstance(plain, str) else not isinstance(plain, list | dict)
    return plain if scalar else json.dumps(plain, separators=(",", ":"))


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
