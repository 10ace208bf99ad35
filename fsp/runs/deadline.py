"""A time limit on any code."""

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

GRACE = 30.0  # seconds between the limit and the last resort


class OutOfTime(BaseException):
    """Raised in the code whose time is over; no `Exception`, so that the code's own handlers let it pass."""


def deadline(seconds: float | None, *, last_resort: Callable[[], None] | None = None) -> AbstractContextManager[None]:
    """Raise `OutOfTime` inside a ``with`` block that takes longer than this.

    Parameters
    ----------
    seconds : float or None
        Wall time; None is no limit.
    last_resort : callable, optional
        Called from another thread if the block has still not ended `GRACE` seconds after its time. Outside the main
        thread only.

    Notes
    -----
    The main thread is stopped by a timer signal, which also ends a sleep or a wait for input; any other thread by an
    exception that Python raises before its next instruction. Neither ends a single call into compiled code, such as
    one matrix product: the exception comes when that returns. Where it never does, only `last_resort` helps.

    Examples
    --------
    >>> with deadline(0.01):
    ...     time.sleep(60)
    Traceback (most recent call last):
    fsp.runs.deadline.OutOfTime
    """
    if seconds is None:
        return nullcontext()
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        return _by_signal(seconds)
    return _by_thread(seconds, last_resort)


@contextmanager
def _by_signal(seconds: float) -> Iterator[None]:
    """Limit for the main thread; a timer that was set before goes on afterwards."""

    def ring(number: int, frame: object) -> None:
        raise OutOfTime

    handler = signal.signal(signal.SIGALRM, ring)
    start = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)

    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # reached even if it rings in the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)


@contextmanager
def _by_thread(seconds: float, last_resort: Callable[[], None] | None) -> Iterator[None]:
    """Limit for any other thread."""
    thread, over, raising = threading.get_ident(), threading.Event(), threading.Lock()

    def watch() -> None:
        if over.wait(seconds):
            return
        with raising:
            if not over.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(OutOfTime))
        if last_resort is not None and not over.wait(GRACE):
            last_resort()

    threading.Thread(target=watch, name="fsp deadline", daemon=True).start()
    try:
        try:
            yield
        finally:
            over.set()
            with raising:  # from here on the watcher raises nothing; what it has raised arrives at the next call
                time.sleep(0)
    finally:
        over.set()
