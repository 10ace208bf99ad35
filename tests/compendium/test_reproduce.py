import contextlib
import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from bs4 import BeautifulSoup

from fsp import paths
from fsp.compendium import claims, compare, execute, parameters, renew, report, reproduce, stats
from fsp.runs import tables

PARAMETERS = """\
seeds = [0, 1]  # one run each
lr = 0.5
epochs = 3
pretrain = 0  # here the seconds that a run takes
scheduler = None
recompute = False
out_dir = ""
"""
# A notebook that keeps the contract with nothing but the standard library, so that it starts fast.
PLACES = """\
import csv, os, sys, time
from pathlib import Path
folder = Path(out_dir or os.environ["FSP_ROOT"])
data = folder if out_dir else folder / "data"
runs, results, figures = data / "runs", data / "results", folder / "figures"
for place in (runs, results, figures):
    place.mkdir(parents=True, exist_ok=True)
"""
RUNS = (
    PLACES
    + """\
print("backend", os.environ["MPLBACKEND"])
for seed in seeds:
    record = runs / f"k{{seed}}.json"
    if recompute or not record.exists():
        time.sleep(pretrain)
        record.write_text("{{}}")
        print(f"bar at seed {{seed}}", file=sys.stderr)
"""
)
TABLES = """\
with open(results / f"{stem}.csv", "w") as file:
    rows = ([f"k{s}", "finished", lr + s, time.time()] for s in seeds)
    csv.writer(file).writerows([["key", "status", "accuracy", "train_s"], *rows])
head = "claim,kind,paper,section,measured,low,high,n,bound,published,holds,note".split(",")
holds = "yes" if lr > 0.4 else "not decided"
row = ["Rate | is high", "exploratory", "P", "4.2", lr, lr - 0.1, lr + 0.1, 4, "> 0.3", "", holds, ""]
with open(results / f"{stem}.claims.csv", "w") as file:
    csv.writer(file).writerows([head, row])
for ending in ("png", "pdf"):
    (figures / f"{stem}.{ending}").write_bytes(b"drawn")
"""
CHATTER = "import time\nfor i in range(3):\n    print(i, flush=True)\n    time.sleep(0.3)"
FAILS = "raise ValueError('method snap: expected one of snip, grasp')"


def write_notebook(folder: Path, stem: str, *cells: str, tag: str = "nbval-check-output") -> Path:
    new = nbformat.v4.new_code_cell
    parameters = new(PARAMETERS, metadata={"tags": ["parameters"]})
    checked = new("len(seeds)", metadata={"tags": [tag]})
    sources = [new(text.replace("{stem}", stem).replace("{{", "{").replace("}}", "}")) for text in cells]
    notebook = nbformat.v4.new_notebook(cells=[parameters, *sources, checked], metadata=renew.METADATA)
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{stem}.ipynb")
    return folder / f"{stem}.ipynb"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of its own, with one notebook."""
    root = tmp_path / "repository"
    write_notebook(root / "notebooks", "01_good", RUNS, TABLES)
    for module in (reproduce, renew, paths):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(paths, "DATA", root / "data")
    places = paths.Outputs(root / "data" / "runs", root / "data" / "results", root / "figures")
    monkeypatch.setattr(paths, "COMMITTED", places, raising=False)
    monkeypatch.setattr(reproduce, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(reproduce, "PROFILES", root / "notebooks" / "profiles")
    monkeypatch.setenv("FSP_PROGRESS", "0")
    monkeypatch.setenv("MPLBACKEND", "agg")  # of a shell; in a notebook it would hide the figures
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def claim(text="Gap decides", measured=0.5, low=0.4, high=0.6, above=0.3, **more):
    row = claims.claim(text, stats.Estimate(measured, low, high, 9), above=above, paper="P")
    return {"notebook": "03_x"} | row | more


# --- what is refused before anything runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "07"], r"no notebook '07': there are 01_good"),
        (["-p", "sedes", "[1]"], r"01_good has no parameter 'sedes': it has seeds, lr, epochs, pretrain, scheduler"),
        (["-p", "lr=1e-3"], r"01_good: lr = '1e-3': expected a number above 0.*YAML reads 1e-3 as text"),
        (["-p", "seeds", "[0, x]"], r"01_good: seeds = \[0, 'x'\]: expected a list of different whole numbers"),
        (["--scheduler", "locl"], r"01_good: scheduler = 'locl': expected None.*\"local\" or the address of a Dask"),
        (["--workers", "0"], r"--workers is a whole number of at least 1"),
        (["--timeout", "-1"], r"--timeout a number of seconds above 0"),
        (["-p", "out_dir", "x"], r"use --out"),
        (["-p", "epochs"], r"expected -p NAME VALUE or -p NAME=VALUE"),
        (["-p", "seeds", "[0"], r"'\[0' is not YAML"),
        (["--profile", "paper"], r"paper.01_good.yaml"),
        (["--out", "{root}"], r"would overwrite what is committed"),
        (["--out", "{root}/notebooks/01_good.ipynb"], r"Not a directory|File exists"),
        (["--recompute"], r"belongs to --refresh"),
        (["--check", "-p", "epochs", "1"], r"only --only and --workers go with them"),
        (["--refresh", "--resume"], r"only --only and --workers go with them"),
        (["--refresh"], r"README.md"),
    ],
)
def test_a_wrong_argument_stops_before_any_notebook_runs(root, capsys, arguments, message):
    before = contents(root)
    with pytest.raises(SystemExit) as stopped:
        reproduce.main([argument.replace("{root}", str(root)) for argument in arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert contents(root) == before


def test_what_any_notebook_misses_is_said_of_all_at_once_before_one_runs(root, monkeypatch, capsys):
    def check(**given):
        if given["lr"] == 0.25:
            raise FileNotFoundError("cifar10: data_batch_1 not found")

    monkeypatch.setattr(parameters, "check", check)
    write_notebook(root / "notebooks", "02_b", RUNS)
    before = contents(root)
    for arguments in (["-p", "lr=0.25"], ["-p", "lr=0.25", "--only", "2"]):
        with pytest.raises(SystemExit):
            reproduce.main(arguments)
        said = capsys.readouterr().err
        assert "02_b: cifar10: data_batch_1 not found" in said
        assert ("01_good: cifar10: data_batch_1 not found" in said) == (len(arguments) == 2)
    assert contents(root) == before


def test_a_kernel_that_is_missing_or_another_python_is_refused(root, monkeypatch, capsys):
    kernel = SimpleNamespace(argv=["/usr/other/bin/python"])
    with monkeypatch.context() as patched:
        patched.setattr(execute.KernelSpecManager, "get_kernel_spec", lambda self, name: kernel)
        with pytest.raises(SystemExit):
            reproduce.main([])
    assert f"starts /usr/other/bin/python, not {sys.executable}" in capsys.readouterr().err
    monkeypatch.setattr(execute, "KERNEL", "python0")
    with pytest.raises(SystemExit):
        reproduce.main([])
    assert "Jupyter knows no kernel python0" in capsys.readouterr().err


def test_parameters_come_from_the_profile_then_from_the_command_line(root, tmp_path, monkeypatch):
    monkeypatch.setattr(parameters, "connect", lambda scheduler: contextlib.nullcontext())  # as if it answered
    profile = root / "notebooks" / "profiles" / "smoke" / "01_good.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("epochs: 1\nlr: 1\nscheduler: local\n")
    source, address = root / "notebooks" / "01_good.ipynb", "tcp://10.0.0.1:8786"
    chosen = reproduce.plan(source, "smoke", {"lr": 0.25, "scheduler": address}, tmp_path)
    assert chosen == {"epochs": 1, "lr": 0.25, "scheduler": address, "out_dir": str(tmp_path)}
    defaults = reproduce.plan(source, "full", {}, tmp_path)
    assert defaults == reproduce.plan(source, "quick", {}, tmp_path) == {"out_dir": str(tmp_path)}
    quick = root / "notebooks" / "profiles" / "quick" / "01_good.yaml"
    quick.parent.mkdir()
    quick.write_text("epochs: 2\n")
    assert reproduce.plan(source, "full", {}, tmp_path) == defaults
    assert reproduce.plan(source, "quick", {}, tmp_path) == defaults | {"epochs": 2}
    for wrong, message in [("epoch: 1", "no parameter 'epoch'"), ("- 1", "no mapping")]:
        profile.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            reproduce.plan(source, "smoke", {}, tmp_path)


def test_the_default_output_folder_is_another_one_for_other_code(root):
    first = reproduce.default_out("quick")
    assert first == reproduce.default_out("quick")
    assert re.fullmatch("quick-[0-9a-f]{8}", first.relative_to(root / "reproduced").as_posix())
    write_notebook(root / "notebooks", "01_good", RUNS, TABLES + "\n# changed")
    assert reproduce.default_out("quick") != first


def test_notebooks_are_chosen_by_number_or_stem_and_run_in_order(root):
    for stem in ("02_b", "03_c"):
        write_notebook(root / "notebooks", stem)
    assert [path.stem for path in reproduce.notebooks(["03_c", "1"])] == ["01_good", "03_c"]
    assert [path.stem for path in reproduce.notebooks()] == ["01_good", "02_b", "03_c"]


# --- running and reporting


def test_the_processes_of_notebooks_do_not_load_torch_beside_their_kernels():
    """They import the module that the command started, and spend neither its seconds nor its memory."""
    code = "import fsp.compendium.reproduce, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_reports_claims_differences_and_the_notebook_that_failed(root, tmp_path, capfd):
    write_notebook(root / "notebooks", "00_bad", FAILS)
    committed_results = root / "data" / "results"
    committed_results.mkdir(parents=True)
    rows = pd.DataFrame({"key": ["k0", "k1", "k2"], "status": "finished", "accuracy": [0.5, 1.25, 2.5], "train_s": 1.0})
    tables.save(rows, committed_results / "01_good.csv")
    old = claim("Rate | is high", 0.7, 0.65, 0.75, above=0.8, section="4.2")
    tables.save(pd.DataFrame([old]), committed_results / "01_good.claims.csv")
    repository, out = contents(root), tmp_path / "out"

    assert reproduce.main(["--out", str(out), "--workers", "1"]) == 1
    printed = capfd.readouterr()
    text = (out / "report.md").read_text()
    assert "| 00_bad | failed |" in text
    assert "ValueError: method snap: expected one of snip, grasp" in text
    assert str(out / "notebooks" / "00_bad.ipynb") in text
    assert "| 01_good | finished |" in text
    assert r"| Rate \| is high | P 4.2 | 0.5 [0.4, 0.6] | 4 | > 0.3 |" in text
    assert "2 of 3 committed rows compared, 0 rows are new: `accuracy`: 1 differ, by at most 0.25" in text
    assert "verdict 'yes', committed 'no'" in text
    assert "bound '> 0.3', committed '> 0.8'" in text.replace("&gt;", ">")
    assert "measured 0.5, committed 0.7 [0.65, 0.75]" in text
    assert "- skipped committed rows: 1 (profile quick leaves their runs out)" in text
    assert "- wall times are another machine's and are not compared: `train_s`" in text
    assert "01_good  cell 3/5" in printed.out
    assert "bar at seed 1" in printed.err
    assert "backend module://matplotlib_inline" in printed.out
    assert text in printed.out
    assert printed.out.endswith(f"report     {out / 'report.html'}\n")
    executed = {path.name for path in (out / "notebooks").glob("0*")}
    assert executed == {"00_bad.ipynb", "00_bad.html", "01_good.ipynb", "01_good.html"}
    assert contents(root) == repository


def test_a_notebook_that_keeps_no_promise_or_takes_too_long_has_failed(root, tmp_path, capfd):
    write_notebook(root / "notebooks", "01_good", RUNS)
    stale = tmp_path / "a" / "results" / "01_good.claims.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text(",".join(claims.CLAIM_COLUMNS) + "\n")
    assert reproduce.main(["--out", str(tmp_path / "a")]) == 1
    assert "without writing 01_good.csv, 01_good.claims.csv, 01_good*.png" in capfd.readouterr().out


def jobs_of(folder: Path, **cells: str) -> list[execute.Job]:
    """Notebooks called by keywords, `_01_a` for 01_a, with one cell beside the parameters."""
    out = folder / "out"
    sources = [write_notebook(folder, name[1:], text) for name, text in cells.items()]
    return [execute.Job(source, out / source.name, {"epochs": 1}, {}) for source in sources]


def test_a_time_limit_stops_each_notebook_with_its_kernel_and_keeps_what_it_did(tmp_path, monkeypatch):
    kernels = running_kernels()
    slow = f"import time\nopen(r'{tmp_path}/{{stem}}.came', 'w').close()\nwhile True: time.sleep(1)"
    jobs = jobs_of(tmp_path, _01_slow=slow, _02_slower=slow)
    clock = SimpleNamespace(monotonic=lambda: 11.0 if len(list(tmp_path.glob("*.came"))) == 2 else 0.0)
    monkeypatch.setattr(execute, "time", clock)
    ended = [(job.source.stem, seconds, error) for job, seconds, error in execute.run(jobs, workers=2, timeout=10)]
    error = "stopped after 10 seconds (--timeout)"
    assert sorted(ended) == [("01_slow", 11.0, error), ("02_slower", 11.0, error)]
    assert gone(running_kernels() - kernels)
    assert nbformat.read(jobs[0].target, 4).cells[1].metadata.tags == ["injected-parameters"]


def test_a_kernel_or_a_process_that_dies_is_an_error_and_not_a_wait(tmp_path):
    jobs = jobs_of(tmp_path, _01_dies="import os; os.abort()", _02_kills="import os; os.kill(os.getppid(), 9)")
    ended = {job.source.stem: error for job, _, error in execute.run(jobs, workers=2)}
    assert "Kernel died" in ended["01_dies"]
    assert ended["02_kills"] == "its process ended with exit code -9"


MEETS = """\
import pathlib, time
place = pathlib.Path(r"{folder}")
(place / "{own}").touch()
while not (place / "{other}").exists(): time.sleep(0.05)
"""


def test_notebooks_run_side_by_side_then_those_that_measure_time_alone_then_those_that_show_the_others(
    root, tmp_path, capfd
):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    for own, other in (("02_b", "03_c"), ("03_c", "02_b")):  # neither ends without the other
        meets = MEETS.replace("{folder}", str(meeting)).replace("{own}", own).replace("{other}", other)
        write_notebook(root / "notebooks", own, RUNS, TABLES, meets)
    write_notebook(root / "notebooks", "00_shows", RUNS, TABLES, tag="last")
    write_notebook(root / "notebooks", "01_good", RUNS, TABLES, tag="timing")
    out = tmp_path / "out"
    assert reproduce.main(["--out", str(out), "--workers", "2", "--timeout", "120"]) == 0
    text, printed = (out / "report.md").read_text(), capfd.readouterr().out
    rows = [line.split("|")[1].strip() for line in text.splitlines() if "| finished |" in line]
    assert rows == ["00_shows", "01_good", "02_b", "03_c"]
    begins = {stem: printed.index(f"{stem}  cell 1/") for stem in rows}
    ends = {stem: printed.index(f"{stem}  finished") for stem in rows}
    assert max(begins["02_b"], begins["03_c"]) < min(ends["02_b"], ends["03_c"])
    assert begins["01_good"] > max(ends["02_b"], ends["03_c"])
    assert begins["00_shows"] > ends["01_good"]
    assert printed.count("backend module") == 2, "what several kernels print at once is in their notebooks alone"
    assert "backend module://matplotlib_inline" in (out / "notebooks" / "02_b.ipynb").read_text()


@pytest.mark.parametrize("workers", [1, 3, 9])
def test_as_many_notebooks_run_at_once_as_asked_and_no_more(tmp_path, monkeypatch, workers):
    enough, started, running, most = threading.Event(), [], [], []

    def one(job, shown, timeout, stopping):
        started.append(job)
        running.append(job)
        most.append(len(running))
        if len(started) >= min(workers, 4):
            enough.set()
        enough.wait(10)  # nobody ends before as many have begun
        time.sleep(0.1)  # and one too many has the time to begin
        running.remove(job)
        return job, 1.0, f"shown: {shown}"

    monkeypatch.setattr(execute, "_run_one", one)
    jobs = jobs_of(tmp_path, _01_a="", _02_b="", _03_c="", _04_d="")
    assert sorted(execute.run(jobs, workers=workers)) == [(job, 1.0, f"shown: {workers == 1}") for job in jobs]
    assert max(most) == min(workers, 4)


def write_executed(target: Path, printed: str = "", text: str = "") -> None:
    """An executed notebook of a cell that printed something and one of text."""
    outputs = [nbformat.v4.new_output("stream", text=printed)] if printed else []
    cells = [nbformat.v4.new_code_cell("x", outputs=outputs), nbformat.v4.new_markdown_cell(text)]
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"papermill": {"duration": 3.0}}), target)


def run_here(jobs, monkeypatch, ran):
    """In place of `execute.run`: notebooks run in this process and at once; what they print is in their last cell."""
    for job in jobs:
        ran.append(job.source.stem)
        executed = execute.read(job.source)
        executed.metadata["papermill"] = {"duration": 3.0}
        for cell in executed.cells:
            cell.metadata.setdefault("tags", [])
        code = [cell.source for cell in executed.cells]
        error, printed = "", io.StringIO()
        for name, value in job.environment.items():
            monkeypatch.setenv(name, value)
        try:
            with contextlib.redirect_stdout(printed):
                exec("\n".join([code[0], *(f"{n} = {v!r}" for n, v in job.parameters.items()), *code[1:]]), {})
        except ValueError as raised:
            error = str(raised)
        if printed.getvalue():
            executed.cells[-1].outputs = [nbformat.v4.new_output("stream", text=printed.getvalue())]
        job.target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(executed, job.target)
        yield job, 3.0, error


@pytest.fixture
def in_process(monkeypatch):
    """Notebooks are run here; the stems of those that ran."""
    ran = []
    monkeypatch.setattr(execute, "run", lambda jobs, **_: run_here(jobs, monkeypatch, ran))
    return ran


def test_resume_leaves_out_what_finished_with_the_same_parameters_and_code(root, tmp_path, in_process):
    write_notebook(root / "notebooks", "02_bad", FAILS)
    out = tmp_path / "out"

    def runs(*more):
        in_process.clear()
        failed = reproduce.main(["--out", str(out), *more])
        assert failed == ("02_bad" in in_process)
        return list(in_process)

    assert runs() == ["02_bad", "01_good"], "the first ones are short, and fill the cores at the end"
    assert runs("--resume") == ["02_bad"], "what failed runs again"
    page = (out / "report.md").read_text()
    assert "| 01_good | finished earlier | 3 |" in page
    assert "| 02_bad | failed | 3 |" in page
    assert r"| Rate \| is high | P 4.2 | 0.5 [0.4, 0.6] | 4 | > 0.3 |" in page

    good = ("--only", "01", "--resume")
    assert runs(*good) == []
    assert runs(*good, "-p", "lr=0.25") == ["01_good"], "other parameters"
    assert runs(*good) == ["01_good"], "the mark is that of the last parameters"
    assert runs("--only", "01") == ["01_good"], "without --resume all run"
    (out / "figures" / "01_good.png").unlink()
    assert runs(*good) == ["01_good"], "a promised file is missing"
    (out / "notebooks" / "01_good.ipynb").unlink()
    assert runs(*good) == ["01_good"], "the executed notebook is missing"
    (out / "finished" / "01_good.json").write_text("{")
    assert runs(*good) == ["01_good"], "the mark is damaged"
    write_notebook(root / "notebooks", "01_good", RUNS, TABLES + "\n# other code")
    assert runs(*good) == ["01_good"], "the code is another"
    assert runs(*good) == []
    write_notebook(root / "notebooks", "01_good", RUNS, FAILS)
    in_process.clear()
    assert reproduce.main(["--out", str(out), *good]) == 1
    write_notebook(root / "notebooks", "01_good", RUNS, TABLES + "\n# other code")
    assert runs(*good) == ["01_good"], "a notebook that fails takes its mark with it"


def test_what_lacks_a_gpu_or_a_download_is_gated_and_all_else_runs(root, tmp_path, monkeypatch, in_process, capsys):
    write_notebook(root / "notebooks", "02_b", RUNS, TABLES)
    profile = root / "notebooks" / "profiles" / "quick" / "02_b.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("lr: 0.25\n")

    def check(**given):
        if given["lr"] == 0.25:
            raise FileNotFoundError("cifar10: data_batch_1 not found")

    monkeypatch.setattr(parameters, "check", check)
    assert reproduce.main(["--out", str(tmp_path)]) == 0
    assert in_process == ["01_good"]
    assert capsys.readouterr().err.startswith("gated, not run: 02_b: cifar10: data_batch_1 not found\n")
    text = (tmp_path / "report.md").read_text()
    assert "- Notebooks: 1 gated, 1 finished." in text
    assert "| 02_b | gated | 0 |" in text


def test_a_cuda_device_is_lacking_only_where_all_else_is_right(root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = root / "notebooks" / "01_good.ipynb"
    edit(source, "lr = 0.5", 'lr = 0.5\\ndevice = \\"auto\\"')
    with pytest.raises(
        reproduce.Gated, match=r"01_good: device = 'cuda:1' needs a CUDA device, and there is none here"
    ):
        reproduce.plan(source, "full", {"device": "cuda:1"}, tmp_path)
    with pytest.raises(ValueError, match="lr = -1") as wrong:
        reproduce.plan(source, "full", {"device": "cuda", "lr": -1}, tmp_path)
    assert not isinstance(wrong.value, reproduce.Gated)


def test_a_notebook_that_reused_runs_of_other_code_is_stale_and_runs_again(root, tmp_path, in_process):
    said = f"2 of 5 {report.EDITED}; recompute=True redoes all"
    write_notebook(root / "notebooks", "01_good", RUNS, TABLES, f"print('{said}')")
    command = ["--out", str(tmp_path), "--resume"]
    assert reproduce.main(command) == 0
    assert f"## 01_good: stale\n\n```text\n{said}\n```" in (tmp_path / "report.md").read_text()
    assert reproduce.main(command) == 0
    assert in_process == ["01_good", "01_good"], "a stale notebook has not finished"


HOSTILE = "<img src=x onerror=alert()> & 'all', and so long that no table may cut this sentence"


@pytest.fixture
def page(root, tmp_path):
    """A function that writes the report on five notebooks, each with another end, and gives its page."""
    committed, out = paths.COMMITTED, paths.Outputs(*(tmp_path / "out" / name for name in paths.Outputs._fields))
    stems = {"01_good": "finished", "02_few": "finished", "03_old": "stale", "04_bad": "failed", "05_far": "gated"}
    sources = [write_notebook(root / "notebooks", stem, tag="timing" if stem == "01_good" else "x") for stem in stems]
    for stem in list(stems)[:3]:
        tables.save(pd.DataFrame({"key": ["a"], "status": "finished", "x": 1.0}), committed.results / f"{stem}.csv")
        tables.save(pd.DataFrame({"key": ["a"], "status": "finished", "x": 1.0}), out.results / f"{stem}.csv")
        both = [claim(f"{stem} same"), claim(HOSTILE)]
        more = [claim("02_few left out")] if stem == "02_few" else []
        tables.save(pd.DataFrame(both + more), committed.results / f"{stem}.claims.csv")
        out.figures.mkdir(exist_ok=True)
        (out.figures / f"{stem}_second.png").write_bytes(b"drawn")
    old, moved, further = (pd.DataFrame({"key": ["a", "b"], "status": "finished", "x": [x, 2]}) for x in (1, 1.05, 1.5))
    for stem, new in {"02_few": moved[:1], "03_old": further}.items():
        tables.save(old.assign(left_out=[None, 1.0]), committed.results / f"{stem}.csv")
        tables.save(new, out.results / f"{stem}.csv")
    timed = [claim("01_good same"), claim(HOSTILE, 0.1, 0, 0.2), claim("01_good new"), claim("Undecided", low=0.2)]
    tables.save(pd.DataFrame(timed), out.results / "01_good.claims.csv")
    few = [claim("02_few same"), claim(HOSTILE, low=0.2) | {"n": 2}]
    tables.save(pd.DataFrame(few), out.results / "02_few.claims.csv")
    tables.save(pd.DataFrame([claim("03_old same"), claim(HOSTILE, 0.1, 0, 0.2)]), out.results / "03_old.claims.csv")
    links = "[next](02_few.ipynb#a) [D4](../docs/decisions.md#d4) [no](../nowhere.md) [far](05_far.ipynb) $x<y$"
    for stem in list(stems)[:4]:
        opening = f"![what it finds](../figures/{stem}_second.png)"  # the fourth has drawn none
        write_executed(tmp_path / "out" / "notebooks" / f"{stem}.ipynb", text=f"{links}\n\n{opening}")

    def page(profile: str = "quick", **given: str) -> BeautifulSoup:
        outcomes = [report.Outcome(source, 3.0, word) for source, word in zip(sources, stems.values(), strict=True)]
        reasons = {"03_old": "3 are stale", "04_bad": f"ValueError: {HOSTILE}", "05_far": f"05_far: {HOSTILE}"}
        outcomes = [outcome._replace(reason=reasons.get(outcome.stem, "")) for outcome in outcomes]
        report.write(tmp_path / "out", outcomes, profile=profile, given=given, records_before=0)
        return BeautifulSoup((tmp_path / "out" / "report.html").read_text(encoding="utf-8"), "html.parser")

    return page


def test_the_page_opens_with_what_changed_and_keeps_failed_stale_gated_and_expected_apart(page):
    found = page()
    few = "3 not decided by the fewer runs of profile quick"
    headline = f"9 claims compared: 3 same, 2 changed, {few}, 1 times of this machine"
    assert found.find(class_="headline").text == headline
    lines = [line.text for line in found.find("ul").find_all("li")]
    moved = "in 02 some moved no further than another processor explains; in 03 some moved further"
    assert lines[0] == f"Rows: 3 of the committed tables computed anew: {moved}."
    assert lines[2:4] == [
        "Changed: 1 decided otherwise, 1 not committed.",
        "Notebooks: 1 failed, 1 stale, 1 gated, 2 finished.",
    ]
    assert "beyond what another processor explains: nothing" in found.text
    assert "beyond what another processor explains: x: 1 differ, by at most 0.5" in found.text.replace("`", "")
    order = ["ValueError: ", "3 are stale", "What changed", "Not run on this machine", "Answers", "All its claims"]
    places = [found.text.index(words) for words in order]
    assert places == sorted(places)
    unexpected, expected = (table.find_all("tr")[1:] for table in found.find_all("table")[:2])
    row, new = ([cell.text.replace("\u00a0", " ") for cell in row.find_all("td")][1:] for row in unexpected)
    assert new[0] == "not committed", "a claim that is new is no matter of time"
    assert row == [
        "decided otherwise",
        "no: 0.1 [0, 0.2], n = 9",
        "yes: 0.5 [0.4, 0.6], n = 9",
        "verdict 'no', committed 'yes'; measured 0.1, committed 0.5 [0.4, 0.6]",
        "03",
    ]
    assert [row.find_all("td")[4].text for row in expected] == [
        "profile quick leaves its runs out",
        "profile quick asks of other densities or numbers of runs than are committed",
        "profile quick has fewer observations, and fewer than 3 decide nothing",
        "a time of this machine: another one, or a busy one, gives another",
    ]
    status = {card["id"]: card.find(class_="status").text for card in found.find_all(class_="card", id=True)}
    assert list(status.values()) == ["finished", "finished", "stale", "failed", "gated"]
    assert [bool(found.find(id=stem).find("img")) for stem in status] == [True, True, True, False, False]
    whole = page("full").find(class_="headline").text
    assert "3 same, 4 changed, 1 not decided" in whole, "here claims that are made on one side alone have changed"
    paper = page("paper").find(class_="headline").text
    assert (
        paper == "No claim compared, 8 judged: the committed results belong to the profiles full and quick as they are"
    )


def test_the_pages_escape_what_they_are_given_and_no_link_of_theirs_leads_nowhere(page, tmp_path):
    assert HOSTILE in page(lr=HOSTILE).find("ul").text
    found = page()
    changes, claims_, differences, errors = 3, 3, 5, 2
    assert found.text.count(HOSTILE) == changes + claims_ + differences + errors
    assert not found.find_all("script")
    ids = {tag["id"] for tag in found.find_all(id=True)}
    names = sorted(path.name for path in (tmp_path / "out" / "notebooks").glob("*.html"))
    assert names == ["01_good.html", "02_few.html", "03_old.html", "04_bad.html"]
    for path in [tmp_path / "out" / "report.html", *(tmp_path / "out" / "notebooks" / name for name in names)]:
        read = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        assert bool(read.find("img")) == (path.name != "04_bad.html")
        for tag in [*read.find_all(href=True), *read.find_all(src=True)]:
            link = tag.get("href") or tag["src"]
            target, _, anchor = link.partition("#")
            if link.startswith("data:image/png;base64,"):
                continue
            leads = (path.parent / target).exists() if target else anchor in ids
            assert leads, f"{path.name}: {link}"
    links = {tag.text: tag.get("href") for tag in read.find_all("a")}
    assert links["next"] == "02_few.html#a"
    assert links["D4"].endswith("/docs/decisions.md#d4")
    assert links.keys() == {"Report", "next", "D4"}
    assert "$x<y$" in read.text


def test_ctrl_c_stops_everything_and_the_same_command_continues(root, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--out", str(out), "-p", f"seeds={list(range(40))}", "-p", "pretrain"]
    first = subprocess.Popen(
        [sys.executable, "-m", "fsp.compendium.reproduce", *arguments, "1"],
        env={**os.environ, "FSP_ROOT": str(root)},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell starts a background job
    )
    wait_until(lambda: (out / "runs" / "k0.json").exists() or first.poll() is not None, 120)
    started = {process.pid for process in psutil.Process(first.pid).children(recursive=True)}
    os.killpg(first.pid, signal.SIGINT)
    errors = first.communicate(timeout=120)[1]
    assert first.returncode == 130
    assert f"finished runs are kept in {out / 'runs'}, and the same command continues there" in errors
    assert "Traceback" not in errors, errors
    assert len(started) >= 2
    assert gone(started)

    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert 1 <= len(kept) < 40
    capsys.readouterr()
    assert reproduce.main([*arguments, "0"]) == 0
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert f"reused where they fit: {len(kept)}." in (out / "report.md").read_text()
    assert "belong to the profiles full and quick" in capsys.readouterr().out


def running_kernels() -> set[int]:
    """Kernels below this process."""
    return {
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "ipykernel_launcher" in " ".join(process.cmdline())
    }


def gone(pids: set[int]) -> bool:
    """Whether processes end within ten seconds (a zombie has ended)."""
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, left = psutil.wait_procs(alive, timeout=10)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in left)


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


# --- the committed notebooks


def test_refresh_renews_notebook_tables_and_readme_and_check_changes_nothing(root, tmp_path, capfd):
    readme = root / "README.md"
    readme.write_text("# x\n<!-- claims -->\nold\n<!-- /claims -->\nend\n")
    write_notebook(root / "notebooks", "01_good", RUNS, TABLES, CHATTER)
    assert reproduce.main(["--refresh"]) == 0
    notebook = json.loads((root / "notebooks" / "01_good.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [1, 2, 3, 4, 5]
    assert len(code[-2]["outputs"]) == 1
    assert code[-1]["outputs"][0]["data"]["text/plain"] in ("2", ["2"])
    assert notebook["metadata"] == renew.METADATA
    assert [cell["metadata"] for cell in code[1:-1]] == [{}, {}, {}], "papermill's notes are gone"
    assert {path.name for path in (root / "figures").iterdir()} == {"01_good.png", "01_good.pdf"}
    assert not (root / "data" / "runs").exists()
    text = readme.read_text()
    assert text.startswith("# x\n<!-- claims -->\n|  | What its notebook finds |")
    assert "| [01](notebooks/01_good.ipynb) | 01_good | 1 | 0 | 0 | 0 |\n<!-- /claims -->\nend\n" in text
    page = (root / "data" / "results" / "README.md").read_text()
    assert "| Claim |" in page
    assert page.endswith("[01](../../notebooks/01_good.ipynb) |\n")

    # A changed output fails, unless the sanitize file makes both the same.
    path, sanitize = root / "notebooks" / "01_good.ipynb", root / "tests" / "nbval_sanitize.cfg"
    path.write_text(path.read_text().replace('"2"', '"5"'))
    sanitize.parent.mkdir()
    sanitize.write_text("[number]\nregex: [0-9]\nreplace: N\n")
    before = contents(root)
    assert reproduce.main(["--check"]) == 0
    assert contents(root) == before
    sanitize.unlink()
    assert reproduce.main(["--check"]) == 1


def test_what_a_failed_refresh_has_computed_is_kept_and_the_next_one_goes_on_there(root, in_process, capsys):
    (root / "README.md").write_text("<!-- claims -->\n<!-- /claims -->\n")
    write_notebook(root / "notebooks", "02_bad", RUNS, FAILS)
    before, reproduced = contents(root), root / "reproduced"
    assert reproduce.main(["--refresh", "--recompute"]) == 1
    after = {name: content for name, content in contents(root).items() if not name.startswith("reproduced")}
    assert after == before, "what finished beside a failure changes nothing either"
    [kept] = reproduced.glob("refresh-*/data/runs")
    said = capsys.readouterr().err
    assert "bar at seed 1" in said
    assert f"failed, and nothing was changed: 02_bad; finished runs are kept in {kept}, and the same command" in said

    write_notebook(root / "notebooks", "02_bad", RUNS, TABLES)
    assert reproduce.main(["--refresh", "--recompute"]) == 0
    assert "bar at seed" not in capsys.readouterr().err, "a run that was done before the failure was done again"
    assert (root / "data" / "results" / "02_bad.csv").exists()
    assert list(reproduced.iterdir()) == [], "what is in the tables now is no longer kept beside them"


def test_refresh_needs_a_tree_without_changes_so_that_results_can_name_their_commit(root, capsys):
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (root / "README.md").write_text("<!-- claims -->\n<!-- /claims -->\n")
    renew.check_clean()  # without git nothing is known
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (root / "untracked").write_text("")
    renew.check_clean()
    write_notebook(root / "notebooks", "01_good", FAILS)
    before = contents(root)
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(["--refresh"])
    assert stopped.value.code == 2
    assert "commit or undo the changes of notebooks/01_good.ipynb first" in capsys.readouterr().err
    assert contents(root) == before


# A notebook that takes the rows of its table as they are, and does the other runs.
REUSES = (
    PLACES
    + """\
import runpy
double = runpy.run_path(r"{folder}/quantity{number}.py")["double"]

def run(seed):
    return double(seed) + 0.5

table = results / "{stem}.csv"
known = {{row["key"]: row for row in csv.DictReader(table.open())}} if table.exists() else {{}}
rows = []
for seed in range(4):
    new = {{"key": f"k{{seed}}-{stem}", "status": "finished", "value": run(seed), "unread": run(seed)}}
    new["wall_s"] = time.time() % 1
    rows.append(known.get(new["key"], new))
with table.open("w") as file:
    csv.writer(file).writerows([list(rows[0]), *(row.values() for row in rows)])
values = [float(row["value"]) for row in rows]
head = "claim,kind,paper,section,measured,low,high,n,bound,published,holds,note".split(",")
row = ["It is high", "exploratory", "P", "", sum(values) / 4, min(values), max(values), 4, "> 0.25", "", "yes", ""]
with open(results / "{stem}.claims.csv", "w") as file:
    csv.writer(file).writerows([head, row])
for ending in ("png", "pdf"):
    (figures / f"{stem}.{{ending}}").write_bytes(b"drawn")
"""
)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (path, text.count(old))
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def commit(root, monkeypatch, capfd):
    """A function that refreshes notebooks with these stems; it gives a function for the lines of --check on each."""
    folder = root / "notebooks"
    (folder / "01_good.ipynb").unlink()
    (root / "README.md").write_text("<!-- claims -->\n<!-- /claims -->\n")

    def commit(*stems: str):
        for stem in stems:
            text = REUSES.replace("{folder}", str(folder)).replace("{number}", stem[:2])
            tag = "timing" if stem.endswith("times") else "nbval-check-output"
            write_notebook(folder, stem, text, tag=tag)
            (folder / f"quantity{stem[:2]}.py").write_text("def double(x):\n    return 2 * x\n")
        with monkeypatch.context() as patched:
            patched.setattr(execute, "run", lambda jobs, **_: run_here(jobs, patched, []))
            assert reproduce.main(["--refresh"]) == 0
        return SimpleNamespace(notebooks=folder, results=root / "data" / "results", check=check)

    def check() -> dict[str, list[str]]:
        capfd.readouterr()
        before = contents(root)
        status = reproduce.main(["--check", "--workers", "2"])
        printed = capfd.readouterr()
        assert contents(root) == before
        assert " failed" not in printed.out, "nbval itself sees none of this"
        found = {}
        for line in printed.err.splitlines():
            if re.match("0[1-6]_", line):
                stem, sentence = line.split(": ", 1)
                found.setdefault(stem, []).append(sentence)
        assert status == bool(found)
        return found

    return commit


def test_check_notices_an_edited_claim_cell_run_function_and_definition(commit):
    committed = commit("01_same", "02_claim", "03_cell", "04_run", "05_definition", "06_times")
    edit(committed.notebooks / "02_claim.ipynb", "> 0.25", "> 0.125")
    edit(committed.results / "03_cell.csv", "k2-03_cell,finished,4.5,4.5", "k2-03_cell,finished,4.5,4.75")
    edit(committed.notebooks / "04_run.ipynb", "double(seed) + 0.5", "double(seed) + 0.625")
    edit(committed.notebooks / "quantity05.py", "2 * x", "2 * x + 1e-12")
    edit(committed.results / "06_times.claims.csv", "yes", "no")
    found = committed.check()
    assert found.pop("02_claim") == ["bound '> 0.125', committed '> 0.25': It is high"]
    assert found.pop("03_cell")[0] == "03_cell.csv is not as make refresh wrote it"
    run = [text for text in found.pop("04_run") if "runs done anew" in text]
    assert re.fullmatch(
        r"2 runs done anew \(k\d-04_ru, k\d-04_ru\) differ .*: `value`: 2 differ, by at most 0.125; .*", run[0]
    )
    definition = found.pop("05_definition")
    assert len(definition) == 1
    assert "runs done anew" in definition[0]
    assert found.pop("06_times") == [
        "06_times.claims.csv is not as make refresh wrote it",
        "committed: verdict 'no' is written, 'yes' follows from its numbers: It is high",
        "verdict 'yes', committed 'no': It is high",
    ]
    assert found == {}


def test_rows_of_edited_code_may_round_otherwise_and_those_of_the_same_code_may_not(root, tmp_path):
    row = {"key": "a", "status": "finished", "value": 1.0, "code": "old"}
    edited, same = tmp_path / "edited", tmp_path / "same"
    for folder, value, code in ((root, 1.0, "old"), (edited, 1 + 1e-9, "new"), (same, 1 + 1e-9, "old")):
        tables.save(pd.DataFrame([row | {"value": value, "code": code}]), folder / "data" / "results" / "01_good.csv")
    assert renew._compare_runs(edited, "01_good", ["a"], None) == []
    assert "`value`: 1 differ" in renew._compare_runs(same, "01_good", ["a"], None)[0]


def test_check_allows_another_processor_to_move_a_number_and_a_notebook_of_times_any_time(commit):
    committed = commit("04_near", "05_far", "06_times")
    edit(committed.notebooks / "04_near.ipynb", "double(seed) + 0.5", "double(seed) + 0.625")
    edit(committed.notebooks / "05_far.ipynb", "double(seed) + 0.5", "double(seed) + 1.25")
    edit(committed.notebooks / "06_times.ipynb", "double(seed) + 0.5", "double(seed) + 99")
    written = committed.results / "provenance.json"
    known = json.loads(written.read_text())
    assert list(known) == ["04_near", "05_far", "06_times"]
    for stem in ("04_near", "05_far"):
        known[stem]["made_with"]["cpu"] = "another"
    written.write_text(json.dumps(known))
    found = committed.check()
    assert list(found) == ["05_far"]
    assert "`value`: 2 differ, by at most 0.75" in found["05_far"][0]


def test_runs_of_another_processor_are_done_in_notebooks_that_end_there_and_draw_no_files(root, tmp_path):
    cells = "a = 1", "table = study.sweep(run, configs, given, STEM)", "a = 2", "raise ValueError"
    source = write_notebook(root / "notebooks", "03_long", *cells)
    begun = renew._up_to_the_runs(source, tmp_path)
    assert [cell.source for cell in execute.read(begun).cells] == [PARAMETERS, *cells[:2]]
    without = write_notebook(root / "notebooks", "04_other", *cells[2:])
    assert execute.read(renew._up_to_the_runs(without, tmp_path)).cells == execute.read(without).cells
    assert renew._jobs([begun], tmp_path, figures=False)[0].environment["FSP_FIGURES"] == "0"
    assert "FSP_FIGURES" not in renew._jobs([begun], tmp_path)[0].environment, "a refresh writes them"


def write_table(root, stem, text):
    path = root / "data" / "results" / f"{stem}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_is_done_anew_is_a_fast_run_of_each_kind_that_no_other_notebook_does(root):
    """Rows of one kind fill the same columns: here there are searches, and trainings without one."""
    runs = {"a": (3000, 90), "b": (20, 2), "c": (500, 10), "d": (3000, 80), "e": ("", 2), "f": ("", 1)}
    rows = "".join(f"{key},finished,{of},0.5,{seconds}\n" for key, (of, seconds) in runs.items())
    write_table(root, "07_searches", f"key,status,population,accuracy,train_s\n{rows}")
    assert sorted(renew._some_runs("07_searches", done=set())) == ["b", "f"]
    assert renew._some_runs("07_searches", done={"c"}) == ["f"], "a search is done elsewhere"
    write_table(root, "08_alike", "key,status,accuracy\n" + "".join(f"{key},finished,0.5\n" for key in "uvwxyz"))
    chosen = renew._some_runs("08_alike", done=set())
    assert len({*chosen}) == 2
    assert chosen == renew._some_runs("08_alike", done={"a"}), "always the same"
    assert renew._some_runs("08_alike", done={"u"}) == []
    rows = "".join(
        f"{key},finished,0.5,{epochs},\n" for key, epochs in zip("abcdef", (90, 60, 6, 120, 90, 180), strict=True)
    )
    write_table(root, "09_epochs", f"key,status,accuracy,epochs,init\n{rows}z,finished,0.5,180,scaled\n")
    assert {*renew._some_runs("09_epochs", done=set())} <= {"b", "c", "z"}, "short trainings, where no time is told"


@pytest.mark.parametrize(("arguments", "anew"), [([], {"a"}), (["--recompute"], {"a", "b"})])
def test_slow_runs_are_done_anew_on_request_and_else_it_is_said_that_they_are_not(
    root, monkeypatch, capsys, arguments, anew
):
    write_table(root, "01_good", "key,status,x,y,train_s\na,finished,1,,30\nb,finished,,1,31\n")
    write_table(root, "01_good.claims", "")
    monkeypatch.setattr(renew, "_nbval", lambda *_: 0)
    monkeypatch.setattr(renew, "_damage", lambda *_: [])
    monkeypatch.setattr(renew, "_compare_claims", lambda *_: [])
    chosen = {}
    monkeypatch.setattr(renew, "_leave_out", lambda _, keys: chosen.update(keys))
    monkeypatch.setattr(execute, "run", lambda jobs, **_: [])
    reproduce.main(["--check", *arguments])
    assert {*chosen["01_good"]} == anew
    said = "01_good: 1 kinds of runs that take over 30 seconds are not done anew without --recompute\n"
    assert capsys.readouterr().out == ("" if arguments else said)


def test_rows_of_one_run_that_differ_between_two_tables_are_noticed(root):
    for stem, of_b in {"01_first": 0.5, "02_second": 0.5, "03_third": 0.5000000000000001}.items():
        write_table(
            root, stem, f"key,status,{stem},accuracy,train_s\nb,finished,1,{of_b},{of_b}\n{stem},finished,1,7,1\n"
        )
    found = renew._contradicting(["01_first", "02_second", "03_third"])
    assert [len(found[stem]) for stem in found] == [0, 0, 2]
    assert found["03_third"][0].startswith("its rows of runs that 01_first has as well differ: `accuracy`: 1 differ")


def test_check_says_what_is_not_committed(root, monkeypatch, capsys):
    monkeypatch.setattr(renew, "_nbval", lambda *_: 0)
    assert reproduce.main(["--check"]) == 1
    assert capsys.readouterr().err == "01_good: 01_good.csv is not committed: make refresh writes it\n"
    results = root / "data" / "results"
    write_notebook(root / "notebooks", "01_good", tag="timing")
    tables.save(pd.DataFrame({"key": ["a"], "status": "finished"}), results / "01_good.csv")
    tables.save(pd.DataFrame([claim()]), results / "01_good.claims.csv")
    assert reproduce.main(["--check"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        "01_good: 01_good.csv is not as make refresh wrote it",
        "01_good: 01_good.claims.csv is not as make refresh wrote it",
    ]
    assert said[2].startswith("01_good: it finished without writing 01_good.claims.csv")
    assert len(said) == 3


def test_the_short_page_counts_the_verdicts_of_each_notebook():
    holds = ["yes", "no", "yes", "equivalent", "not decided"]
    found = pd.DataFrame({"notebook": ["01_a"] * 4 + ["02_b"], "holds": holds})
    rows = report.verdicts_table(found, {"01_a": "A", "03_c": "C"}, link="x").splitlines()
    assert rows[0] == "|  | What its notebook finds | claims hold | equivalent | do not hold | not decided |"
    assert rows[2:] == ["| [01](x/01_a.ipynb) | A | 2 | 1 | 1 | 0 |", "| [03](x/03_c.ipynb) | C | 0 | 0 | 0 | 0 |"]


# --- comparing


def test_rows_are_matched_by_key_whatever_their_order_and_rows_of_one_key_by_position():
    old = pd.DataFrame({"key": ["a", "a", "b"], "step": [1, 2, 1], "x": [0.1, 0.2, 0.3]})
    assert compare.compare_rows(old.iloc[[2, 0, 1]], old).differing == {}
    swapped = compare.compare_rows(old.iloc[[1, 0, 2]], old)
    assert swapped.differing == {"step": "2 differ, by at most 1", "x": "2 differ, by at most 0.1"}
    assert compare.compare_rows(old.iloc[:2], old)[:3] == (2, 1, 0)
    assert compare.compare_rows(old, old.iloc[:2])[:3] == (2, 0, 1)
    assert str(compare.compare_rows(old, old)).endswith("same to the printed digits")


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"x": [1000.0009, 2.0]}, {}),
        ({"x": [1000.01, 2.0]}, {"x": "1 differ, by at most 0.01"}),
        ({"x": [1000.0, float("nan")]}, {"x": "1 differ, one is missing"}),
        ({"part": ["y", None]}, {"part": "1 differ"}),
        ({"part": ["x", "y"]}, {"part": "1 differ"}),
        ({"ok": [False, True]}, {"ok": "1 differ"}),
        ({"more": 0}, {"more": "only in the new table"}),
        ({"wall_s": 9.0}, {}),
    ],
)
def test_numbers_differ_beyond_a_tolerance_and_all_else_where_it_is_not_the_same(new, said):
    old = pd.DataFrame({"key": ["a", "b"], "x": [1000.0, 2.0], "part": ["x", None], "ok": [True, True], "wall_s": 1.0})
    assert compare.compare_rows(old.assign(**new), old).differing == said


def test_on_another_processor_what_is_read_off_a_trained_network_may_move_as_far_as_two_seeds_lie_apart():
    """In 999 of 1000 cases, by Student's t with four degrees of freedom: 8.61 times the deviation of a difference."""
    alike = {key: key[0] for key in ("a1", "a2", "a3", "a4", "a5", "b1", "b2", "b3", "b4", "b5")}
    wide, narrow = [1.0, 2.0, 3.0, 4.0, 5.0], [100.0, 100.25, 100.5, 100.5, 100.5]
    old = pd.DataFrame({"key": list(alike), "code": "1", "ece": wide + narrow, "r2": 3.0, "bin_01_n": 7})

    def differing(**new):
        made = old.assign(code="2", bin_01_n=99)
        for name, (row, value) in new.items():
            made[name] = made[name].where(made.index != row, value)
        return compare.compare_rows(made[made.key.isin(["a1", "b1"])], old, alike=alike).differing

    of_wide, of_narrow = (8.6103 * math.sqrt(2) * statistics.stdev(values) for values in (wide, narrow))
    assert differing(ece=(0, 1 + 0.999 * of_wide)) == {}
    assert differing(ece=(0, 1 + 1.001 * of_wide)) == {"ece": f"1 differ, by at most {1.001 * of_wide:.3g}"}
    assert differing(ece=(5, 100 + 0.999 * of_narrow)) == {}
    assert differing(ece=(5, 100 + 1.001 * of_narrow)) == {"ece": f"1 differ, by at most {1.001 * of_narrow:.3g}"}
    assert differing(r2=(0, 4.0)) == {"r2": "1 differ, by at most 1"}
    assert differing(ece=(0, float("nan"))) == {"ece": "1 differ, one is missing"}
    assert "bin_01_n" in compare.compare_rows(old.assign(bin_01_n=99), old).differing, "on this processor it counts"
    few = {key: key for key in alike}
    assert compare.compare_rows(old.assign(ece=old.ece + 10), old, alike=few).differing != {}, "a tenth of 99.5 is less"
    assert compare.compare_rows(old.assign(ece=old.ece + 9), old, alike=few).differing == {}


def test_lists_of_numbers_are_compared_number_by_number_and_losses_of_epochs_as_what_is_read_off_a_network():
    losses = ["[1.5, 0.5]", "[1.7, 0.5]", "[1.3, 0.5]", "[1.6, 0.6]", "[1.4, 0.4]", None]
    old = pd.DataFrame(
        {"key": list("abcdef"), "validation_losses": losses, "methods": '["er", "erk"]', "lists": "[1, 2]"}
    )
    new = old.assign(validation_losses=["[1.75, 0.5]", *losses[1:]])
    assert compare.compare_rows(new, old).differing == {"validation_losses[0]": "1 differ, by at most 0.25"}
    assert compare.compare_rows(new, old, alike=dict.fromkeys("abcdef", "one config")).differing == {}
    one_less, one_more = (old.assign(validation_losses=[text, *losses[1:]]) for text in ("[1.5]", "[1.5, 0.5, 9]"))
    assert compare.compare_rows(one_less, old).differing == {"validation_losses[1]": "1 differ, one is missing"}
    assert compare.compare_rows(one_more, old).differing == {"validation_losses[2]": "only in the new table"}
    without = old.loc[5:]  # the run that has no losses
    assert compare.compare_rows(without, old).differing == compare.compare_rows(old, without).differing == {}
    other = old.assign(methods='["er", "er"]', lists='["a"]')
    assert compare.compare_rows(other, old).differing["methods"] == "6 differ"
    assert not compare.compare_rows(old, old).differing


def test_all_else_may_move_by_a_tenth_of_the_range_of_its_column_there():
    old = pd.DataFrame({"key": ["a", "b", "c"], "x": [0.0, 10.0, 0.0], "code": "1"})
    assert compare.compare_rows(old.assign(x=[0.9, 10.0, 0.0], code="2"), old, alike={}).differing == {}
    assert compare.compare_rows(old.assign(x=[1.1, 10.0, 0.0]), old[:2], alike={}).differing != {}
    assert compare.compare_rows(old.assign(x=[0.9, 10.0, 0.0]), old).differing != {}
    good = old.assign(accuracy=[0.95, 0.96, 0.95])  # 10 % of their range is less than an image
    near, far = (good.assign(accuracy=[0.95, 0.96, 0.95 - moved]) for moved in (0.028, 0.032))
    assert compare.compare_rows(near, good, alike={}).differing == {}
    assert compare.compare_rows(far, good, alike={}).differing == {"accuracy": "1 differ, by at most 0.032"}
    assert compare.compare_rows(near, good).differing == {"accuracy": "1 differ, by at most 0.028"}
    last_bit = old.assign(x=[0.0, 10.000000000000002, 0.0])
    assert compare.compare_rows(last_bit, old).differing == {}
    assert compare.compare_rows(last_bit, old, rtol=0).differing != {}


def test_a_column_that_is_gone_is_named_but_not_one_of_runs_that_are_left_out():
    old = pd.DataFrame({"key": ["a", "b"], "x": [1.0, None]})
    assert compare.compare_rows(old[["key"]], old).differing == {"x": "only in the committed table"}
    assert compare.compare_rows(old.loc[1:, ["key"]], old).differing == {}


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ([claim(measured=0.59)], []),
        ([claim(measured=0.61)], ["measured 0.61, committed 0.5 [0.4, 0.6]: Gap decides"]),
        ([claim(measured=float("nan"))], ["measured nan, committed 0.5 [0.4, 0.6]: Gap decides"]),
        ([claim(low=0.2)], ["verdict 'not decided', committed 'yes': Gap decides"]),
        ([claim(above=0.35)], ["bound '> 0.35', committed '> 0.3': Gap decides"]),
        ([claim(kind="primary")], ["kind 'primary', committed 'exploratory': Gap decides"]),
        ([claim(paper="Q")], ["paper 'Q', committed 'P': Gap decides"]),
        ([claim(note="other", published="0.5")], []),
        ([], ["missing: Gap decides"]),
        ([claim(), claim(text="Width decides")], ["not committed: Width decides"]),
    ],
)
def test_a_claim_is_the_same_if_its_verdict_is_and_its_value_stays_in_the_committed_interval(new, said):
    old = pd.DataFrame([claim()])
    assert compare.compare_claims(pd.DataFrame(new, columns=old.columns), old) == said


@pytest.mark.parametrize(
    ("new", "old", "kind"),
    [
        ({"measured": 0.7}, {}, "value outside the committed interval"),
        ({"kind": "primary"}, {}, "stated otherwise"),
        ({}, {"holds": "no"}, "committed in error"),
        ({"low": 0.2}, {}, "no longer decided"),
        ({}, {"low": 0.2}, "decided only here"),
        ({}, {"measured": 0.15, "low": 0.1, "high": 0.2}, "decided otherwise"),
    ],
)
def test_a_changed_claim_is_of_the_worst_kind_that_fits(new, old, kind):
    ours, committed = (pd.DataFrame([claim(**more)]) for more in (new, old))
    assert compare._change("03_x", "Gap decides", ours, committed).kind == kind
    assert compare._change("03_x", "Gap decides", committed, committed) is None or kind == "committed in error"


def test_a_file_of_claims_without_a_column_is_named_and_a_notebook_without_a_file_is_left_out(tmp_path):
    pd.DataFrame([claim()]).drop(columns=["notebook", "paper"]).to_csv(tmp_path / "03_x.claims.csv", index=False)
    with pytest.raises(ValueError, match=r"03_x\.claims\.csv has no column 'paper': expected claim,"):
        report.read_claims(tmp_path, ["03_x"])
    assert report.read_claims(tmp_path, ["04_y"]).empty


def test_a_table_that_got_rows_on_another_processor_names_both_each_once():
    before, now = {"cpu": "A", "torch": "2"}, {"cpu": "B", "torch": "2"}
    both = renew._both(before, now)
    assert both == {"cpu": "A and B", "torch": "2"}
    assert renew._both(both, before) == renew._both(both, now) == both


def test_claims_from_the_same_rows_are_the_same_in_every_column():
    old = pd.DataFrame([claim()])
    assert compare.compare_claims(pd.DataFrame([claim(measured=0.5 + 1e-9)]), old, exact=True) == []
    new = pd.DataFrame([claim(measured=0.59, low=0.41, note="other", n=8)])
    assert compare.compare_claims(new, old, exact=True) == [
        "note 'other', committed '': Gap decides",
        "measured 0.59, committed 0.5: Gap decides",
        "low 0.41, committed 0.4: Gap decides",
        "n 8, committed 9: Gap decides",
    ]


def test_a_committed_verdict_that_its_row_does_not_give_is_named_although_the_new_one_agrees():
    wrong = pd.DataFrame([claim(holds="no")])
    said = "committed: verdict 'no' is written, 'yes' follows from its numbers: Gap decides"
    assert compare.compare_claims(wrong, wrong) == [said]


def test_a_committed_claim_without_an_interval_is_compared_by_its_value():
    old = pd.DataFrame([claim(low=float("nan"), high=float("nan"))])
    assert list(old.holds) == ["not decided"]
    assert compare.compare_claims(old, old) == []
    assert len(compare.compare_claims(old.assign(measured=0.5001), old)) == 1
