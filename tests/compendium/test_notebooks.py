"""The committed notebooks: their shape, and one run of each with its smoke profile."""

import ast
import hashlib
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import yaml
from papermill.exceptions import PapermillExecutionError

from fsp.compendium import parameters, report
from fsp.paths import NOTEBOOKS, PROFILES, ROOT
from fsp.runs import tables

ALL = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
each = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
CORRELATION = "04_weighted_gap_correlation"


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def code_lines(cell: nbformat.NotebookNode) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in cell.source.splitlines())


def committed_state() -> dict[str, str]:
    """Hash of every file that a notebook could change in the repository."""
    folders = [ROOT / "data" / "results", ROOT / "data" / "runs", ROOT / "figures", NOTEBOOKS]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(path: Path, out: Path, parameters: dict) -> nbformat.NotebookNode:
    return papermill.execute_notebook(
        path,
        out / path.name,
        {**parameters, "out_dir": str(out)},
        kernel_name="python3",
        progress_bar=False,
        extra_arguments=["--log-level=CRITICAL"],
    )


def smoke(path: Path) -> dict:
    return yaml.safe_load((PROFILES / "smoke" / f"{path.stem}.yaml").read_text(encoding="utf-8"))


# --- shape


def test_there_are_notebooks():
    assert CORRELATION in [path.stem for path in ALL]


@each
def test_the_first_code_cell_and_no_other_holds_the_parameters(path):
    cells = code_cells(path)
    assert [i for i, cell in enumerate(cells) if "parameters" in tags(cell)] == [0]
    assert not any("injected-parameters" in tags(cell) for cell in cells)


@each
def test_papermill_sees_every_parameter(path):
    source = code_cells(path)[0].source
    assigned = re.findall(r"^(\w+)(?:\s*:[^=\n]+)?\s*=", source, re.MULTILINE)
    assert list(papermill.inspect_notebook(path)) == assigned
    assert {"recompute", "out_dir", "scheduler"} <= set(assigned)


@each
def test_it_was_executed_from_top_to_bottom_without_an_error(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [output for cell in cells for output in cell.outputs if output.output_type == "error"] == []


@each
def test_every_checked_cell_has_an_output_to_check(path):
    checked = [cell for cell in code_cells(path) if "nbval-check-output" in tags(cell)]
    assert checked
    assert all(cell.outputs for cell in checked)


@each
def test_it_is_short(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= 16
    longest = max(code_cells(path)[1:], key=code_lines)
    assert code_lines(longest) <= 20, longest.source
    assert path.stat().st_size < 400_000


@each
def test_its_outputs_name_no_folder_of_a_machine(path):
    outputs = "\n".join(str(cell.outputs) for cell in code_cells(path))
    text = re.sub(r"'(?:image/png|image/svg\+xml|application/pdf)': '[^']*'", "", outputs)
    assert re.findall(r"(?:/home/|/Users/|/root/|/tmp/|/work/|/opt/|site-packages|[A-Z]:\\)[^\s']*", text) == []
    assert str(ROOT) not in text
    assert sys.prefix not in text


@each
def test_its_kernel_is_the_one_every_installation_has(path):
    metadata = nbformat.read(path, as_version=4).metadata
    assert metadata["kernelspec"]["name"] == "python3"
    assert set(metadata) == {"kernelspec", "language_info"}


@each
@pytest.mark.parametrize("profile", ["smoke", "paper"])
def test_a_profile_sets_parameters_that_the_notebook_has(path, profile):
    values = yaml.safe_load((PROFILES / profile / f"{path.stem}.yaml").read_text(encoding="utf-8"))
    assert values
    assert set(values) <= set(papermill.inspect_notebook(path)) - {"out_dir"}


def test_every_profile_belongs_to_a_notebook():
    assert {path.stem for path in PROFILES.rglob("*.yaml")} <= {path.stem for path in ALL}


# --- runs


@pytest.fixture(scope="module")
def smoked(tmp_path_factory):
    """Notebook to the folder of its smoke run, the executed notebook, and what the run changed in the repository."""
    done = {}

    def run_once(path: Path) -> tuple[Path, nbformat.NotebookNode, bool]:
        if path not in done:
            out, before = tmp_path_factory.mktemp(path.stem), committed_state()
            executed = run(path, out, smoke(path))
            done[path] = out, executed, committed_state() != before
        return done[path]

    return run_once


@pytest.fixture(autouse=True)
def _kernels_as_reproduce_starts_them(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")
    monkeypatch.delenv("MPLBACKEND", raising=False)


@each
def test_its_smoke_profile_writes_everything_to_the_given_folder_and_nothing_else(path, smoked):
    out, executed, changed = smoked(path)
    assert not changed
    assert report.broken_promise(out, path.stem) == ""
    assert list((out / "runs").glob("*.json"))
    claims = report.read_claims(out / "results", [path.stem])
    assert len(claims) >= 1
    assert set(claims.holds) <= {"yes", "no", "not decided"}
    shown = [output.get("data", {}) for cell in executed.cells for output in cell.get("outputs", [])]
    assert any("image/png" in data for data in shown), "no figure is shown in the notebook"


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem == "02_mask_graphs" else pytest.mark.slow, id=path.stem) for path in ALL],
)
def test_local_workers_give_the_table_that_one_process_gives(path, smoked, tmp_path):
    run(path, tmp_path, smoke(path) | {"scheduler": "local"})
    there, here = (tables.read(out / "results" / f"{path.stem}.csv") for out in (tmp_path, smoked(path)[0]))
    compared = report.compare_rows(there, here)
    assert compared[:3] == (len(here), 0, 0)
    assert set(compared.differing) <= {"peak_bytes"}


def test_running_it_again_computes_nothing_and_gives_the_same_table(smoked):
    path = NOTEBOOKS / f"{CORRELATION}.ipynb"
    out = smoked(path)[0]
    records = {record: record.stat().st_mtime_ns for record in (out / "runs").glob("*.json")}
    table = (out / "results" / f"{path.stem}.csv").read_bytes()
    run(path, out, smoke(path))
    assert {record: record.stat().st_mtime_ns for record in (out / "runs").glob("*.json")} == records
    assert (out / "results" / f"{path.stem}.csv").read_bytes() == table


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dataset": "digit"}, r"dataset = 'digit': expected one of .*digits.*cifar10"),
        ({"densities": [float("nan")]}, r"densities = \[nan\]: expected .*fractions in \(0, 1\]"),
        ({"sedes": [0]}, r"no parameter is called sedes: this notebook has dataset, model, .*seeds"),
    ],
    ids=str,
)
def test_a_wrong_parameter_stops_at_once_and_names_the_valid_ones(wrong, message, tmp_path):
    path, before = NOTEBOOKS / f"{CORRELATION}.ipynb", committed_state()
    with pytest.raises(PapermillExecutionError) as stopped:
        run(path, tmp_path, {**smoke(path), **wrong})
    assert stopped.value.ename == "ValueError"
    assert re.search(message, stopped.value.evalue), stopped.value.evalue
    assert {path.name for path in tmp_path.iterdir()} == {f"{CORRELATION}.ipynb"}
    assert committed_state() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dataset": ["digits"]}, r"dataset = \['digits'\]: expected one of .*digits.*cifar10"),
        ({"model": "mpl"}, r"model = 'mpl': expected one of .*mlp"),
        ({"methods": ["snap"]}, r"methods = \['snap'\]: expected .*random.*snip.*synflow"),
        ({"methods": ["snip", "snip"]}, r"expected a list of different ones of .*random.*snip.*synflow"),
        ({"densities": [0]}, r"densities = \[0\]: expected .*fractions in \(0, 1\]"),
        ({"densities": [1.5]}, r"densities = \[1.5\]: expected .*fractions in \(0, 1\]"),
        ({"densities": []}, r"densities = \[\]: expected .*fractions in \(0, 1\]"),
        ({"seeds": []}, r"seeds = \[\]: expected a list of different whole numbers"),
        ({"seeds": [0, 1, 1]}, r"seeds = \[0, 1, 1\]: expected a list of different whole numbers"),
    ],
    ids=str,
)
def test_the_check_that_the_notebook_makes_refuses_a_wrong_value(wrong, message):
    known = papermill.inspect_notebook(NOTEBOOKS / f"{CORRELATION}.ipynb")
    defaults = {name: ast.literal_eval(entry["default"]) for name, entry in known.items()}
    assert parameters.check(**defaults) == defaults
    with pytest.raises(ValueError, match=message):
        parameters.check(**{**defaults, **wrong})


@each
def test_its_table_claims_and_figures_are_committed_and_no_run_failed(path):
    results = ROOT / "data" / "results"
    table = pd.read_csv(results / f"{path.stem}.csv")
    assert (table.status == "finished").all()
    assert not report.read_claims(results, [path.stem]).empty
    assert list((ROOT / "figures").glob(f"{path.stem}*.png"))
    assert list((ROOT / "figures").glob(f"{path.stem}*.pdf"))
