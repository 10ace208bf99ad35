"""The report on a reproduction: what changed, answers, notebooks, claims, differences, environment."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fsp import paths
from fsp.compendium import execute, page, renew, stats
from fsp.compendium.claims import LEAST, VERDICTS, contradictions, measured, p_value_of, primaries, read_claims
from fsp.compendium.compare import CHANGES, MOVED, RTOL, Change, Comparison, compare_committed
from fsp.files import replacing
from fsp.runs import tables
from fsp.runs.provenance import provenance

EDITED = "runs were made by code that has been edited since"  # what `fsp.compendium.study.sweep` prints of such runs
# What became of a notebook, in the order of the report. The first two come before the answers.
STATUSES = {
    "failed": "it raised an error, took too long, or did not write what it owes",
    "stale": "it finished, with runs that other code has made than there is now",
    "gated": "not run: it needs a GPU or a download that is not here",
    "finished": "",
    "finished earlier": "before this call, with these parameters and this code",
}
# Why a claim is not the same as committed: it speaks against it, or it does not.
CHANGED, FEWER, TIME = "changed", "fewer runs", "a time"
NOT_COMPARED = "the committed results belong to the profiles full and quick as they are"


class Outcome(NamedTuple):
    """How one notebook ended: one of `STATUSES`, and the error, or what it lacks, or what is stale."""

    source: Path
    seconds: float
    status: str
    reason: str = ""

    @property
    def stem(self) -> str:
        """Name of the notebook."""
        return self.source.stem


def stale_runs(executed: Path) -> str:
    """What an executed notebook printed of runs that other code has made; "" if nothing."""
    outputs = [output for cell in execute.read(executed).cells for output in cell.get("outputs", [])]
    lines = "".join(output.get("text", "") for output in outputs).splitlines()
    return "\n".join(line for line in lines if EDITED in line)


def broken_promise(place: paths.Outputs, stem: str) -> str:
    """What a finished notebook owes: the name of a file it did not write, or what is wrong with a table; else ""."""
    table = place.results / f"{stem}.csv"
    drawn = [place.figures / f"{stem}*{suffix}" for suffix in (".png", ".pdf")]
    promised = [table, place.results / f"{stem}.claims.csv", *drawn]
    missing = [path.name for path in promised if not any(path.parent.glob(path.name))]
    if missing:
        return f"it finished without writing {', '.join(missing)}"
    try:
        if wrong := contradictions(read_claims(place.results, [stem])):
            return f"its claims contradict themselves: {wrong[0]}"
        return "" if "key" in tables.read(table) else f"its table {table.name} has no column 'key'"
    except ValueError as error:
        return f"a table it wrote cannot be read: {error}"


def claims_table(claims: pd.DataFrame, *, link: str) -> str:
    """Markdown table of claims, one a line.

    Parameters
    ----------
    claims : pandas.DataFrame
        From `read_claims`.
    link : str
        Folder of the notebooks as seen from the page.

    Returns
    -------
    str
    """
    lines = []
    for row in claims.to_dict("records"):
        source = f"{row['paper']} {row['section']}".strip()
        link_to = _link(row["notebook"], link)
        found = [measured(row), row["n"], row["bound"]]
        lines.append([row["claim"], source, *found, row["published"], row["holds"], link_to])
    head = ["Claim", "Paper", "Measured here [interval]", "n", "Bound", "Published", "Holds", "Notebook"]
    return _markdown(head, lines)


def answers(claims: pd.DataFrame) -> dict[str, dict]:
    """Primary claims that notebooks have judged, in the order of ``docs/claims.md``, each with its answer.

    Parameters
    ----------
    claims : pandas.DataFrame
        From `read_claims`.

    Returns
    -------
    dict of claim to its row
        With two entries more: ``p``, corrected by Holm's procedure among the claims that are judged, and ``answer``:
        the verdict, marked if that correction does not leave it standing.
    """
    judged = claims[claims.kind == "primary"].copy()
    judged["p"] = stats.holm([p_value_of(row) for row in judged.to_dict("records")]) if len(judged) else []
    rows = judged.set_index("claim", drop=False).to_dict("index")
    found = {stated.claim: rows[stated.claim] for stated in primaries().values() if stated.claim in rows}
    for row in found.values():
        falls = row["holds"] != "not decided" and row["p"] >= 1 - stats.CONFIDENCE
        row["answer"] = row["holds"] + (", but not after Holm's correction" if falls else "")
    return found


def answers_table(claims: pd.DataFrame, *, link: str, whole: bool) -> str:
    """Markdown table of `answers`.

    Parameters
    ----------
    claims : pandas.DataFrame
        From `read_claims`.
    link : str
        Folder of the notebooks as seen from the page.
    whole : bool
        With the papers' sentences, bounds, testbeds, and what would overturn the answer.

    Returns
    -------
    str
        Empty if none is judged.
    """
    found = answers(claims)
    if not found:
        return ""
    lines = []
    for stated in primaries().values():
        if stated.claim not in found:
            continue
        row = found[stated.claim]
        line = [stated.claim, f"**{row['answer']}**", measured(row), row["n"], _link(row["notebook"], link)]
        if whole:
            line = [stated.sentence, *line[:3], row["bound"], f"{row['p']:.2g}", line[3], stated.testbed]
            line += [stated.overturned, _link(row["notebook"], link)]
        lines.append(line)
    head = ["Tested here", "Answer", "Measured [interval]", "n", "Notebook"]
    if whole:
        head = ["The paper's sentence", *head[:3], "Bound", "p (Holm)", "n", "Testbed", "Overturned by", "Notebook"]
    return _markdown(head, lines)


def verdicts_table(claims: pd.DataFrame, headings: dict[str, str], *, link: str) -> str:
    """Markdown table of notebooks: what each finds, and how many claims hold.

    Parameters
    ----------
    claims : pandas.DataFrame
        From `read_claims`.
    headings : dict of notebook to str
    link : str
        Folder of the notebooks as seen from the page.

    Returns
    -------
    str
    """
    lines = []
    for stem, heading in headings.items():
        verdicts = list(claims.holds[claims.notebook == stem])
        lines.append([_link(stem, link), heading, *(verdicts.count(verdict) for verdict in VERDICTS)])
    head = ["", "What its notebook finds", "claims hold", "equivalent", "do not hold", "not decided"]
    return _markdown(head, lines)


def write(out: Path, outcomes: list[Outcome], *, profile: str, given: dict, records_before: int) -> str:
    """Write ``report.md``, ``report.html`` and a page for each executed notebook into an output folder.

    Parameters
    ----------
    out : path
        Where the notebooks wrote to.
    outcomes : list of Outcome
        In the order of the notebooks.
    profile : {"quick", "full", "smoke", "paper"}
    given : dict
        Parameters set on the command line; not the scheduler, which changes no result.
    records_before : int
        Run records that lay in `out` at the start, reused where they fit.

    Returns
    -------
    str
        The report, in Markdown.

    Raises
    ------
    ValueError
        If a claims table lacks a column.
    """
    sources = {outcome.stem: outcome.source for outcome in outcomes if outcome.status not in ("failed", "gated")}
    ended = list(sources)
    claims = read_claims(out / "results", ended)
    compared, committed = {}, claims[:0]
    timed = {outcome.stem for outcome in outcomes if execute.measures_time(outcome.source)}
    if profile in ("quick", "full") and not given:
        for stem, source in sources.items():
            alike = None if stem in timed else renew.alike(source)
            compared[stem] = compare_committed(out / "results", stem, alike)
        stems = sorted(path.name.split(".")[0] for path in paths.COMMITTED.results.glob("*.claims.csv"))
        committed = read_claims(paths.COMMITTED.results, stems)
    changes = [change for comparison in compared.values() if comparison for change in comparison.changes]
    changes.sort(key=lambda change: (_is_time(change, timed), CHANGES.index(change.kind)))
    change_rows = [_change_row(change, profile, _is_time(change, timed)) for change in changes]
    facts = {
        "title": f"Reproduction, profile {profile}",
        "headline": _headline(list(compared.values()), change_rows, profile, len(claims)),
        "lines": _first_lines(outcomes, change_rows, compared, timed, committed, given, records_before),
        "changes": change_rows,
        "outcomes": sorted(outcomes, key=lambda outcome: list(STATUSES).index(outcome.status)),
        "statuses": STATUSES,
        "answers": _answer_rows(claims, committed),
        "judged_of": len(primaries()) if profile in ("quick", "full") else 0,
        "differences": {stem: _differences(found, profile, stem in timed) for stem, found in compared.items()},
        "rtol": RTOL,
        "environment": _environment(out),
    }
    text = _text(out, facts, claims)
    with replacing(out / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    page.write(out, facts, claims)
    return text


def _headline(compared: list[Comparison | None], changes: list[dict], profile: str, judged: int) -> str:
    """The first sentence of the report; `changes` are those of `_change_row`."""
    if not compared:
        return f"No claim compared, {judged} judged: {NOT_COMPARED}"
    total = sum(comparison.claims for comparison in compared if comparison)
    reasons = Counter(row["reason"] for row in changes)
    counts = {"same": total - len(changes), "changed": reasons[CHANGED]}
    counts[f"not decided by the fewer runs of profile {profile}"] = reasons[FEWER]
    counts["times of this machine"] = reasons[TIME]
    always = ("same", "changed")
    told = ", ".join(f"{count} {words}" for words, count in counts.items() if count or words in always)
    return f"{total} claims compared: {told}"


def _is_time(change: Change, timed: set[str]) -> bool:
    """Whether all that changed is a number of a notebook that measures times."""
    return change.stem in timed and change.kind in MOVED


def _first_lines(
    outcomes: list[Outcome],
    changes: list[dict],
    compared: dict[str, Comparison | None],
    timed: set[str],
    committed: pd.DataFrame,
    given: dict,
    records_before: int,
) -> list[str]:
    """Sentences that say more of the headline: on the rows, how claims changed, and what became of the notebooks."""
    lines = []
    if rows := _rows_line({stem: found for stem, found in compared.items() if found and stem not in timed}):
        lines.append(rows)
    if committed.size:
        lines.append("Same: the committed verdict, and a value within the committed interval.")
    kinds = Counter(row["kind"] for row in changes if row["reason"] == CHANGED)
    if kinds:
        lines.append(f"Changed: {', '.join(f'{kinds[kind]} {kind}' for kind in CHANGES if kinds[kind])}.")
    statuses = Counter(outcome.status for outcome in outcomes)
    lines.append(f"Notebooks: {', '.join(f'{statuses[word]} {word}' for word in STATUSES if statuses[word])}.")
    absent = [outcome.stem for outcome in outcomes if outcome.status in ("failed", "gated")]
    if not_compared := int(committed.notebook.isin(absent).sum()):
        lines.append(f"Not compared: {not_compared} committed claims of notebooks that failed or are gated.")
    if given:
        lines.append(f"Parameters from the command line: `{json.dumps(given, default=str)}`.")
    return [*lines, f"Run records found at the start, and reused where they fit: {records_before}."]


def _rows_line(compared: dict[str, Comparison]) -> str:
    """A sentence on the rows of the committed tables that were computed anew; "" if none were."""
    total = sum(found.rows.compared for found in compared.values())
    if not total:
        return ""
    groups = {
        "all are the same": [],
        "some moved no further than another processor explains": [],
        "some moved further": [],
    }
    same, moved, further = groups.values()
    for stem, found in compared.items():
        (further if found.beyond else moved if found.rows.differing else same).append(stem[:2])
    told = [f"in {', '.join(numbers)} {words}" for words, numbers in groups.items() if numbers]
    return f"Rows: {total} of the committed tables computed anew: {'; '.join(told)}."


def _change_row(change: Change, profile: str, timed: bool) -> dict:
    """What a changed claim says here and committed, and what may explain it.

    Its ``reason`` is `FEWER` where this profile decides nothing, for it has fewer observations than are committed, or
    none, or asks of other runs; `TIME` where a time is another machine's; else `CHANGED`.
    """
    here, committed = change.here, change.committed
    row = {"claim": change.claim, "kind": change.kind, "stem": change.stem, "what": "; ".join(change.what)}
    for side, found in {"here": here, "committed": committed}.items():
        row[side] = f"{found['holds']}: {measured(found)}, n = {found['n']:g}" if found else "–"
    fewer = bool(here and committed and here["n"] < committed["n"])
    left_out = profile == "quick" and not here
    of_others = profile == "quick" and not committed
    row["why"] = ""
    if timed:
        row["why"] = "a time of this machine: another one, or a busy one, gives another"
    elif left_out:
        row["why"] = f"profile {profile} leaves its runs out"
    elif of_others:
        row["why"] = f"profile {profile} asks of other densities or numbers of runs than are committed"
    elif fewer:
        row["why"] = f"profile {profile} has fewer observations"
        row["why"] += f", and fewer than {LEAST} decide nothing" if here["n"] < LEAST else ""
    says_otherwise = change.kind in ("committed in error", "stated otherwise")
    undecided = left_out or ((fewer or of_others) and here["holds"] == "not decided" and not says_otherwise)
    row["reason"] = TIME if timed else FEWER if undecided else CHANGED
    return row


def _answer_rows(claims: pd.DataFrame, committed: pd.DataFrame) -> list[dict]:
    """Answers to the primary claims judged here, beside the committed ones."""
    before, rows = answers(committed), []
    for claim, row in answers(claims).items():
        old = before.get(claim)
        was = f"{old['answer']}: {measured(old)}, n = {old['n']:g}" if old else "–"
        here = {"claim": claim, "stem": row["notebook"], "answer": row["answer"], "measured": measured(row)}
        rows.append(
            {**here, "n": f"{row['n']:g}", "committed": was, "changed": bool(old and old["holds"] != row["holds"])}
        )
    return rows


def _differences(comparison: Comparison | None, profile: str, timed: bool) -> list[str]:
    """Sentences on a notebook's tables beside the committed ones, each difference with what explains it."""
    if comparison is None:
        return ["nothing is committed to compare with"]
    rows = comparison.rows
    found = [str(rows)]
    if rows.missing:
        why = f"profile {profile} leaves their runs out" if profile == "quick" else "their runs were not done here"
        machine = ", or only a machine with other cores or a GPU does them" if timed else ""
        found.append(f"skipped committed rows: {rows.missing} ({why}{machine})")
    if rows.times:
        times = ", ".join(f"`{name}`" for name in rows.times)
        found.append(f"wall times are another machine's and are not compared: {times}")
    if rows.differing and not timed:
        found.append(f"beyond what another processor explains: {comparison.beyond or 'nothing'}")
    if timed and (rows.differing or comparison.changes):
        found.append("it measures this machine: what differs here is no other result of a paper")
    for change in comparison.changes:
        found += [f"{sentence}: {change.claim}" for sentence in change.what]
    if not comparison.changes:
        same = "same verdicts, values within their committed intervals"
        found.append(f"{comparison.claims} claims compared: {same}")
    return found


def _environment(out: Path) -> dict[str, object]:
    """What the runs were made with, and the GPUs that their records name."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "runs").glob("*.json")]
    gpus = {(record.get("provenance") or {}).get("gpu") for record in records} - {None, ""}
    return provenance() | {"gpu": ", ".join(sorted(gpus)) or "none used"}


def _text(out: Path, facts: dict, claims: pd.DataFrame) -> str:
    """The report in Markdown, for the terminal."""
    parts = [f"# {facts['title']}", f"**{facts['headline']}**", "\n".join(f"- {line}" for line in facts["lines"])]
    for outcome in facts["outcomes"]:
        if outcome.reason:
            parts += [f"## {outcome.stem}: {outcome.status}", f"```text\n{outcome.reason}\n```"]
        if outcome.status == "failed":
            executed = out / "notebooks" / outcome.source.name
            parts.append(f"As far as it came: `{executed}`" if executed.exists() else "It ended before its first cell.")
    head = {"claim": "Claim", "kind": "How", "here": "Here", "committed": "Committed", "why": "Why"}
    sections = {"Changed": (CHANGED,), "Not decided here, or a time of this machine": (FEWER, TIME)}
    for heading, reasons in sections.items():
        parts += _section(heading, head, [row for row in facts["changes"] if row["reason"] in reasons])
    head = {"claim": "Primary claim", "answer": "Answer", "measured": "Measured [interval]", "n": "n"}
    parts += _section("Answers", head | {"committed": "Committed"}, facts["answers"])
    outcomes = sorted(facts["outcomes"], key=lambda outcome: outcome.stem)
    lines = [[outcome.stem, outcome.status, f"{outcome.seconds:.0f}"] for outcome in outcomes]
    parts += ["## Notebooks", _markdown(["Notebook", "Status", "Seconds"], lines)]
    parts += ["## Claims", claims_table(claims, link="notebooks") if len(claims) else "None."]
    parts += ["## Differences to the committed results"]
    parts += [
        f"Numbers count as the same within a relative tolerance of {RTOL:g}." if facts["differences"] else NOT_COMPARED
    ]
    for stem, sentences in facts["differences"].items():
        parts += [f"**{stem}**", "\n".join(f"- {sentence}" for sentence in sentences)]
    parts += ["## Environment", _markdown(["", ""], [list(item) for item in facts["environment"].items()])]
    return "\n\n".join(parts) + "\n"


def _section(heading: str, head: dict[str, str], rows: list[dict]) -> list[str]:
    """A heading and a table of rows, each with a link to its notebook; nothing without rows."""
    lines = [[*(row[name] for name in head), _link(row["stem"], "notebooks")] for row in rows]
    return [f"## {heading}", _markdown([*head.values(), "Notebook"], lines)] if rows else []


def _link(stem: str, folder: str) -> str:
    """Link in Markdown to a notebook, called by its number."""
    return f"[{stem[:2]}]({folder}/{stem}.ipynb)"


def _markdown(head: list[str], lines: list[list]) -> str:
    """Markdown table; what Markdown or HTML would read as markup is escaped."""
    cells = [[" ".join(str(cell).split()).replace("|", r"\|").replace("<", "&lt;") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells])
