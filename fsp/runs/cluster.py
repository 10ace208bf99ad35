"""Runs on a Dask cluster: workers on this machine, or wherever a scheduler is.

Distribution, retries and the handling of dead workers are Dask's. The function and the tasks go to the workers; each
worker writes the records of its runs itself, and sends a copy back.
"""

import copyreg
import functools
import importlib
import itertools
import logging
import math
import os
import pickle
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING

import cloudpickle
import torch

from fsp.runs.attempt import Outcome, Task, WorkerDied, attempt
from fsp.runs.locks import lock

if TYPE_CHECKING:
    from distributed import Client

ADDRESS = re.compile(r"(tcp|tls|ucx|ws|wss)://\S+")
SCHEDULERS = 'None (in this process), "local" or the address of a Dask scheduler, such as "tcp://10.0.0.1:8786"'
CONNECT_S = 5
WAIT_S = 0.005  # between looks for new answers
ANSWER_S = 5  # for an answer that was there a moment ago
AGAIN = "records are kept, sweep again to go on"
# Seconds to import; the last comes with the first optimiser that a process makes.
HEAVY = ("distributed", "pandas", "scipy", "sklearn.model_selection", "torch", "torch._dynamo")
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def is_scheduler(value: object) -> bool:
    """Whether `connect` takes this: None, "local", an address or a Dask client."""
    if value is None or value == "local":
        return True
    if isinstance(value, str):
        return ADDRESS.fullmatch(value) is not None
    distributed = sys.modules.get("distributed")  # nobody has a client without having imported it
    return distributed is not None and isinstance(value, distributed.Client)


@contextmanager
def connect(
    scheduler: "str | Client", *, workers: int | None = None, per_gpu: int = 1, retries: int = 2
) -> Iterator["Client"]:
    """Client of a cluster; one made for it goes with the ``with`` block.

    Parameters
    ----------
    scheduler : str or distributed.Client
        "local" starts worker processes on this machine, each with one thread. Anything else is used as it is.
    workers : int, optional
        "local": number of processes; default `per_gpu` for each GPU that this process may see, or without one the
        number of CPU cores it may use. They take the GPUs in turn.
    per_gpu : int
        "local": processes a GPU.
    retries : int
        "local": how many workers may die on a run before the last one.

    Raises
    ------
    ConnectionError
        If no scheduler answers at the address within `CONNECT_S` seconds.
    """
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster
    from distributed.nanny import CPU_COUNT
    from distributed.utils import get_mp_context

    if isinstance(scheduler, Client):
        yield scheduler
        return
    if scheduler != "local":
        try:
            client = Client(scheduler, timeout=CONNECT_S, set_as_default=False)
        except (OSError, TimeoutError, ValueError, MemoryError) as error:  # the last: something else answers there
            raise ConnectionError(
                f"no Dask scheduler answers at {scheduler}: start one with `dask scheduler`, use the address it says, "
                f'or scheduler="local" for this machine alone ({type(error).__name__}: {error})'
            ) from error
        with client:
            yield client
        return
    gpus = _gpus()
    places = itertools.islice(itertools.cycle(gpus or [None]), workers or per_gpu * len(gpus) or CPU_COUNT)
    spec = {}
    for number, gpu in enumerate(places):
        # A forked worker has the variables of the server that forks it, which may have been started long ago.
        environment = {**os.environ, **THREADS, "FSP_PROGRESS": "0"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        # With a memory limit Dask would pause or kill a process before the memory of the machine is used up.
        options = {"nthreads": 1, "memory_limit": 0, "host": "127.0.0.1", "env": environment}
        spec[number] = {"cls": Nanny, "options": options | {"silence_logs": logging.CRITICAL}}
    # Workers forked from a process that has torch already start in a tenth of a second instead of some. With GPUs they
    # start from nothing, for CUDA_VISIBLE_DEVICES has to be set before torch is imported; so do they where system
    # libraries do not bear a fork (macOS) or there is none (Windows).
    forked = sys.platform == "linux" and not gpus
    settings = {
        "distributed.worker.multiprocessing-method": "forkserver" if forked else "spawn",
        "distributed.nanny.pre-spawn-environ": THREADS,
        "distributed.worker.daemon": False,  # runs may have child processes, such as a DataLoader's
        "distributed.scheduler.worker-ttl": None,  # a run may keep its process from answering for long
        "distributed.scheduler.worker-saturation": 1.0,  # no run waits at a worker, to be blamed when that dies
        "distributed.scheduler.allowed-failures": retries,
        "distributed.scheduler.work-stealing": False,
        "distributed.deploy.lost-worker-timeout": "36500 days",  # its nanny may need long to start it again
    }
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    server = {"cls": Scheduler, "options": options}
    with dask.config.set(settings), _same_environment():  # Dask sets variables in this process, for good
        # after Dask's own list, which the first call sets
        get_mp_context().set_forkserver_preload([name for name in HEAVY if name.split(".")[0] in sys.modules])
        cluster = SpecCluster(workers=spec, scheduler=server, silence_logs=logging.CRITICAL)
        with cluster, Client(cluster, set_as_default=False) as client:
            yield client


@contextmanager
def _same_environment() -> Iterator[None]:
    """Take environment variables back that were set in a ``with`` block."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ |= before
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


@contextmanager
def sign_in(store: Path) -> Iterator[Path]:
    """A file in the store, for a ``with`` block, by which workers know that they see the store of this sweep."""
    sign = store / f".sweep-{uuid.uuid4().hex}.lock"
    try:
        with lock(sign):  # so that nobody takes it for the file of a killed sweep
            sign.touch()  # where there are no locks
            yield sign
    finally:
        sign.unlink(missing_ok=True)


def distribute(
    client: "Client", sign: Path, function: Callable, retries: int, tasks: dict[str, Task], show: Callable[[int], None]
) -> Iterator[tuple[str, Outcome]]:
    """Do runs on the workers, in any order.

    Parameters
    ----------
    client : distributed.Client
    sign : path
        What `sign_in` made in the store.
    function : callable
        Anything that cloudpickle takes: lambdas and what a notebook defines, too.
    retries : int
        How often Dask tries again what failed outside the run.
    tasks : dict
        Keys of the runs to what is to be done.
    show : callable
        Told about every second how many runs are at work.

    Yields
    ------
    name : str
        Key of a run.
    outcome : Outcome

    Raises
    ------
    Exception
        What `attempt` raised on a worker, such as an OSError where the record cannot be written.
    FileNotFoundError
        If a worker does not see the store.
    TypeError
        If `function` cannot be pickled.
    ConnectionError
        If the connection to the scheduler is lost.
    RuntimeError
        If the workers cannot load `function`.
    """
    from distributed import KilledWorker, Nanny, Status, as_completed

    # cloudpickle takes the word `classes` in a function that uses torch for the module torch.classes, which it does not
    # know as a module.
    for module in (torch.classes, torch.ops):
        copyreg.pickle(type(module), lambda module: (importlib.import_module, (module.__name__,)))  # type: ignore[arg-type, return-value]  # any object may be what it gives
    try:
        pickled = cloudpickle.dumps(function)
    except Exception as error:
        raise TypeError(f"function {function!r} cannot be sent to workers: {error}") from error
    tag = uuid.uuid4().hex[:8]
    names = {f"run-{name[:16]}-{tag}": name for name in tasks}
    futures = client.map(
        functools.partial(_on_worker, sign, pickled), list(tasks.values()), key=list(names), pure=False, retries=retries
    )
    address = client.scheduler.address
    left = as_completed(futures, loop=client.loop)
    del futures  # a future that is held is computed again when the worker with its answer dies
    shown = -math.inf
    try:
        while names:
            if client.status != "running":
                raise ConnectionError(f"the Dask scheduler at {address} is gone: {AGAIN}")
            if time.monotonic() - shown > 1:
                shown = time.monotonic()
                nannies = list(getattr(client.cluster, "workers", {}).values())
                gone = [isinstance(n, Nanny) and n.status in (Status.closed, Status.failed) for n in nannies]
                if gone and all(gone):
                    raise RuntimeError(f"no local worker can be started any more: {AGAIN}")
                with suppress(OSError):  # if the scheduler is gone, the next look at the client's status tells
                    show(min(len(names), sum(client.nthreads().values())))
            done = left.next_batch(block=False)
            if not done:
                time.sleep(WAIT_S)
            for future in done:
                try:
                    outcome = future.result(timeout=ANSWER_S)
                except TimeoutError:  # its worker died with the answer: it is asked for again
                    left.add(future)
                    continue
                except KilledWorker as error:
                    died = f"worker died {error.allowed_failures + 1} times on this run, the last at "
                    died += f"{error.last_worker.address}: killed for its memory, crashed in compiled code, or lost"
                    outcome = attempt(functools.partial(_die, died), tasks[names[future.key]])
                except (CancelledError, OSError) as error:
                    raise ConnectionError(f"the Dask scheduler at {address} is gone: {AGAIN}") from error
                except Exception as error:
                    raise RuntimeError(
                        f"a worker cannot start run {names[future.key]}: {type(error).__name__}: {error}; workers need "
                        "this package and the modules that the function uses"
                    ) from error
                if isinstance(outcome, BaseException):
                    raise outcome
                future.release()
                yield names.pop(future.key), outcome
    finally:
        if client.status == "running":
            client.cancel(list(left.futures), force=True)


def _die(error: str, config: dict) -> None:
    """A run that ends as its workers did."""
    raise WorkerDied(error)


_unpickled = functools.lru_cache(maxsize=4)(pickle.loads)  # a sweep's function is loaded once a process


def _on_worker(sign: Path, pickled: bytes, task: Task) -> Outcome | BaseException:
    """One run on a worker, with one thread; an exception comes back as a value, for Dask to leave it alone."""
    from distributed import get_worker

    _one_thread_each()
    torch.set_num_threads(1)  # of the calling thread
    function = _unpickled(pickled)
    try:
        if not sign.exists():
            raise FileNotFoundError(
                f"worker {gethostname()} does not see the store {sign.parent} of this sweep: expected a folder that "
                "this machine and all workers share under one path"
            )
        # a process that ends is started again only by a nanny
        return attempt(function, task, die=functools.partial(os._exit, 1) if get_worker().nanny else None)
    except (Exception, SystemExit) as error:
        return error


@functools.cache
def _one_thread_each() -> None:
    """Keep this process to one thread a library, whatever its environment says; progress bars are the sweep's."""
    from threadpoolctl import threadpool_limits

    os.environ |= {**THREADS, "FSP_PROGRESS": "0"}
    threadpool_limits(1)


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    count = torch.cuda.device_count()  # asks the driver, and starts nothing on the GPU
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name.strip() for name in given.split(",")] if given else [str(number) for number in range(count)]
    return named[:count]
