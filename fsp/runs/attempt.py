"""One attempt at one run: lock it, do it, write its record, whatever happens."""

import copy
import gc
import math
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import NamedTuple

import torch

from fsp.files import CannotResume
from fsp.runs.deadline import GRACE, OutOfTime, deadline
from fsp.runs.locks import lock
from fsp.runs.provenance import provenance
from fsp.runs.records import SCHEMA, check_rows, stored, whole_record, write_record
from fsp.runs.scratching import FOLDER, scratch_folder


class Task(NamedTuple):
    """A run to be done: all that an attempt needs to know beside the function."""

    config: dict
    path: Path  # of its record
    entries: set[str]  # names of all entries of the sweep's configs
    recompute: bool
    timeout: float | None
    # When the failed record was started that was there before the sweep. A later one is from this sweep, or from
    # another at the same time, and counts.
    failed_before: str | None
    code: str = ""  # digest of the function, see `fsp.runs.code.run_code`


class Outcome(NamedTuple):
    """How a run ended: "computed", "reused", "failed", or "busy" if another process is doing it."""

    word: str
    record: dict | None = None


class WorkerDied(Exception):
    """Every worker that took this run died."""


def attempt(function: Callable, task: Task, *, die: Callable[[], None] | None = None) -> Outcome:
    """Do one run, unless it is done or another process is doing it.

    Parameters
    ----------
    function : callable
        As in `fsp.runs.sweep`.
    task : Task
    die : callable, optional
        Ends this process. Called where nothing else helps, after the record is written.

    Returns
    -------
    Outcome
    """
    with lock(task.path) as mine:
        if not mine:
            return Outcome("busy")
        # Look again: another process may have finished this run, or failed in it, since the sweep began.
        found = whole_record(task.path)
        if found and found["status"] == "finished" and not task.recompute:
            return on_record(found, task.config, task.entries)
        if found and found["status"] == "failed" and found["started"] != task.failed_before:
            return on_record(found, task.config, task.entries)
        return _compute(function, task, die)


def on_record(record: dict, config: dict, entries: set[str]) -> Outcome:
    """The outcome of a run that has a record; raises if the table of this sweep cannot hold it."""
    if record["status"] == "failed":
        return Outcome("failed", record)
    check_rows(record["rows"], config, entries)
    return Outcome("reused", record)


def _compute(function: Callable, task: Task, die: Callable[[], None] | None) -> Outcome:
    """Do one run and write its record."""
    for gpu in _gpus_in_use():  # pragma: no cover - needs CUDA
        torch.cuda.reset_peak_memory_stats(gpu)
    started, clock = datetime.now(UTC), time.perf_counter()

    def write(rows: list[dict], kind: str | None = None, error: str | None = None) -> dict:
        record = {
            "schema": SCHEMA,
            "key": task.path.stem,
            "config": {name: stored(value, name) for name, value in task.config.items()},
            "status": "failed" if kind else "finished",
            "rows": rows,
            "kind": kind,
            "error": error,
            "provenance": provenance() | {"run_code": task.code, "host": gethostname(), "process": os.getpid()},
            "started": started.isoformat(),
            "wall_s": time.perf_counter() - clock,
            "peak_memory_bytes": _peak_memory_bytes(),
            "peak_cuda_bytes": max(map(torch.cuda.max_memory_allocated, _gpus_in_use()), default=0) or None,
        }
        return write_record(task.path, record, replace=task.recompute)

    too_late = f"not finished after {task.timeout or math.inf:g} s"

    def give_up() -> None:
        write([], "timeout", f"{too_late}, and stuck for {GRACE:g} s more: its process was ended")
        die()  # type: ignore[misc]  # called only where there is one

    kind = None
    try:
        with deadline(task.timeout, last_resort=give_up if die else None):
            result = _call(function, task)
    except (Exception, OutOfTime) as raised:
        kind, error = _kind(raised), traceback.format_exc()
        if kind == "timeout":
            error += too_late
        if kind == "worker died":
            error = str(raised)
        # after such an error, an illegal memory access for one, all work of this process on the GPU fails
        spoiled = kind == "exception" and isinstance(raised, torch.AcceleratorError)
    if kind is None:
        record = write(check_rows(result, task.config, task.entries))
        shutil.rmtree(scratch_folder(task.path, task.code), ignore_errors=True)
        return Outcome("computed", record)
    record = write([], kind, error)
    if spoiled and die:
        die()
    if kind == "out of memory":
        gc.collect()
        torch.cuda.empty_cache()
    return Outcome("reused" if record["status"] == "finished" else "failed", record)


def _call(function: Callable, task: Task) -> object:
    """What the function returns; if it cannot go on from its scratch, it starts again without."""
    folder = scratch_folder(task.path, task.code)
    if task.recompute:
        shutil.rmtree(folder, ignore_errors=True)
    resumes = folder.is_dir() and any(folder.iterdir())
    token = FOLDER.set(folder)
    try:
        try:
            return function(copy.deepcopy(task.config))
        except CannotResume as error:  # a checkpoint of other masks, for one, which scoring on a GPU may give next time
            if not resumes:
                raise
            text = f"{task.path.stem[:12]} cannot go on from its scratch, and starts again without: {error}"
            warnings.warn(text, stacklevel=2)
        shutil.rmtree(folder, ignore_errors=True)
        return function(copy.deepcopy(task.config))
    finally:
        FOLDER.reset(token)


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


def _gpus_in_use() -> range:
    """Numbers of the GPUs, none if this process does not use CUDA."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _peak_memory_bytes() -> int | None:
    """Most memory this process ever held."""
    try:
        import resource
    except ImportError:  # Windows has no such module
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kibibytes everywhere else
