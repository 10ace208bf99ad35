"""Locks on runs: while one process does a run, every other process that shares the store leaves it alone."""

import errno
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: no locks there
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

HELD = {errno.EAGAIN, errno.EACCES}  # another process has the lock
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # the file system has none


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Lock a run, by its record's path, for the time of a ``with`` block; yields False if another process has it.

    Notes
    -----
    The lock (``flock``) is on the file ``<key>.lock``, which says who has it since when and is deleted with it.
    Locks never become stale: the kernel takes a lock back when its process ends, however it ends; a file that a
    killed process leaves behind locks nothing. (Processes forked by the run have the lock too, until they end.) NFS
    (Linux 2.6.12 and later) passes the lock to the server, which keeps it for clients on all machines and drops it
    when a client is gone, after a lease of about 90 s if the whole machine died. Lustre needs the mount option
    ``flock``. Where there are no locks, Windows included, everyone gets the lock: two sweeps at the same time may do
    a run twice, and the first to finish decides its result.
    """
    if fcntl is None:
        _warn(path.parent)
        yield True
        return
    path = path.with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked_file(path)
    try:
        yield file is not None
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # before the lock is given back: nobody else can have this file by then
            file.close()


def locked_by(path: Path) -> str | None:
    """Who has the lock on a run, by its record's path, and since when; None if it is free. Changes nothing."""
    if fcntl is None:
        return None
    try:
        with path.with_suffix(".lock").open(encoding="utf-8") as file:
            return None if _granted(file, fcntl.LOCK_SH) else file.read()
    except FileNotFoundError:
        return None


def _granted(file: IO, kind: int) -> bool:
    """Ask for a lock on an open file, without waiting; where there are no locks it is granted."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in NO_LOCKS:
            raise
        _warn(Path(file.name).parent)
    return True


def _warn(store: Path) -> None:
    """Warn of a store without locks."""
    warnings.warn(f"{store} has no file locks: sweeps at the same time may do a run twice", stacklevel=3)


def _locked_file(path: Path) -> IO | None:
    """The lock file, open and locked; None if another process has it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        if not _granted(file, fcntl.LOCK_EX):
            file.close()
            return None
        # Whoever had the lock may have deleted the file after we opened it: then our lock is on no file of that name.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                with suppress(OSError):  # only a note to people
                    file.truncate(0)
                    file.write(f"{gethostname()}, process {os.getpid()}, since {time.strftime('%F %T')}")
                    file.flush()
                return file
        file.close()
