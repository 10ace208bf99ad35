"""The sweep: which runs are missing, who does them, and the table of all."""

import functools
import os
import tempfile
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from math import isfinite
from numbers import Real
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING

import pandas as pd

from fsp.progress import bar
from fsp.runs import cluster
from fsp.runs.attempt import Outcome, attempt, failure
from fsp.runs.locks import claim, has_locks
from fsp.runs.provenance import provenance
from fsp.runs.records import check_rows, frame, key, whole_record
from fsp.runs.tables import OWN_COLUMNS, rows_by_key

if TYPE_CHECKING:
    from distributed import Client

BUSY_S = 0.2  # between looks at runs that another process is doing
VISIBLE_S = 90.0  # in which a record written on another machine must show here


def sweep(
    function: Callable[[dict], dict | list[dict]],
    configs: list[dict],
    *,
    store: str | Path,
    table: str | Path | None = None,
    recompute: bool = False,
    retry_failed: bool = True,
    timeout: float | None = None,
    scheduler: "str | Client | None" = None,
    workers: int | None = None,
    per_gpu: int = 1,
    retries: int = 2,
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
        Folder of the records ``<key>.json``. All workers must see it under this path.
    table : path, optional
        A table written by `fsp.runs.tables.update`, if it exists. Its finished rows stand in for missing records.
    recompute : bool
        Compute every run. A record is replaced only when its replacement is finished; a run that fails leaves
        the finished record of before.
    retry_failed : bool
        Try again the runs whose record says that they failed; else they stay as they are.
    timeout : float, optional
        Seconds of wall time that a run may take before it fails.
    scheduler : None, "local", str or distributed.Client
        None: runs go one after another in this process. "local": in worker processes on this machine. Else the
        address of a Dask scheduler, such as ``"tcp://10.0.0.1:8786"``, or a client.
    workers : int, optional
        "local": number of processes; default `per_gpu` for each GPU, without one the number of cores.
    per_gpu : int
        "local": processes that share a GPU.
    retries : int
        How often a run is done again whose worker died before it counts as failed. With an address or a client
        the cluster decides (``distributed.scheduler.allowed-failures``, 3 by default).

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
        If `function` is not callable or cannot be sent to workers, `configs` is no list of dicts, a config value
        is not JSON, or what `function` returned is not made of the types above.
    ValueError
        If `configs` is empty or holds one run twice, a number in a config is nan or infinite, an entry is called
        ``status`` or ``key``, another argument is out of its range, `table` is no such table, a metric is infinite,
        reads back from a CSV file as something else, or has the name of a config entry.
    OSError
        If a run is missing and `store` cannot be written to, checked before the first run; if a record cannot be
        written later, as on a full disk; if a worker does not see `store`. Records written before are kept.
    ConnectionError
        If no scheduler answers at the address, or it goes away. Records written before are kept.
    RuntimeError
        If workers cannot load `function`.

    Warns
    -----
    UserWarning
        For a damaged record (set aside as ``<key>.json.corrupt`` and computed again), failed runs (the sweep goes
        on), a store without file locks, and records made by another version of this package.

    Notes
    -----
    A run fails by an exception (kind "exception"; "non-finite" for a `FloatingPointError`, "out of memory" for
    `MemoryError` and torch's errors of that sort), by its `timeout`, or because every worker died that took it
    ("worker died"). Its record keeps kind and traceback. `timeout` cannot end a call into compiled code (see
    `fsp.runs.deadline.deadline`); a local worker that is stuck in one for another 30 s is started anew.

    Sweeps may run at the same time on one store: each run is done by one of them (see `fsp.runs.locks.claim`).

    On workers a run has one thread of torch and of the numerical libraries, unless `function` asks for more. Results
    are the same bits as in this process if that has one thread too (``torch.set_num_threads(1)``).

    With "local" a script, unlike a notebook, needs the usual ``if __name__ == "__main__":``, for worker processes
    import it. Rows from `table` carry all its metric columns, those of other functions (all missing) included.

    Examples
    --------
    >>> frame = sweep(lambda c: {"square": c["x"] ** 2}, [{"x": 2}, {"x": 3}], store=tempfile.mkdtemp())
    >>> frame[["x", "square"]].values.tolist()
    [[2, 4], [3, 9]]
    """
    keys = _check_sweep(function, configs)
    _check_options(scheduler, workers, per_gpu, timeout, retries)
    entries = {name for config in configs for name in config}
    store = Path(store).absolute()
    rows_in_table = {} if recompute or table is None else rows_by_key(Path(table), entries)
    before = {name: record for name in keys if (record := whole_record(store / f"{name}.json"))}
    failed_before = {name: record["started"] for name, record in before.items() if record["status"] == "failed"}
    known = {} if recompute else {n: r for n, r in before.items() if n not in failed_before or not retry_failed}
    for name in rows_in_table.keys() & keys - known.keys():
        known[name] = {"status": "finished", "rows": rows_in_table[name]}
    for config, name in zip(configs, keys, strict=True):
        if name in known and known[name]["rows"]:
            check_rows(known[name]["rows"], config, entries)
    calls = {
        name: (config, name, store, entries, recompute, timeout, failed_before.get(name))
        for config, name in zip(configs, keys, strict=True)
        if name not in known
    }
    outcomes = {n: Outcome("reused") if r["rows"] else failure(r) for n, r in known.items()}
    if calls:
        _check_writable(store)
        with ExitStack() as stack:
            if scheduler is None:
                engine = _in_process
            else:
                engine = _on_cluster(stack, store, scheduler, workers, per_gpu, retries)
            show = stack.enter_context(_progress(function, outcomes, len(configs)))
            _finish(functools.partial(engine, function, show), calls, outcomes, show)

    runs = known | _read(store, {n: outcomes[n] for n in calls}, 0.0 if scheduler is None else VISIBLE_S)
    errors = [outcome for name in keys if (outcome := outcomes[name]).word == "failed"]
    if errors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(error.kind for error in errors).items())
        warnings.warn(
            f"{len(errors)} of {len(configs)} runs failed, the first with {errors[0].error} ({kinds}); tracebacks: "
            f"python -m fsp.runs list --status failed --store {store}",
            stacklevel=2,
        )
    reused = [runs[name] for name in keys if outcomes[name].word == "reused" and "provenance" in runs[name]]
    other_code = sum(run["provenance"].get("code") != provenance()["code"] for run in reused)
    if other_code:
        warnings.warn(
            f"{other_code} reused runs were made by another version of fsp; recompute=True redoes them",
            stacklevel=2,
        )
    made = frame(configs, keys, [runs[name] for name in keys])
    counts = Counter(outcomes[name].word for name in keys)
    made.attrs = {word: counts[word] for word in ("computed", "reused", "failed")} | {"other_code": other_code}
    return made


@contextmanager
def _progress(function: Callable, outcomes: dict[str, Outcome], total: int) -> Iterator[Callable]:
    """Bar over the runs; what it yields brings it up to date, and may be told the number of runs in work."""
    label = getattr(function, "__name__", type(function).__name__)
    # The runs known at the start are no work: they count for neither rate nor time left.
    with bar(total=total, initial=len(outcomes), desc=label, unit="run", smoothing=0) as progress:
        running = 0

        def show(now: int | None = None) -> None:
            nonlocal running
            running = min(running if now is None else now, total - len(outcomes))
            words = Counter(outcome.word for outcome in outcomes.values())
            counts = {"finished": words["computed"] + words["reused"], "running": running, "failed": words["failed"]}
            progress.set_postfix(counts, refresh=False)
            if len(outcomes) > progress.n:
                progress.update(len(outcomes) - progress.n)
            else:
                progress.refresh()

        show()
        yield show


def _finish(engine: Callable, calls: dict[str, tuple], outcomes: dict[str, Outcome], show: Callable) -> None:
    """Bring every call to its outcome; those that another process is doing are asked for again."""
    pause = BUSY_S
    while calls:
        busy = {}
        with closing(engine(calls)) as ended:
            for name, outcome in ended:
                if isinstance(outcome, cluster.WorkerDied):
                    outcome = attempt(functools.partial(_throw, outcome), *calls[name])
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome.word == "busy":
                    busy[name] = calls[name]
                else:
                    outcomes[name] = outcome
                    show()
        pause = BUSY_S if len(busy) < len(calls) else min(1.5 * pause, 10.0)
        calls = busy
        if busy:
            time.sleep(pause)


def _in_process(function: Callable, show: Callable, calls: dict[str, tuple]) -> Iterator[tuple[str, Outcome]]:
    """Runs one after another in this process."""
    for name, call in calls.items():
        show(1)
        yield name, attempt(function, *call)


def _on_cluster(
    stack: ExitStack, store: Path, scheduler: "str | Client", workers: int | None, per_gpu: int, retries: int
) -> Callable:
    """Runs on a cluster, which `stack` closes, with a file in the store by which workers know that it is this one."""
    client = stack.enter_context(cluster.connect(scheduler, workers=workers, per_gpu=per_gpu, retries=retries))
    sign = store / f".sweep-{uuid.uuid4().hex}.lock"
    sign.touch()
    stack.callback(sign.unlink, missing_ok=True)
    stack.enter_context(claim(sign))
    task = functools.partial(_task_in_store, sign)
    return lambda function, show, calls: cluster.distribute(client, task, function, calls, retries=retries, show=show)


def _task_in_store(sign: Path, function: Callable, *call, die: Callable | None) -> Outcome:
    """An attempt, if this machine sees the store of the sweep."""
    if not sign.exists():
        raise FileNotFoundError(
            f"worker {gethostname()} does not see the store {sign.parent} of this sweep: expected a folder that this "
            "machine and all workers share under one path"
        )
    return attempt(function, *call, die=die)


def _throw(error: Exception, config: dict) -> None:
    """A run that ends as its workers did."""
    raise error


def _read(store: Path, outcomes: dict[str, Outcome], wait: float) -> dict[str, dict]:
    """What the table needs of the runs; a record from another machine may take `wait` seconds to show here."""
    found, end = {}, time.monotonic() + wait
    for name, outcome in outcomes.items():
        found[name] = {"status": "failed", "rows": []}
        while outcome.word != "failed":
            record = whole_record(store / f"{name}.json")
            if record is not None:
                found[name] = record
                break
            if time.monotonic() > end:
                raise FileNotFoundError(f"record {name}.json was written to {store}, and is not there: sweep again")
            time.sleep(0.5)
    return found


def _check_sweep(function: Callable, configs: list[dict]) -> list[str]:
    """Keys of the configs; raises on anything that a sweep could stumble over later."""
    if not callable(function):
        raise TypeError(f"function is {function!r}: expected a callable that takes a config")
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


def _check_options(scheduler: object, workers: object, per_gpu: object, timeout: object, retries: object) -> None:
    """Raises on an option that is out of its range or belongs to another scheduler."""

    def count(value: object, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    if not cluster.is_scheduler(scheduler):
        raise ValueError(f"scheduler is {scheduler!r}: expected {cluster.SCHEDULERS}, or a distributed.Client")
    if workers is not None and not count(workers, 1):
        raise ValueError(f"workers is {workers!r}: expected a whole number of at least 1, or None for all there is")
    if not count(per_gpu, 1):
        raise ValueError(f"per_gpu is {per_gpu!r}: expected a whole number of at least 1")
    if (workers, per_gpu) != (None, 1) and scheduler != "local":
        raise ValueError('workers and per_gpu belong to scheduler="local": other clusters have the workers they have')
    if not count(retries, 0):
        raise ValueError(f"retries is {retries!r}: expected a whole number of at least 0")
    number = isinstance(timeout, Real) and not isinstance(timeout, bool)
    if timeout is not None and not (number and isfinite(timeout) and timeout > 0):
        raise ValueError(f"timeout is {timeout!r}: expected seconds above 0, or None for no limit")


def _check_writable(store: Path) -> None:
    """Write a little into the folder, made if missing, before hours of work depend on it."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store) as file:
            file.write(bytes(65536))
            file.flush()
            os.fsync(file.fileno())
            locks = has_locks(file)
    except OSError as error:
        message = f"no run was started, for records cannot be written here ({error.strerror}); choose a store"
        raise OSError(error.errno, f"{message} that is writable and has space", str(store)) from error
    if not locks:
        warnings.warn(f"{store} has no file locks: sweeps at the same time may do a run twice", stacklevel=3)
