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
        Folders need not exist yet; `fsp.files.replacing` makes them.
    """
    if not str(out_dir):
        return Outputs(DATA / "runs", DATA / "results", ROOT / "figures")
    base = Path(out_dir).expanduser().resolve()
    return Outputs(base / "runs", base / "results", base / "figures")
