"""The sweep: which runs are missing, where they are done, and the table of all."""

import functools
import math
import os
import shlex
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from numbers import Real
from pathlib import Path

import pandas as pd

from fsp.progress import bar
from fsp.runs import cluster
from fsp.runs.attempt import Outcome, Task, attempt, on_record
from fsp.runs.code import run_code
from fsp.runs.records import CODE_DIGITS, code_of, frame, key, whole_record
from fsp.runs.tables import OWN_COLUMNS, rows_by_key

BUSY_S = 0.2  # between looks at runs that another process is doing


def sweep(
    function: Callable[[dict], dict | list[dict]],
    configs: list[dict],
    *,
    store: str | Path,
    table: str | Path | None = None,
    recompute: bool = False,
    retry_failed: bool = True,
    timeout: float | None = None,
    scheduler: "str | cluster.Client | None" = None,
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
        How often a run whose worker died is done again before it counts as failed. With an address or a client
        the cluster decides (``distributed.scheduler.allowed-failures``, 3 by default).

    Returns
    -------
    pandas.DataFrame
        For each config in the given order its row or rows. Columns: the config's entries except `EXCLUDED` ones
        (lists, dicts and unprintable text as compact JSON), the metrics, ``status`` ("finished" or "failed"; a
        failed run has missing metrics), ``key`` and ``code``, the first twelve digits of the digest of the code that
        made the row (see `fsp.runs.code.run_code`; missing where nobody knows it). A column is bool or int where
        every value is, float64 where all are numbers or missing. ``attrs`` counts ``reused``, ``computed`` and
        ``failed`` runs, and as ``stale`` the reused ones that other code made.

    Raises
    ------
    TypeError
        If `function` is not callable or cannot be sent to workers, `configs` is no list of dicts, a config value
        is not JSON, or what `function` returned is not made of the types above.
    ValueError
        If `configs` is empty or holds one run twice, a number in a config is nan or infinite, an entry is called
        ``status``, ``key`` or ``code``, another argument is out of its range, `table` is no such table, a metric is
        infinite, reads back from a CSV file as something else, or has the name of a config entry.
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
        on), a store without file locks, and reused rows that other code made: `function`, or something that it reaches,
        has been edited since.

    Notes
    -----
    A run fails by an exception (kind "exception"; "non-finite" for a `FloatingPointError`, "out of memory" for
    `MemoryError` and torch's errors of that sort), by its `timeout`, or because every worker died that took it
    ("worker died"). Its record keeps kind and traceback. `timeout` cannot end a call into compiled code (see
    `fsp.runs.deadline.deadline`); a local worker that is stuck in one for another 30 s is started anew.

    Sweeps may run at the same time on one store: each run is done by one of them (see `fsp.runs.locks.lock`).

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
    by_key = _check_sweep(function, configs)
    code = run_code(function)
    _check_options(scheduler, workers, per_gpu, timeout, retries)
    entries = {name for config in configs for name in config}
    store = Path(store).absolute()
    rows_in_table = {} if recompute or table is None else rows_by_key(Path(table), entries)
    outcomes, tasks = {}, {}
    for name, config in by_key.items():
        path = store / f"{name}.json"
        record = whole_record(path)
        failed_before = record["started"] if record and record["status"] == "failed" else None
        if record and not recompute and not (failed_before and retry_failed):
            outcomes[name] = on_record(record, config, entries)
        elif name in rows_in_table:
            outcomes[name] = on_record(rows_in_table[name], config, entries)
        else:
            tasks[name] = Task(config, path, entries, recompute, timeout, failed_before, code)
    if tasks:
        _check_writable(store)
        with ExitStack() as stack:
            if scheduler is None:
                engine = functools.partial(_in_process, function)
            else:
                connection = cluster.connect(scheduler, workers=workers, per_gpu=per_gpu, retries=retries)
                client = stack.enter_context(connection)
                sign = stack.enter_context(cluster.sign_in(store))
                engine = functools.partial(cluster.distribute, client, sign, function, retries)
            _finish(engine, tasks, outcomes, getattr(function, "__name__", type(function).__name__))

    counts = Counter(outcomes[name].word for name in by_key)
    records = {name: outcomes[name].record or {} for name in by_key}  # all have one: none is busy any more
    errors = [record for name, record in records.items() if outcomes[name].word == "failed"]
    if errors:
        first = errors[0]["error"].strip().splitlines()[-1]
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(error["kind"] for error in errors).items())
        warnings.warn(
            f"{len(errors)} of {len(configs)} runs failed, the first with {first} ({kinds}); tracebacks: "
            f"python -m fsp.runs list --status failed --store {shlex.quote(str(store))}",
            stacklevel=2,
        )
    reused = [name for name in by_key if outcomes[name].word == "reused"]
    stale = sum(code_of(records[name]) != code[:CODE_DIGITS] for name in reused)
    if stale:
        warnings.warn(
            f"{stale} of {len(configs)} runs were reused that other code made: the function, or something that it "
            "reaches, has been edited since; recompute=True does them again",
            stacklevel=2,
        )
    made = frame(configs, list(by_key), list(records.values()))
    # Numbers alone: pandas copies what is here, deeply, with every selection of rows or columns.
    made.attrs = {word: counts[word] for word in ("computed", "reused", "failed")} | {"stale": stale}
    return made


def _finish(engine: Callable, tasks: dict[str, Task], outcomes: dict[str, Outcome], label: str) -> None:
    """Bring every run to its outcome; those that another process is doing are asked for again."""
    # The runs known at the start are no work: they count for neither rate nor time left.
    known = len(outcomes)
    with bar(total=known + len(tasks), initial=known, desc=label, unit="run", smoothing=0) as progress:

        def show(running: int) -> None:
            words = Counter(outcome.word for outcome in outcomes.values())
            counts = {"finished": words["computed"] + words["reused"], "running": running, "failed": words["failed"]}
            progress.set_postfix(counts, refresh=len(outcomes) == progress.n)
            progress.update(len(outcomes) - progress.n)

        pause = BUSY_S
        while tasks:
            busy = {}
            with closing(engine(tasks, show)) as ended:
                for name, outcome in ended:
                    if outcome.word == "busy":
                        busy[name] = tasks[name]
                    else:
                        outcomes[name] = outcome
            pause = BUSY_S if len(busy) < len(tasks) else min(1.5 * pause, 10.0)
            tasks = busy
            if busy:
                time.sleep(pause)
        show(0)


def _in_process(function: Callable, tasks: dict[str, Task], show: Callable) -> Iterator[tuple[str, Outcome]]:
    """Runs one after another in this process."""
    for name, task in tasks.items():
        show(1)
        yield name, attempt(function, task)


def _check_sweep(function: Callable, configs: list[dict]) -> dict[str, dict]:
    """The configs by their keys; raises on anything that a sweep could stumble over later."""
    if not callable(function):
        raise TypeError(f"function is {function!r}: expected a callable that takes a config")
    if not isinstance(configs, list | tuple):
        raise TypeError(f"configs is a {type(configs).__name__}: expected a list of dicts")
    if not configs:
        raise ValueError("configs is empty: expected at least one config")
    by_key: dict[str, dict] = {}
    for index, config in enumerate(configs):
        try:
            name = key(config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"configs[{index}]: {error}") from error
        if own := [entry for entry in OWN_COLUMNS if entry in config]:
            raise ValueError(f"configs[{index}] has an entry {own[0]!r}, a column of the table: rename it")
        if name in by_key:
            earlier = list(by_key).index(name)
            raise ValueError(f"configs[{index}] is the same run as configs[{earlier}]: {config!r}")
        by_key[name] = config
    return by_key


def _check_options(scheduler: object, workers: object, per_gpu: object, timeout: object, retries: object) -> None:
    """Raises on an option that is out of its range or belongs to another scheduler."""
    if not cluster.is_scheduler(scheduler):
        raise ValueError(f"scheduler is {scheduler!r}: expected {cluster.SCHEDULERS}, or a distributed.Client")
    if (workers, per_gpu) != (None, 1) and scheduler != "local":
        raise ValueError('workers and per_gpu belong to scheduler="local": other clusters have the workers they have')
    counts = {"workers": (1 if workers is None else workers, 1), "per_gpu": (per_gpu, 1), "retries": (retries, 0)}
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}: expected a whole number of at least {least}")
    number = isinstance(timeout, Real) and not isinstance(timeout, bool)
    if timeout is not None and not (number and 0 < timeout < math.inf):  # type: ignore[operator]  # a number by now
        raise ValueError(f"timeout is {timeout!r}: expected seconds above 0, or None for no limit")


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
