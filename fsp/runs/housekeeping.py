"""What lies in a store: ``python -m fsp.runs`` lists its records and clears up what nobody needs."""

import argparse
import ast
import shutil
import sys
from pathlib import Path

from fsp.paths import outputs
from fsp.runs.locks import claim, is_claimed, owner
from fsp.runs.provenance import provenance
from fsp.runs.records import frame, plain, read_record, record_paths
from fsp.runs.unfinished import MARK


def main(argv: list[str] | None = None) -> int:
    """Command line; `argv` defaults to the process's arguments, what is returned is its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fsp.runs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="one line a run, oldest first; with --status failed the tracebacks")
    listing.add_argument(
        "entries", nargs="*", metavar="entry=value", help="only runs whose config says so: method=snip"
    )
    listing.add_argument("--status", choices=("finished", "failed"), help="only these")
    prune = commands.add_parser("prune", help="delete files left behind by killed processes, and damaged records")
    prune.add_argument("--other-code", action="store_true", help="also records made by other versions of this package")
    prune.add_argument("--unfinished", action="store_true", help="also what unfinished runs kept to go on from")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    for command in (listing, prune):
        command.add_argument("--store", type=Path, default=outputs().runs, help="folder of records; here %(default)s")
    args = parser.parse_args(argv)
    if not args.store.is_dir():
        parser.error(f"no folder {args.store}: nothing was run yet, or --store is another one")
    if args.command == "prune":
        return _prune(args.store, other_code=args.other_code, unfinished=args.unfinished, yes=args.yes)
    try:
        wanted = dict(_entry(text) for text in args.entries)
    except ValueError as error:
        parser.error(str(error))
    return _list(args.store, wanted, args.status)


def orphans(store: Path, *, other_code: bool = False, unfinished: bool = False) -> dict[str, list[Path]]:
    """Files and folders of a store that nobody needs, by what they are; none that a process is working with.

    Parameters
    ----------
    store : path
    other_code : bool
        Also records made by another version of this package than this one.
    unfinished : bool
        Also the `fsp.runs.scratch` of runs without a finished record, which would go on from there.
    """
    free = [path for path in sorted(store.iterdir()) if path.is_file() and _is_left(path)]
    found = {
        "temporary files of killed processes": [path for path in free if path.suffix in (".json", ".lock")],
        "damaged records that were set aside": [path for path in free if path.suffix == ".corrupt"],
    }
    records = _whole(store)
    kept = [path for path in sorted(store.glob(f"*{MARK}*")) if path.is_dir() and not is_claimed(_run_of(path))]
    wanted = [path for path in kept if path.name.endswith(provenance()["code"][:8]) and not _is_done(records, path)]
    found["folders of runs that finished, or that another version of this package began"] = [
        path for path in kept if path not in wanted
    ]
    if unfinished:
        found["folders of unfinished runs, which would go on from there"] = wanted
    if other_code:
        others = [path for path, record in records.items() if record["provenance"].get("code") != provenance()["code"]]
        found["records made by other versions of this package"] = others
    return found


def _prune(store: Path, *, other_code: bool, unfinished: bool, yes: bool) -> int:
    """Delete the orphans, asking about each sort."""
    sorts = orphans(store, other_code=other_code, unfinished=unfinished)
    found = {what: paths for what, paths in sorts.items() if paths}
    if not found:
        print(f"nothing to delete in {store}")
    for what, paths in found.items():
        size = sum(file.stat().st_size for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
        print(f"{len(paths)} {what} ({size / 1e6:.2f} MB)")
        if yes or input("delete them? [y/N] ").strip().lower() in ("y", "yes"):
            for path in paths:
                if path.suffix == ".lock":
                    with claim(path):  # takes it away, unless somebody has it by now
                        continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            print("deleted")
    return 0


def _list(store: Path, wanted: dict[str, object], status: str | None) -> int:
    """Print the records that fit, and what is at work."""
    records = sorted(_whole(store).values(), key=lambda record: (record["started"], record["key"]))
    known = {entry for record in records for entry in record["config"]}
    if strange := sorted(wanted.keys() - known):
        print(f"no record has an entry {strange[0]!r}: there are {', '.join(sorted(known))}", file=sys.stderr)
        return 2
    fitting = [r for r in records if all(_fits(r["config"], *item) for item in wanted.items())]
    shown = [r for r in fitting if status in (None, r["status"])]
    if shown:
        first_rows = [{**record, "rows": record["rows"][:1]} for record in shown]
        table = frame([r["config"] for r in shown], [r["key"][:12] for r in shown], first_rows)
        table["rows"] = [len(record["rows"]) for record in shown]
        table["wall_s"] = [round(record["wall_s"], 2) for record in shown]
        print(table.to_string(index=False, max_colwidth=40, na_rep=""))
    for record in shown if status == "failed" else []:
        print(f"\n{record['key'][:12]} {record['kind']}: {record['config']}\n{record['error'].strip()}")
    failed = sum(record["status"] == "failed" for record in fitting)
    print(f"\n{len(fitting)} records, {failed} failed, in {store}")
    for path in sorted(store.glob("[0-9a-f]*.lock")):
        if not _is_left(path):
            print(f"in work: {path.stem[:12]} on {owner(path)}")
    return 0


def _whole(store: Path) -> dict[Path, dict]:
    """Records that can be read; a note on standard error for each other one."""
    found = {}
    for path in record_paths(store):
        try:
            found[path] = read_record(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            print(f"{error}; the next sweep that meets it sets it aside", file=sys.stderr)
    return found


def _run_of(path: Path) -> Path:
    """Record of the run that a scratch folder belongs to."""
    return path.with_name(path.name.partition(MARK)[0] + ".json")


def _is_done(records: dict[Path, dict], folder: Path) -> bool:
    """Whether the run that a scratch folder belongs to has finished."""
    record = records.get(_run_of(folder))
    return record is not None and record["status"] == "finished"


def _is_left(path: Path) -> bool:
    """Whether a file is a temporary one or a lock whose process is gone, or was set aside."""
    if path.name.endswith(".json.corrupt"):
        return True
    if path.suffix == ".lock":
        run = path
    elif path.name.startswith(".") and path.suffix == ".json" and "-" in path.name:
        run = path.with_name(path.name[1:].rpartition("-")[0] + ".json")  # see fsp.files.replacing
    else:
        return False
    return not is_claimed(run)


def _entry(text: str) -> tuple[str, object]:
    """Name and value from ``name=value``, the value as Python reads it, or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text!r}: expected entry=value, such as method=snip")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _fits(config: dict, name: str, value: object) -> bool:
    """Whether a config has the value, as a number or as the text it was given as."""
    if name not in config:
        return False
    there, asked = config[name], plain(value, name) if not isinstance(value, set) else value
    return (there == asked and isinstance(there, bool) == isinstance(asked, bool)) or there == str(value)
