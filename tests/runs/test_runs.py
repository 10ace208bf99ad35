import errno
import functools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsp import models, paths, progress, runs, training
from fsp.data import load as load_data
from fsp.files import CannotResume
from fsp.runs import attempt, key, load, locks, read_record, records, sweep, tables
from fsp.runs import provenance as provenance_module
from fsp.runs.code import run_code
from fsp.runs.locks import lock, locked_by
from fsp.runs.provenance import provenance

# Children of a server that has imported torch already start in a few milliseconds.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["fsp.runs", "pytest", "hypothesis"])


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


def counts(frame):
    return [frame.attrs[word] for word in ("computed", "reused", "failed")]


def square(config):
    return {"square": config["x"] ** 2, "half": config["x"] / 2}


def never(config):
    raise AssertionError(f"{config} was computed")


def fails_at_2(config):
    if config["x"] == 2:
        raise ArithmeticError("two is too many")
    return square(config)


XS = [{"x": x} for x in (1, 2, 3)]
# Tests show what is reused by another function in its place.
pytestmark = pytest.mark.filterwarnings("ignore:[0-9]+ of [0-9]+ runs were reused")

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=2), max_leaves=4
)
names = st.text().filter(lambda name: name not in runs.EXCLUDED)
dicts = st.dictionaries(names, values, max_size=4)


@given(dicts, st.randoms(), st.sampled_from(sorted(runs.EXCLUDED)))
def test_key_ignores_the_order_of_entries_and_excluded_ones_whatever_they_hold(config, shuffler, excluded):
    entries = [*config.items(), (excluded, object())]
    shuffler.shuffle(entries)
    assert key(dict(entries)) == key(config)


@given(st.integers(-(2**53), 2**53), st.lists(values))
def test_key_takes_a_whole_float_for_an_int_and_a_tuple_for_a_list_at_any_depth(number, items):
    assert key({"a": float(number), "b": [{"c": tuple(items)}]}) == key({"a": number, "b": [{"c": items}]})


@given(dicts, st.integers(), st.integers())
def test_key_tells_seeds_apart(config, one, other):
    assert (key({**config, "seed": one}) == key({**config, "seed": other})) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (1, "1"), (0.1 + 0.2, 0.3), ([[1], 2], [1, [2]]), (2**53 + 1, 2.0**53), ({"device": 1}, {"device": 2})],
)
def test_key_tells_different_values_apart(one, other):
    assert key({"a": one}) != key({"a": other})


def test_key_is_the_hash_of_the_canonical_json_and_so_the_same_for_ever():
    # printf '{"density":1,"widths":[8,0.5]}' | sha256sum
    expected = "4e5ebf045b52959e08a6d6e986b59618eb82b5489a91052ffba9d8c25c96f6d7"
    assert key({"widths": (8, 0.5), "density": 1.0, "device": "cuda"}) == expected


@pytest.mark.parametrize(
    ("config", "error", "named"),
    [
        ({"lr": [0.1, math.inf]}, ValueError, r"'lr\[1\]' is inf"),
        ({"net": {"depth": {3}}}, TypeError, "'net.depth' is .3. of type set"),
        ({"net": {3: "depth"}}, TypeError, "'net' holds a name 3"),
        ({3: "x"}, TypeError, "entry 3: expected a name of type str"),
    ],
)
def test_key_refuses_what_json_cannot_hold_and_names_it(config, error, named):
    with pytest.raises(error, match=named):
        key(config)


def test_a_table_has_the_config_the_metrics_the_status_and_the_key(tmp_path):
    config = {"name": "a\n", "widths": (8, 4), "options": {"k": 1}, "device": torch.device("cpu"), "none": None}
    frame = sweep(lambda c: [{"step": i, "ok": i > 0} for i in range(2)], [config], store=tmp_path)
    assert list(frame) == ["name", "widths", "options", "none", "step", "ok", "status", "key", "code"]
    code = read_record(tmp_path / f"{key(config)}.json")["provenance"]["run_code"]
    assert frame.drop(columns="none").values.tolist() == [
        ['"a\\n"', "[8,4]", '{"k":1}', 0, False, "finished", key(config), code[:12]],
        ['"a\\n"', "[8,4]", '{"k":1}', 1, True, "finished", key(config), code[:12]],
    ]
    assert counts(frame) == [1, 0, 0]


def test_a_column_has_the_type_its_values_have_together(tmp_path):
    metrics = [
        {"int": 1, "some": 1, "real": 1, "flag": True, "text": "a", "none": None},
        {"int": 2, "real": 0.5, "flag": False, "text": None, "none": None},
    ]
    frame = sweep(lambda c: metrics[c["i"]], [{"i": 0}, {"i": 1}], store=tmp_path)
    assert [frame[name].dtype.kind for name in ("int", "some", "real", "flag", "none")] == list("iffbf")
    assert frame[["some", "text", "none"]].isna().values.tolist() == [[False, False, True], [True, True, True]]


def test_a_record_tells_all_about_its_run(tmp_path):
    config = {"x": 0.5, "widths": [1, 2], "device": torch.device("cpu"), "out_dir": tmp_path}
    store = tmp_path / "made" / "here"

    def run(config):  # it cannot change the config of the record
        return {"y": math.nan, "z": time.sleep(config["widths"].pop() / 100)}

    sweep(run, [config], store=store)
    (path,) = store.iterdir()
    raw = json.loads(path.read_text())
    assert path.name == f"{key(config)}.json"
    assert raw["config"] == {"x": 0.5, "widths": [1, 2], "device": "cpu", "out_dir": str(tmp_path)}
    assert raw["rows"] == [{"y": None, "z": None}]
    assert (raw["schema"], raw["key"], raw["status"]) == (3, key(config), "finished")
    assert (raw["kind"], raw["error"]) == (None, None)
    about = {"run_code": run_code(run), "host": os.uname().nodename, "process": os.getpid()}
    assert raw["provenance"] == provenance() | about
    assert pd.Timestamp(raw["started"]).utcoffset().total_seconds() == 0
    assert 0.02 <= raw["wall_s"] < 10
    assert 10e6 < raw["peak_memory_bytes"] <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert raw["peak_cuda_bytes"] is None or torch.cuda.is_available()
    assert math.isnan(read_record(path)["rows"][0]["y"])


def test_a_finished_run_is_not_computed_again_and_only_missing_ones_are(tmp_path):
    sweep(square, XS[1:2], store=tmp_path)
    calls = []
    frame = sweep(lambda c: calls.append(c["x"]) or square(c), XS, store=tmp_path)
    assert calls == [1, 3]
    assert frame["x"].tolist() == [1, 2, 3]
    assert counts(frame) == [2, 1, 0]
    assert frame.equals(sweep(never, XS, store=tmp_path))


def test_recompute_does_all_again_and_leaves_old_records_until_then(tmp_path):
    sweep(lambda c: {"old": 1}, XS, store=tmp_path)

    def interrupted(config):
        if config["x"] == 2:
            raise KeyboardInterrupt
        return {"new": 1}

    with pytest.raises(KeyboardInterrupt):
        sweep(interrupted, XS, store=tmp_path, recompute=True)
    assert [list(read_record(tmp_path / f"{key(c)}.json")["rows"][0]) for c in XS] == [["new"], ["old"], ["old"]]
    frame = sweep(square, XS, store=tmp_path, recompute=True)
    assert frame.attrs["computed"] == 3
    assert frame["square"].tolist() == sweep(never, XS, store=tmp_path)["square"].tolist() == [1, 4, 9]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_through_and_loses_nothing(tmp_path, stop):
    def stopped(limit, config):  # a partial has no name to show with the progress
        if config["x"] == limit:
            raise stop
        return square(config)

    with pytest.raises(stop):
        sweep(functools.partial(stopped, 3), XS, store=tmp_path)
    assert load(tmp_path)["x"].tolist() == [1, 2]


def sweep_with_a_failure(function, **options):
    with pytest.warns(UserWarning, match="1 of 3 runs failed, the first with ArithmeticError: two is too many"):
        return sweep(function, XS, **options)


def test_a_failed_run_is_tried_again_unless_told_otherwise(tmp_path):
    frame = sweep_with_a_failure(fails_at_2, store=tmp_path)
    assert frame["status"].tolist() == ["finished", "failed", "finished"]
    assert frame["square"].isna().tolist() == [False, True, False]
    assert counts(frame) == [2, 0, 1]
    left = sweep_with_a_failure(never, store=tmp_path, retry_failed=False)
    assert left.equals(load(tmp_path))
    assert counts(left) == [0, 2, 1]
    again = sweep(square, XS, store=tmp_path)
    assert counts(again) == [1, 2, 0]
    undisturbed = sweep(square, XS, store=tmp_path / "undisturbed")
    assert again.drop(columns="code").equals(undisturbed.drop(columns="code"))
    assert again["code"].tolist() == [run_code(function)[:12] for function in (fails_at_2, square, fails_at_2)]


def test_a_failure_never_replaces_a_result(tmp_path):
    sweep(square, XS, store=tmp_path)
    frame = sweep_with_a_failure(fails_at_2, store=tmp_path, recompute=True)
    assert frame["status"].tolist() == ["finished", "failed", "finished"]
    assert sweep(never, XS, store=tmp_path)["square"].tolist() == [1, 4, 9]


DAMAGES = [  # in the text of a record
    ('"schema": 3', '"schema": 4'),
    ('"x": 2', '"x": 4'),
    ('"wall_s"', '"wall"'),
    ('"square": 4', '"square": [4]'),
    ('"square": 4', '"square": 5'),
    ('"wall_s": ', '"wall_s": 1'),
    ('"finished"', '"done"'),
    ('"kind": null', '"kind": "timeout"'),
    ('"rows": [', '"rows": '),
]


@pytest.mark.parametrize(("old", "new"), DAMAGES)
def test_a_damaged_record_is_set_aside_and_computed_again(tmp_path, old, new):
    whole = sweep(square, XS, store=tmp_path)
    path = tmp_path / f"{key({'x': 2})}.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match="not a whole run record"):
        load(tmp_path)
    with pytest.warns(UserWarning, match="set aside"):
        frame = sweep(square, XS, store=tmp_path)
    assert frame.attrs["computed"] == 1
    assert frame.equals(whole)
    assert path.with_name(path.name + ".corrupt").read_text() == text.replace(old, new)
    assert len(load(tmp_path)) == 3


def times(factor):
    def run(config):
        return {"y": factor * config["x"]}

    return run


@pytest.mark.parametrize("source", ["records", "table", "table without the column"])
def test_rows_that_other_code_made_are_reused_counted_and_told_of(tmp_path, source):
    table, store = tmp_path / "a.csv", tmp_path / "runs"
    first = sweep(times(1), XS[:2], store=store)
    tables.save(first if source == "table" else first.drop(columns="code"), table)
    if source != "records":
        store = tmp_path / "empty"
    with pytest.warns(UserWarning, match=r"2 of 3 runs were reused that other code made.* recompute=True does them ag"):
        frame = sweep(times(2), XS, store=store, table=table)
    assert frame["y"].tolist() == [1, 2, 6]
    assert frame.attrs == {"computed": 1, "reused": 2, "failed": 0, "stale": 2}
    known = first["code"][0] if source != "table without the column" else None
    assert frame["code"].fillna("").tolist() == [known or "", known or "", run_code(times(2))[:12]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sweep(times(2), XS, store=store, table=table, recompute=True)
        assert again.equals(sweep(times(2), XS, store=store, table=table))
    assert again.attrs["stale"] == 0
    assert again["y"].tolist() == [2, 4, 6]


def of_schema(schema, path):
    """What a record had said in an older schema."""
    raw = {n: value for n, value in json.loads(path.read_text()).items() if n not in records.ADDED[schema]}
    return raw | {"schema": schema}


def test_records_that_do_not_name_their_code_count_as_of_other_code(tmp_path):
    sweep(square, XS[:1], store=tmp_path)
    path = tmp_path / f"{key(XS[0])}.json"
    raw = of_schema(2, path)
    del raw["provenance"]["run_code"]
    path.write_text(json.dumps(raw))
    with pytest.warns(UserWarning, match="1 of 1 runs were reused that other code made"):
        frame = sweep(square, XS[:1], store=tmp_path)
    assert frame.attrs["stale"] == 1
    assert frame["code"].isna().all()


def test_finished_rows_of_a_committed_table_stand_in_for_missing_records(tmp_path):
    table = tmp_path / "results" / "a.csv"
    tables.update(sweep_with_a_failure(fails_at_2, store=tmp_path / "one", table=table), table)
    # Nothing to compute: a store that cannot be written is no obstacle.
    finished = [XS[0], XS[2]]
    frame = sweep(never, finished, store=table / "no folder", table=table)
    assert frame["square"].tolist() == [1, 9]
    assert counts(frame) == [0, 2, 0]
    sweep(lambda c: {"square": 100}, XS[:1], store=tmp_path / "two")
    frame = sweep(lambda c: {"square": 200}, XS, store=tmp_path / "two", table=table)
    assert frame["square"].tolist() == [100, 200, 9]
    assert sweep(square, XS, store=tmp_path / "two", table=table, recompute=True).attrs["computed"] == 3


@pytest.mark.parametrize("first", [[0], [1], [2, 0], [1, 2]])
@pytest.mark.parametrize("source", ["records", "table"])
def test_a_table_does_not_depend_on_which_rows_were_reused(tmp_path, first, source):
    metrics = [
        [{"step": i, "loss": 1.0, "ok": True, "text": "T", "gap": math.nan} for i in (0, 1)],
        {"step": 7, "loss": 1e-7, "ok": False, "text": "-", "gap": 0.1 + 0.2},
        {"step": -1, "loss": -0.0, "ok": True, "text": "1.2.3", "gap": math.nan},
    ]
    configs = [{"i": 0, "a": 1.0, "b": [1]}, {"i": 1, "a": 2, "c": "007"}, {"i": 2, "a": 3, "b": [2, 3]}]

    def run(config):
        return metrics[config["i"]]

    whole = sweep(run, configs, store=tmp_path / "whole")
    part = sweep(run, [configs[i] for i in first], store=tmp_path / "part")
    table = tables.update(part, tmp_path / "part.csv")
    store = tmp_path / ("part" if source == "records" else "other")
    resumed = sweep(run, configs, store=store, table=table if source == "table" else None)
    assert resumed.attrs["reused"] == len(first)
    assert resumed.equals(whole)
    one, other = tables.save(whole, tmp_path / "1.csv"), tables.save(resumed, tmp_path / "2.csv")
    assert one.read_bytes() == other.read_bytes()


metrics = st.fixed_dictionaries(
    {
        "real": st.floats(allow_infinity=False),
        "int": st.integers(-(2**63), 2**63 - 1),
        "flag": st.booleans(),
        "text": st.text("aTruenNA,\"' é-.#", min_size=1).filter(lambda t: isinstance(tables.value_of(t), str)),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(metrics, min_size=1, max_size=4), st.text("a\n\r,\" '\\"))
def test_records_and_tables_give_every_metric_back_to_the_last_bit(tmp_path_factory, rows, label):
    folder = tmp_path_factory.mktemp("exact")
    config = {"label": f"x{label}"}
    frame = sweep(lambda c: rows, [config], store=folder)
    for name in ("real", "int", "flag", "text"):
        assert list(map(repr, frame[name].tolist())) == [repr(row[name]) for row in rows]
    assert frame.equals(sweep(never, [config], store=folder))
    table = tables.update(frame, folder / "a.csv")
    assert frame.equals(sweep(never, [config], store=folder / "empty", table=table))
    assert frame.equals(tables.read(table))
    before = table.read_bytes()
    assert tables.update(frame, table).read_bytes() == before


def test_a_saved_table_has_plain_line_ends_and_empty_cells_for_nan(tmp_path):
    frame = pd.DataFrame({"a": [0.1, math.nan], "b": [1, 2], "c": ["NA", None]}, index=[5, 6])
    path = tables.save(frame, tmp_path / "new" / "a.csv")
    assert path.read_bytes() == b"a,b,c\n0.1,1,NA\n,2,\n"
    assert tables.read(path)["c"].tolist()[0] == "NA"


def test_a_digest_that_looks_like_a_number_stays_text(tmp_path):
    digests = ["001234567890", "12345678e123"]
    frame = pd.DataFrame({"x": [1, 2], "y": [0.5, 1], "status": "finished", "key": ["A", "B"], "code": digests})
    path = tables.update(frame, tmp_path / "a.csv")
    assert tables.read(path)["code"].tolist() == digests
    known = tables.rows_by_key(path, {"x"})
    assert [known[name]["provenance"]["run_code"] for name in "AB"] == digests


def test_update_table_replaces_its_own_rows_and_keeps_the_others_as_they_were(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("z,seed,gone,status,key\n1.50,3,,finished,C\n7,1,2,finished,A\n2,3,,failed,C\n1,0,1,finished,B\n")
    frame = pd.DataFrame({"seed": [0, 1, 1], "y": [0.5, 1, 2], "status": "finished", "key": ["B", "A", "A"]})
    expected = "seed,y,status,key,z\n0,0.5,finished,B,\n1,1.0,finished,A,\n1,2.0,finished,A,\n"
    expected += "3,,finished,C,1.50\n3,,failed,C,2\n"
    assert tables.update(frame, path).read_text() == expected
    assert tables.update(frame, path).read_text() == expected
    with pytest.raises(ValueError, match="frame has no column 'key'"):
        tables.update(frame.drop(columns="key"), path)
    tables.save(frame.drop(columns="status"), path)
    with pytest.raises(ValueError, match=r"a\.csv has no column 'status'"):
        sweep(never, XS, store=tmp_path / "runs", table=path)


def test_the_progress_bar_counts_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FSP_PROGRESS", "1")
    monkeypatch.setattr(progress, "LINE_S", 0)
    sweep(square, XS[:1], store=tmp_path)
    assert "running=1" in capsys.readouterr().err
    sweep_with_a_failure(fails_at_2, store=tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"fails_at_2: 100%.* 3/3 .*run.*finished=2, running=0, failed=1", captured.err)


@pytest.mark.parametrize(
    ("function", "configs", "options", "error", "named"),
    [
        (None, XS, {}, TypeError, "function is None: expected a callable"),
        (never, [], {}, ValueError, "configs is empty"),
        (never, {"x": 1}, {}, TypeError, "configs is a dict: expected a list"),
        (never, [{"x": 1}, 3], {}, TypeError, r"configs\[1\]: config is 3"),
        (never, [{"x": 1}, {"x": math.nan}], {}, ValueError, r"configs\[1\]: config entry 'x' is nan"),
        (never, [{"x": 1}, {"y": 1}, {"x": 1.0, "device": "cuda"}], {}, ValueError, r"\[2\] is the same .*0\].*: 1.0,"),
        (never, [{"x": 1, "status": 1}], {}, ValueError, r"configs\[0\] has an entry 'status'"),
        (never, XS, {"scheduler": "10.0.0.1:8786"}, ValueError, "scheduler is '10.0.0.1:8786': expected None .*or the"),
        (never, XS, {"scheduler": 4}, ValueError, "scheduler is 4: expected None"),
        (never, XS, {"scheduler": "tcp://a:1", "per_gpu": 2}, ValueError, "workers and per_gpu belong to scheduler="),
        (never, XS, {"scheduler": "local", "workers": 0}, ValueError, "workers is 0: expected a whole number of at"),
        (never, XS, {"scheduler": "local", "per_gpu": True}, ValueError, "per_gpu is True: expected"),
        (never, XS, {"retries": -1}, ValueError, "retries is -1: expected a whole number of at least 0"),
        (never, XS, {"timeout": 0}, ValueError, "timeout is 0: expected seconds above 0"),
        (never, XS, {"timeout": math.inf}, ValueError, "timeout is inf: expected"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_any_run(tmp_path, function, configs, options, error, named):
    with pytest.raises(error, match=named):
        sweep(function, configs, store=tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("result", "error", "named"),
    [
        ([{"y": 1}, 3], TypeError, r"{'y': 1}, 3\]: expected a dict or a list of at least one dict"),
        ({"y": torch.ones(())}, TypeError, "'y': tensor.* a Tensor"),
        ({3: 1}, TypeError, "3: 1"),
        ({"y": -math.inf}, ValueError, "'y': -inf: expected a finite number, or nan"),
        ({"other": 1}, ValueError, "'other': 1, but a config entry .* has that name"),
        ({"key": 1}, ValueError, "'key': 1, but a config entry or a column"),
        ({"y": "1e3"}, ValueError, "does not turn into a number"),
        ({"y": "a\nb"}, ValueError, "expected printable text"),
    ],
)
def test_a_result_that_no_table_can_hold_stops_the_sweep_and_leaves_no_record(tmp_path, result, error, named):
    with pytest.raises(error, match=rf"run {{'x': 1}} returned .*{named}"):
        sweep(lambda c: result, [{"x": 1}, {"x": 2, "other": 3}], store=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_reused_metric_that_has_the_name_of_a_config_entry_is_refused(tmp_path):
    sweep(square, XS, store=tmp_path)
    with pytest.raises(ValueError, match=r"'half': 0\.5, but a config entry"):
        sweep(square, [*XS, {"x": 4, "half": 1}], store=tmp_path)


def test_a_store_that_cannot_be_written_stops_before_any_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"no run was started.*file/runs"):
        sweep(never, XS, store=tmp_path / "file" / "runs")


@contextmanager
def full_disk(free):
    """No file can grow beyond this many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_store_stops_before_any_run(tmp_path):
    sweep(square, XS, store=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(1000), pytest.raises(OSError, match=f"no run was started.*{tmp_path}"):
        sweep(never, XS, store=tmp_path, recompute=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_fills_up_in_the_middle_stops_with_a_clear_message_and_loses_no_record(tmp_path):
    def run(config):
        return [{"n": n, "text": "x" * 100} for n in range(1000 if config["x"] == 2 else 1)]

    with full_disk(100_000), pytest.raises(OSError, match="those before it are kept: make space") as error:
        sweep(run, XS, store=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [f"{key(XS[0])}.json"]
    assert sweep(run, XS, store=tmp_path).attrs["computed"] == 2


def test_the_code_of_provenance_follows_names_and_bytes_of_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance_module, "PACKAGE", tmp_path)
    codes = []
    for name, text in [("a.py", ""), ("a.py", "2"), ("b.py", ""), ("notes.txt", "3")]:
        (tmp_path / name).write_text(text)
        codes.append(provenance_module._fixed_provenance.__wrapped__()["code"])
    assert len(set(codes)) == 3
    assert codes[2] == codes[3]


def test_provenance_is_plain_and_names_versions_but_no_host():
    made = provenance()
    assert (made["torch"], made["pandas"]) == (torch.__version__, pd.__version__)
    assert made["cpu"]
    assert os.uname().nodename not in made.values()
    assert json.loads(json.dumps(made)) == made


def test_the_commit_is_that_of_the_repository_and_says_dirty(tmp_path):
    def git(*arguments):
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        words = ["git", "-C", tmp_path, *author, *arguments]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    assert provenance_module._git_commit(tmp_path) == ""
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "first")
    git("tag", "-am", "named", "v1")
    commit = git("rev-parse", "HEAD")
    assert provenance_module._git_commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert provenance_module._git_commit(tmp_path) == f"{commit}-dirty"
    (tmp_path / "inner").mkdir()
    assert provenance_module._git_commit(tmp_path / "inner") == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_record_holds_the_gpu_memory_of_its_own_run(tmp_path):
    configs = [{"megabytes": n} for n in (64, 8)]
    sweep(lambda c: {"n": torch.ones(c["megabytes"] << 20, device="cuda").numel()}, configs, store=tmp_path)
    peaks = [read_record(tmp_path / f"{key(c)}.json")["peak_cuda_bytes"] for c in configs]
    assert [round(peak / 2**20 / 4) for peak in peaks] == [64, 8]
    assert provenance()["gpu"] == torch.cuda.get_device_name()


def until(happened):
    """Wait for an event, and fail rather than wait for ever."""
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


# Kill and resume: the runs take some 15 ms, and say when they start and whether their record was there already.

MANY = [{"seed": seed, "density": 1 / (1 + seed), "widths": (8, seed)} for seed in range(12)]


def noted(config, folder):
    known = (folder / "runs" / f"{key(config)}.json").exists()
    with (folder / "log").open("a") as log:
        log.write(f"{config['seed']} {known}\n")
    time.sleep(0.015)
    rng = random.Random(config["seed"])
    return [{"step": step, "gap": math.nan if step else rng.random()} for step in range(1 + config["seed"] % 3)]


def child(folder, table):
    os.environ["FSP_PROGRESS"] = "0"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    frame = sweep(functools.partial(noted, folder=folder), MANY, store=folder / "runs")
    tables.save(frame, folder / f"{table}.csv")


def undisturbed(folder):
    folder.mkdir()
    frame = sweep(functools.partial(noted, folder=folder), MANY, store=folder / "runs")
    return frame, tables.save(frame, folder / "table.csv").read_bytes()


def log_of(folder):
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_killed_and_restarted_repeats_nothing_and_loses_nothing(tmp_path, stop):
    folder = tmp_path / "killed"
    folder.mkdir()
    moments, kills = random.Random(int(stop)), 0
    for life in range(7):
        begun = len(log_of(folder))
        process = CHILDREN.Process(target=child, args=(folder, "table"))
        process.start()
        if life < 6:  # the last one is left alone
            until(lambda: len(log_of(folder)) > begun or not process.is_alive())  # noqa: B023
            time.sleep(moments.uniform(0, 0.04))
            with suppress(ProcessLookupError):  # it may have come to its end meanwhile
                os.kill(process.pid, stop)
        process.join(30)
        if process.exitcode == 0:
            break
        kills += 1
    assert process.exitcode == 0
    assert kills >= 2
    log = log_of(folder)
    assert {line.split()[0] for line in log} == {str(config["seed"]) for config in MANY}
    assert not [line for line in log if line.endswith("True")]
    assert len(log) <= len(MANY) + kills
    assert not list((folder / "runs").glob("*.corrupt"))
    frame, table = undisturbed(tmp_path / "whole")
    assert sweep(never, MANY, store=folder / "runs").equals(frame)
    assert (folder / "table.csv").read_bytes() == table


def test_two_processes_on_one_store_do_each_run_once_and_end_with_the_same_table(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    processes = [CHILDREN.Process(target=child, args=(folder, name)) for name in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    frame, table = undisturbed(tmp_path / "whole")
    assert [(folder / f"{name}.csv").read_bytes() for name in ("one", "two")] == [table, table]
    assert sweep(never, MANY, store=folder / "runs").equals(frame)
    assert sorted(log_of(folder)) == sorted(f"{config['seed']} False" for config in MANY)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == sorted(f"{key(c)}.json" for c in MANY)


def test_what_another_process_finished_or_failed_in_meanwhile_counts(tmp_path):
    def ahead(config):
        assert config == XS[0]  # the others are done by then
        with pytest.warns(UserWarning, match="1 of 2 runs failed"):
            sweep(fails_at_2, XS[1:], store=tmp_path)
        return square(config)

    frame = sweep_with_a_failure(ahead, store=tmp_path)
    assert frame["status"].tolist() == ["finished", "failed", "finished"]
    assert counts(frame) == [1, 1, 1]


# ---- locks -------------------------------------------------------------------------------------------------------


def test_a_lock_is_granted_once_and_again_when_it_is_given_back(tmp_path):
    path = tmp_path / "store" / "run.json"
    with suppress(KeyboardInterrupt), lock(path) as mine:
        assert mine
        assert f"process {os.getpid()}" in locked_by(path)
        with lock(path) as other, lock(tmp_path / "store" / "other.json") as free:
            assert not other
            assert free
        assert locked_by(path) is not None
        raise KeyboardInterrupt
    assert locked_by(path) is None
    assert list(path.parent.iterdir()) == []
    with lock(path) as mine:
        assert mine


def lock_and_die(path):
    with lock(path):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    path = tmp_path / f"{key(XS[0])}.json"
    process = CHILDREN.Process(target=lock_and_die, args=(path,))
    process.start()
    process.join(60)
    assert path.with_suffix(".lock").exists()
    assert locked_by(path) is None
    assert sweep(square, XS, store=tmp_path).attrs["computed"] == 3
    assert list(tmp_path.glob("*.lock")) == []


def test_a_lock_on_a_file_that_its_owner_has_just_deleted_does_not_count(tmp_path, monkeypatch):
    path, flock, calls = tmp_path / "run.json", locks.fcntl.flock, []

    def late(file, how):  # between our open and our lock the owner deletes the file
        if not calls:
            path.with_suffix(".lock").unlink()
        calls.append(how)
        return flock(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with lock(path) as mine:
        assert mine
        assert len(calls) == 2
        assert path.with_suffix(".lock").exists()


def test_a_run_that_another_process_has_locked_is_left_to_it_and_the_others_are_done_meanwhile(tmp_path):
    path = tmp_path / f"{key(XS[0])}.json"
    with ThreadPoolExecutor() as pool:
        with lock(path):
            sweeping = pool.submit(sweep, square, XS, store=tmp_path)
            until(lambda: len(list(tmp_path.glob("[0-9a-f]*.json"))) == 2)
            assert sorted(load(tmp_path)["x"]) == [2, 3]
            sweep(lambda c: {"square": 100}, XS[:1], store=tmp_path / "other")
            os.replace(tmp_path / "other" / path.name, path)  # the other process finishes
        frame = sweeping.result(60)
    assert frame["square"].tolist() == [100, 4, 9]
    assert counts(frame) == [2, 1, 0]


@pytest.mark.parametrize("lack", [OSError(errno.ENOLCK, "no locks"), None])
def test_without_file_locks_sweeps_go_on_with_a_warning_and_the_first_to_finish_decides(tmp_path, monkeypatch, lack):
    def refuse(file, how):
        raise lack

    monkeypatch.setattr(locks, "fcntl", lack and SimpleNamespace(flock=refuse, LOCK_EX=2, LOCK_NB=4, LOCK_SH=1))

    def overtaken(config):
        with pytest.warns(UserWarning, match="no file locks"):
            sweep(lambda c: {"by": "other"}, [config], store=tmp_path)
        return {"by": "me"}

    with pytest.warns(UserWarning, match="no file locks: sweeps at the same time may do a run twice"):
        assert sweep(overtaken, XS[:1], store=tmp_path)["by"].tolist() == ["other"]
    assert load(tmp_path)["by"].tolist() == ["other"]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


# ---- failure is data ---------------------------------------------------------------------------------------------


def throw(error):
    raise error


@pytest.mark.parametrize(
    ("fail", "kind", "named"),
    [
        (lambda: 1 / 0, "exception", "ZeroDivisionError"),
        (lambda: throw(FloatingPointError("loss is nan")), "non-finite", "loss is nan"),
        (lambda: torch.empty(1 << 60), "out of memory", "DefaultCPUAllocator"),
        (lambda: bytearray(1 << 62), "out of memory", "MemoryError"),
        (lambda: throw(torch.cuda.OutOfMemoryError("CUDA out of memory")), "out of memory", "CUDA"),
        (lambda: time.sleep(600), "timeout", "not finished after 0.3 s"),
        (lambda: throw(TimeoutError("a server")), "exception", "a server"),
    ],
)
def test_a_failure_is_recorded_by_its_kind_and_the_sweep_goes_on(tmp_path, fail, kind, named):
    def run(config):
        return {"y": 1} if config["x"] != 2 else fail()

    with pytest.warns(UserWarning, match=rf"1 of 3 runs failed, .*\(1 {kind}\); tracebacks: python -m fsp.runs list"):
        frame = sweep(run, XS, store=tmp_path, timeout=0.3)
    assert frame["status"].tolist() == ["finished", "failed", "finished"]
    record = read_record(tmp_path / f"{key({'x': 2})}.json")
    assert (record["status"], record["kind"], record["rows"]) == ("failed", kind, [])
    assert named in record["error"]
    assert "in run" in record["error"]


def test_a_gpu_error_that_spoils_the_process_ends_it_after_the_record_is_written(tmp_path):
    def spoil(config):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    class Ended(Exception):
        pass

    def die():
        raise Ended

    path = tmp_path / f"{key(XS[0])}.json"
    task = attempt.Task(XS[0], path, {"x"}, recompute=False, timeout=None, failed_before=None)
    with pytest.raises(Ended):
        attempt.attempt(spoil, task, die=die)
    assert read_record(path)["kind"] == "exception"
    assert attempt.attempt(spoil, task, die=die) == ("failed", read_record(path))  # a failure of this very sweep


@pytest.mark.parametrize("schema", records.ADDED)
def test_records_of_older_schemas_are_read_reused_and_retried_as_ever(tmp_path, schema):
    before = sweep_with_a_failure(fails_at_2, store=tmp_path)
    for path in tmp_path.iterdir():
        path.write_text(json.dumps(of_schema(schema, path), indent=1))
    assert load(tmp_path).equals(before)
    assert [read_record(tmp_path / f"{key(c)}.json")["kind"] for c in XS] == [None, "exception", None]
    assert counts(sweep(square, XS, store=tmp_path)) == [1, 2, 0]


def test_load_gives_all_records_of_the_repository_s_own_store_or_another_and_nothing_else(tmp_path, monkeypatch):
    own = paths.COMMITTED._replace(runs=tmp_path / "runs")
    monkeypatch.setattr(records, "COMMITTED", own)
    assert load().empty
    frame = sweep(square, XS, store=tmp_path / "runs")
    (tmp_path / "runs" / "notes.json").write_text("{")
    assert load().equals(frame)
    assert load(tmp_path / "runs").equals(frame)


def test_a_sweep_in_this_process_does_not_import_dask(tmp_path):
    code = (
        "import sys, tempfile\n"
        "from fsp import runs\n"
        "from fsp.runs.cluster import is_scheduler\n"
        "is_scheduler('tcp://10.0.0.1:8786')\n"
        "runs.sweep(lambda c: {'y': c['x']}, [{'x': 1}], store=tempfile.mkdtemp(), timeout=60)\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'dask', 'distributed'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- scratch -----------------------------------------------------------------------------------------------------


def keep(text=""):
    path = runs.scratch("kept")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def kept():
    return {"kept": runs.scratch("kept").exists()}


def test_a_run_finds_its_scratch_after_a_failure_and_loses_it_when_finished(tmp_path):
    def counting(config):
        count = int(runs.scratch("kept").read_text()) + 1 if kept()["kept"] else 1
        keep(str(count))
        if count < 3:
            raise RuntimeError("again")
        return {"count": count}

    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 1 runs failed"):
            sweep(counting, XS[:1], store=tmp_path)
    assert sweep(counting, XS[:1], store=tmp_path)["count"].tolist() == [3]
    assert [path.name for path in tmp_path.iterdir()] == [f"{key(XS[0])}.json"]
    assert runs.scratch("count") is None  # outside a sweep


def test_two_runs_two_versions_and_a_recomputation_share_no_scratch(tmp_path):
    def version(number):
        def run(config):
            found = kept()["kept"]
            keep()
            if config["x"] == 1 and number == 1 and not found:
                raise RuntimeError("stop")
            return {"kept": found}

        return run

    with pytest.warns(UserWarning, match="1 of 3 runs failed"):
        assert sweep(version(1), XS, store=tmp_path)["kept"].tolist()[1:] == [False, False]
    (left,) = tmp_path.glob("*.scratch-*")
    shutil.copytree(left, tmp_path / "saved")
    assert sweep(version(2), XS[:1], store=tmp_path)["kept"].tolist() == [False]
    assert left.exists()
    (tmp_path / f"{key(XS[0])}.json").unlink()
    assert sweep(version(1), XS[:1], store=tmp_path)["kept"].tolist() == [True]
    shutil.copytree(tmp_path / "saved", left)
    with pytest.warns(UserWarning, match="1 of 1 runs failed"):
        sweep(version(1), XS[:1], store=tmp_path, recompute=True)


def refusing(config, log):
    """A run that keeps something and fails; with its scratch, cannot go on from there; without, ends well then."""
    starts = log.read_text().splitlines() if log.exists() else []
    with log.open("a") as file:
        file.write(f"{kept()['kept']}\n")
    runs.scratch("kept").parent.mkdir(exist_ok=True)  # as a training does before its first checkpoint
    if kept()["kept"]:
        raise CannotResume("this is the checkpoint of another training")
    if len(starts) == 0:
        raise CannotResume("at first")
    if len(starts) == 1:
        keep()
        raise ValueError("later")
    return {"done": True}


def test_a_run_that_cannot_go_on_from_its_scratch_starts_again_without_if_there_is_some(tmp_path):
    log = tmp_path / "log"
    run = functools.partial(refusing, log=log)
    for message in ("CannotResume: at first", "ValueError: later"):
        with pytest.warns(UserWarning, match=f"1 of 1 runs failed, the first with .*{message}"):
            sweep(run, XS[:1], store=tmp_path)
    with pytest.warns(UserWarning, match="cannot go on from its scratch, and starts again without: this is the checkp"):
        assert sweep(run, XS[:1], store=tmp_path)["done"].tolist() == [True]
    assert log.read_text().split() == ["False", "False", "True", "False"]


def test_an_ordinary_error_after_a_checkpoint_is_a_failure_done_once_that_keeps_the_scratch(tmp_path):
    log = tmp_path / "log"

    def run(config):
        digits = load_data("digits", seed=0)
        network = models.build("mlp", digits.shape, digits.classes, generator=torch.Generator().manual_seed(0))
        settings = training.TrainConfig(epochs=1)
        training.fit(network, digits, settings, checkpoint=runs.scratch("training.safetensors"))
        keep()
        with log.open("a") as file:
            file.write("trained ")
        raise ValueError("this analysis is wrong")

    for times_done in (1, 2):
        with pytest.warns(UserWarning, match="1 of 1 runs failed, the first with ValueError: this analysis is wrong"):
            sweep(run, XS[:1], store=tmp_path)
        assert log.read_text().split() == ["trained"] * times_done
        assert list(tmp_path.glob("*.scratch-*/kept")) != []
