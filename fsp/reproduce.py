"""Run every notebook from nothing and report on the claims: ``python -m fsp.reproduce --help``.

Three things to do with the notebooks: run them with papermill into a folder of their own and compare with what
is committed (the default), test that the committed ones still give their outputs (``--check``), and renew the
committed ones (``--refresh``). Only the last changes the repository.
"""

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import nbformat
import papermill
import yaml
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
from nbconvert.filters import markdown2html
from papermill.iorw import NoDatesSafeLoader

from fsp import committed
from fsp.paths import NOTEBOOKS, PROFILES, ROOT, replacing

KERNEL = "python3"
VERSIONS = ("code", "python", "torch", "torchvision", "numpy", "scipy", "pandas")
ERROR_LINES = 15


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
    if (args.check or args.refresh) and (args.parameters or args.out or args.timeout or args.profile != "quick"):
        parser.error("--check and --refresh take the notebooks as they are: of the options only --only goes with them")
    if args.recompute and not args.refresh:
        parser.error("--recompute belongs to --refresh: into an output folder everything is computed anyway")
    try:
        selected = notebooks(args.only)
        _check_kernel()
        if args.refresh:
            committed.check_readme()
        elif not args.check:
            given = dict(_assignment(words) for words in args.parameters)
            out = Path(args.out).expanduser().resolve() if args.out else default_out(args.profile)
            jobs = {path: plan(path, args.profile, given, out) for path in selected}
            _check_out(out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        if args.check:
            return committed.check(selected)
        if args.refresh:
            return committed.refresh(selected, recompute=args.recompute)
        return reproduce(jobs, out, profile=args.profile, given=given, timeout=args.timeout)
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


def plan(path: Path, profile: str, given: dict, out: Path) -> dict:
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

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If a name is no parameter of the notebook, or a value has another type than its default.
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
        _check_type(value, known[name]["default"], f"{path.stem}: {name}")
    return parameters


def default_out(profile: str) -> Path:
    """Output folder named by all code that makes the results, so that other code never finds these records.

    The name holds a hash over the package, the versions of Python and the numerical libraries, and the code cells
    of all notebooks.
    """
    from fsp.provenance import provenance

    made_by = {name: provenance()[name] for name in VERSIONS}
    cells = {path.stem: [c.source for c in _read(path).cells if c.cell_type == "code"] for path in notebooks()}
    digest = hashlib.sha256(json.dumps([made_by, cells], sort_keys=True).encode()).hexdigest()
    return ROOT / "reproduced" / f"{profile}-{digest[:8]}"


def reproduce(jobs: dict[Path, dict], out: Path, *, profile: str, given: dict, timeout: float | None = None) -> int:
    """Run notebooks one after another into a folder, then write and print the report.

    Parameters
    ----------
    jobs : dict
        Notebook to its parameters, from `plan`.
    out : path
        Gets ``notebooks/``, ``runs/``, ``results/``, ``figures/``, ``report.md`` and ``report.html``.
    profile, given
        For the report; see `fsp.report.write`.
    timeout : float, optional
        Seconds for each notebook.

    Returns
    -------
    int
        0, or 1 if a notebook failed. A failure stops no other notebook.
    """
    from fsp import report  # here, because it loads torch, which the process of a notebook has no use for

    outcomes = []
    records = len(list((out / "runs").glob("*.json")))
    for source, parameters in jobs.items():
        # What an earlier attempt claimed must not pass for what this one found.
        (out / "results" / f"{source.stem}.claims.csv").unlink(missing_ok=True)
        begin = time.monotonic()
        error = run_notebook(source, out / "notebooks" / source.name, parameters, timeout)
        error = error or report.broken_promise(out, source.stem)
        outcomes.append(report.Outcome(source.stem, time.monotonic() - begin, error))
    short = report.write(out, outcomes, profile=profile, given=given, records_before=records)
    page = markdown2html((out / "report.md").read_text(encoding="utf-8"))
    style = "body { font: 16px sans-serif; margin: 2em } td, th { padding: 0 1em 0.3em 0; text-align: left }"
    with replacing(out / "report.html") as temporary:
        head = f"<!doctype html><meta charset='utf-8'><title>Reproduction</title><style>{style}</style>"
        temporary.write_text(f"{head}\n{page}\n", encoding="utf-8")
    print(f"\n{short}\n\nnotebooks  {out / 'notebooks'}\nfigures    {out / 'figures'}\nreport     {out / 'report.md'}")
    return 1 if any(outcome.error for outcome in outcomes) else 0


def run_notebook(source: Path, target: Path, parameters: dict, timeout: float | None = None) -> str:
    """Run one notebook with papermill in a process of its own; what its kernel prints is shown as it comes.

    Parameters
    ----------
    source, target : path
        The notebook, and where to write the executed one, kept up to date after every cell.
    parameters : dict
    timeout : float, optional
        Seconds.

    Returns
    -------
    str
        "", or the end of the error message.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_papermill, args=(source, target, parameters, sender))
    process.start()
    sender.close()  # the notebook's process holds the other copy: its end, however it comes, ends the wait
    try:
        if not receiver.poll(timeout):
            return f"stopped after {timeout:g} seconds (--timeout)"
        error = receiver.recv()
        process.join()
        return error
    except EOFError:
        process.join()
        return f"its process ended with exit code {process.exitcode}"
    finally:
        if process.is_alive():
            process.terminate()
            process.join(10)
            process.kill()  # its kernel notices within a second and ends too
            process.join()


def _papermill(source: Path, target: Path, parameters: dict, results: Connection) -> None:
    """Body of a notebook's process: sends "" or the error, and takes its kernel down when terminated."""
    # Ctrl-C reaches the whole process group; the parent answers it by terminating this process, once.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.pop("MPLBACKEND", None)  # with another backend than Jupyter's no figure would be in the notebook
    total = len(_read(source).cells) + 1  # papermill adds a cell with the parameters

    def announce(cell, cell_index):
        print(f"{source.stem}  cell {cell_index + 1}/{total}", flush=True)

    try:
        papermill.execute_notebook(
            source,
            target,
            parameters,
            kernel_name=KERNEL,
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            on_cell_execute=announce,
            extra_arguments=["--log-level=CRITICAL"],  # of the kernel's own machinery; cells report all the same
        )
        results.send("")
    except KeyboardInterrupt:
        pass
    except Exception as error:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}").rstrip()
        results.send("\n".join(plain.splitlines()[-ERROR_LINES:]))


def _parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fsp.reproduce",
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


def _check_type(value: object, default: str, where: str) -> None:
    """Raise if a value has another type than a parameter's default, given as source text."""
    try:
        expected = type(ast.literal_eval(default))
    except (ValueError, SyntaxError):
        return  # an expression: only the notebook knows
    expected = {tuple: list}.get(expected, expected)
    if expected is type(None) or type(value) is expected or (expected is float and type(value) is int):
        return
    hint = "; YAML reads 1e-3 as text, write 0.001 or 1.0e-3" if expected is float and type(value) is str else ""
    raise ValueError(f"{where} is {value!r}: expected {expected.__name__}, as its default {default}{hint}")


def _check_kernel() -> None:
    """Raise if Jupyter has no python3 kernel, or one that starts another Python than this."""
    try:
        program = Path(KernelSpecManager().get_kernel_spec(KERNEL).argv[0])
    except NoSuchKernel:
        raise ValueError(f"Jupyter knows no kernel {KERNEL}: install ipykernel into this environment") from None
    if program.is_absolute() and program.parent != Path(sys.executable).parent:
        raise ValueError(f"kernel {KERNEL} starts {program}, not {sys.executable}: set JUPYTER_PREFER_ENV_PATH=1")


def _check_out(out: Path) -> None:
    """Make the output folder; raise if it is the repository itself or cannot be written to."""
    if (out / "notebooks").resolve() == NOTEBOOKS:
        raise ValueError(f"--out {out} would overwrite the committed notebooks: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


def _read(path: Path) -> nbformat.NotebookNode:
    """A notebook."""
    return nbformat.read(path, as_version=4)


if __name__ == "__main__":
    # A job scheduler's polite stop means the same as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
