"""Arrows between the wings of fsp, read from the source: an import anywhere in a file counts."""

import ast
import sys

import pytest

from fsp.paths import PACKAGE

FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES.pop("__init__.py")
WINGS = sorted({name.split("/")[0].removesuffix(".py") for name in FILES})  # masks/algebra.py belongs to masks

ARROWS = {  # a wing, and the wings that it may import
    "files": set(),
    "paths": set(),
    "progress": set(),
    "checks": set(),
    "masks": {"checks", "files"},
    "models": {"checks"},
    "data": {"checks", "files", "paths", "progress"},
    "spectrum": {"checks", "masks"},
    "training": {"checks", "data", "files", "masks", "progress"},
    "pruning": {"checks", "data", "files", "masks", "progress", "training"},
    "search": {"checks", "data", "files", "masks", "progress", "pruning", "spectrum"},
    "runs": {"checks", "files", "paths", "progress"},
    "compendium": set(WINGS) - {"compendium"},
}


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


def of_wing(wing: str, **options) -> set[str]:
    """Dotted names that the files of a wing import."""
    files = [path for name, path in FILES.items() if name.split("/")[0].removesuffix(".py") == wing]
    return {name for path in files for name in imported(path.read_text(encoding="utf-8"), **options)}


def packages(wing: str, **options) -> set[str]:
    """Top-level packages other than fsp that a wing imports."""
    return {name.split(".")[0] for name in of_wing(wing, **options)} - {"fsp"}


def test_the_reader_of_imports_sees_every_form():
    source = "import a.b\nfrom c import d, e\nfrom fsp.models import MODELS\ndef f():\n    import g\n"
    source += "if TYPE_CHECKING:\n    import h\n"
    assert imported(source) == {"a.b", "c.d", "c.e", "fsp.models.MODELS", "g", "h"}
    assert imported(source, at_import_only=True) == {"a.b", "c.d", "c.e", "fsp.models.MODELS"}


def test_the_house_has_ten_wings_or_fewer_beside_four_files():
    assert set(ARROWS) == set(WINGS)
    assert len(set(WINGS) - {"checks", "files", "paths", "progress"}) <= 10


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_only_the_wings_that_it_may(wing):
    found = {name.split(".")[1] for name in of_wing(wing) if name.startswith("fsp.")} - {wing}
    assert found <= ARROWS[wing]


def test_no_arrow_of_the_plan_runs_in_a_circle():
    left = set(ARROWS)
    while free := {wing for wing in left if not ARROWS[wing] & left}:
        left -= free
    assert left == set()


def test_spectrum_needs_the_numerical_libraries_alone():
    assert packages("spectrum") - set(sys.stdlib_module_names) <= {"torch", "numpy", "scipy", "pandas", "threadpoolctl"}


@pytest.mark.parametrize(
    ("heavy", "owner"),
    [
        ({"matplotlib", "seaborn", "papermill", "nbconvert", "nbformat"}, "compendium"),
        ({"dask", "distributed", "cloudpickle"}, "runs"),
    ],
)
def test_a_heavy_package_is_imported_by_its_owner_alone(heavy, owner):
    assert [wing for wing in WINGS if packages(wing) & heavy] == [owner]


def test_dask_and_torchvision_are_never_imported_with_a_module():
    late = {"dask", "distributed", "torchvision"}  # seconds for every process, of which few need them
    assert [wing for wing in WINGS if packages(wing, at_import_only=True) & late] == []
