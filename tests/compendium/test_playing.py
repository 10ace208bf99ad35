"""Ten minutes of playing: whatever a reader does with a notebook, git sees nothing; a line tells what happened."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from papermill.translators import PythonTranslator

from fsp.paths import ROOT

STEM = "02_mask_graphs"
QUICK = {"model_options": {"hidden": [32, 32]}, "methods": ["erk"], "density": 0.5, "shuffles": 2}
LONG = QUICK | {"seeds": list(range(1000))}  # a run takes some hundredths of a second

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository, committed anew elsewhere, without downloads and records."""
    root = tmp_path_factory.mktemp("copy") / "fsp"
    junk = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("fsp", "notebooks", "figures"):
        shutil.copytree(ROOT / name, root / name, ignore=junk)
    shutil.copytree(ROOT / "data", root / "data", ignore=shutil.ignore_patterns("raw", "runs"))
    shutil.copy(ROOT / ".gitignore", root)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "all of it")
    return root


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", root, *words], check=True, capture_output=True, text=True).stdout


class Reader:
    """Somebody with a notebook open in a kernel of its own."""

    def __init__(self, root: Path):
        self.root, self.said = root, ""
        environment = os.environ | {"PYTHONPATH": str(root), "FSP_PROGRESS": "0"}
        for name in ("FSP_ROOT", "FSP_RENEW", "MPLBACKEND"):
            environment.pop(name, None)
        options = {"cwd": root / "notebooks", "env": environment, "extra_arguments": ["--log-level=CRITICAL"]}
        self.manager, self.client = start_new_kernel(startup_timeout=120, **options)
        cells = nbformat.read(root / "notebooks" / f"{STEM}.ipynb", as_version=4).cells
        self.cells = [cell.source for cell in cells if cell.cell_type == "code"]
        self.sweep = next(i for i, cell in enumerate(self.cells) if "study.sweep(" in cell)

    def plays(self, *, until_sweep: bool = False, **given) -> str:
        """Run the notebook with other parameters, as papermill gives them; the error that stops it, or ""."""
        self.said = ""
        first, *others = self.cells[: self.sweep if until_sweep else None]
        for cell in (first, PythonTranslator.codify(given), *others):
            reply = self.client.execute_interactive(cell, output_hook=self.hears, timeout=120)["content"]
            if reply["status"] == "error":
                return f"{reply['ename']}: {reply['evalue']}"
        return ""

    def hears(self, message: dict) -> None:
        self.said += message["content"].get("text", "")

    def starts_a_long_sweep(self) -> str:
        """Returns when it is at work; the number of its message."""
        before = records(self.root)
        assert self.plays(until_sweep=True, **LONG) == ""
        number = self.client.execute(self.cells[self.sweep])
        until(lambda: len(records(self.root) - before) > 2)
        return number

    def error_of(self, number: str) -> str:
        while (reply := self.client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != number:
            pass
        return f"{reply['content']['ename']}: {reply['content']['evalue']}"


def records(root: Path) -> set[Path]:
    return set((root / "data" / "runs").glob("*.json"))


def until(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def kernel(copy):
    somebody = Reader(copy)
    yield somebody
    somebody.client.stop_channels()
    somebody.manager.shutdown_kernel(now=True)


@pytest.fixture
def reader(kernel):
    """Whatever he does, git sees nothing of it."""
    yield kernel
    assert git(kernel.root, "status", "--porcelain") == ""


def test_other_seeds_go_to_scratch_and_a_line_says_so(reader):
    assert reader.plays(**QUICK, seeds=[7]) == ""
    said = "table, claims and figures of this run: scratch/02_mask_graphs (the text describes the committed run, and "
    assert f"{said}this is another: 1 runs are new)\n" in reader.said
    made = {path.name for path in (reader.root / "scratch" / STEM).rglob("*") if path.is_file()}
    assert made == {f"{STEM}.csv", f"{STEM}.claims.csv", f"{STEM}.png", f"{STEM}.pdf"}


def test_an_interrupt_and_a_killed_kernel_lose_no_finished_run(reader):
    number = reader.starts_a_long_sweep()
    reader.manager.interrupt_kernel()
    stopped = "KeyboardInterrupt: stopped: finished runs are kept; run again to go on"
    assert reader.error_of(number) == stopped

    reader.starts_a_long_sweep()
    os.kill(reader.manager.provisioner.pid, signal.SIGKILL)
    until(lambda: not reader.manager.is_alive())
    reader.manager.restart_kernel(now=True)
    reader.client.wait_for_ready(timeout=120)
    kept = records(reader.root)
    assert reader.plays(**LONG | {"seeds": [0, 1, 2]}) == ""
    assert records(reader.root) == kept


def test_what_is_not_there_is_told_before_anything_is_done(reader):
    before = records(reader.root)
    error = reader.plays(**QUICK, dataset="cifar10")
    expected = r'FileNotFoundError: cifar10: .* not found in .*\. Run load\("cifar10", download=True\) .*'
    assert re.fullmatch(expected, error)
    error = reader.plays(**QUICK, device="cuda:99")
    assert re.fullmatch(r"ValueError: device = 'cuda:99': expected auto or cpu, or cuda where .*", error)
    error = reader.plays(**QUICK, sedes=[7])  # the kernel remembers this wrong cell: it is the last
    assert re.fullmatch(r"ValueError: no parameter is called sedes: this notebook has dataset, .*", error)
    assert records(reader.root) == before
