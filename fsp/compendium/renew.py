"""Care of the committed notebooks: test that they still give their outputs, and renew them."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

from fsp.files import replacing
from fsp.paths import ROOT

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# No time stamps, and one output for what a cell prints however it was cut into messages.
STABLE = [
    "--ExecutePreprocessor.record_timing=False",
    "--CoalesceStreamsPreprocessor.enabled=True",
    "--NotebookExporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor",  # after execution
]
ERROR_LINES = 15
MARKERS = "<!-- claims -->", "<!-- /claims -->"
CLAIMS_PAGE = """# The papers' claims, as measured here

Written by `make refresh` from the files `NN_name.claims.csv`, which also hold notes. Means have Student's t intervals,
correlations bootstrap intervals, both at 95 %. *Not decided*: the interval holds the bound of the claim.
"""


def check(selected: list[Path]) -> int:
    """Run the committed notebooks with nbval and compare their tagged outputs; nothing in the repository changes.

    They run with the committed tables at hand, so that rows are drawn and not computed, and they write to a
    temporary folder. ``tests/nbval_sanitize.cfg`` is used where it exists.

    Returns
    -------
    int
        Exit status of pytest.
    """
    sanitize = ROOT / "tests" / "nbval_sanitize.cfg"
    options = ["--nbval-lax", "-p", "no:cacheprovider", "--nbval-cell-timeout=300"]
    options += [f"--nbval-sanitize-with={sanitize}"] if sanitize.exists() else []
    with _copied_root() as root:
        command = [sys.executable, "-m", "pytest", *options, *map(str, selected)]
        return subprocess.run(command, cwd=ROOT, env=_quiet(root)).returncode


def refresh(selected: list[Path], *, recompute: bool = False) -> int:
    """Execute the committed notebooks in place and renew their tables, figures and the two pages with claims.

    Each runs on a copy of the repository's tables in a temporary folder; only when it has finished do notebook,
    tables and figures replace the committed ones.

    Parameters
    ----------
    selected : list of path
    recompute : bool
        Leave the notebook's own table out of the copy, so that every row is computed.

    Returns
    -------
    int
        0, or 1 if a notebook failed; then the pages with the claims stay as they are.
    """
    failed = []
    with _copied_root() as root:
        (root / "notebooks").mkdir()
        for source in selected:
            tables = [f"data/results/{source.stem}.csv", f"data/results/{source.stem}.claims.csv"]
            for name in tables if recompute else []:
                (root / name).unlink(missing_ok=True)
            copy = Path(shutil.copy(source, root / "notebooks"))
            print(f"{source.stem}  running", flush=True)
            command = [sys.executable, "-m", "nbconvert", "--to=notebook", "--execute", "--inplace", *STABLE, str(copy)]
            done = subprocess.run(command, env=_quiet(root), stderr=subprocess.PIPE, text=True)
            if done.returncode or not all((root / name).exists() for name in tables):
                print("\n".join(done.stderr.splitlines()[-ERROR_LINES:]), file=sys.stderr)
                failed.append(source.stem)
                continue
            figures = sorted(path.relative_to(root) for path in (root / "figures").glob(f"{source.stem}*"))
            for name in [*tables, *figures]:
                with replacing(ROOT / name) as temporary:
                    shutil.copyfile(root / name, temporary)
            notebook = nbformat.read(copy, as_version=4)
            notebook.metadata = nbformat.from_dict(METADATA)
            nbformat.validate(notebook)
            with replacing(source) as temporary:
                nbformat.write(notebook, temporary)
    if failed:
        print(f"failed or wrote no tables, and left as they were: {', '.join(failed)}", file=sys.stderr)
        return 1
    from fsp.compendium import report  # here, because it loads torch; see `fsp.compendium.reproduce`

    results = ROOT / "data" / "results"
    stems = sorted(path.name.removesuffix(".claims.csv") for path in results.glob("*.claims.csv"))
    claims = report.read_claims(results, stems)
    headings = {stem: _heading(ROOT / "notebooks" / f"{stem}.ipynb") for stem in stems}
    pages = {
        ROOT / "README.md": _with_claims(
            (ROOT / "README.md").read_text(encoding="utf-8"), report.verdicts_table(claims, headings, link="notebooks")
        ),
        results / "README.md": f"{CLAIMS_PAGE}\n{report.claims_table(claims, notes=False, link='../../notebooks')}\n",
    }
    for path, text in pages.items():
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0


def check_readme() -> None:
    """Raise `ValueError` or `OSError` if README.md has no place for the claims, before `refresh` computes them."""
    _with_claims((ROOT / "README.md").read_text(encoding="utf-8"), "")


@contextmanager
def _copied_root() -> Iterator[Path]:
    """Temporary folder with a copy of the committed tables and figures, for FSP_ROOT."""
    with tempfile.TemporaryDirectory(prefix="fsp-") as folder:
        root = Path(folder).resolve()
        for name in ("data/results", "data/published", "figures"):
            (root / name).mkdir(parents=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, dirs_exist_ok=True)
        yield root


def _quiet(root: Path) -> dict[str, str]:
    """Environment in which `fsp.paths.ROOT` is `root`, no bar is drawn and figures appear in notebooks."""
    environment = {**os.environ, "FSP_ROOT": str(root), "FSP_PROGRESS": "0"}
    environment.pop("MPLBACKEND", None)
    return environment


def _heading(notebook: Path) -> str:
    """What a notebook says it finds: its first line, or its name if it begins otherwise."""
    first = nbformat.read(notebook, as_version=4).cells[0].source.partition("\n")[0]
    return first.removeprefix("# ") if first.startswith("# ") else notebook.stem


def _with_claims(readme: str, table: str) -> str:
    """README with another table between its markers."""
    begin, end = MARKERS
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"README.md needs one pair of lines {begin} and {end}: the claims are written between them")
    return readme[: readme.index(begin)] + f"{begin}\n{table}\n" + readme[readme.index(end) :]
