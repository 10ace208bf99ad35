"""Pytest in a copy of the repository, in a process that has what takes long to import; see test_planted.py."""

import multiprocessing
import os
import sys
from pathlib import Path

SETTINGS = {"PYTHONDONTWRITEBYTECODE": "1", "FSP_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "pandas", "scipy.stats", "sklearn.datasets", "networkx"])  # nothing of fsp


def environment(root: Path) -> dict[str, str]:
    """Variables by which Python finds `fsp` in the copy, and keeps no bytecode that would hide the next change."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("FSP_", "PYTEST_"))}
    return ours | SETTINGS | {"PYTHONPATH": str(root)}


def pytest_in(root: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status of pytest, and what it has said."""
    said = root / "pytest.log"
    process = PROCESSES.Process(target=_run, args=(root, tests, said))
    process.start()
    process.join()
    return process.exitcode, said.read_text("utf-8")


def _run(root: Path, tests: tuple[str, ...], said: Path) -> None:
    """Become pytest in the copy."""
    import pytest

    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    given = environment(root)
    os.environ.clear()
    os.environ.update(given)
    os.chdir(root)
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode = True
    sys.exit(pytest.main(["-q", "-x", *tests]))
