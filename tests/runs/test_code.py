"""The digest of a run's code: every edit that can change a result changes it, and nothing else does."""

import ast
import dataclasses
import functools
import linecache
import math
import os
import shutil
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from fsp import paths
from fsp.runs import code, sweep
from fsp.runs.code import run_code

CELLS = """
import functools
from fsp import spectrum
from fsp.compendium import plot, study
SCALE = 2
NAMES = ["a", "b"]
OPTIONS = {"depth": (1, 2), "on": True}
unused = 5

def helper(x):
    return x * SCALE

class Counter:
    start = 1

    def next(self):
        return self.start + len(NAMES)

def run(config):
    "What it does."
    part = Counter().next()
    return {"y": helper(config["x"]) + part + OPTIONS["depth"][0]}
"""


def in_notebook(source, name="run"):
    """A function as a kernel defines it: in __main__, with a source that only linecache has."""
    file = f"/tmp/ipykernel_1/{abs(hash(source))}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace = {"__name__": "__main__"}
    exec(compile(source, file, "exec"), namespace)
    return namespace[name]


EDITS = [  # in the cells: another result is possible
    ('config["x"]', 'config["z"]'),
    ("return x * SCALE", "return x + SCALE"),
    ("SCALE = 2", "SCALE = 3"),
    ("SCALE = 2", "SCALE = 2.0"),
    ('["a", "b"]', '["a"]'),
    ("(1, 2)", "(0, 2)"),
    ('"on": True', '"on": 1'),
    ("start = 1", "start = 2"),
    ("self.start +", "self.start -"),
    ("def run(config):", "@functools.cache\ndef run(config):"),
    ("def run(config):", "def run(config, more=SCALE):"),
    ("part = Counter", "from fsp import masks\n    part = Counter"),
    ("part = Counter", "study.begin\n    part = Counter"),
]


@pytest.mark.parametrize(("old", "new"), EDITS)
def test_an_edit_that_can_change_a_result_changes_the_digest(old, new):
    assert CELLS.count(old) == 1
    assert run_code(in_notebook(CELLS.replace(old, new))) != run_code(in_notebook(CELLS))


LAYOUT = [
    ('"What it does."', '"""Something else,\n\n    in full."""'),
    ("part = Counter", "# why\n    part = Counter"),
    ("helper(config", "helper(\n        config"),
    ("unused = 5", "unused = 6\nfile = open\n"),
    ("class Counter:", '\n\nclass Counter:\n    """Counts."""\n'),
    ("SCALE = 2\n", "SCALE = (2)  # twice\n"),
]


@pytest.mark.parametrize(("old", "new"), LAYOUT)
def test_comments_docstrings_layout_and_what_is_not_used_do_not_count(old, new):
    assert CELLS.count(old) == 1
    assert run_code(in_notebook(CELLS.replace(old, new))) == run_code(in_notebook(CELLS))


def test_the_digest_is_the_same_in_every_process_and_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CELLS + "\nfrom fsp.runs.code import run_code\nprint(run_code(run))\n")
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        words = [sys.executable, script]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.strip() == run_code(in_notebook(CELLS))


KERNEL = """
import re
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell()
for cell in re.split(r"\\n\\n(?=\\S)", sys.argv[1]):
    shell.run_cell(cell).raise_error()
shell.run_cell("from fsp.runs.code import run_code; print(run_code(run))")
"""


def test_the_digest_is_the_same_in_a_notebook_whatever_its_cells_are():
    done = subprocess.run([sys.executable, "-c", KERNEL, CELLS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == run_code(in_notebook(CELLS))


def numbered(number):
    return lambda config: {"y": config["x"] + number}


def test_closures_partials_methods_and_lambdas_count_with_what_they_hold():
    def run(config, more):
        return {"y": config["x"] + more}

    class Callable:
        def __init__(self, more):
            self.more = more

        def __call__(self, config):
            return run(config, self.more)

        def method(self, config):
            return run(config, self.more)

    ways = {
        "closure": numbered,
        "partial": lambda number: functools.partial(run, more=number),
        "instance": Callable,
        "method": lambda number: Callable(number).method,
        "wrapped": lambda number: functools.cache(numbered(number)),
        "default": lambda number: eval("lambda config, more=number: more", {"number": number}),
        "namespace": lambda number: eval("lambda config: given.more", {"given": SimpleNamespace(more=number)}),
        "plain": lambda number: eval(f"lambda config: {number}"),
        "array": lambda number: eval("lambda config: held", {"held": np.array([0.1, number])}),
        "texts": lambda number: eval("lambda config: held", {"held": np.array(["a", number], dtype=object)}),
        "tensor": lambda number: eval("lambda config: held", {"held": torch.tensor([0.1, number])}),
        "table": lambda number: eval("lambda config: held", {"held": pd.DataFrame({"x": [0.1, number]})}),
        "built-in": lambda number: (math.sqrt, math.exp)[number - 1],
    }
    digests = {(name, number): run_code(make(number)) for name, make in ways.items() for number in (1, 2)}
    assert len(set(digests.values())) == len(digests)
    assert digests == {(name, number): run_code(make(number)) for name, make in ways.items() for number in (1, 2)}


def test_a_namespace_counts_with_the_entries_that_are_used():
    def made(**entries):
        return eval("lambda config: given.epochs", {"given": SimpleNamespace(**entries)})

    assert run_code(made(epochs=1, out_dir="here")) == run_code(made(epochs=1, out_dir="there"))
    assert run_code(made(epochs=1)) != run_code(made(epochs=2))


def test_a_function_without_source_counts_with_its_bytecode_and_constants():
    def made(body):
        namespace = {}
        exec(f"def run(config):\n    'Text.'\n    return {body}", namespace)
        assert namespace["run"].__code__.co_filename == "<string>"
        return namespace["run"]

    bodies = ["config['x']", "config['z']", "[y in {'a', 'b'} for y in config]", "[y in {'a', 'c'} for y in config]"]
    digests = [run_code(made(body)) for body in bodies]
    assert len(set(digests)) == 4
    assert digests == [run_code(made(body)) for body in bodies]


def test_things_that_reach_each_other_and_themselves_have_a_digest():
    source = "LOOP = [1]\nLOOP.append(LOOP)\ndef run(c):\n    return other(c)\ndef other(c):\n    return run(LOOP)\n"
    first = run_code(in_notebook(source))
    assert first == run_code(in_notebook(source + "\n"))
    assert first != run_code(in_notebook(source.replace("[1]", "[2]")))


def test_a_dataclass_counts_with_its_fields():
    def made(default):
        @dataclasses.dataclass
        class Settings:
            lr: float = default

        def run(config):
            return {"y": Settings().lr}

        return run

    assert run_code(made(0.1)) == run_code(made(0.1))
    assert run_code(made(0.1)) != run_code(made(0.2))


def test_a_module_of_one_s_own_counts_where_the_function_uses_it(monkeypatch):
    def made(text):
        module = ModuleType("mine")
        module.__file__ = "/home/me/mine.py"
        exec(text, vars(module))
        monkeypatch.setitem(sys.modules, "mine", module)
        return in_notebook("import mine\ndef run(config):\n    return mine.f(config)\n")

    one = "def f(config):\n    return g()\ndef g():\n    return 1\ndef h():\n    return 1\n"
    assert run_code(made(one)) == run_code(made(one.replace("def h():\n    return 1", "def h():\n    return 2")))
    assert run_code(made(one)) != run_code(made(one.replace("def g():\n    return 1", "def g():\n    return 2")))


# ---- modules of fsp ----------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package, read in the place of the one that is loaded."""
    copy = shutil.copytree(paths.PACKAGE, tmp_path / "fsp", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", copy)
    return copy


USES_STUDY = CELLS.replace("part = Counter", "study.begin(config)\n    part = Counter")


def after(path, text, source):
    """The digest when a text has been added to a module."""
    path.write_text(path.read_text() + text)
    code._module.cache_clear()
    return run_code(in_notebook(source))


@pytest.mark.parametrize(
    "name",
    ["compendium/study.py", "spectrum/definitions.py", "masks/algebra.py", "training/train.py", "models/mlp.py"],
)
def test_an_edited_module_that_is_reached_by_import_changes_the_digest(package, name):
    source = USES_STUDY.replace("study.begin", "spectrum.coordinates, study.begin")
    before = run_code(in_notebook(source))
    path = package / name
    assert after(path, "\n# a comment\n", source) == before
    assert after(path, "\nADDED = 1\n", source) != before


@pytest.mark.parametrize(
    "name",
    [
        "compendium/plot.py",
        "compendium/stats.py",
        "compendium/report.py",
        "runs/locks.py",
        "progress.py",
        "search/state.py",
    ],
)
def test_an_edited_module_that_is_beside_the_point_or_not_reached_changes_nothing(package, name):
    before = run_code(in_notebook(USES_STUDY))
    assert after(package / name, "\nADDED = 1\n", USES_STUDY) == before


def test_a_module_beside_the_point_counts_where_the_function_itself_uses_it(package):
    source = CELLS.replace("part = Counter", "plot.save(config)\n    part = Counter")
    before = run_code(in_notebook(source))
    assert after(package / "compendium" / "plot.py", "\nADDED = 1\n", source) != before


@pytest.mark.parametrize(
    "words", ["from fsp import masks", "import fsp.masks", "from fsp.masks.algebra import keep_top"]
)
def test_an_import_in_the_body_of_the_function_is_followed(package, words):
    source = CELLS.replace("part = Counter", f"{words}\n    part = Counter")
    before = run_code(in_notebook(source))
    assert after(package / "masks" / "algebra.py", "\nADDED = 1\n", source) != before


def test_every_module_beside_the_point_is_there_or_was_planned():
    there = [name for name in code.BESIDE if code._file_of(name) is not None]
    assert set(code.BESIDE) - set(there) <= {"fsp.compendium.claims"}


def test_a_digest_takes_less_than_a_fifth_of_a_second():
    run = in_notebook(USES_STUDY)
    run_code(run)
    start = time.process_time()
    run_code(run)
    assert time.process_time() - start < 0.2


def test_the_tree_is_written_the_same_for_ever():
    source = 'def f(x: int = 1) -> str:\n    "Text."\n    return f"{x!r:>3} and" + g(*x)[0]\n'
    expected = (
        "(Module body=[(FunctionDef name='f' args=(arguments args=[(arg arg='x' annotation=(Name id='int'))] "
        "defaults=[(Constant value=1)]) body=[(Return value=(BinOp left=(JoinedStr values=[(FormattedValue "
        "value=(Name id='x') conversion=114 format_spec=(JoinedStr values=[(Constant value='>3')])) (Constant "
        "value=' and')]) op=(Add) right=(Subscript value=(Call func=(Name id='g') args=[(Starred value=(Name "
        "id='x'))]) slice=(Constant value=0))))] returns=(Name id='str'))])"
    )
    assert code._outline(ast.parse(source)) == expected


# ---- through a sweep ---------------------------------------------------------------------------------------------


def test_an_edited_cell_is_told_of_by_the_sweep_and_an_edited_comment_is_not(tmp_path, recwarn):
    def swept(source):
        return sweep(in_notebook(source), [{"x": 1}], store=tmp_path)

    assert swept(CELLS)["y"].tolist() == [6]
    assert swept(CELLS.replace("# why", "")).attrs["stale"] == 0
    assert len(recwarn) == 0
    with pytest.warns(UserWarning, match="1 of 1 runs were reused that other code made"):
        assert swept(CELLS.replace("x * SCALE", "x - SCALE"))["y"].tolist() == [6]
