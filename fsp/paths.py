"""Where things lie. Nothing in this repository depends on the working directory.

`ROOT` is the repository, or the folder named by the environment variable ``FSP_ROOT``
(for an installed copy of `fsp`, or to let a test write elsewhere).
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
ROOT = Path(os.environ.get("FSP_ROOT") or PACKAGE.parent).resolve()
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
DATA = ROOT / "data"
RAW = DATA / "raw"
PUBLISHED = DATA / "published"


class Outputs(NamedTuple):
    """The three folders a notebook writes to."""

    runs: Path
    results: Path
    figures: Path


def outputs(out_dir: str | Path = "") -> Outputs:
    """Folders for run records, result tables and figures.

    Parameters
    ----------
    out_dir : str or path
        Empty: the repository's own ``data/runs``, ``data/results`` and ``figures``.
        Otherwise everything goes below this folder and the repository is left as it is.
        A relative path is taken from the working directory.

    Returns
    -------
    Outputs
        Folders need not exist yet; `replacing` makes them.
    """
    if not str(out_dir):
        return Outputs(DATA / "runs", DATA / "results", ROOT / "figures")
    base = Path(out_dir).expanduser().resolve()
    return Outputs(base / "runs", base / "results", base / "figures")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: readers see the old content or the new, never a part.

    Yields the path of an empty temporary file in the same folder (made if missing). On a normal exit it is
    flushed to disk and renamed to `path`; on an exception it is removed and `path` stays as it was. Write into
    that very file: ``safetensors.torch.save_file`` would make one more beside it, which a kill leaves there.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "made" / "note.txt"
    >>> with replacing(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    """Permissions mask of this process (mkstemp ignores it and makes private files)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
