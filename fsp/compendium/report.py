"""The report on a reproduction: environment, notebooks, claims, and differences to the committed results."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from nbconvert.filters import markdown2html
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from fsp import paths
from fsp.compendium import stats
from fsp.compendium.claims import CLAIM_COLUMNS, MEASURED, VERDICTS, contradictions, measured, p_value_of, primaries
from fsp.files import replacing
from fsp.runs import tables
from fsp.runs.provenance import provenance

# Of accuracies, where numbers may move by a share of their column's range: in a column of good methods alone that is
# less than an image. Between two processors an accuracy was seen to move by 7 of 360 test images.
ACCURACY = 0.03
RTOL = 1e-6  # numbers closer than this, relative to the committed one, count as the same
STYLE = "body { font: 16px sans-serif; margin: 2em } td, th { padding: 0 1em 0.3em 0; text-align: left }"
TEXTS = [name for name in CLAIM_COLUMNS if name not in MEASURED]
MEANING = ("kind", "paper", "section", "bound")  # what a claim says, beside its sentence


class Outcome(NamedTuple):
    """How one notebook ended: ``finished``, ``finished earlier`` (before this call) or ``failed``, with its error."""

    stem: str
    seconds: float
    status: str
    error: str = ""


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


def read_claims(results: Path, stems: list[str]) -> pd.DataFrame:
    """Claims tables of several notebooks as one; a notebook without one is left out.

    Parameters
    ----------
    results : path
        Folder of the files ``<stem>.claims.csv``.
    stems : list of str
        Notebooks, in the order of the table.

    Returns
    -------
    pandas.DataFrame
        Column ``notebook``, then `CLAIM_COLUMNS`; text that is missing is "".

    Raises
    ------
    ValueError
        If a file lacks one of the columns.
    """
    columns = ["notebook", *CLAIM_COLUMNS]
    frames = []
    for stem in stems:
        path = results / f"{stem}.claims.csv"
        if not path.exists():
            continue
        frame = tables.read(path).assign(notebook=stem)
        missing = [name for name in columns if name not in frame]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}: expected {', '.join(CLAIM_COLUMNS)}")
        frames.append(frame[columns].astype(dict.fromkeys(TEXTS, object)))
    claims = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    return claims.assign(**claims[TEXTS].fillna("").astype(str))


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


class RowComparison(NamedTuple):
    """Two tables matched row by row: counts of rows, and what differs by column."""

    compared: int
    missing: int
    added: int
    differing: dict[str, str]

    def __str__(self):
        rows = f"{self.compared} of {self.compared + self.missing} committed rows compared, {self.added} rows are new"
        return f"{rows}: {self.differences() or 'same to the printed digits'}"

    def differences(self) -> str:
        """What differs, by column; "" if nothing does."""
        return "; ".join(f"`{column}`: {text}" for column, text in self.differing.items())


def compare_rows(
    ours: pd.DataFrame, committed: pd.DataFrame, *, rtol: float = RTOL, of_range: float = 0.0
) -> RowComparison:
    """Compare two tidy tables, rows matched by ``key`` (and by position among the rows of one key).

    Columns whose name ends in ``_s`` are wall times and left out, and so is ``code``, which is no result.

    Parameters
    ----------
    ours, committed : pandas.DataFrame
        Tables with a column ``key``.
    rtol : float
        Tolerance for numbers, relative to the committed one.
    of_range : float
        More tolerance, as a share of the range that the column has in the committed table; for a column whose name
        begins with ``accuracy`` it is `ACCURACY` at least.

    Returns
    -------
    RowComparison
        ``differing`` says for each column that differs in how many cells, and for numbers the largest absolute
        difference. Numbers differ beyond the tolerances, or where one is missing.

    Examples
    --------
    >>> old = pd.DataFrame({"key": ["a", "b"], "accuracy": [0.5, 0.75], "train_s": [1.0, 1.0]})
    >>> print(compare_rows(old.assign(accuracy=[0.5, 0.5], train_s=9.0), old))
    2 of 2 committed rows compared, 0 rows are new: `accuracy`: 1 differ, by at most 0.25
    """
    ours, committed = (frame.set_index(["key", frame.groupby("key").cumcount()]) for frame in (ours, committed))
    common = committed.index.intersection(ours.index)
    differing = {}
    for name in dict.fromkeys([*committed, *ours]):
        if name.endswith("_s") or name == "code":
            continue
        if name not in ours or name not in committed:
            differing[name] = "only in the " + ("committed table" if name not in ours else "new table")
            continue
        a, b = ours.loc[common, name], committed.loc[common, name]
        largest = ""
        if all(is_numeric_dtype(column) and not is_bool_dtype(column) for column in (a, b)):
            span = committed[name].max() - committed[name].min()
            atol = of_range * span if span > 0 else 0
            if of_range and name.startswith("accuracy"):
                atol = max(atol, ACCURACY)
            unequal = ~np.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
            gap = (a - b).abs()[unequal].max()
            largest = ", one is missing" if math.isnan(gap) else f", by at most {gap:.3g}"
        else:
            unequal = (a.astype(str) != b.astype(str)) & ~(a.isna() & b.isna())
        if unequal.any():
            differing[name] = f"{unequal.sum()} differ{largest}"
    return RowComparison(len(common), len(committed) - len(common), len(ours) - len(common), differing)


def compare_claims(ours: pd.DataFrame, committed: pd.DataFrame, *, exact: bool = False) -> list[str]:
    """Sentences on claims that are missing, say or find something else, or whose committed verdict is wrong.

    Parameters
    ----------
    ours, committed : pandas.DataFrame
        From `read_claims`; matched by notebook and claim.
    exact : bool
        Both come from the same rows: all columns are compared, and numbers to `RTOL`. Without it a value is the same
        inside the committed interval; where there is none it is compared to `RTOL`.

    Returns
    -------
    list of str
        Empty if nothing of this is the case.
    """
    found = [f"committed: {wrong}" for _, rows in committed.groupby("notebook") for wrong in contradictions(rows)]
    ours, committed = (
        {(row["notebook"], row["claim"]): row for row in frame.to_dict("records")} for frame in (ours, committed)
    )
    found += [f"not committed: {claim}" for stem, claim in ours if (stem, claim) not in committed]
    for name, old in committed.items():
        if name not in ours:
            found.append(f"missing: {name[1]}")
            continue
        new = ours[name]
        for column in (*MEANING, "published", "note") if exact else MEANING:
            if new[column] != old[column]:
                found.append(f"{column} {new[column]!r}, committed {old[column]!r}: {name[1]}")
        if new["holds"] != old["holds"]:
            found.append(f"verdict {new['holds']!r}, committed {old['holds']!r}: {name[1]}")
        if exact:
            moved = [column for column in MEASURED if not _close(new[column], old[column])]
            found += [f"{column} {new[column]:.6g}, committed {old[column]:.6g}: {name[1]}" for column in moved]
        elif not _within(new["measured"], old):
            found.append(f"measured {new['measured']:.4g}, committed {measured(old)}: {name[1]}")
    return found


def compare_committed(results: Path, stem: str) -> list[str]:
    """What differs between a notebook's tables in a folder and the committed ones, in sentences."""
    committed = paths.COMMITTED.results
    if not (committed / f"{stem}.csv").exists() or not (committed / f"{stem}.claims.csv").exists():
        return ["nothing is committed to compare with"]
    rows, committed_rows = (tables.read(folder / f"{stem}.csv") for folder in (results, committed))
    claims, committed_claims = (read_claims(folder, [stem]) for folder in (results, committed))
    same = f"{len(committed_claims)} claims compared: same verdicts, values within their committed intervals"
    return [str(compare_rows(rows, committed_rows)), *(compare_claims(claims, committed_claims) or [same])]


def write(out: Path, outcomes: list[Outcome], *, profile: str, given: dict, records_before: int) -> str:
    """Write ``report.md`` and ``report.html`` into an output folder.

    Parameters
    ----------
    out : path
        Where the notebooks wrote to.
    outcomes : list of Outcome
        In the order they ran.
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
    finished = [outcome.stem for outcome in outcomes if not outcome.error]
    claims = read_claims(out / "results", finished)
    if profile in ("quick", "full") and not given:
        differences = {stem: compare_committed(out / "results", stem) for stem in finished}
    else:
        differences = {"not compared": ["the committed results belong to the profiles full and quick as they are"]}
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "runs").glob("*.json")]
    gpus = {(record.get("provenance") or {}).get("gpu") for record in records} - {None, ""}
    environment = provenance() | {"gpu": ", ".join(sorted(gpus)) or "none used"}

    parts = [f"# Reproduction, profile {profile}"]
    if given:
        parts.append(f"Parameters from the command line: `{json.dumps(given, default=str)}`")
    parts.append(f"Run records found at the start, and reused where they fit: {records_before}.")
    rows = [[o.stem, o.status, f"{o.seconds:.0f}", f"[{o.stem}](notebooks/{o.stem}.ipynb)"] for o in outcomes]
    parts += ["## Notebooks", _markdown(["Notebook", "Status", "Seconds", "Executed"], rows)]
    for outcome in outcomes:
        if outcome.error:
            executed = out / "notebooks" / f"{outcome.stem}.ipynb"
            partial = f"As far as it came: `{executed}`" if executed.exists() else "It ended before its first cell."
            parts += [f"### {outcome.stem} failed", f"```text\n{outcome.error}\n```", partial]
    parts += ["## Claims", claims_table(claims, link="notebooks") if len(claims) else "None."]
    parts += ["## Differences to the committed results"]
    parts += [f"Numbers count as the same within a relative tolerance of {RTOL:g}; wall times are left out."]
    for stem, sentences in differences.items():
        parts += [f"**{stem}**", "\n".join(f"- {sentence}" for sentence in sentences)]
    parts += ["## Environment", _markdown(["", ""], [list(item) for item in environment.items()])]
    text = "\n\n".join(parts) + "\n"
    head = f"<!doctype html><meta charset='utf-8'><title>Reproduction</title><style>{STYLE}</style>"
    for name, content in (("report.md", text), ("report.html", f"{head}\n{markdown2html(text)}\n")):
        with replacing(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return text


def _within(value: float, old: dict) -> bool:
    """Whether a value lies in a committed interval, or equals the committed value if that has none."""
    if math.isnan(old["low"]) or math.isnan(old["high"]):
        return _close(value, old["measured"])
    return old["low"] <= value <= old["high"]


def _close(value: float, committed: float) -> bool:
    """Whether two numbers are the same to `RTOL`, or both missing."""
    return bool(np.isclose(value, committed, rtol=RTOL, atol=1e-12, equal_nan=True))


def _link(stem: str, folder: str) -> str:
    """Link in Markdown to a notebook, called by its number."""
    return f"[{stem[:2]}]({folder}/{stem}.ipynb)"


def _markdown(head: list[str], lines: list[list]) -> str:
    """Markdown table; what Markdown or HTML would read as markup is escaped."""
    cells = [[" ".join(str(cell).split()).replace("|", r"\|").replace("<", "&lt;") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells])
