"""Runs on a Dask cluster: workers on this machine, or wherever a scheduler is.

Distribution, retries and the handling of dead workers are Dask's. What travels is the function, one config a task
and back a word on how it ended; results stay in the records that the workers write.
"""

import copyreg
import functools
import importlib
import itertools
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from distributed import Client

ADDRESS = re.compile(r"(tcp|tls|ucx|ws|wss)://\S+")
SCHEDULERS = 'None (in this process), "local" or the address of a Dask scheduler, such as "tcp://10.0.0.1:8786"'
CONNECT_S = 5
ANSWER_S = 5  # for an answer that is known to be there
AGAIN = "records are kept, sweep again to go on"
HEAVY = ("distributed", "pandas", "scipy", "sklearn.model_selection", "torch", "torchvision")  # seconds to import
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


class WorkerDied(Exception):
    """Every worker that took this run died."""


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
        except (OSError, TimeoutError, ValueError) as error:
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
        environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        # Without a limit of its own a process may take what memory there is; Dask would pause or kill it before.
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
    with dask.config.set(settings), _same_environment():  # Dask sets variables in this process, for good
        # after Dask's own list, which the first call sets
        get_mp_context().set_forkserver_preload([name for name in HEAVY if name in sys.modules])
        options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
        cluster = SpecCluster(
            workers=spec, scheduler={"cls": Scheduler, "options": options}, silence_logs=logging.CRITICAL
        )
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


def distribute(
    client: "Client",
    task: Callable,
    function: Callable,
    calls: dict[str, tuple],
    *,
    retries: int,
    show: Callable[[int], None],
) -> Iterator[tuple[str, object]]:
    """Do ``task(function, *call)`` on the workers for every call, in any order.

    Parameters
    ----------
    client : distributed.Client
    task : callable
        Importable on the workers. It also gets the keyword ``die``: a callable that ends the worker's process, to be
        started anew, or None where nobody would.
    function : callable
        Anything that cloudpickle takes: lambdas and what a notebook defines, too.
    calls : dict
        Name to further arguments.
    retries : int
        How often Dask tries again what failed outside `task`.
    show : callable
        Told about every second how many calls are in work.

    Yields
    ------
    name : str
    outcome : object
        What `task` returned or the exception it raised; `WorkerDied` if too many workers did.

    Raises
    ------
    TypeError
        If `function` cannot be pickled.
    ConnectionError
        If the connection to the scheduler is lost.
    RuntimeError
        If the workers cannot load `function` or `task`.
    """
    import cloudpickle
    from distributed import KilledWorker, Nanny, Status, as_completed

    gone = (Status.closed, Status.failed)
    # cloudpickle takes the word `classes` in a function that uses torch for the module torch.classes, which it does not
    # know as a module.
    for module in (torch.classes, torch.ops):
        copyreg.pickle(type(module), lambda module: (importlib.import_module, (module.__name__,)))
    try:
        pickled = cloudpickle.dumps(function)
    except Exception as error:
        raise TypeError(f"function {function!r} cannot be sent to workers: {error}") from error
    tag = uuid.uuid4().hex[:8]
    futures = client.map(
        functools.partial(_on_worker, task, pickled),
        list(calls.values()),
        key=[f"run-{name[:16]}-{tag}" for name in calls],
        pure=False,
        retries=retries,
    )
    names = {future.key: name for future, name in zip(futures, calls, strict=True)}
    address = client.scheduler.address
    left = as_completed(futures, loop=client.loop)
    del futures  # a future that is held is computed again when the worker with its answer dies
    shown, pause = -1.0, 0.001
    try:
        while names:
            if client.status != "running":
                raise ConnectionError(f"the Dask scheduler at {address} is gone: {AGAIN}")
            nannies = list(getattr(client.cluster, "workers", {}).values())
            if nannies and all(isinstance(nanny, Nanny) and nanny.status in gone for nanny in nannies):
                raise RuntimeError(f"no local worker can be started any more: {AGAIN}")
            if time.monotonic() - shown > 1:
                shown = time.monotonic()
                with suppress(OSError):  # if the scheduler is gone, the next look at the client's status tells
                    show(min(len(names), sum(client.nthreads().values())))
            done = left.next_batch(block=False)
            if not done:
                time.sleep(pause)
            pause = 0.001 if done else min(2 * pause, 0.05)
            for future in done:
                if future.status in ("pending", "lost"):  # its worker died with the answer: it is asked for again
                    left.add(future)
                    continue
                try:
                    outcome = future.result(timeout=ANSWER_S)
                except TimeoutError:  # its worker died with the answer a moment ago
                    left.add(future)
                    continue
                except KilledWorker as error:
                    died = f"worker died {error.allowed_failures + 1} times on this run, the last at "
                    died += f"{error.last_worker.address}: killed for its memory, crashed in compiled code, or lost"
                    outcome = WorkerDied(died)
                except (CancelledError, OSError) as error:
                    raise ConnectionError(f"the Dask scheduler at {address} is gone: {AGAIN}") from error
                except Exception as error:
                    raise RuntimeError(
                        f"a worker cannot start run {names[future.key]}: {type(error).__name__}: {error}; workers need "
                        "this package and the modules that the function uses"
                    ) from error
                future.release()
                yield names.pop(future.key), outcome
    finally:
        if client.status == "running":
            client.cancel(list(left.futures), force=True)


def _on_worker(task: Callable, pickled: bytes, call: tuple) -> object:
    """One call on a worker, with one thread; an exception comes back as a value, for Dask to leave it alone."""
    _one_thread_each()
    torch.set_num_threads(1)  # of the calling thread
    function = _unpickled(pickled)
    try:
        return task(function, *call, die=_way_out())
    except (Exception, SystemExit) as error:
        return error


@functools.cache
def _one_thread_each() -> None:
    """Keep this process to one thread a library, whatever its environment says; progress bars are the sweep's."""
    from threadpoolctl import threadpool_limits

    os.environ |= {**THREADS, "FSP_PROGRESS": "0"}
    threadpool_limits(1)


@functools.lru_cache(maxsize=4)
def _unpickled(pickled: bytes) -> Callable:
    """The function of a sweep, loaded once a process."""
    import cloudpickle

    return cloudpickle.loads(pickled)


def _way_out() -> Callable[[], None] | None:
    """What ends this process, if that is a worker which a nanny starts again."""
    from distributed import get_worker

    return functools.partial(os._exit, 1) if get_worker().nanny else None


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    count = torch.cuda.device_count()  # asks the driver, and starts nothing on the GPU
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name.strip() for name in given.split(",")] if given else [str(number) for number in range(count)]
    return named[:count]
