"""Run every notebook from nothing and report on the claims: ``python -m fsp.compendium.reproduce --help``.

Three things to do with the notebooks: run them with papermill into a folder of their own and compare with what
is committed (the default), test that the committed ones still give their outputs (``--check``), and renew the
committed ones (``--refresh``). Only the last changes the repository.
"""

import argparse
import ast
import hashlib
import json
import re
import signal
import sys
import tempfile
from pathlib import Path

import papermill
import yaml
from nbconvert.filters import markdown2html
from papermill.iorw import NoDatesSafeLoader

from fsp.compendium import execute, renew
from fsp.files import replacing
from fsp.paths import NOTEBOOKS, PROFILES, ROOT

VERSIONS = ("code", "python", "torch", "torchvision", "numpy", "scipy", "pandas")
STYLE = "body { font: 16px sans-serif; margin: 2em } td, th { padding: 0 1em 0.3em 0; text-align: left }"


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
    asked = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    if (args.check or args.refresh) and asked.keys() - {"check", "refresh", "only", "recompute"}:
        parser.error("--check and --refresh take the notebooks as they are: of the options only --only goes with them")
    if args.recompute and not args.refresh:
        parser.error("--recompute belongs to --refresh: into an output folder everything is computed anyway")
    try:
        selected = notebooks(args.only)
        execute.check_kernel()
        if args.refresh:
            renew.check_readme()
        elif not args.check:
            given = dict(_assignment(words) for words in args.parameters)
            out = Path(args.out).expanduser().resolve() if args.out else default_out(args.profile)
            jobs = {path: plan(path, args.profile, given, out, scheduler=args.scheduler) for path in selected}
            _check_scheduler(args.scheduler, given, jobs)
            _check_out(out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        if args.check:
            return renew.check(selected)
        if args.refresh:
            return renew.refresh(selected, recompute=args.recompute)
        options = {"timeout": args.timeout, "workers": args.workers, "resume": args.resume}
        return reproduce(jobs, out, profile=args.profile, given=given, **options)
    except KeyboardInterrupt:
        kept = f": finished runs are kept in {out / 'runs'}, and the same command continues there"
        print("\nstopped" + ("" if args.check or args.refresh else kept), file=sys.stderr)
        return 130


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


def plan(path: Path, profile: str, given: dict, out: Path, *, scheduler: str | None = None) -> dict:
    """Parameters of one notebook, every name and type checked against its parameters cell.

    Parameters
    ----------
    path : path
        The notebook.
    profile : {"quick", "smoke", "paper"}
        "quick" is the notebook as it stands, the others are ``notebooks/profiles/<profile>/<stem>.yaml``.
    given : dict
        Parameters from the command line; they come after the profile's.
    out : path
        Becomes the parameter ``out_dir``.
    scheduler : str, optional
        Becomes the parameter ``scheduler`` where the notebook has one, whatever its profile says.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If a name is no parameter of the notebook, or a value (or an element of a list) has another type than its
        default or its annotation says.
    FileNotFoundError
        If the profile's file is missing.
    """
    chosen = {}
    if profile != "quick":
        file = PROFILES / profile / f"{path.stem}.yaml"
        chosen = _yaml(file.read_text(encoding="utf-8"), str(file)) or {}
        if not isinstance(chosen, dict):
            raise ValueError(f"{file} holds no mapping of parameter names to values")
    if "out_dir" in chosen or "out_dir" in given:
        raise ValueError("out_dir is set for every notebook alike: use --out")
    parameters = {**chosen, **given, "out_dir": str(out)}
    known = papermill.inspect_notebook(path)
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"{path.stem} has no parameter {name!r}: it has {', '.join(known)}")
        _check_type(value, known[name], f"{path.stem}: {name}")
    return parameters | ({"scheduler": scheduler} if scheduler is not None and "scheduler" in known else {})


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
    timeout: float | None = None,
    workers: int = 1,
    resume: bool = False,
) -> int:
    """Run notebooks into a folder, then write and print the report.

    Parameters
    ----------
    jobs : dict
        Notebook to its parameters, from `plan`.
    out : path
        Gets ``notebooks/``, ``runs/``, ``results/``, ``figures/``, ``report.md`` and ``report.html``; and
        ``finished/<stem>.json`` for each notebook that kept its promise: its parameters, code and wall time.
    profile, given
        For the report; see `fsp.compendium.report.write`.
    timeout : float, optional
        Seconds for each notebook.
    workers : int
        Notebooks at once.
    resume : bool
        Leave out the notebooks that finished here with these parameters and this code, and report what they found.
        Without it they run again, on the run records that are there: that repeats no run.

    Returns
    -------
    int
        0, or 1 if a notebook failed. A failure stops no other notebook.
    """
    from fsp.compendium import report  # here, because it loads torch, which the process of a notebook has no use for

    records = len(list((out / "runs").glob("*.json")))
    outcomes, waiting, marks = {}, [], {}
    for source, parameters in jobs.items():
        stem, mark = source.stem, out / "finished" / f"{source.stem}.json"
        marks[source] = {"parameters": json.loads(json.dumps(parameters, default=str)), "code": _code([source])}
        earlier = _json(mark) if resume else {}
        seconds = earlier.pop("seconds", None)
        executed = out / "notebooks" / source.name
        if (
            seconds is not None
            and earlier == marks[source]
            and executed.exists()
            and not report.broken_promise(out, stem)
        ):
            outcomes[stem] = report.Outcome(stem, seconds, "", earlier=True)
            continue
        # What an earlier attempt claimed must not pass for what this one found.
        for stale in (mark, out / "results" / f"{stem}.claims.csv"):
            stale.unlink(missing_ok=True)
        waiting.append(execute.Job(source, executed, parameters))
    for job, seconds, error in execute.run(waiting, workers=workers, timeout=timeout):
        stem = job.source.stem
        outcomes[stem] = report.Outcome(stem, seconds, error or report.broken_promise(out, stem))
        if not outcomes[stem].error:
            with replacing(out / "finished" / f"{stem}.json") as temporary:
                temporary.write_text(json.dumps(marks[job.source] | {"seconds": seconds}, indent=1), encoding="utf-8")
        print(f"{stem}  {outcomes[stem].status} after {seconds:.0f} s", flush=True)
    ordered = [outcomes[source.stem] for source in jobs]
    short = report.write(out, ordered, profile=profile, given=given, records_before=records)
    page = markdown2html((out / "report.md").read_text(encoding="utf-8"))
    with replacing(out / "report.html") as temporary:
        head = f"<!doctype html><meta charset='utf-8'><title>Reproduction</title><style>{STYLE}</style>"
        temporary.write_text(f"{head}\n{page}\n", encoding="utf-8")
    print(f"\n{short}\n\nnotebooks  {out / 'notebooks'}\nfigures    {out / 'figures'}\nreport     {out / 'report.md'}")
    return 1 if any(outcome.error for outcome in ordered) else 0


def _parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fsp.compendium.reproduce",
        description="Run the notebooks from nothing into an output folder and report on the papers' claims.",
    )
    add = parser.add_argument
    add("--profile", choices=["quick", "smoke", "paper"], default="quick", help="size of the runs (default: quick)")
    add("--only", nargs="+", metavar="NB", help="numbers or names of notebooks (default: all), such as 03 04")
    add("--out", metavar="DIR", help="output folder (default: reproduced/<profile>-<hash of the code>)")
    add(
        "-p",
        "--parameter",
        dest="parameters",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter of the notebooks, value in YAML: -p seeds '[0, 1]' or -p epochs=5; may be repeated",
    )
    add("--timeout", type=_seconds, metavar="SECONDS", help="stop a notebook that takes longer (default: never)")
    add("--workers", type=_count, default=1, metavar="N", help="notebooks at once, each in its process (default: 1)")
    add(
        "--scheduler",
        metavar="WHERE",
        help='where the notebooks do their runs: "local" for processes on this machine, or the address of a Dask '
        "scheduler (default: in the notebook's own process)",
    )
    add("--resume", action="store_true", help="leave out notebooks that finished in the output folder as they are now")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="test the committed notebooks' outputs with nbval instead")
    mode.add_argument("--refresh", action="store_true", help="renew the committed notebooks, tables, figures, README")
    add("--recompute", action="store_true", help="with --refresh: compute all rows, the committed ones too")
    return parser


def _seconds(text: str) -> float:
    """A positive number of seconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number of seconds")
    return value


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


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


def _check_type(value: object, parameter: dict, where: str) -> None:
    """Raise if a value has another type than a parameter's annotation and default, as papermill inspects them, say."""
    try:
        default = ast.literal_eval(parameter["default"])
    except (ValueError, SyntaxError):
        return  # an expression: only the notebook knows
    default = list(default) if isinstance(default, tuple) else default
    outer, inner = re.fullmatch(r"(Optional|Union|)\[?(.*?)\]?", parameter["inferred_type_name"]).groups()
    words = {word.strip() for word in re.sub(r"\[.*\]?", "", inner).split(",")}  # list[int] is a list
    annotated = {kind for kind in (bool, int, float, str, list, dict) if kind.__name__ in words}
    optional = outer == "Optional" or (annotated and "None" in words)
    types = annotated | {type(default)} | ({type(None)} if optional else set())
    if types == {type(None)}:
        return  # without an annotation papermill says "None"
    if not _is_one_of(types, value):
        names = " or ".join(sorted("None" if kind is type(None) else kind.__name__ for kind in types))
        number = float in types and type(value) is str
        hint = "; YAML reads 1e-3 as text, write 0.001 or 1.0e-3" if number else ""
        raise ValueError(f"{where} is {value!r}: expected {names}, as its default {parameter['default']}{hint}")
    kinds = {type(element) for element in default} if isinstance(default, list) else set()
    for element in value if kinds and isinstance(value, list) else []:
        if not _is_one_of(kinds, element):
            names = " or ".join(sorted(kind.__name__ for kind in kinds))
            default = parameter["default"]
            raise ValueError(f"{where} holds {element!r}: expected a list of {names}, as its default {default}")


def _is_one_of(types: set[type], value: object) -> bool:
    """Whether a value has one of the types; a whole number is a float, too, and a truth value no whole number."""
    return type(value) in types or (float in types and type(value) is int)


def _check_scheduler(scheduler: str | None, given: dict, jobs: dict[Path, dict]) -> None:
    """Raise if the notebooks cannot do their runs where they are told to."""
    from fsp.runs.cluster import SCHEDULERS, is_scheduler  # here, because it loads torch; see `reproduce`

    if scheduler is not None and "scheduler" in given:
        raise ValueError("--scheduler and -p scheduler say the same: give one of them")
    if scheduler is not None and not any("scheduler" in parameters for parameters in jobs.values()):
        raise ValueError(f"--scheduler {scheduler}: none of the chosen notebooks has a parameter scheduler")
    for path, parameters in jobs.items():
        if not is_scheduler(parameters.get("scheduler")):
            raise ValueError(f"{path.stem}: scheduler is {parameters['scheduler']!r}: expected {SCHEDULERS}")


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


def _json(path: Path) -> dict:
    """What a JSON file holds; nothing if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    # A job scheduler's polite stop means the same as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
