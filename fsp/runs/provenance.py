"""What a result was made with: versions, commit, code, hardware."""

import functools
import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from fsp.paths import PACKAGE


def provenance() -> dict:
    """What a result was made with.

    Returns
    -------
    dict
        Versions of ``fsp``, ``python``, ``torch``, ``torchvision``, ``numpy``, ``scipy`` and ``pandas`` ("" if not
        installed); ``git``: commit of the repository, with "-dirty" if tracked files differ from it, "" outside
        one; ``code``: SHA-256 over names and bytes of the package's source files; ``platform``, ``cpu``,
        ``threads`` of torch, and ``gpu``: name of the CUDA device in use or "".

    Notes
    -----
    Code and commit are read once, at the first call, as later edits do not change what Python has loaded.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""
    return {**_fixed_provenance(), "threads": torch.get_num_threads(), "gpu": gpu}


@functools.cache
def _fixed_provenance() -> dict:
    """The part of `provenance` that a process cannot change."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}  # tells CPU or CUDA build
    for name in ("fsp", "torchvision", "numpy", "scipy", "pandas"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    code = hashlib.sha256()
    for source in sorted(PACKAGE.rglob("*.py"), key=lambda source: source.relative_to(PACKAGE).as_posix()):
        code.update(source.relative_to(PACKAGE).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return {
        **versions,
        "git": _git_commit(PACKAGE.parent),
        "code": code.hexdigest(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
    }


def _git_commit(folder: Path) -> str:
    """Commit checked out in `folder`, "-dirty" added if tracked files differ; "" if it is no repository."""
    if not (folder / ".git").exists():  # an installed package may lie inside somebody else's repository
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    """Model of the processor, or its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()
