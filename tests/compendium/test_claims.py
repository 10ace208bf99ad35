import html
import math
import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from fsp.compendium import report
from fsp.compendium.claims import (
    CLAIM_COLUMNS,
    LEAST,
    claim,
    contradictions,
    p_value_of,
    primaries,
    primary,
    shown,
    verdict,
)
from fsp.compendium.stats import Estimate
from fsp.paths import DATA

NAN, INF = math.nan, math.inf
COMMITTED = sorted(path.name.removesuffix(".claims.csv") for path in (DATA / "results").glob("*.claims.csv"))


def between(low, high, n=9):
    return Estimate((low + high) / 2, low, high, n)


# --- verdicts


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (0.6, 0.9, "yes", "no"),
        (0.1, 0.4, "no", "yes"),
        (0.4, 0.6, "not decided", "not decided"),
        (0.5, 0.9, "not decided", "not decided"),  # it touches the bound
        (0.1, 0.5, "not decided", "not decided"),
        (0.5, 0.5, "not decided", "not decided"),
        (math.nextafter(0.5, 1), 0.9, "yes", "no"),
        (0.1, math.nextafter(0.5, 0), "no", "yes"),
        (0.6, INF, "yes", "no"),
        (-INF, 0.4, "no", "yes"),
        (NAN, NAN, "not decided", "not decided"),
        (NAN, 0.4, "not decided", "not decided"),
        (0.6, NAN, "not decided", "not decided"),
    ],
)
def test_a_one_sided_claim_needs_the_whole_interval_on_its_side(low, high, above, below):
    assert verdict(between(low, high), "> 0.5") == above
    assert verdict(between(low, high), "< 0.5") == below


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [
        (0.96, 1.04, "equivalent"),
        (0.95, 1.04, "not decided"),  # it touches a bound
        (0.96, 1.05, "not decided"),
        (0.90, 1.04, "not decided"),
        (0.96, 1.10, "not decided"),
        (0.90, 1.10, "not decided"),  # wider than the bounds: neither inside nor outside
        (0.80, 0.94, "no"),
        (1.06, 1.20, "no"),
        (0.80, 0.95, "not decided"),
        (1.05, 1.20, "not decided"),
        (-INF, INF, "not decided"),
        (NAN, NAN, "not decided"),
    ],
)
def test_equivalence_needs_the_whole_interval_between_the_bounds_and_a_no_the_whole_outside(low, high, holds):
    assert verdict(between(low, high), "within 0.95 … 1.05") == holds


def test_the_ends_of_the_interval_decide_and_not_the_value_in_it():
    assert verdict(Estimate(22.4, 19.9, 56.9, 12), "> 20") == "not decided"
    assert verdict(Estimate(0.4, 0.6, 0.9, 12), "> 0.5") == "yes"


@pytest.mark.parametrize("bound", ["> 0.5", "< 0.5", "within 0.1 … 0.2"])
def test_fewer_than_three_observations_decide_nothing(bound):
    assert LEAST == 3
    for n in (0, 1, 2, NAN):
        assert verdict(between(0.7, 0.8, n), bound) == "not decided"
    assert verdict(between(0.7, 0.8, 3), bound) in ("yes", "no")


WRONG = ["", "0.5", ">0.5", ">= 0.5", "> half", "> nan", "< inf", "> 1 2", "> 0.5 "]
WRONG += ["within 1", "within 2 … 1", "within 1 … 1", "within 0 .. 1"]


@pytest.mark.parametrize("bound", WRONG)
def test_a_bound_that_cannot_be_read_is_an_error_that_shows_the_forms(bound):
    with pytest.raises(ValueError, match=r'expected "> a", "< b" or "within a … b"'):
        verdict(between(0.6, 0.9), bound)


# --- claims


def test_a_claim_is_a_row_with_the_columns_of_the_claims_table_in_order():
    about = {"paper": "P", "section": "4.2", "published": ".83", "kind": "primary", "note": "small"}
    row = claim("A beats B", Estimate(0.8, 0.7, 0.9, 30), above=0.5, **about)
    assert tuple(row) == CLAIM_COLUMNS
    assert " ".join(row) == "claim kind paper section measured low high n bound published holds note"
    assert tuple(row.values()) == (
        *("A beats B", "primary", "P", "4.2", 0.8, 0.7, 0.9, 30), "> 0.5", ".83", "yes", "small"
    )  # fmt: skip
    short = claim("A", between(1, 2), below=1, paper="P")
    assert [short[name] for name in ("kind", "section", "published", "note")] == ["exploratory", "", "", ""]


@pytest.mark.parametrize(
    ("given", "bound", "holds"),
    [
        ({"above": 0}, "> 0", "yes"),
        ({"below": 0}, "< 0", "no"),
        ({"above": -0.02}, "> -0.02", "yes"),
        ({"below": 20}, "< 20", "yes"),
        ({"below": 1e-9}, "< 1e-09", "no"),
        ({"above": np.float64(0.1) * 3}, "> 0.30000000000000004", "not decided"),
        ({"above": 1e22}, "> 1e+22", "no"),
        ({"equivalent": 0.5}, "within -0.5 … 0.5", "equivalent"),
        ({"equivalent": (0.2, 0.5)}, "within 0.2 … 0.5", "not decided"),
        ({"equivalent": (-1, 0)}, "within -1 … 0", "no"),
    ],
)
def test_a_bound_is_stored_as_text_that_gives_the_verdict_back(given, bound, holds):
    row = claim("A", Estimate(0.3, 0.2, 0.4, 5), **given, paper="P")
    assert (row["bound"], row["holds"]) == (bound, holds)
    assert verdict(Estimate(0.3, 0.2, 0.4, 5), row["bound"]) == holds


def test_a_bound_keeps_every_bit():
    third = 1 / 3
    values = [math.nextafter(third, 0), third, math.nextafter(third, 1)]
    texts = [claim("A", between(0, 1), above=value, paper="P")["bound"] for value in values]
    assert [float(text.removeprefix("> ")) for text in texts] == values
    assert all(a != b for a, b in pairwise(texts))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one bound: pass above=..., below=... or equivalent=..."),
        ({"above": 0.1, "below": 0.9}, "one bound"),
        ({"above": 0.1, "equivalent": 0.9}, "one bound"),
        ({"above": NAN}, "bound '> nan'"),
        ({"below": INF}, "bound '< inf'"),
        ({"equivalent": 0}, "bound 'within 0 … 0'|bound 'within -0 … 0'"),
        ({"equivalent": -0.5}, "bound 'within 0.5 … -0.5'"),
        ({"equivalent": (1, 2, 3)}, "bound 'within 1 … 2 … 3'"),
        ({"above": 0, "kind": "secondary"}, "kind is 'secondary': expected primary or exploratory"),
    ],
)
def test_a_claim_has_one_bound_of_finite_numbers_and_a_known_kind(given, message):
    with pytest.raises(ValueError, match=message):
        claim("A", between(0.1, 0.2), paper="P", **given)


# --- tables of claims


@pytest.mark.parametrize("stem", COMMITTED)
def test_every_committed_verdict_follows_from_its_row(stem):
    table = report.read_claims(DATA / "results", [stem])
    assert len(table) > 0
    assert contradictions(table) == []


def test_a_verdict_that_its_row_does_not_give_is_named():
    rows = [claim(text, between(0.6, 0.9), above=0.5, paper="P") for text in "ABCD"]
    assert contradictions(pd.DataFrame(rows)) == []
    rows[0]["holds"] = "no"
    rows[1]["n"] = 1
    rows[2]["bound"] = "above half"
    rows[3]["claim"] = "A"
    twice, *wrong = contradictions(pd.DataFrame(rows))
    assert twice == "there is more than one claim: A"
    assert wrong[0] == "verdict 'no' is written, 'yes' follows from its numbers: A"
    assert wrong[1] == "verdict 'yes' is written, 'not decided' follows from its numbers: B"
    assert wrong[2].startswith("bound 'above half': expected")
    assert len(wrong) == 3


# --- primary claims


def test_a_primary_claim_has_the_sentence_and_the_bound_of_the_page():
    row = primary("P6", between(0.1, 0.3), note="here")
    stated = primaries()["P6"]
    assert (row["claim"], row["bound"], row["kind"], row["holds"]) == (stated.claim, "> 0", "primary", "yes")
    assert contradictions(pd.DataFrame([row])) == []
    with pytest.raises(ValueError, match="'P0'"):
        primary("P0", between(0.1, 0.3))


def test_every_entry_of_the_page_is_whole_and_an_incomplete_one_is_named(tmp_path):
    assert [entry.claim.split(".")[0] for entry in primaries().values()] == list(primaries())
    page = tmp_path / "claims.md"
    page.write_text("# Claims\n\n## P1. It is so\n\n* **Paper:** A\n* **Bound:** `> 0`\n")
    with pytest.raises(ValueError, match=r"'P1\. It is so': expected the lines paper, sentence"):
        primaries(page)


def test_primary_claims_of_notebooks_are_those_of_the_page():
    written = report.read_claims(DATA / "results", COMMITTED)
    written = written[written.kind == "primary"]
    stated = {entry.claim: entry.bound for entry in primaries().values()}
    assert written.claim.is_unique
    assert dict(zip(written.claim, written.bound, strict=True)).items() <= stated.items()


def test_the_p_value_of_a_claim_is_that_of_the_nearer_bound():
    row = primary("P10", Estimate(0.01, -0.005, 0.025, 30))
    assert 0.05 < p_value_of(row) == p_value_of(row | {"bound": "> 0.02"}) < 0.5
    assert math.isnan(p_value_of(row | {"low": NAN}))


def test_the_answers_are_in_the_order_of_the_page_and_marked_where_holm_leaves_nothing():
    weak, strong = Estimate(0.1, 0.001, 0.199, 30), Estimate(0.5, 0.4, 0.6, 30)
    rows = [primary("P9", weak), primary("P6", strong), primary("P8", weak), claim("E", weak, above=0, paper="P")]
    written = pd.DataFrame(rows).assign(notebook="14_x")
    short = report.answers_table(written, link="n", whole=False).splitlines()[2:]
    assert [line.split(".")[0] for line in short] == ["| P6", "| P8", "| P9"]
    assert "**yes** | 0.5 [0.4, 0.6] | 30 | [14](n/14_x.ipynb)" in short[0]
    assert all("**yes, but not after Holm's correction**" in line for line in short[1:])
    whole = report.answers_table(written, link="n", whole=True).splitlines()
    assert len(whole) == 5
    assert primaries()["P6"].overturned in whole[2]


# --- how they are shown


@pytest.mark.parametrize("stem", COMMITTED)
def test_a_shown_table_has_every_sentence_whole_and_no_number_rounded_to_nothing(stem):
    table = report.read_claims(DATA / "results", [stem])
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", shown(table)._repr_html_())]
    width = shown(table).shape[1] + 1
    lines = [cells[start : start + width] for start in range(width, len(cells), width)]  # below the headings
    for line, row in zip(lines, table.to_dict("records"), strict=True):
        assert (line[0], line[-1]) == (row["claim"], row["holds"])
        told = [float(number) for number in re.findall(r"[-+.\de]+", line[2])]
        exact = [row[name] for name in ("measured", "low", "high")]
        assert told == pytest.approx([number for number in exact if not math.isnan(number)], rel=0.005)
