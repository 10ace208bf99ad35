"""The committed notebooks: their anatomy, how they read, and one run of each with its smoke profile."""

import ast
import contextlib
import functools
import hashlib
import html
import re
import subprocess
import symtable
import sys
from itertools import pairwise
from pathlib import Path

import distributed
import nbformat
import pandas as pd
import papermill
import pytest
import yaml

from fsp.compendium import compare, execute, parameters, report, study
from fsp.paths import NOTEBOOKS, PROFILES, ROOT, outputs
from fsp.runs import read_record, tables

ALL = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
each = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
OVERVIEW = NOTEBOOKS / "00_overview.ipynb"
CORRELATION = NOTEBOOKS / "04_weighted_gap_correlation.ipynb"
TAGS = {"parameters", "timing", "last", "nbval-check-output", "nbval-ignore-output"}
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@functools.cache  # these files are large, and each is looked at some twenty times
def notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@functools.cache
def known_parameters(path: Path) -> dict:
    """Names to what papermill knows of them."""
    return papermill.inspect_notebook(path)


def cells_of(path: Path) -> list[nbformat.NotebookNode]:
    return notebook(path).cells


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in cells_of(path) if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def depth(tree: ast.AST, kinds: type) -> int:
    """How many nodes of some kinds lie inside each other."""
    inside = max((depth(child, kinds) for child in ast.iter_child_nodes(tree)), default=0)
    return inside + isinstance(tree, kinds)


def read_globals(table: symtable.SymbolTable) -> set[str]:
    """Names that code reads and does not make itself, in its functions and comprehensions as well."""
    names = set().union(*(read_globals(child) for child in table.get_children()))
    for symbol in table.get_symbols():
        made_here = symbol.is_assigned() if table.get_type() == "module" else not symbol.is_global()
        if symbol.is_referenced() and not made_here:
            names.add(symbol.get_name())
    return names


def default_parameters(path: Path) -> dict:
    return {name: ast.literal_eval(entry["default"]) for name, entry in known_parameters(path).items()}


def profile(name: str, path: Path) -> dict:
    return yaml.safe_load((PROFILES / name / f"{path.stem}.yaml").read_text(encoding="utf-8"))


def profiles(path: Path) -> list[str]:
    """Names of a notebook's profiles; one that is quick as it stands has none of that name."""
    return ["smoke", "paper", *(["quick"] if (PROFILES / "quick" / f"{path.stem}.yaml").exists() else [])]


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


# --- anatomy


def test_there_are_notebooks():
    assert CORRELATION in ALL


@each
def test_its_title_is_a_sentence_and_the_only_one(path):
    headings = [re.findall(r"^# (.+)$", cell.source, re.MULTILINE) for cell in cells_of(path)]
    code = [cell.cell_type == "code" for cell in cells_of(path)]
    titles = [title for found, is_code in zip(headings, code, strict=True) for title in found if not is_code]
    assert titles == headings[0]
    assert len(titles) == 1
    assert len(titles[0].split()) > 5  # a claim has a verb and more, a topic has not


@each
def test_the_first_code_cell_and_no_other_holds_the_parameters_each_with_its_type_and_a_comment(path):
    cells = code_cells(path)
    assert [i for i, cell in enumerate(cells) if "parameters" in tags(cell)] == [0]
    assert not any("injected-parameters" in tags(cell) for cell in cells)
    statements = ast.parse(cells[0].source).body
    assert all(isinstance(statement, ast.AnnAssign) for statement in statements)
    lines = cells[0].source.splitlines()
    assert [lines[s.lineno - 1] for s in statements if "  # " not in lines[s.lineno - 1]] == []
    assigned = [statement.target.id for statement in statements]
    assert list(known_parameters(path)) == assigned
    assert {"recompute", "out_dir", "scheduler"} <= set(assigned)


@each
def test_after_the_check_the_parameters_are_read_from_its_result_alone(path):
    """So that "auto", and a list that papermill was given as text, reach every cell as they should."""
    first, checking, *others = code_cells(path)
    names = {statement.target.id for statement in ast.parse(first.source).body}
    check, after = checking.source.split("given = parameters.check(")[1].split("\n)\n", maxsplit=1)
    assert sorted(re.findall(r"(\w+)=\1\b", check)) == sorted(names)
    for source in (after, *(cell.source for cell in others)):
        assert read_globals(symtable.symtable(source, "cell", "exec")) & names == set(), source


def parameters_read(code: str) -> set[str]:
    """Parameters that code takes from ``given``, by name or through `fsp.compendium`'s functions."""
    tree, names = ast.parse(code), set()
    tuples = {"study.TRAINING": study.TRAINING}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            with contextlib.suppress(ValueError):
                tuples[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "given":
            names.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "study.chosen":
            for argument in node.args[1:]:
                starred = isinstance(argument, ast.Starred)
                names |= set(tuples[ast.unparse(argument.value)]) if starred else {ast.literal_eval(argument)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("population.members", "members"):
            names |= {*study.TRAINING, "early_steps"}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "study.sweep":
            assert ast.unparse(node.args[2]) == "given"
            here = any(keyword.arg == "here" for keyword in node.keywords)
            names |= {"out_dir", "recompute"} if here else {"out_dir", "recompute", "scheduler"}
    return names


def test_what_reads_a_parameter_is_known():
    code = "own = ('lr', 'init')\nstudy.chosen(given, 'seeds', *own, *study.TRAINING)\ndensity + given.density"
    assert parameters_read(code) == {"seeds", "lr", "init", "density", *study.TRAINING}
    assert parameters_read("study.sweep(run, configs, given, STEM)") == {"out_dir", "recompute", "scheduler"}
    assert parameters_read("study.sweep(run, configs, given, STEM, here=True)") == {"out_dir", "recompute"}
    assert parameters_read("population.members(given, [], [], [])") == {*study.TRAINING, "early_steps"}
    assert parameters_read("'seeds'; seeds; other.seeds") == set()


@each
def test_every_parameter_is_read_after_the_check(path):
    first, checking, *others = code_cells(path)
    names = {statement.target.id for statement in ast.parse(first.source).body}
    after = checking.source.split("given = parameters.check(")[1].split("\n)\n", maxsplit=1)[1]
    read = parameters_read("\n".join([after, *(cell.source for cell in others)]))
    assert names - read == set(), "set, and used by nothing"
    assert read - names == set(), "used, and no parameter"


@each
def test_it_ends_with_what_it_was_made_with(path):
    [shown] = code_cells(path)[-1].outputs[-1:]
    assert re.match(r"\s+made with\n.*^torch .*^git ", shown.data["text/plain"], re.DOTALL | re.MULTILINE)


@each
def test_it_was_executed_from_top_to_bottom_without_an_error(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [output for cell in cells for output in cell.outputs if output.output_type == "error"] == []


@each
def test_it_shows_a_figure(path):
    assert any("image/png" in output.get("data", {}) for cell in code_cells(path) for output in cell.outputs)


@each
def test_its_tags_are_known_and_every_checked_cell_has_an_output_to_check(path):
    assert {tag for cell in cells_of(path) for tag in tags(cell)} <= TAGS
    checked = [cell for cell in code_cells(path) if "nbval-check-output" in tags(cell)]
    assert checked
    assert all(cell.outputs for cell in checked)


@each
def test_its_outputs_are_small_and_name_no_folder_of_a_machine(path):
    assert path.stat().st_size < 400_000
    outputs = "\n".join(str(cell.outputs) for cell in code_cells(path))
    text = re.sub(r"'(?:image/png|image/svg\+xml|application/pdf)': '[^']*'", "", outputs)
    assert re.findall(r"(?:/home/|/Users/|/root/|/tmp/|/work/|/opt/|site-packages|[A-Z]:\\)[^\s']*", text) == []
    assert str(ROOT) not in text
    assert sys.prefix not in text


@each
def test_its_kernel_is_the_one_every_installation_has(path):
    metadata = notebook(path).metadata
    assert metadata["kernelspec"]["name"] == "python3"
    assert set(metadata) == {"kernelspec", "language_info"}


@each
def test_a_profile_sets_parameters_that_the_notebook_has(path):
    for name in profiles(path):
        values = profile(name, path)
        assert values
        assert set(values) <= set(known_parameters(path)) - {"out_dir"}


def test_every_profile_belongs_to_a_notebook():
    assert {path.stem for path in PROFILES.rglob("*.yaml")} <= {path.stem for path in ALL}


def test_notebooks_that_measure_time_say_so():
    """They run alone."""
    timing = [path.stem for path in ALL if "timing" in tags(code_cells(path)[0])]
    assert timing == ["12_performance", "13_sweeps"]


# --- the overview


def test_the_overview_runs_last_because_it_shows_what_the_others_have_found():
    assert [path for path in ALL if "last" in execute.tags_of(path)] == [OVERVIEW]


def test_the_overview_shows_every_primary_claim_with_its_committed_answer():
    """Where one has changed: make refresh ARGS="--only 00"."""
    outputs = [output for cell in code_cells(OVERVIEW) for output in cell.outputs]
    shown = "".join(output.get("data", {}).get("text/markdown", "") for output in outputs)
    lines = [line for line in shown.splitlines() if re.match(r"\| .* \| P\d+\. ", line)]
    written = report.read_claims(ROOT / "data" / "results", [path.stem for path in ALL])
    answers = report.answers(written)
    assert len(lines) == len(answers) > 20
    for claim, row in answers.items():
        entries = [
            claim,
            f"**{row['answer']}**",
            report.measured(row),
            row["bound"].replace("<", "&lt;"),
            str(row["n"]),
        ]
        [line] = [line for line in lines if f"| {claim} |" in line]
        assert " | ".join(entries) in line
        assert f"({row['notebook']}.ipynb)" in line


def test_the_overview_says_of_every_notebook_which_question_it_answers():
    prose = "".join(cell.source for cell in cells_of(OVERVIEW) if cell.cell_type == "markdown")
    asked = re.findall(r"^\| .+\? \| \[(\d\d)\]\((\S+)\) \|$", prose, re.MULTILINE)
    assert asked == [(path.stem[:2], path.name) for path in ALL if path != OVERVIEW]


# --- how it reads


def test_all_are_formatted():
    command = [sys.executable, "-m", "ruff", "format", "--check", "--quiet", str(NOTEBOOKS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each
def test_no_name_comes_from_a_table_of_names(path):
    assert [cell.source for cell in code_cells(path) if re.search(r"\b(globals|locals)\(", cell.source)] == []


@each
def test_it_has_one_plain_statement_a_line(path):
    for cell in code_cells(path):
        assert max(len(line) for line in cell.source.splitlines()) <= 100, cell.source
        tree = ast.parse(cell.source)
        assert depth(tree, ast.NamedExpr) == 0, cell.source
        assert depth(tree, COMPREHENSIONS) <= 2, cell.source
        targets = [target for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in node.targets]
        assert [t for t in targets if isinstance(t, ast.Tuple) and len(t.elts) > 3] == [], cell.source


@each
def test_a_sentence_before_each_code_cell_says_what_it_does(path):
    for before, cell in pairwise(cells_of(path)):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
            assert re.search(r"\w\W*[.:]\W*$", before.source, re.MULTILINE), before.source


@each
def test_it_opens_with_the_figure_of_what_it_finds(path):
    """Relative, so that a notebook that is computed anew shows its own."""
    [figure] = re.findall(r"^!\[.{30,}\]\(\.\./figures/(\S+)\.png\)$", cells_of(path)[0].source, re.MULTILINE)
    assert figure.startswith(path.stem)
    assert (ROOT / "figures" / f"{figure}.png").exists()


@each
def test_no_printed_line_is_wider_than_a_laptop_shows(path):
    printed = [output for cell in code_cells(path) for output in cell.outputs if output.output_type == "stream"]
    assert [line for output in printed for line in output.text.splitlines() if len(line) > 120] == []


# --- runs


@pytest.fixture(scope="module")
def smoked(tmp_path_factory):
    """Notebook to the folder of its smoke run, and whether the run changed anything in the repository."""
    done = {}

    def run_once(path: Path) -> tuple[Path, bool]:
        if path not in done:
            out, before = tmp_path_factory.mktemp(path.stem), committed_state()
            run(path, out, profile("smoke", path))
            done[path] = out, committed_state() != before
        return done[path]

    return run_once


@pytest.fixture(autouse=True)
def _kernels_that_show_nothing(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")
    monkeypatch.setenv("MPLBACKEND", "agg")  # figures go to their files alone: --check shows them in the notebooks


@each
def test_its_smoke_profile_writes_everything_to_the_given_folder_and_nothing_else(path, smoked):
    out, changed = smoked(path)
    assert not changed
    assert report.broken_promise(outputs(out, path.stem), path.stem) == ""
    assert list((out / "runs").glob("*.json"))
    claims = report.read_claims(out / "results", [path.stem])
    assert len(claims) >= 1
    assert set(claims.holds) <= {"yes", "no", "equivalent", "not decided"}


@pytest.fixture(scope="module")
def address():
    """Of a Dask scheduler with two workers that nobody of this package has started."""
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def makers(out: Path) -> list[int]:
    """Processes that made the records of a folder, one for each."""
    return [read_record(record)["provenance"]["process"] for record in sorted((out / "runs").glob("*.json"))]


def placed(path: Path, where: str):
    """A notebook on workers; one of them is enough for `make test`."""
    marks = [] if path.stem == "02_mask_graphs" else pytest.mark.slow
    return pytest.param(path, where, marks=marks, id=f"{path.stem}-{where}")


AT_ADDRESS = [path for path in ALL if path.stem[:2] in ("01", "02", "04")]


@pytest.mark.parametrize(
    ("path", "where"), [placed(path, "local") for path in ALL] + [placed(path, "address") for path in AT_ADDRESS]
)
def test_workers_do_the_runs_and_give_the_table_that_one_process_gives(
    path, where, smoked, tmp_path, request, monkeypatch
):
    monkeypatch.setenv("FSP_FIGURES", "0")
    scheduler = request.getfixturevalue("address") if where == "address" else where
    told = nbformat.read(path, as_version=4)
    told.cells.append(nbformat.v4.new_code_cell("import os\nprint(os.getpid())"))
    nbformat.write(told, tmp_path / "told.ipynb")
    executed = run(tmp_path / "told.ipynb", tmp_path, profile("smoke", path) | {"scheduler": scheduler})
    kernel, made_by = int(executed.cells[-1].outputs[0].text), makers(tmp_path)
    if path.stem == "13_sweeps":  # measures workers, itself and in its own process
        assert set(made_by) == {kernel}
    else:
        assert kernel not in made_by
    if where == "address":
        assert len(set(made_by)) == 2
    monkeypatch.delenv("FSP_FIGURES")
    assert len(set(makers(smoked(path)[0]))) == 1
    there, here = (tables.read(out / "results" / f"{path.stem}.csv") for out in (tmp_path, smoked(path)[0]))
    compared = compare.compare_rows(there, here)
    assert compared[:3] == (len(here), 0, 0)
    assert set(compared.differing) <= {"peak_bytes"}


def test_running_it_again_computes_nothing_and_gives_the_same_table(smoked, monkeypatch):
    out = smoked(CORRELATION)[0]
    made = [*(out / "runs").glob("*.json")]
    times = [record.stat().st_mtime_ns for record in made]
    table = (out / "results" / f"{CORRELATION.stem}.csv").read_bytes()
    monkeypatch.setenv("FSP_FIGURES", "0")
    run(CORRELATION, out, profile("smoke", CORRELATION))
    assert {*(out / "runs").glob("*.json")} == {*made}
    assert [record.stat().st_mtime_ns for record in made] == times
    assert (out / "results" / f"{CORRELATION.stem}.csv").read_bytes() == table


@each
def test_its_check_finds_its_own_values_and_those_of_its_profiles_right(path, monkeypatch):
    monkeypatch.setattr(parameters, "check_files", lambda name: None)  # nothing need be downloaded here
    defaults = default_parameters(path)
    assert vars(parameters.check(**defaults)) == defaults
    for name in profiles(path):
        values = defaults | profile(name, path)
        if "device" in values:
            values["device"] = "cpu"  # there need not be a GPU here
        assert vars(parameters.check(**values)) == values


@each
def test_its_table_claims_and_figures_are_committed_and_no_run_failed(path):
    results = ROOT / "data" / "results"
    table = pd.read_csv(results / f"{path.stem}.csv")
    assert (table.status == "finished").all()
    assert not report.read_claims(results, [path.stem]).empty
    assert list((ROOT / "figures").glob(f"{path.stem}*.png"))
    assert list((ROOT / "figures").glob(f"{path.stem}*.pdf"))


@each
def test_its_claims_are_shown_as_whole_sentences(path):
    [cell] = [cell for cell in code_cells(path) if "study.save_claims(" in cell.source]
    page = cell.outputs[-1].data["text/html"]
    sentences = report.read_claims(ROOT / "data" / "results", [path.stem]).claim
    assert [sentence for sentence in sentences if f"<th>{html.escape(sentence, quote=False)}</th>" not in page] == []
