"""Arrows between the modules of fsp, read from the source: an import anywhere in a file counts."""

import ast
import sys

import pytest

from fsp.paths import PACKAGE

FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted({name.split("/")[0] for name in FILES} - {"__init__"})  # models/vgg.py belongs to models


def imported(source: str, *, at_import_only: bool = False) -> set[str]:
    """Dotted names that a module imports; `from a import b` gives a.b."""
    tree = ast.parse(source)
    if at_import_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                node.body = []
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: this package writes fsp.module"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def outside(module: str, **options) -> set[str]:
    """Top-level packages that a module of fsp imports."""
    return {name.split(".")[0] for name in _imported_by(module, **options)} - {"fsp"}


def inside(module: str) -> set[str]:
    """Modules of fsp that a module of fsp imports, itself left out."""
    return {name.split(".")[1] for name in _imported_by(module) if name.startswith("fsp.")} - {module}


def _imported_by(module: str, **options) -> set[str]:
    return {
        name
        for file, path in FILES.items()
        if file.split("/")[0] == module
        for name in imported(path.read_text(encoding="utf-8"), **options)
    }


def test_the_reader_of_imports_sees_every_form():
    source = "import a.b\nfrom c import d, e\nfrom fsp.models import MODELS\ndef f():\n    import g\n"
    source += "if TYPE_CHECKING:\n    import h\n"
    assert imported(source) == {"a.b", "c.d", "c.e", "fsp.models.MODELS", "g", "h"}
    assert imported(source, at_import_only=True) == {"a.b", "c.d", "c.e", "fsp.models.MODELS"}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("paths", set()),
        ("progress", set()),
        ("stats", set()),
        ("spectrum", set()),
        ("masks", {"paths"}),
        ("gradients", {"masks"}),
        ("scores", {"gradients", "masks"}),
        ("diagnose", {"masks"}),
        ("dynamic", {"masks"}),
        ("tickets", {"masks", "paths"}),
        ("checkpoint", {"data", "masks", "paths"}),
        ("train", {"batches", "checkpoint", "data", "masks", "progress"}),
        ("execute", set()),
        ("search", {"batches", "data", "masks", "paths", "progress", "prune", "scores", "spectrum"}),
        ("plot", {"paths", "stats"}),
        ("tables", {"paths"}),
        ("provenance", {"paths"}),
        ("runs", {"paths", "progress", "provenance", "tables"}),
        ("parameters", {"runs", "data", "models", "prune", "dynamic", "train"}),
    ],
)
def test_a_low_module_imports_only_what_lies_below_it(module, allowed):
    assert inside(module) <= allowed


@pytest.mark.parametrize("module", ["models", "data", "train", "checkpoint", "masks", "lottery"])
def test_training_code_knows_nothing_of_spectrum_search_and_runs(module):
    assert inside(module) & {"spectrum", "search", "runs"} == set()


def test_spectrum_needs_the_numerical_libraries_alone():
    assert outside("spectrum") - set(sys.stdlib_module_names) <= {"torch", "numpy", "scipy", "pandas", "threadpoolctl"}


@pytest.mark.parametrize(
    ("packages", "owners"),
    [
        ({"matplotlib", "seaborn"}, {"plot"}),
        ({"papermill"}, {"reproduce", "execute"}),
        ({"nbconvert"}, {"reproduce"}),
        ({"dask", "distributed", "cloudpickle"}, {"runs"}),
        ({"nbformat"}, {"execute", "committed"}),
    ],
)
def test_a_heavy_package_is_imported_by_its_owner_alone(packages, owners):
    assert {module for module in MODULES if outside(module) & packages} == owners


def test_dask_is_never_imported_with_a_module():
    assert [m for m in MODULES if outside(m, at_import_only=True) & {"dask", "distributed"}] == []


def test_no_two_modules_import_each_other_in_a_circle():
    arrows = {module: inside(module) for module in MODULES}
    left = set(MODULES)
    while free := {module for module in left if not arrows[module] & left}:
        left -= free
    assert left == set()
