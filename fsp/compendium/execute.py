"""Notebooks in processes of their own, several at once if asked; papermill executes them."""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

KERNEL = "python3"
ERROR_LINES = 15


class Job(NamedTuple):
    """A notebook, where to write the executed one (kept up to date after every cell), and its parameters."""

    source: Path
    target: Path
    parameters: dict


class _Running(NamedTuple):
    """A job in its process, since when on the monotonic clock."""

    job: Job
    process: BaseProcess
    begin: float


def run(jobs: Iterable[Job], *, workers: int = 1, timeout: float | None = None) -> Iterator[tuple[Job, float, str]]:
    """Run notebooks with papermill, each in a process of its own.

    Every cell is announced.  What kernels print is shown as it comes where one notebook runs at a time; of several,
    it is in their executed notebooks alone.  No notebook runs on when the iteration ends, however it ends.

    Parameters
    ----------
    jobs : iterable of Job
        Started in this order.
    workers : int, at least 1
        Notebooks at once.
    timeout : float, optional
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
    context = multiprocessing.get_context("spawn")
    waiting, running = deque(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                job.target.parent.mkdir(parents=True, exist_ok=True)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_papermill, args=(job, workers == 1, sender))
                process.start()
                sender.close()  # the notebook's process holds the other copy: its end, however it comes, is seen here
                running[receiver] = _Running(job, process, time.monotonic())
            left = None
            if timeout is not None:
                left = max(0.0, min(each.begin for each in running.values()) + timeout - time.monotonic())
            ended = {receiver: _error(receiver, running[receiver].process) for receiver in wait(running, left)}
            now = time.monotonic()
            for receiver, each in running.items():
                if receiver not in ended and timeout is not None and now - each.begin >= timeout:
                    _stop([each.process])
                    ended[receiver] = f"stopped after {timeout:g} seconds (--timeout)"
            for receiver, error in ended.items():
                receiver.close()
                each = running.pop(receiver)
                yield each.job, now - each.begin, error
    finally:
        _stop([each.process for each in running.values()])


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


def _error(receiver: Connection, process: BaseProcess) -> str:
    """What a process that has ended, or is about to, says of its notebook."""
    try:
        error = receiver.recv()
    except EOFError:
        process.join()
        return f"its process ended with exit code {process.exitcode}"
    process.join()
    return error


def _stop(processes: list[BaseProcess]) -> None:
    """End processes, all at the same time."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(10)
        process.kill()  # its kernel notices within a second and ends too
        process.join()


def _papermill(job: Job, shown: bool, results: Connection) -> None:
    """Body of a notebook's process: sends "" or the error, and takes its kernel down when terminated."""
    # Ctrl-C reaches the whole process group; the parent answers it by terminating this process, once.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
            extra_arguments=["--log-level=CRITICAL"],  # of the kernel's own machinery; cells report all the same
        )
        results.send("")
    except KeyboardInterrupt:
        pass
    except Exception as error:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}").rstrip()
        results.send("\n".join(plain.splitlines()[-ERROR_LINES:]))
