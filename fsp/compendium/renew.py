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

from fsp import paths
from fsp.compendium import execute
from fsp.paths import ROOT

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MARKERS = "<!-- claims -->", "<!-- /claims -->"
CLAIMS_PAGE = """# The papers' claims, as measured here

Written by `make refresh` from the files `NN_name.claims.csv`, which also hold notes. Means have Student's t intervals,
correlations bootstrap intervals, both at 95 %. *Not decided*: the interval holds the bound of the claim.
"""


def check(selected: list[Path], *, workers: int) -> int:
    """Run the committed notebooks with nbval and compare their tagged outputs; nothing in the repository changes.

    They run with the committed tables at hand, so that rows are drawn and not computed, and they write to a
    temporary folder. ``tests/nbval_sanitize.cfg`` is used where it exists.

    Returns
    -------
    int
        Exit status of pytest.
    """
    sanitize = ROOT / "tests" / "nbval_sanitize.cfg"
    options = ["--nbval-lax", "--nbval-cell-timeout=300", "-p", "no:cacheprovider"]
    options += ["-n", str(min(workers, len(selected))), "--dist", "loadscope"]  # a notebook is a scope
    options += [f"--nbval-sanitize-with={sanitize}"] if sanitize.exists() else []
    with _copied_root() as root:
        environment = {**os.environ, **_environment(root)}
        environment.pop("MPLBACKEND", None)
        command = [sys.executable, "-m", "pytest", *options, *map(str, selected)]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


def refresh(selected: list[Path], *, workers: int, recompute: bool) -> int:
    """Execute the committed notebooks in place and renew their tables, figures and the two pages with claims.

    Each runs on a copy of the repository's tables in a temporary folder; only when it has finished do notebook,
    tables and figures replace the committed ones.

    Parameters
    ----------
    selected : list of path
    workers : int
        Notebooks at once; see `fsp.compendium.execute.run`.
    recompute : bool
        Leave the tables of the notebooks out of the copy, so that every row is computed.

    Returns
    -------
    int
        0, or 1 if a notebook failed; then the pages with the claims stay as they are.
    """
    from fsp.compendium import report  # here, because they load torch; see `fsp.compendium.reproduce`
    from fsp.files import replacing

    failed = []
    with _copied_root() as root:
        place = paths.Outputs(root / "data" / "runs", root / "data" / "results", root / "figures")
        for source in selected if recompute else []:
            for table in place.results.glob(f"{source.stem}.*"):
                table.unlink()
        jobs = [execute.Job(source, root / "notebooks" / source.name, {}, _environment(root)) for source in selected]
        for job, seconds, error in execute.run(jobs, workers=workers):
            stem = job.source.stem
            error = error or report.broken_promise(place, stem)
            print(f"{stem}  {error or f'finished after {seconds:.0f} s'}", flush=True)
            if error:
                failed.append(stem)
                continue
            for path in [*place.results.glob(f"{stem}.*"), *place.figures.glob(f"{stem}*")]:
                with replacing(ROOT / path.relative_to(root)) as temporary:
                    shutil.copyfile(path, temporary)
            with replacing(job.source) as temporary:
                nbformat.write(_plain(execute.read(job.target)), temporary)
    if failed:
        print(f"failed, and left as they were: {', '.join(failed)}", file=sys.stderr)
        return 1
    results = ROOT / "data" / "results"
    stems = sorted(path.name.removesuffix(".claims.csv") for path in results.glob("*.claims.csv"))
    claims = report.read_claims(results, stems)
    headings = {stem: _heading(ROOT / "notebooks" / f"{stem}.ipynb") for stem in stems}
    readme = readme_with(report.verdicts_table(claims, headings, link="notebooks"))
    page = f"{CLAIMS_PAGE}\n{report.claims_table(claims, link='../../notebooks')}\n"
    for path, text in ((ROOT / "README.md", readme), (results / "README.md", page)):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0


@contextmanager
def _copied_root() -> Iterator[Path]:
    """Temporary folder with a copy of the committed tables and figures, for FSP_ROOT."""
    with tempfile.TemporaryDirectory(prefix="fsp-") as folder:
        root = Path(folder).resolve()
        for name in ("data/results", "data/published", "figures"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name)
        yield root


def _environment(root: Path) -> dict[str, str]:
    """Variables by which `fsp.paths.ROOT` is `root` and no bar is drawn."""
    return {"FSP_ROOT": str(root), "FSP_PROGRESS": "0"}


def _plain(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook without what papermill notes in it."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if not cell.metadata.tags:
            del cell.metadata["tags"]
    nbformat.validate(notebook)
    return notebook


def _heading(notebook: Path) -> str:
    """What a notebook says it finds: its first line, or its name if it begins otherwise."""
    first = execute.read(notebook).cells[0].source.partition("\n")[0]
    return first.removeprefix("# ") if first.startswith("# ") else notebook.stem


def readme_with(table: str) -> str:
    """README.md with another table of claims; raises `ValueError` or `OSError` if it has no place for one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, begin, rest = readme.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end or MARKERS[0] in after:
        raise ValueError(f"README.md needs one pair of lines {MARKERS[0]} and {MARKERS[1]}, for the claims")
    return f"{before}{begin}\n{table}\n{end}{after}"
