"""What lies in a store: ``python -m fsp.runs`` lists its records and clears up what nobody needs."""

import argparse
import ast
import re
import shutil
import sys
from pathlib import Path

from fsp.paths import COMMITTED
from fsp.runs.locks import lock, locked_by
from fsp.runs.provenance import provenance
from fsp.runs.records import frame, key, read_record, record_paths
from fsp.runs.scratching import MARK

TEMPORARY = "temporary files of killed processes"
DAMAGED = "damaged records that were set aside"
USELESS = "scratch folders of finished runs"
UNFINISHED = "scratch folders of unfinished runs, which go on from there if their code is still the same"
OTHER_CODE = "records made by other versions of this package"


def main(argv: list[str] | None = None) -> int:
    """Command line; `argv` defaults to the process's arguments, what is returned is its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fsp.runs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="one line a run, oldest first; with --status failed the tracebacks")
    help_entries = "only runs with this in their config: method=snip"
    listing.add_argument("entries", nargs="*", type=_entry, metavar="entry=value", help=help_entries)
    listing.add_argument("--status", choices=("finished", "failed"), help="only these")
    prune = commands.add_parser("prune", help="delete files left behind by killed processes, and damaged records")
    prune.add_argument("--other-code", action="store_true", help="also records made by other versions of this package")
    prune.add_argument("--unfinished", action="store_true", help="also the scratch folders of unfinished runs")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    for command in (listing, prune):
        command.add_argument("--store", type=Path, default=COMMITTED.runs, help="folder of records; here %(default)s")
    args = parser.parse_args(argv)
    if not args.store.is_dir():
        parser.error(f"no folder {args.store}: nothing was run yet, or --store is another one")
    if args.command == "prune":
        unasked = {UNFINISHED: not args.unfinished, OTHER_CODE: not args.other_code}
        found = {what: paths for what, paths in orphans(args.store).items() if paths and not unasked.get(what)}
        return _prune(found, yes=args.yes)
    return _list(args.store, dict(args.entries), args.status)


def orphans(store: Path) -> dict[str, list[Path]]:
    """Files and folders of a store that nobody may need, by what they are; none that a process is working with."""
    records = _whole(store)
    found: dict[str, list[Path]] = {TEMPORARY: [], DAMAGED: [], USELESS: [], UNFINISHED: [], OTHER_CODE: []}
    for path in sorted(store.iterdir()):
        what = _what(path, records)
        if what is not None:
            found[what].append(path)
    return found


def _what(path: Path, records: dict[Path, dict]) -> str | None:
    """What a path in a store is, if it may be one that nobody needs."""
    if path in records:
        return OTHER_CODE if records[path]["provenance"].get("code") != provenance()["code"] else None
    if path.name.endswith(".json.corrupt"):
        return DAMAGED
    of_run = re.search("[0-9a-f]{64}", path.name)
    record = path.with_name(f"{of_run[0]}.json") if of_run else path
    temporary = path.name.startswith(".") and path.suffix == ".json" and of_run  # see fsp.files.replacing
    if not (temporary or path.suffix == ".lock" or MARK in path.name) or locked_by(record) is not None:
        return None
    if MARK not in path.name:
        return TEMPORARY
    is_done = record in records and records[record]["status"] == "finished"
    return USELESS if is_done else UNFINISHED


def _prune(found: dict[str, list[Path]], *, yes: bool) -> int:
    """Delete the orphans, asking about each sort."""
    if not found:
        print("nothing to delete")
    for what, paths in found.items():
        files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
        print(f"{len(paths)} {what} ({sum(file.stat().st_size for file in files) / 1e6:.2f} MB)")
        if not yes and not _agreed():
            continue
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix != ".lock":
                path.unlink(missing_ok=True)
            else:
                with lock(path):  # deletes it, unless somebody has it by now
                    pass
        print("deleted")
    return 0


def _agreed() -> bool:
    """Whether somebody says yes."""
    try:
        return input("delete them? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print("\nnobody answers: pass --yes to delete")
        return False


def _list(store: Path, wanted: dict[str, str], status: str | None) -> int:
    """Print the records that fit, and the runs at work."""
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
        who = locked_by(path)
        if who is not None:
            print(f"at work: {path.stem[:12]} on {who}")
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


def _entry(text: str) -> tuple[str, str]:
    """Name and value from ``name=value``."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r}: expected entry=value, such as method=snip")
    return name, value


def _fits(config: dict, name: str, text: str) -> bool:
    """Whether an entry of a config is what a text says, as Python reads it or as it is."""
    if name not in config:
        return False
    try:
        asked = key({"value": ast.literal_eval(text)})
    except (ValueError, SyntaxError, TypeError):
        asked = None
    return config[name] == text or key({"value": config[name]}) == asked
