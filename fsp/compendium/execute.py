"""Notebooks in processes of their own, several at once if asked; papermill executes them."""

import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

KERNEL = "python3"
ERROR_LINES = 15
LOOK_S = 0.1  # how often a notebook's process is looked at


class Job(NamedTuple):
    """A notebook to run.

    Attributes
    ----------
    source, target : Path
        The notebook, and where to write the executed one, which is kept up to date after every cell.
    parameters : dict
    environment : dict of str to str
        Environment variables of its kernel, beside those of this process.
    """

    source: Path
    target: Path
    parameters: dict
    environment: dict


def run(jobs: Iterable[Job], *, workers: int = 1, timeout: float = math.inf) -> Iterator[tuple[Job, float, str]]:
    """Run notebooks with papermill, each in a process of its own.

    Every cell is announced.  What kernels print is shown as it comes where one notebook runs at a time; of several,
    it is in their executed notebooks alone.  No notebook runs on when the iteration ends, however it ends.

    Parameters
    ----------
    jobs : iterable of Job
        Started in this order, but for notebooks that measure time, with the tag ``timing`` on a cell such as the
        parameters, and those that show what the others found, with the tag ``last``: they run alone, these after those.
    workers : int, at least 1
        Notebooks at once.
    timeout : float
        Seconds for each notebook.

    Yields
    ------
    job : Job
        In the order in which they end.
    seconds : float
        Wall time.
    error : str
        "", or the end of the error message.
    """
    side_by_side, timing, last = [], [], []
    for job in jobs:
        tags = tags_of(job.source)
        (last if "last" in tags else timing if "timing" in tags else side_by_side).append(job)
    for batch, at_once in ((side_by_side, workers), (timing + last, 1)):
        stopping = threading.Event()
        pool = ThreadPoolExecutor(at_once)  # a thread watches over a process
        try:
            ended = as_completed([pool.submit(_run_one, job, at_once == 1, timeout, stopping) for job in batch])
            yield from (future.result() for future in ended)
        finally:
            stopping.set()
            pool.shutdown(cancel_futures=True)


def check_kernel() -> None:
    """Raise `ValueError` if Jupyter has no python3 kernel, or one that starts another Python than this."""
    try:
        program = Path(KernelSpecManager().get_kernel_spec(KERNEL).argv[0])
    except NoSuchKernel:
        raise ValueError(f"Jupyter knows no kernel {KERNEL}: install ipykernel into this environment") from None
    if program.is_absolute() and program.parent != Path(sys.executable).parent:
        raise ValueError(f"kernel {KERNEL} starts {program}, not {sys.executable}: set JUPYTER_PREFER_ENV_PATH=1")


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook."""
    return nbformat.read(path, as_version=4)


def tags_of(path: Path) -> set[str]:
    """Tags that some cell of a notebook has."""
    return {tag for cell in read(path).cells for tag in cell.metadata.get("tags", [])}


def heading(path: Path) -> str:
    """What a notebook says it finds: its first line, or its name if it begins otherwise."""
    cells = read(path).cells
    first = cells[0].source.partition("\n")[0] if cells else ""
    return first.removeprefix("# ") if first.startswith("# ") and cells[0].cell_type == "markdown" else path.stem


def measures_time(path: Path) -> bool:
    """Whether a notebook has the tag ``timing`` on a cell: its results are times of this machine."""
    return "timing" in tags_of(path)


def _run_one(job: Job, shown: bool, timeout: float, stopping: threading.Event) -> tuple[Job, float, str]:
    """Start a notebook's process and watch over it until it ends, takes too long or everything stops."""
    job.target.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_papermill, args=(job, shown, sender))
    begin = time.monotonic()
    process.start()
    sender.close()  # the process holds the other copy: its end, however it comes, is seen here
    while not receiver.poll(LOOK_S):
        if stopping.is_set() or time.monotonic() - begin > timeout:
            process.terminate()
            process.join(10)
            process.kill()  # its kernel notices within a second and ends too
            process.join()
            return job, time.monotonic() - begin, f"stopped after {timeout:g} seconds (--timeout)"
    try:
        error = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        error = f"its process ended with exit code {process.exitcode}"
    return job, time.monotonic() - begin, error


def _papermill(job: Job, shown: bool, results: Connection) -> None:
    """Body of a notebook's process: sends "" or the error, and takes its kernel down when terminated."""
    # Ctrl-C reaches the whole process group; the parent answers it by terminating this process, once.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, _stop)
    os.environ.update(job.environment)
    os.environ.pop("MPLBACKEND", None)  # with another backend than Jupyter's no figure would be in the notebook
    total = len(read(job.source).cells) + 1  # papermill adds a cell with the parameters

    def announce(cell, cell_index):
        print(f"{job.source.stem}  cell {cell_index + 1}/{total}", flush=True)

    try:
        papermill.execute_notebook(
            job.source,
            job.target,
            job.parameters,
            kernel_name=KERNEL,
            progress_bar=False,
            stdout_file=sys.stdout if shown else None,
            stderr_file=sys.stderr if shown else None,
            on_cell_execute=announce,
            coalesce_streams=True,  # one output for what a cell prints, however it was cut into messages
            record_timing=False,
            extra_arguments=["--log-level=CRITICAL"],  # of the kernel's own machinery; cells report all the same
        )
        results.send("")
    except KeyboardInterrupt:
        pass
    except Exception as error:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}").rstrip()
        results.send("\n".join(plain.splitlines()[-ERROR_LINES:]))


def _stop(*_) -> None:
    """Raise `KeyboardInterrupt`; asyncio says nothing of the wait for the kernel that ends with it."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    raise KeyboardInterrupt
