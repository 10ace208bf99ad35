"""Claims: that of all processes which share a store only one does a run at a time."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: no claims there
    fcntl = None

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Claim a run, by its record's path, for the time of a ``with`` block; False if another process has it.

    Notes
    -----
    The claim is a lock (``flock``) on the file ``<key>.lock``, which says who holds it since when and goes with it.
    No rule for stale claims is needed: the kernel gives the lock back when its process ends, however it ends; a
    file left behind by a kill claims nothing. (Processes forked by the run hold it too, until they end.) NFS
    (Linux 2.6.12 and later) passes the lock to the server, which holds it for clients on all machines and drops it
    when a client is gone, after a lease of about 90 s if the whole machine died. Lustre needs the mount option
    ``flock``. Where there are no locks, Windows included, every claim is granted: two sweeps at the same time may do
    a run twice, and the first to finish decides its result.
    """
    if fcntl is None:
        yield True
        return
    lock = path.with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(lock)
    try:
        yield file is not None
    finally:
        if file is not None:
            lock.unlink(missing_ok=True)  # before the lock is given back: nobody can have it under this name
            file.close()


def has_locks(file: IO) -> bool:
    """Whether the file system of an open file has the locks that claims are made of."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS
    return True


def is_claimed(path: Path) -> bool:
    """Whether a process has claimed a run, by its record's path; asking leaves all as it is."""
    if fcntl is None:
        return False
    try:
        with path.with_suffix(".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return True
    return False


def owner(path: Path) -> str:
    """Who claims a run and since when, as text for people; "" if nobody says so."""
    try:
        return path.with_suffix(".lock").read_text(encoding="utf-8")
    except OSError:
        return ""


def _locked(path: Path) -> IO | None:
    """The lock file, open and locked; None if another process has it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed the file between our open and our lock: then it is nobody's lock.
            current = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            current = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return None
                raise
            current = True
        if current:
            with suppress(OSError):  # only a note to people
                file.truncate(0)
                file.write(f"{gethostname()}, process {os.getpid()}, since {time.strftime('%F %T')}")
                file.flush()
            return file
        file.close()
