"""Records of any shape: whatever stands in the file, it is a whole record or the run is done again.

The records here are of schema 2, which have no digest of what they say: with it nearly all changes would be noticed by
that alone.
"""

import copy
import json
import random
import warnings

import pandas as pd
import pytest

from fsp.runs import key, load, read_record, sweep
from fsp.runs.housekeeping import main
from fsp.runs.records import ADDED

CONFIG = {"x": 2, "widths": [8, 4], "options": {"on": True, "lr": 0.5}, "device": "cpu"}
OTHERS = [None, True, 0, -1, 0.5, 1e400, "text", [], [1], [[]], {}, {"a": 1}, {"a": [None]}]


def run(config):
    return [{"step": step, "y": config["x"] / 3 + step, "word": "good", "gap": None, "on": True} for step in range(2)]


def fails(config):
    raise ArithmeticError("two is too many")


def nodes(tree):
    """Every dict or list of a tree, with each of the names or places in it."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    for place, value in inner:
        yield tree, place
        yield from nodes(value)


def corrupted(text, chance):
    """A record as text with one thing changed: a node of its tree, or some bytes."""
    if chance.random() < 0.25:
        raw = bytearray(text.encode())
        for _ in range(chance.choice([1, 1, 3])):
            place = chance.randrange(len(raw))
            raw[place : place + chance.choice([0, 1, 20])] = bytes([chance.randrange(256)])
        return bytes(raw)
    tree = [json.loads(text)]
    parent, place = chance.choice(list(nodes(tree)))
    what = chance.choice(["replace", "replace", "delete", "duplicate", "move"])
    if what == "replace":
        parent[place] = copy.deepcopy(chance.choice(OTHERS))
    elif what == "delete":
        del parent[place]
    elif what == "duplicate":
        other, there = chance.choice(list(nodes(tree)))
        value = copy.deepcopy(parent[place])
        if isinstance(other, list):
            other.insert(there, value)
        else:
            other[f"{there}"] = value
    elif isinstance(parent, dict):
        parent[f"{place}2"] = parent.pop(place)
    else:
        parent.reverse()
    return json.dumps(tree[0] if tree else None).replace("Infinity", "1e400").encode()


def whole(folder, status):
    """Path and text of a whole record."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sweep(run if status == "finished" else fails, [CONFIG], store=folder / "whole")
    (path,) = (folder / "whole").iterdir()
    record = {name: value for name, value in json.loads(path.read_text()).items() if name not in ADDED[2]}
    path.write_text(json.dumps(record | {"schema": 2}, indent=1))
    return path, path.read_text()


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_record_with_any_node_replaced_is_whole_or_refused_and_never_trips_what_reads_it(tmp_path, capsys, status):
    path, text = whole(tmp_path, status)
    sweep(run, [{**CONFIG, "x": 3}], store=path.parent)  # records are sorted and shown together
    refused = read = 0
    for number in range(len(list(nodes(json.loads(text))))):
        for other in OTHERS:
            tree = json.loads(text)
            parent, place = list(nodes(tree))[number]
            parent[place] = other
            path.write_text(json.dumps(tree).replace("Infinity", "1e400"))
            try:
                read += len(load(path.parent)) > 0
                assert parent is not tree or other != {"a": [None]}, f"no {place} is such a thing"
            except ValueError as error:
                assert "not a whole run record" in str(error)  # noqa: PT017
                refused += 1
            assert main(["list", "--status", status, "--store", str(path.parent)]) == 0
    capsys.readouterr()
    assert refused > read > 0


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_whatever_is_changed_in_a_record_the_sweep_heals_and_its_table_says_what_the_record_says(tmp_path, status):
    path, text = whole(tmp_path, status)
    chance = random.Random(14)
    clean = sweep(run, [CONFIG], store=tmp_path / "clean").drop(columns="code")
    set_aside = 0
    for number in range(150):
        store = tmp_path / str(number)
        store.mkdir()
        damaged = corrupted(text, chance)
        (store / path.name).write_bytes(damaged)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            table = sweep(run, [CONFIG], store=store).drop(columns="code")
        messages = [str(warning.message) for warning in told]
        assert all("not a whole run record" in m or "runs were reused that other code" in m for m in messages), messages
        assert table["status"].eq("finished").all()
        aside = store / f"{path.name}.corrupt"
        assert aside.exists() == any("not a whole" in message for message in messages)
        if aside.exists():
            set_aside += 1
            assert aside.read_bytes() == damaged
        if aside.exists() or status == "failed":
            assert table.equals(clean)
        else:
            held = pd.DataFrame(json.loads(damaged)["rows"], dtype=object)
            shown = table[list(held)].astype(object)
            assert shown.where(shown.notna(), None).equals(held.where(held.notna(), None))
        assert read_record(store / path.name)["key"] == key(CONFIG)
        assert load(store)["status"].tolist() == table["status"].tolist()
    assert 75 < set_aside < 150
