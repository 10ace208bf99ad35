"""Scratch: what a run keeps on disk until it is finished, so that it goes on from there if it is killed."""

from contextvars import ContextVar
from pathlib import Path

MARK = ".scratch-"  # between a run's key and the digest of its code
FOLDER: ContextVar[Path | None] = ContextVar("scratch folder of the run at work", default=None)


def scratch(name: str) -> Path | None:
    """Path of a file or folder that the run at work may keep until it is finished.

    For use in a function that `fsp.runs.sweep` calls.  A run that is killed, fails or exceeds its time finds there
    what it left when it is done again by the same code (see `fsp.runs.code.run_code`); if it then raises
    `fsp.files.CannotResume`, as a checkpoint that does not fit does, it starts again without.  All is deleted once the
    run is finished, and before it with ``recompute=True``.  Functions that resume by themselves take the path as it
    is::

        fit(net, data, config, checkpoint=runs.scratch("training.safetensors"))
        search(net, "snip", 0.05, population=200, directory=runs.scratch("search"))

    Parameters
    ----------
    name : str
        A different one for each thing that the run keeps.

    Returns
    -------
    Path or None
        Path in the run's own folder in the store, which may not exist yet.  None outside a sweep.
    """
    folder = FOLDER.get()
    return None if folder is None else folder / name


def scratch_folder(record: Path, code: str) -> Path:
    """Scratch of a run, by its record's path and the digest of its code: other code has another folder."""
    return record.with_name(f"{record.stem}{MARK}{code[:8]}")
