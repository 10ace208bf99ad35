"""One attempt at one run: claim it, do it, write its record, whatever happens."""

import copy
import gc
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from fsp.runs.cluster import WorkerDied
from fsp.runs.deadline import GRACE, OutOfTime, deadline
from fsp.runs.locks import claim
from fsp.runs.provenance import provenance
from fsp.runs.records import SCHEMA, check_rows, stored, whole_record, write_record
from fsp.runs.unfinished import delete_scratch, has_scratch, scratch_of

try:
    import resource
except ImportError:  # Windows has no such module: records there hold a null peak_memory_bytes
    resource = None


class Outcome(NamedTuple):
    """How a run ended: "computed", "reused", "failed", or "busy" if another process is doing it."""

    word: str
    kind: str | None = None
    error: str | None = None


def attempt(
    function: Callable,
    config: dict,
    name: str,
    store: Path,
    entries: set[str],
    recompute: bool,
    timeout: float | None,
    failed_before: str | None,
    die: Callable[[], None] | None = None,
) -> Outcome:
    """Do one run, unless it is done or another process is at it.

    Parameters
    ----------
    function, config, store, recompute, timeout
        As in `fsp.runs.sweep`.
    name : str
        Key of the config.
    entries : set of str
        Names of all entries of the sweep's configs.
    failed_before : str or None
        When the failed record that the sweep may replace was started; a later one is from this sweep or another
        at the same time, and counts.
    die : callable, optional
        Ends this process. Called where nothing else helps, after the record is written.

    Returns
    -------
    Outcome
    """
    path = store / f"{name}.json"
    with claim(path) as mine:
        if not mine:
            return Outcome("busy")
        # Look again: another process may have finished this run, or failed in it, since the sweep began.
        found = whole_record(path)
        if found and found["status"] == "finished" and not recompute:
            check_rows(found["rows"], config, entries)
            return Outcome("reused")
        if found and found["status"] == "failed" and found["started"] != failed_before:
            return failure(found)
        return _compute(function, config, path, entries, recompute, timeout, die)


def _compute(
    function: Callable,
    config: dict,
    path: Path,
    entries: set[str],
    recompute: bool,
    timeout: float | None,
    die: Callable[[], None] | None,
) -> Outcome:
    """Do one run and write its record."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    started, clock = datetime.now(UTC), time.perf_counter()

    def record(rows: list[dict], kind: str | None = None, error: str | None = None) -> dict:
        return {
            "schema": SCHEMA,
            "key": path.stem,
            "config": {name: stored(value, name) for name, value in config.items()},
            "status": "failed" if kind else "finished",
            "rows": rows,
            "kind": kind,
            "error": error,
            "provenance": provenance(),
            "started": started.isoformat(),
            "wall_s": time.perf_counter() - clock,
            "peak_memory_bytes": _peak_memory_bytes(),
            "peak_cuda_bytes": _peak_cuda_bytes(),
        }

    def give_up() -> None:
        text = f"not finished after {timeout:g} s, and stuck for {GRACE:g} s more: its process was ended"
        write_record(path, record([], "timeout", text), replace=recompute)
        die()

    result = kind = None
    poisoned = False
    try:
        with deadline(timeout, last_resort=give_up if die else None):
            result = _called(function, config, path, recompute)
    except (Exception, OutOfTime) as error:
        kind, text = _kind(error), traceback.format_exc()
        text += f"not finished after {timeout:g} s" if kind == "timeout" else ""
        text = str(error) if kind == "worker died" else text
        poisoned = isinstance(error, torch.AcceleratorError) and kind == "exception"
    if kind is None:
        rows = check_rows(result, config, entries)
        write_record(path, record(rows), replace=recompute)
        delete_scratch(path)
        return Outcome("computed")
    kept = write_record(path, record([], kind, text), replace=recompute)
    if poisoned and die:  # a GPU error such as an illegal access fails all that this process does after it
        die()
    if kind == "out of memory":
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return Outcome("reused") if kept["status"] == "finished" else failure(kept)


def _called(function: Callable, config: dict, path: Path, recompute: bool) -> object:
    """What the function returns; where it cannot go on from what it kept, from nothing."""
    going_on = has_scratch(path) and not recompute
    try:
        with scratch_of(path, anew=recompute):
            return function(copy.deepcopy(config))
    except ValueError as error:  # so is a checkpoint of other weights or masks refused, as after scoring on a GPU again
        if not going_on:
            raise
        warnings.warn(f"{path.stem[:12]} cannot go on from what it kept, and begins anew: {error}", stacklevel=2)
    with scratch_of(path, anew=True):
        return function(copy.deepcopy(config))


def failure(record: dict) -> Outcome:
    """The outcome that a failed record tells of."""
    return Outcome("failed", record["kind"], record["error"].strip().splitlines()[-1])


def _kind(error: BaseException) -> str:
    """What sort of failure an exception is, one of `fsp.runs.records.KINDS`."""
    if isinstance(error, OutOfTime):
        return "timeout"
    if isinstance(error, WorkerDied):
        return "worker died"
    if isinstance(error, FloatingPointError):
        return "non-finite"
    # torch has no class of its own for lack of main memory
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of memory"
    return "exception"


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
