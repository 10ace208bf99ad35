"""What a run keeps on disk until it is finished, so that it goes on from there if it is killed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from fsp.runs.provenance import provenance

MARK = ".scratch-"  # between a run's key and the version of the package
_FOLDER: ContextVar[Path | None] = ContextVar("folder of the run in work", default=None)


def scratch(name: str) -> Path | None:
    """Path of a file or folder that the run in work may keep until it is finished.

    To be called by a function that `fsp.runs.sweep` runs.  A run that is killed, fails or exceeds its time finds there
    what it left when it is done again by the same version of this package; if it then raises a `ValueError`, as a
    checkpoint that does not fit does, it begins anew.  Once it is finished, or with ``recompute=True``, all is deleted.
    What resumes by itself takes it as it is::

        fit(net, data, config, checkpoint=runs.scratch("training.safetensors"))
        search(net, "snip", 0.05, population=200, directory=runs.scratch("search"))

    Parameters
    ----------
    name : str
        Another one for each thing that the run keeps.

    Returns
    -------
    Path or None
        In a folder of the store that belongs to the run and may not be there yet.  None outside a sweep.
    """
    folder = _FOLDER.get()
    return None if folder is None else folder / name


@contextmanager
def scratch_of(record: Path, *, anew: bool) -> Iterator[None]:
    """Give a run, by its record's path, its folder for a ``with`` block, empty if `anew`."""
    if anew:
        delete_scratch(record)
    token = _FOLDER.set(_folder(record))
    try:
        yield
    finally:
        _FOLDER.reset(token)


def has_scratch(record: Path) -> bool:
    """Whether a run kept something; an empty folder is nothing to go on from."""
    folder = _folder(record)
    return folder.is_dir() and any(folder.iterdir())


def delete_scratch(record: Path) -> None:
    """Delete what a run kept, if anything."""
    shutil.rmtree(_folder(record), ignore_errors=True)


def _folder(record: Path) -> Path:
    """Folder of a run; another version of this package has another one."""
    return record.with_name(f"{record.stem}{MARK}{provenance()['code'][:8]}")
