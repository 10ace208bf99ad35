"""Where things lie. Nothing in this repository depends on the working directory.

`ROOT` is the repository, or the folder named by the environment variable ``FSP_ROOT``
(for an installed copy of `fsp`, or to let a test write elsewhere).
"""

import os
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
    """Three folders: of run records, of result tables, of figures."""

    runs: Path
    results: Path
    figures: Path


COMMITTED = Outputs(DATA / "runs", DATA / "results", ROOT / "figures")  # the repository's own, to be read


def outputs(out_dir: str | Path, stem: str) -> Outputs:
    """Folders a notebook writes to; they are the committed ones for ``make refresh`` alone.

    Parameters
    ----------
    out_dir : str or path
        Everything goes below this folder; a relative path is taken from the working directory. Empty: tables and
        figures go to ``scratch/<stem>`` in the repository, which git ignores, and run records to ``data/runs``; where
        the environment variable ``FSP_RENEW`` is 1, all go to `COMMITTED`.
    stem : str
        Name of the notebook.

    Returns
    -------
    Outputs
        Folders need not exist yet; `fsp.files.replacing` makes them.

    Raises
    ------
    ValueError
        If a folder below `out_dir` is one of `COMMITTED`.
    """
    if str(out_dir):
        base = Path(out_dir).expanduser().resolve()
        found = Outputs(base / "runs", base / "results", base / "figures")
        if set(found) & set(COMMITTED):
            raise ValueError(f"out_dir = {str(out_dir)!r} would overwrite what is committed: choose another folder")
        return found
    if renewing():
        return COMMITTED
    base = ROOT / "scratch" / stem
    return Outputs(COMMITTED.runs, base / "results", base / "figures")


def renewing() -> bool:
    """Whether notebooks may write into the committed folders, as ``make refresh`` lets them do in its copy."""
    return os.environ.get("FSP_RENEW") == "1"
