"""Run every notebook from nothing and report on the claims: ``python -m fsp.compendium.reproduce --help``.

Three things to do with the notebooks: run them with papermill into a folder of their own and compare with what
is committed (the default), test that the committed ones still give their outputs, rows and claims (``--check``), and
renew the committed ones (``--refresh``). Only the last changes the repository.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import papermill
import yaml
from papermill.iorw import NoDatesSafeLoader

from fsp.compendium import execute, renew
from fsp.paths import NOTEBOOKS, PROFILES, ROOT, outputs
from fsp.progress import command_line

# Imports inside functions are of modules that load torch, which the process of a notebook has no use for.
VERSIONS = ("code", "python", "torch", "torchvision", "numpy", "scipy", "pandas")


def main(argv: list[str] | None = None) -> int:
    """Command line.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        Exit status: 0, 1 if a notebook failed, 130 after Ctrl-C. Wrong arguments exit with 2 before anything runs.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    asked = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if (args.check or args.refresh) and asked - {"check", "refresh", "only", "recompute", "workers"}:
        parser.error("--check and --refresh take the notebooks as they are: only --only and --workers go with them")
    if args.recompute and not args.refresh and not args.check:
        parser.error("--recompute belongs to --refresh or --check: into an output folder everything is computed anyway")
    if args.workers < 1 or not args.timeout > 0:
        parser.error("--workers is a whole number of at least 1, --timeout a number of seconds above 0")
    try:
        selected = notebooks(args.only)
        execute.check_kernel()
        if args.refresh:
            renew.readme_with("")  # it has a place for the claims
            renew.check_clean()
        given = dict(_assignment(words) for words in args.parameters)
        where = {} if args.scheduler is None else {"scheduler": args.scheduler}
        out = Path(args.out).expanduser().resolve() if args.out else default_out(args.profile)
        jobs, gated = _plan_all(selected, args.profile, given | where, out)
        if not args.check and not args.refresh:
            _check_out(out)
            print("".join(f"gated, not run: {reason}\n" for reason in gated.values()), end="", file=sys.stderr)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        if args.check:
            return renew.check(selected, workers=args.workers, slow=args.recompute)
        if args.refresh:
            return renew.refresh(selected, workers=args.workers, recompute=args.recompute)
        options = {"timeout": args.timeout, "workers": args.workers, "resume": args.resume, "gated": gated}
        return reproduce(jobs, out, profile=args.profile, given=given, **options)
    except KeyboardInterrupt:
        place = renew.kept_root() / "data" if args.refresh else out
        kept = f": finished runs are kept in {place / 'runs'}, and the same command continues there"
        print("\nstopped" + ("" if args.check else kept), file=sys.stderr)
        return 130


class Gated(ValueError):
    """A notebook asks for a GPU or for files of a data set, and they are not here."""


def notebooks(only: list[str] | None = None) -> list[Path]:
    """The notebooks ``NN_*.ipynb`` in order, or those whose number or stem is in `only`.

    Raises
    ------
    ValueError
        If `only` has a name that no notebook has.
    """
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    names = {name: path for path in every for name in (path.stem, path.stem[:2])}
    wanted = [name.zfill(2).removesuffix(".ipynb") for name in only] if only else names
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(f"no notebook {unknown[0]!r}: there are {', '.join(path.stem for path in every)}")
    if not every:
        raise ValueError(f"no notebook NN_name.ipynb in {NOTEBOOKS}")
    return sorted({names[name] for name in wanted})


def plan(path: Path, profile: str, given: dict, out: Path) -> dict:
    """Parameters of one notebook, checked as the notebook itself will check them.

    Parameters
    ----------
    path : path
        The notebook.
    profile : {"quick", "full", "smoke", "paper"}
        "full" is the notebook as it stands, the others are ``notebooks/profiles/<profile>/<stem>.yaml``; without such
        a file "quick" is "full".
    given : dict
        Parameters from the command line; they come after the profile's.
    out : path
        Becomes the parameter ``out_dir``.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If a name is no parameter of the notebook, or `fsp.compendium.parameters.check` refuses a value or finds no
        scheduler.
    Gated
        If all is right but that this machine has no CUDA device, or not the files of a data set.
    FileNotFoundError
        If the profile's file is missing.
    """
    import torch

    from fsp.compendium import parameters

    chosen = {}
    file = PROFILES / profile / f"{path.stem}.yaml"
    if profile in ("smoke", "paper") or (profile == "quick" and file.exists()):
        chosen = _yaml(file.read_text(encoding="utf-8"), str(file)) or {}
        if not isinstance(chosen, dict):
            raise ValueError(f"{file} holds no mapping of parameter names to values")
    chosen |= given
    if "out_dir" in chosen:
        raise ValueError("out_dir is set for every notebook alike: use --out")
    chosen["out_dir"] = str(out)
    defaults = {name: ast.literal_eval(found["default"]) for name, found in papermill.inspect_notebook(path).items()}
    for name in chosen:
        if name not in defaults:
            raise ValueError(f"{path.stem} has no parameter {name!r}: it has {', '.join(defaults)}")
    asked, lacks = defaults | chosen, []
    if str(asked.get("device")).startswith("cuda") and not torch.cuda.is_available():
        lacks.append(f"device = {asked['device']!r} needs a CUDA device, and there is none here")
        asked["device"] = "cpu"  # so that all else is checked
    try:
        parameters.check(**asked)
    except FileNotFoundError as error:
        lacks.append(str(error))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.stem}: {error}") from error
    if lacks:
        raise Gated(f"{path.stem}: {'; '.join(lacks)}")
    return chosen


def _plan_all(selected: list[Path], profile: str, given: dict, out: Path) -> tuple[dict[Path, dict], dict[Path, str]]:
    """Notebooks with their parameters, from `plan`, and those that are gated, with what they lack.

    Raises `ValueError` on all that is wrong at once, a line each, and where nothing is left to run.
    """
    jobs, gated, errors = {}, {}, []
    for path in selected:
        try:
            jobs[path] = plan(path, profile, given, out)
        except Gated as error:
            gated[path] = str(error)
        except (ValueError, OSError) as error:
            errors.append(str(error))
    if errors or not jobs:
        raise ValueError("\n".join(dict.fromkeys([*errors, *gated.values()])))
    return jobs, gated


def default_out(profile: str) -> Path:
    """Output folder named by all code that makes the results, so that other code never finds these records.

    The name holds a hash over the package, the versions of Python and the numerical libraries, and the code cells
    of all notebooks.
    """
    return ROOT / "reproduced" / f"{profile}-{_code(notebooks())[:8]}"


def reproduce(
    jobs: dict[Path, dict],
    out: Path,
    *,
    profile: str,
    given: dict,
    timeout: float = math.inf,
    workers: int = 1,
    resume: bool = False,
    gated: Mapping[Path, str] = MappingProxyType({}),
) -> int:
    """Run notebooks into a folder, then write and print the report.

    Parameters
    ----------
    jobs : dict
        Notebook to its parameters, from `plan`.
    out : path
        Gets ``notebooks/`` (with a page of each), ``runs/``, ``results/``, ``figures/``, ``report.html`` and, the same
        as text, ``report.md``; and
        ``finished/<stem>.json`` for each notebook that kept its promise: its parameters and code.
    profile, given
        For the report; see `fsp.compendium.report.write`.
    timeout : float
        Seconds for each notebook.
    workers : int
        Notebooks at once; see `fsp.compendium.execute.run`.
    resume : bool
        Leave out the notebooks that finished here with these parameters and this code, and report what they found.
        Without it they run again, on the run records that are there: that repeats no run.
    gated : dict
        Notebooks that are not run and what they lack, for the report.

    Returns
    -------
    int
        0, or 1 if a notebook failed. A failure stops no other notebook.
    """
    from fsp.compendium import report

    place = outputs(out, "")
    records = len(list(place.runs.glob("*.json")))
    (out / "finished").mkdir(parents=True, exist_ok=True)
    outcomes = {source: report.Outcome(source, 0, "gated", lacks) for source, lacks in gated.items()}
    waiting, marks = [], {}
    for source, parameters in reversed(jobs.items()):  # the first ones are short: last, they fill all cores
        stem = source.stem
        mark, executed = out / "finished" / f"{stem}.json", out / "notebooks" / source.name
        marks[stem] = json.dumps({"parameters": parameters, "code": _code([source])}, default=str, indent=1)
        finished = mark.exists() and mark.read_text(encoding="utf-8") == marks[stem] and executed.exists()
        if resume and finished and not report.broken_promise(place, stem):
            seconds = execute.read(executed).metadata.papermill.duration
            outcomes[source] = report.Outcome(source, seconds, "finished earlier")
            continue
        # What an earlier attempt claimed must not pass for what this one found.
        for stale in (mark, place.results / f"{stem}.claims.csv"):
            stale.unlink(missing_ok=True)
        waiting.append(execute.Job(source, executed, parameters, {}))
    for job, seconds, error in execute.run(waiting, workers=workers, timeout=timeout):
        stem = job.source.stem
        error = error or report.broken_promise(place, stem)
        stale = "" if error else report.stale_runs(job.target)
        status = "failed" if error else "stale" if stale else "finished"
        outcomes[job.source] = report.Outcome(job.source, seconds, status, error or stale)
        if status == "finished":
            (out / "finished" / f"{stem}.json").write_text(marks[stem], encoding="utf-8")
        print(f"{stem}  {status} after {seconds:.0f} s", flush=True)
    ordered = [outcomes[source] for source in sorted(outcomes)]
    text = report.write(out, ordered, profile=profile, given=given, records_before=records)
    print(f"\n{text}\nnotebooks  {out / 'notebooks'}\nfigures    {out / 'figures'}\nreport     {out / 'report.html'}")
    return 1 if any(outcome.status == "failed" for outcome in ordered) else 0


def _parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fsp.compendium.reproduce",
        description="Run the notebooks from nothing into an output folder and report on the papers' claims.",
    )
    add = parser.add_argument
    assignment = {"dest": "parameters", "action": "append", "nargs": "+", "default": [], "metavar": ("NAME", "VALUE")}
    where = '"local" for processes on this machine, or the address of a Dask scheduler'
    add(
        "--profile",
        choices=["quick", "full", "smoke", "paper"],
        default="quick",
        help="size of the runs (default: quick)",
    )
    add("--only", nargs="+", metavar="NB", help="numbers or names of notebooks (default: all), such as 03 04")
    add("--out", metavar="DIR", help="output folder (default: reproduced/<profile>-<hash of the code>)")
    add("-p", "--parameter", **assignment, help="of the notebooks, value in YAML: -p seeds '[0, 1]' or -p epochs=5")
    add("--timeout", type=float, default=math.inf, metavar="SECONDS", help="stop a notebook that takes longer")
    add("--workers", type=int, default=_cores(), metavar="N", help="notebooks at once (default: one a core)")
    add("--scheduler", metavar="WHERE", help=f"set the parameter scheduler: {where}")
    add("--resume", action="store_true", help="leave out notebooks that finished in the output folder as they are now")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="test the committed notebooks, tables and claims instead")
    mode.add_argument("--refresh", action="store_true", help="renew the committed notebooks, tables, figures, README")
    recompute = "with --refresh: compute all rows, the committed ones too; with --check: slow runs too are done anew"
    add("--recompute", action="store_true", help=recompute)
    return parser


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _assignment(words: list[str]) -> tuple[str, object]:
    """Name and value of ``-p NAME VALUE`` or ``-p NAME=VALUE``."""
    name, *value = words if len(words) > 1 else words[0].split("=", 1)
    if len(value) != 1 or not name.isidentifier():
        raise ValueError(f"-p {' '.join(words)}: expected -p NAME VALUE or -p NAME=VALUE")
    return name, _yaml(value[0], f"-p {name}: {value[0]!r}")


def _yaml(text: str, where: str) -> object:
    """What papermill reads from YAML text."""
    try:
        return yaml.load(text, Loader=NoDatesSafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error


def _check_out(out: Path) -> None:
    """Make the output folder; raise if it is the repository itself or cannot be written to."""
    if (out / "notebooks").resolve() == NOTEBOOKS:
        raise ValueError(f"--out {out} would overwrite the committed notebooks: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


def _code(selected: list[Path]) -> str:
    """SHA-256 over the package, the versions it runs on, and the code cells of notebooks."""
    from fsp.runs.provenance import provenance

    made_by = {name: provenance()[name] for name in VERSIONS}
    cells = {path.stem: [c.source for c in execute.read(path).cells if c.cell_type == "code"] for path in selected}
    return hashlib.sha256(json.dumps([made_by, cells], sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    # A job scheduler's polite stop means the same as Ctrl-C; and a shell starts its background jobs deaf to that.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command_line(main)
