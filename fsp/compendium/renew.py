"""Care of what is committed: test that notebooks still give their outputs, rows and claims, and renew them."""

import hashlib
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pandas as pd

from fsp import paths
from fsp.compendium import execute
from fsp.paths import ROOT

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MARKERS = "<!-- claims -->", "<!-- /claims -->"
CLAIMS_PAGE = """# What the papers say, and what holds here

Written by `make refresh` from the files `NN_name.claims.csv`, which also hold notes. *Not decided*: the interval holds
the bound of the claim, or there are fewer than three observations. *Equivalent*: the interval lies within the two
bounds of the claim. Intervals have 95 %: of means Student's t, and where rows share seeds or methods a jackknife over
them.

## Primary claims

One or two for each sentence of the papers' abstracts, [written down before the runs](../../docs/claims.md); p is
corrected by Holm's procedure for their number.

{answers}

## All claims

{claims}
"""
PROVENANCE = "provenance.json"  # in data/results: what the files of each notebook were made with, and their SHA-256
SLOW_S = 30  # runs of kinds that took longer are done anew by a check only if it is asked to
SAME_BITS = ("cpu", "torch", "numpy", "scipy")  # what must be the same for rows to be so to the last bit


def check(selected: list[Path], *, workers: int, slow: bool = False) -> int:
    """Test that the committed notebooks, tables and claims belong together; nothing in the repository changes.

    * The tables are as ``make refresh`` wrote them, and each verdict follows from its row.
    * The notebooks run with nbval in a copy of the tables: their tagged outputs are the same, and so are their claims.
    * Rows of one run are the same in all tables that have it.
    * Some runs of each are done anew, unless it measures time, in notebooks that end there: one of each kind, and two
      at least, but for kinds that another notebook does (see `_some_runs`), and for those of which a run takes more
      than `SLOW_S` seconds, unless `slow`; the notebooks that have such kinds are named. With the processor, the
      libraries and the code of the committed table their rows must be the same bits, with code that was edited since
      the same to `fsp.compendium.compare.RTOL`; elsewhere they may move as `fsp.compendium.compare.compare_rows` says.

    ``tests/nbval_sanitize.cfg`` is used where it exists.

    Returns
    -------
    int
        0; the exit status of pytest; or 1 if something else differs, which is printed with the notebook's name.
    """
    known = _provenance()
    found = {source.stem: _damage(source.stem, known) for source in selected}
    whole = [source for source in selected if all((_results() / name).exists() for name in _names(source.stem))]
    repeated = [source for source in whole if not execute.measures_time(source)]
    for stem, sentences in _contradicting([source.stem for source in repeated]).items():
        found[stem] += sentences
    chosen: dict[str, list[str]] = {}
    for source in repeated:
        keys = _some_runs(source.stem, done={key for keys in chosen.values() for key in keys})
        seconds = _seconds(source.stem)[keys]
        fast = [key for key in keys if slow or seconds[key] <= SLOW_S]
        chosen[source.stem] = fast or keys[:1]
        if left_out := len(keys) - len(chosen[source.stem]):
            said = f"{left_out} kinds of runs that take over {SLOW_S} seconds are not done anew without --recompute"
            print(f"{source.stem}: {said}", flush=True)
    with _copied_root() as root:
        for path in [_results(root) / f"{source.stem}.claims.csv" for source in selected]:
            if path.exists():
                os.utime(path, (0, 0))  # it stays, for notebooks that show claims of others; see `_compare_claims`
        status = _nbval(selected, root, workers)
        for source in whole:
            found[source.stem] += _compare_claims(root, source.stem)
    with _copied_root() as root:
        _leave_out(root, chosen)
        # the longest first, as far as their tables say; of the others the later ones, which train more
        cost = {source: _seconds(source.stem)[chosen[source.stem]].sum() for source in reversed(repeated)}
        by_cost = sorted(cost, key=cost.get, reverse=True)
        begun = [_up_to_the_runs(source, root) for source in by_cost if chosen[source.stem]]
        for job, _, error in execute.run(_jobs(begun, root, figures=False), workers=workers):
            stem = job.source.stem
            found[stem] += [error] if error else _compare_runs(root, stem, chosen[stem], alike(job.source, known))
    for stem, sentences in found.items():
        print("".join(f"{stem}: {sentence}\n" for sentence in dict.fromkeys(sentences)), end="", file=sys.stderr)
    return status or int(any(found.values()))


def check_clean() -> None:
    """Raise `ValueError` if tracked files of the repository differ from the last commit; without git nothing is known.

    So the commit that ``provenance.json`` and the notebooks name is the code that made the results.
    """
    if not (ROOT / ".git").exists():
        return
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
    changed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    if changed:
        names = ", ".join(line[3:] for line in changed)
        raise ValueError(f"--refresh makes results that name a commit: commit or undo the changes of {names} first")


def refresh(selected: list[Path], *, workers: int, recompute: bool) -> int:
    """Execute the committed notebooks in place and renew their tables, figures and the two pages with claims.

    They run on a copy of the repository's tables in `kept_root`; only when all have finished do notebooks, tables and
    figures replace the committed ones.  Run records that are in no table yet stay there, so that a call after a failure
    does no run again.

    Parameters
    ----------
    selected : list of path
    workers : int
        Notebooks at once; see `fsp.compendium.execute.run`.
    recompute : bool
        Leave the tables of the notebooks out of the copy, so that every row is computed, now or by a call before that
        failed.

    Returns
    -------
    int
        0, or 1 if a notebook failed; then everything stays as it is.
    """
    from fsp.compendium import report
    from fsp.files import replacing
    from fsp.runs import tables

    failed, root = [], kept_root()
    place = _place(root)
    _copy_into(root)
    for source in selected if recompute else []:
        for table in place.results.glob(f"{source.stem}.*"):
            table.unlink()
    for job, seconds, error in execute.run(_jobs(selected, root), workers=workers):
        stem = job.source.stem
        error = error or report.broken_promise(place, stem)
        print(f"{stem}  {error or f'finished after {seconds:.0f} s'}", flush=True)
        failed += [stem] if error else []
    if failed:
        kept = f"finished runs are kept in {place.runs}, and the same command continues there"
        print(f"failed, and nothing was changed: {', '.join(failed)}; {kept}", file=sys.stderr)
        return 1
    known = _provenance()
    known |= {source.stem: _provenance_of(source.stem, root, known, recompute) for source in selected}
    texts = _pages(place.results)
    texts[_results() / PROVENANCE] = json.dumps(dict(sorted(known.items())), indent=1) + "\n"
    for source in selected:
        for path in [*place.results.glob(f"{source.stem}.*"), *place.figures.glob(f"{source.stem}*")]:
            with replacing(ROOT / path.relative_to(root)) as temporary:
                shutil.copyfile(path, temporary)
        with replacing(source) as temporary:
            nbformat.write(_plain(execute.read(root / "notebooks" / source.name)), temporary)
    for path, text in texts.items():
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    # What is in a table now is not taken from its record again; what others of the notebooks have done stays.
    for source in selected:
        for key in tables.read_cells(_results() / f"{source.stem}.csv")["key"]:
            (place.runs / f"{key}.json").unlink(missing_ok=True)
    if not any(place.runs.glob("*.json")):
        shutil.rmtree(root)
    return 0


def kept_root() -> Path:
    """Where a refresh puts all until it is done: a folder that git ignores, one for each set of `SAME_BITS`."""
    made_with = hashlib.sha256(json.dumps(_made_with()).encode()).hexdigest()
    return ROOT / "reproduced" / f"refresh-{made_with[:8]}"


def _nbval(selected: list[Path], root: Path, workers: int) -> int:
    """Compare the tagged outputs of notebooks that run with their tables in another root; pytest's exit status."""
    sanitize = ROOT / "tests" / "nbval_sanitize.cfg"
    options = ["--nbval-lax", "--nbval-cell-timeout=300", "-p", "no:cacheprovider"]
    if min(workers, len(selected)) > 1:
        options += ["-n", str(min(workers, len(selected))), "--dist", "loadscope"]  # a notebook is a scope
    options += [f"--nbval-sanitize-with={sanitize}"] if sanitize.exists() else []
    environment = {**os.environ, **_environment(root, figures=False)}
    environment.pop("MPLBACKEND", None)
    command = [sys.executable, "-m", "pytest", *options, *map(str, selected)]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def _some_runs(stem: str, *, done: set[str]) -> list[str]:
    """Keys of a few runs in a committed table: one of each kind, and two at least, without kinds of a run in `done`.

    Runs are of one kind if their rows fill the same columns. Of each kind it is one of the fastest quarter, as far as
    the table says how long they took or how many epochs they trained: a choice that is random, but always the same.
    """
    table, seconds = _cells(stem), _seconds(stem)
    filled = table.ne("").groupby(table["key"]).any()
    choice = random.Random(stem)
    keys = choice.sample(sorted(seconds.index), len(seconds))
    epochs = table.get("epochs", pd.Series("", table.index)).replace("", "0").groupby(table["key"]).first().astype(int)
    keys.sort(key=lambda key: (seconds[key], epochs[key]))  # those alike in both stay in their random order
    kinds: dict[tuple, list[str]] = {}
    for key in keys:
        kinds.setdefault(tuple(filled.loc[key]), []).append(key)
    if len(kinds) == 1 and done.isdisjoint(keys):
        return keys[:2]
    return [choice.choice(of[: math.ceil(len(of) / 4)]) for of in kinds.values() if done.isdisjoint(of)]


def _seconds(stem: str) -> pd.Series:
    """How long each run of a committed table took, by the columns that are times; 0 where it has none."""
    table = _cells(stem)
    times = table[[name for name in table if name.endswith("_s")]].apply(pd.to_numeric)
    return times.sum(axis=1).groupby(table["key"]).sum()


def _contradicting(stems: list[str]) -> dict[str, list[str]]:
    """For each notebook, sentences on runs whose rows are not the same in the committed table of an earlier one."""
    from fsp.compendium import compare
    from fsp.runs import tables

    known = {stem: tables.read(_results() / f"{stem}.csv") for stem in stems}
    found: dict[str, list[str]] = {stem: [] for stem in stems}
    for other, stem in itertools.combinations(stems, 2):
        keys = {*known[other]["key"]} & {*known[stem]["key"]}
        names = [name for name in known[stem] if name in known[other]]
        pair = (known[name].loc[known[name]["key"].isin(keys), names] for name in (stem, other))
        if keys and (differing := compare.compare_rows(*pair, rtol=0.0).differences()):
            found[stem].append(f"its rows of runs that {other} has as well differ: {differing}")
    return found


def alike(source: Path, known: dict | None = None) -> dict[str, str] | None:
    """For the key of each run of a notebook, the key that its config would have without the seed.

    None if the committed table was made with the processor and the libraries that are here, so that it needs no
    allowance: see `fsp.compendium.compare.compare_rows`. `known` is what is written of each notebook's files.
    """
    from fsp import data, runs
    from fsp.compendium import planning

    if (_provenance() if known is None else known).get(source.stem, {}).get("made_with") == _made_with():
        return None
    if not any("study.sweep(" in cell.source for cell in execute.read(source).cells):
        return {}
    configs = [config for _, config in planning.planned(source.stem, data.load)]
    return {runs.key(c): runs.key({name: c[name] for name in c if name != "seed"}) for c in configs}


def _cells(stem: str) -> pd.DataFrame:
    """A committed table as text."""
    from fsp.runs import tables

    return tables.read_cells(_results() / f"{stem}.csv")


def _leave_out(root: Path, chosen: dict[str, list[str]]) -> None:
    """Take runs out of the copied tables, so that the notebooks do them anew."""
    from fsp.runs import tables

    for stem, keys in chosen.items():
        path = _results(root) / f"{stem}.csv"
        cells = tables.read_cells(path)
        tables.save(cells[~cells["key"].isin(keys)], path)


def _compare_claims(root: Path, stem: str) -> list[str]:
    """Sentences on how the claims that a notebook wrote in another root differ from the committed ones."""
    from fsp.compendium import compare, report  # here, because they load torch; see `fsp.compendium.reproduce`
    from fsp.compendium.claims import read_claims

    if (_results(root) / f"{stem}.claims.csv").stat().st_mtime == 0:
        return [f"it finished without writing {stem}.claims.csv"]
    if broken := report.broken_promise(_place(root), stem):
        return [broken]
    try:
        ours, committed = (read_claims(place, [stem]) for place in (_results(root), _results()))
    except ValueError as error:
        return [str(error)]
    return compare.compare_claims(ours, committed, exact=True)


def _compare_runs(root: Path, stem: str, keys: list[str], alike: Mapping[str, str] | None) -> list[str]:
    """Sentences on how runs that a notebook did anew in another root differ from the committed table."""
    from fsp.compendium import compare
    from fsp.runs import tables

    found = []
    ours, committed = (tables.read(place / f"{stem}.csv") for place in (_results(root), _results()))
    made, before = (table[table["key"].isin(keys)] for table in (ours, committed))
    runs = f"{len(keys)} runs done anew ({', '.join(key[:8] for key in keys)})"
    if sorted(made["key"]) != sorted(before["key"]):
        found.append(f"{runs} have {len(made)} rows, {len(before)} in the committed table")
    edited = "code" in made and "code" in before and set(made["code"]) != set(before["code"])
    rtol = 0.0 if alike is None and not edited else compare.RTOL
    if differing := compare.compare_rows(made, committed, rtol=rtol, alike=alike).differences():
        found.append(f"{runs} differ from the committed table: {differing}")
    if not found and edited:
        print(f"{stem}: {runs} agree with the committed table, which other code has made", flush=True)
    return found


def _names(stem: str) -> list[str]:
    """Files that a notebook has in data/results."""
    return [f"{stem}.csv", f"{stem}.claims.csv"]


def _damage(stem: str, known: dict) -> list[str]:
    """What is wrong with a notebook's committed files: absent, not as refresh wrote them, or in contradiction."""
    from fsp.compendium.claims import contradictions, read_claims

    if missing := [name for name in _names(stem) if not (_results() / name).exists()]:
        return [f"{missing[0]} is not committed: make refresh writes it"]
    written = known.get(stem, {}).get("sha256", {})
    found = [f"{name} is not as make refresh wrote it" for name in _names(stem) if _sha256(name) != written.get(name)]
    try:
        return found + [f"committed: {wrong}" for wrong in contradictions(read_claims(_results(), [stem]))]
    except ValueError as error:
        return [*found, str(error)]


def _provenance() -> dict:
    """What is written of each notebook's files; nothing if it cannot be read."""
    try:
        return json.loads((_results() / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _provenance_of(stem: str, root: Path, known: dict, recompute: bool) -> dict:
    """Commit, digests, and what the table was made with: this machine, unless all its rows were there before.

    Of a table that got more rows both are named, so that it is compared everywhere as one of another machine.
    """
    from fsp.runs.provenance import provenance

    digests = {name: _sha256(name, root) for name in _names(stem)}
    before = known.get(stem, {})
    made_with = _made_with()
    if before and not recompute:
        same_rows = before.get("sha256", {}).get(f"{stem}.csv") == digests[f"{stem}.csv"]
        made_with = before["made_with"] if same_rows else _both(before["made_with"], made_with)
    return {
        "git": provenance()["git"],
        "made_with": made_with,
        "sha256": digests,
    }


def _both(before: dict, now: dict) -> dict:
    """What rows of two refreshes were made with, each named once."""
    joined = {}
    for name, value in now.items():
        earlier = before.get(name, value).split(" and ")
        joined[name] = " and ".join(earlier if value in earlier else [*earlier, value])
    return joined


def _made_with() -> dict:
    """What decides about the last bit of a row: see `SAME_BITS`."""
    from fsp.runs.provenance import provenance

    return {name: provenance()[name] for name in SAME_BITS}


def _sha256(name: str, root: Path | None = None) -> str:
    """Digest of a file in data/results."""
    return hashlib.sha256((_results(root) / name).read_bytes()).hexdigest()


def _results(root: Path | None = None) -> Path:
    """Folder of the committed tables, or of those in another root."""
    return (root or ROOT) / "data" / "results"


def _place(root: Path) -> paths.Outputs:
    """Folders below another root."""
    return paths.Outputs(root / "data" / "runs", _results(root), root / "figures")


def _jobs(selected: list[Path], root: Path, *, figures: bool = True) -> list[execute.Job]:
    """Notebooks to run in another root as they stand."""
    environment = _environment(root, figures=figures)
    return [execute.Job(source, root / "notebooks" / source.name, {}, environment) for source in selected]


def _up_to_the_runs(source: Path, root: Path) -> Path:
    """A copy of a notebook in another root, without the cells after its last sweep: these only read the table."""
    notebook = execute.read(source)
    last = max((i for i, cell in enumerate(notebook.cells) if "study.sweep(" in cell.source), default=None)
    if last is not None:
        del notebook.cells[last + 1 :]
    copy = root / "begun" / source.name
    copy.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, copy)
    return copy


@contextmanager
def _copied_root() -> Iterator[Path]:
    """Temporary folder with a copy of the committed tables and figures, for FSP_ROOT."""
    with tempfile.TemporaryDirectory(prefix="fsp-") as folder:
        root = Path(folder).resolve()
        _copy_into(root)
        yield root


def _copy_into(root: Path) -> None:
    """Make the tables and figures in another root those that are committed."""
    for name in ("data/results", "data/published", "figures"):
        shutil.rmtree(root / name, ignore_errors=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name)


def _environment(root: Path, *, figures: bool = True) -> dict[str, str]:
    """Variables by which `fsp.paths.ROOT` is `root`, where a notebook may renew the tables, and no bar is drawn.

    Without `figures` their files are not written: a notebook then shows them alone.
    """
    silent = {} if figures else {"FSP_FIGURES": "0"}
    return {"FSP_ROOT": str(root), "FSP_RENEW": "1", "FSP_PROGRESS": "0", **silent}


def _plain(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook without what papermill notes in it."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if not cell.metadata.tags:
            del cell.metadata["tags"]
    nbformat.validate(notebook)
    return notebook


def _pages(results: Path) -> dict[Path, str]:
    """The two pages that show the claims in a folder."""
    from fsp.compendium import report
    from fsp.compendium.claims import read_claims

    stems = sorted(path.name.removesuffix(".claims.csv") for path in results.glob("*.claims.csv"))
    claims = read_claims(results, stems)
    headings = {stem: execute.heading(ROOT / "notebooks" / f"{stem}.ipynb") for stem in stems}
    verdicts, away = report.verdicts_table(claims, headings, link="notebooks"), "../../notebooks"
    all_claims = report.claims_table(claims, link=away)

    def answers(whole: bool, link: str) -> str:
        return report.answers_table(claims, link=link, whole=whole)

    return {
        ROOT / "README.md": readme_with(f"{answers(False, 'notebooks')}\n\n{verdicts}".strip()),
        _results() / "README.md": CLAIMS_PAGE.format(answers=answers(True, away), claims=all_claims),
    }


def readme_with(table: str) -> str:
    """README.md with another table of claims; raises `ValueError` or `OSError` if it has no place for one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, begin, rest = readme.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end or MARKERS[0] in after:
        raise ValueError(f"README.md needs one pair of lines {MARKERS[0]} and {MARKERS[1]}, for the claims")
    return f"{before}{begin}\n{table}\n{end}{after}"
