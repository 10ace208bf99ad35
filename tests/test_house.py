"""The house is in order: nothing public is unused, words have one meaning, decisions and files are explained."""

import ast
import base64
import io
import json
import re
import tokenize

import pandas as pd
import pytest
from PIL import Image

from fsp.paths import PACKAGE

ROOT = PACKAGE.parent
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
NOTEBOOKS = {path.name: json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
CELLS = {
    f"{name}, cell {number}": "".join(cell["source"])
    for name, notebook in NOTEBOOKS.items()
    for number, cell in enumerate(notebook["cells"])
    if cell["cell_type"] == "code"
}
PAGES = "\n".join(path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])


def names_used(source: str) -> set[str]:
    """Names that code uses; those that it imports, defines by def or class, or mentions in text do not count."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            used.add(node.id)
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            used |= set(re.findall(r"\w+", annotation.value))
    return used


def public_functions(source: str) -> set[str]:
    """Public functions and classes at the top level of a module."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.parse(source).body if isinstance(node, kinds) and not node.name.startswith("_")}


def test_the_reader_of_names_tells_use_from_mention():
    source = (
        'from a import imported\ndef defined(x: "Quoted"):\n    """mentioned"""\n    return used(other.attribute)\n'
    )
    assert names_used(source) == {"Quoted", "used", "other", "attribute"}
    assert public_functions(source + "def _private(): ...\nclass Kind: ...\n") == {"defined", "Kind"}


def test_every_public_function_is_used_by_the_package_a_notebook_or_a_page():
    used = set().union(*map(names_used, [*SOURCES.values(), *CELLS.values()]), re.findall(r"\w+", PAGES))
    unused = {file: sorted(public_functions(source) - used) for file, source in SOURCES.items()}
    assert {file: names for file, names in unused.items() if names} == {}


def test_no_identifier_says_sparsity_and_no_code_looks_into_its_own_namespace():
    offending = {}
    for place, code in (SOURCES | CELLS).items():
        tokens = tokenize.generate_tokens(io.StringIO(code).readline)
        names = {token.string for token in tokens if token.type == tokenize.NAME}
        offending[place] = [name for name in names if "sparsity" in name.lower() or name in ("globals", "locals")]
    assert {place: names for place, names in offending.items() if names} == {}


def test_every_decision_that_code_or_text_names_is_explained():
    explained = set(re.findall(r"^#+ (D\d+)\b", (ROOT / "docs" / "decisions.md").read_text("utf-8"), re.MULTILINE))
    texts = SOURCES | {"README.md": PAGES}
    texts |= {name: "\n".join("".join(c["source"]) for c in nb["cells"]) for name, nb in NOTEBOOKS.items()}
    named = {place: set(re.findall(r"(?<=[(\s])D\d+(?=[),;:.\s])", text)) for place, text in texts.items()}
    assert len(set().union(*named.values())) > 20
    assert {place: sorted(found - explained) for place, found in named.items() if found - explained} == {}


def code_of(notebook: str) -> str:
    return "\n".join(code for place, code in CELLS.items() if place.startswith(f"{notebook}, "))


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_figure_is_drawn_by_its_notebook_and_every_drawn_figure_is_there(notebook):
    stem, code = notebook.removesuffix(".ipynb"), code_of(notebook)
    panels = re.findall(r'plot\.save\(\s*\w+,\s*place\.figures,\s*STEM(?:,\s*"(\w+)")?,?\s*\)', code)
    drawn = sorted(f"{stem}_{panel}" if panel else stem for panel in panels)
    assert len(drawn) == code.count("plot.save(")
    for kind in ("png", "pdf"):
        assert sorted(path.stem for path in (ROOT / "figures").glob(f"{stem}*.{kind}")) == drawn


def test_every_figure_belongs_to_a_notebook():
    files = [path.name for path in (ROOT / "figures").iterdir()]
    assert [name for name in files if not any(name.startswith(stem.removesuffix(".ipynb")) for stem in NOTEBOOKS)] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_figures_stand_on_a_ground_of_their_own_whatever_the_theme(notebook):
    outputs = [output for cell in NOTEBOOKS[notebook]["cells"] for output in cell.get("outputs", [])]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    for picture in pictures:
        drawn = Image.open(io.BytesIO(base64.b64decode("".join(picture)))).convert("RGBA")
        assert drawn.getchannel("A").getextrema() == (255, 255)


RESULTS = sorted((ROOT / "data" / "results").iterdir())
DATA_PAGE = (ROOT / "data" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_results_file_has_its_row_in_the_readme_of_the_data(path):
    assert f"`results/{re.sub(r'^[0-9]{2}_[a-z_]+', 'NN_name', path.name)}`" in DATA_PAGE


@pytest.mark.parametrize("path", [p for p in RESULTS if re.match(r"\d\d_\w+\.csv", p.name)], ids=lambda p: p.name)
def test_every_column_of_a_committed_table_is_in_the_readme_of_the_data(path):
    """By name, between the two names of a range, or by the stem that columns of several methods share."""
    columns = pd.read_csv(path, nrows=0).columns
    explained = set(re.findall(r"`(\w+)`", DATA_PAGE))
    for first, last in re.findall(r"`(\w+)` … `(\w+)`", DATA_PAGE):
        if {first, last} <= set(columns):
            explained |= set(columns[columns.get_loc(first) : columns.get_loc(last) + 1])
    stems = tuple(re.findall(r"`([a-z]+_)\w+` … \|", DATA_PAGE))
    assert [name for name in columns if name not in explained and not name.startswith(stems)] == []
