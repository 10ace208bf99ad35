"""Wrong lines that the tests must notice: the list in planted.toml is whole, and `make planted` plants every one."""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from planting import environment, pytest_in

from fsp.files import replacing
from fsp.paths import PACKAGE

ROOT = PACKAGE.parent
CHANGES = tomllib.loads((ROOT / "tests" / "planted.toml").read_text("utf-8"))["change"]
TABLE = ROOT / "data" / "results" / "planted.md"
COPIED = ("fsp", "tests", "notebooks", "docs", "data/results", "data/published", "figures")
PAGE = """# Planted changes

Each line below was put into a copy of the code, one at a time, in place of a right one, and the named test failed; it
passes without. The list is `tests/planted.toml`. `make planted` plants all of them again and writes this page.

| what is wrong | where | caught by | seconds |
| --- | --- | --- | --- |
{rows}
"""


def planted(text: str, change: dict) -> tuple[str, int]:
    """The text of a file with the wrong line, and how many lines were the right one."""
    old, new, before, after = change["old"], change["new"], r"^( *)", r"()$"
    if change["file"].endswith(".ipynb"):  # a line of a cell is a string in JSON
        old, new = (json.dumps(line, ensure_ascii=False)[1:-1] for line in (old, new))
        before, after = r'^( *" *)', r'((?:\\n)?",?)$'
    line = re.compile(before + re.escape(old) + after, re.MULTILINE)
    return line.subn(lambda found: found[1] + new + found[2], text)


def number_of(caught_by: str) -> str | None:
    """The notebook whose check catches a change; None where a test does."""
    return caught_by.removeprefix("check ") if caught_by.startswith("check ") else None


def is_there(caught_by: str) -> bool:
    """Whether there is such a test, or such a notebook."""
    if number := number_of(caught_by):
        return len(list((ROOT / "notebooks").glob(f"{number}_*.ipynb"))) == 1
    file, _, name = caught_by.partition("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return name.startswith("test_") and name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def row_of(change: dict) -> tuple[str, str, str]:
    """What the page says of a change, but for the seconds."""
    return change["what"], f"`{change['file']}`", f"`{change['caught_by']}`"


def rows_of(path: Path) -> dict[tuple[str, str, str], str]:
    """Rows of the page, and the seconds of each."""
    text = path.read_text("utf-8") if path.exists() else ""
    return {
        found[:3]: found[3] for found in re.findall(r"^\| (.+) \| (`.+`) \| (`.+`) \| (\d+) \|$", text, re.MULTILINE)
    }


# ---- the list ----------------------------------------------------------------------------------------------------


def test_a_line_is_planted_with_its_indentation_in_code_and_in_a_cell():
    change = {"file": "a.py", "old": 'x = "ä"', "new": "x = 1"}
    assert planted('if y:\n    x = "ä"\n    z = x = "ä"\n', change) == ('if y:\n    x = 1\n    z = x = "ä"\n', 1)
    cell = json.dumps({"source": ["if y:\n", '    x = "ä"\n', 'x = "ä"']}, indent=1, ensure_ascii=False)
    changed, count = planted(cell, change | {"file": "a.ipynb"})
    assert (json.loads(changed)["source"], count) == (["if y:\n", "    x = 1\n", "x = 1"], 2)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change["what"])
def test_the_right_line_is_there_once_the_wrong_one_can_be_read_and_what_catches_it_exists(change):
    assert set(change) == {"what", "file", "old", "new", "caught_by"}
    text = (ROOT / change["file"]).read_text("utf-8")
    changed, count = planted(text, change)
    assert count == 1, (
        f"{change['file']} has {count} lines {change['old']!r}: put the line as it reads now into the list"
    )
    assert changed != text
    if change["file"].endswith(".py"):
        compile(changed, change["file"], "exec")
    assert is_there(change["caught_by"]), f"there is no {change['caught_by']}"


def test_changes_are_planted_in_every_wing_and_in_notebooks():
    assert len(CHANGES) >= 24
    assert len({change["what"] for change in CHANGES}) == len(CHANGES)
    wings = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {Path(change["file"]).parent.name for change in CHANGES} == wings | {"notebooks"}


@pytest.mark.skipif(not TABLE.exists(), reason="make planted has not written its page yet")
def test_the_committed_page_is_of_this_list():
    assert list(rows_of(TABLE)) == [row_of(change) for change in CHANGES], "make planted writes it"


# ---- the run -----------------------------------------------------------------------------------------------------


def ended(root: Path, caught_by: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and output of tests, or of the check of one notebook, in a copy of the repository."""
    number = number_of(caught_by[0])
    if number is None:
        return pytest_in(root, caught_by)
    command = [sys.executable, "-m", "fsp.compendium.reproduce", "--check", "--workers", "1", "--only", number]
    done = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository."""
    root = tmp_path_factory.mktemp("planted")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (path for path in ROOT.iterdir() if path.is_file()):
        shutil.copy(path, root)
    return root


@pytest.fixture(scope="module")
def unchanged(copy, request):
    """How what catches a change ends without one, asked once: all tests together, and each check by itself."""
    slow = [item for item in request.session.items if item.get_closest_marker("slow")]
    asked = {item.callspec.params["change"]["caught_by"] for item in slow}
    tests = tuple(sorted(one for one in asked if not number_of(one)))
    once = functools.cache(ended)
    return lambda caught_by: once(copy, (caught_by,) if number_of(caught_by) else tests)


def page(seconds: dict[tuple[str, str, str], str]) -> str:
    """The page, with a row for each change of the list that was caught."""
    rows = [f"| {' | '.join(row)} | {seconds[row]} |" for row in map(row_of, CHANGES) if row in seconds]
    return PAGE.format(rows="\n".join(rows))


@pytest.fixture(scope="module")
def seconds():
    """How long each red took; written to the page that FSP_PLANTED names, where rows of other changes stay."""
    found = rows_of(TABLE)
    yield found
    if "FSP_PLANTED" in os.environ:
        with replacing(os.environ["FSP_PLANTED"]) as temporary:
            temporary.write_text(page(found), "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change["what"])
def test_a_planted_change_is_caught(change, copy, unchanged, seconds):
    caught_by = change["caught_by"]
    status, text = unchanged(caught_by)
    assert status == 0, f"red without any change\n{text[-4000:]}"
    path = copy / change["file"]
    right = path.read_text("utf-8")
    begin = time.perf_counter()
    try:
        path.write_text(planted(right, change)[0], "utf-8")
        status, text = ended(copy, (caught_by,))
    finally:
        path.write_text(right, "utf-8")
    assert status == 1, f"not caught by {caught_by}, which ended with {status}\n{text[-4000:]}"
    seconds[row_of(change)] = f"{time.perf_counter() - begin:.0f}"
