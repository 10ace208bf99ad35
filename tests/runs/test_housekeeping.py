"""What ``python -m fsp.runs`` lists, and what it deletes."""

import json
import os
import signal
import subprocess
import sys

import pytest

from fsp.files import replacing
from fsp.runs import key, sweep
from fsp.runs.housekeeping import main, orphans
from fsp.runs.locks import lock
from fsp.runs.provenance import provenance


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


def run(config):
    if config["seed"] == 2:
        raise ArithmeticError("two is too many")
    return [{"step": i, "y": config["density"] * i} for i in range(3)]


CONFIGS = [
    {"method": method, "density": density, "seed": seed}
    for method, density, seed in [("snip", 0.05, 0), ("snip", 0.1, 1), ("synflow", 0.05, 0), ("synflow", 1, 2)]
]
SHORT = [key(config)[:12] for config in CONFIGS]


@pytest.fixture
def store(tmp_path):
    with pytest.warns(UserWarning, match="1 of 4 runs failed"):
        sweep(run, CONFIGS, store=tmp_path)
    return tmp_path


def listed(capsys, store, *words):
    assert main(["list", *words, "--store", str(store)]) == 0
    out = capsys.readouterr().out
    return [name for name in SHORT if name in out], out


def test_all_records_are_listed_with_their_configs_and_counted(store, capsys):
    names, out = listed(capsys, store)
    assert names == SHORT
    assert f"4 records, 1 failed, in {store}" in out
    assert "ArithmeticError" not in out
    (line,) = [line for line in out.splitlines() if SHORT[1] in line]
    assert line.split()[:3] == ["snip", "0.10", "1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method=snip"], [0, 1]),
        (["method='snip'"], [0, 1]),
        (["density=5e-2"], [0, 2]),
        (["density=1.0"], [3]),
        (["density=True"], []),
        (["method=synflow", "seed=0"], [2]),
        (["--status", "finished"], [0, 1, 2]),
    ],
)
def test_records_are_chosen_by_config_entries_and_status(store, capsys, words, expected):
    assert listed(capsys, store, *words)[0] == [SHORT[index] for index in expected]


def test_failed_records_come_with_their_tracebacks(store, capsys):
    names, out = listed(capsys, store, "seed=2", "--status", "failed")
    assert names == SHORT[3:]
    assert f"{SHORT[3]} exception: {{'method': 'synflow', 'density': 1, 'seed': 2}}" in out
    assert "in run" in out
    assert "ArithmeticError: two is too many" in out


def test_what_cannot_be_listed_is_named(store, capsys, tmp_path):
    assert main(["list", "methods=snip", "--store", str(store)]) == 2
    assert "no record has an entry 'methods': there are density, method, seed" in capsys.readouterr().err
    for words, named in [
        (["list", "snip", "--store", str(store)], "'snip': expected entry=value"),
        (["list", "--store", str(tmp_path / "none")], f"no folder {tmp_path / 'none'}"),
    ]:
        with pytest.raises(SystemExit):
            main(words)
        assert named in capsys.readouterr().err


def test_a_damaged_record_is_reported_and_the_others_are_listed(store, capsys):
    (store / f"{key(CONFIGS[0])}.json").write_text("{")
    assert main(["list", "--store", str(store)]) == 0
    out, err = capsys.readouterr()
    assert [name for name in SHORT if name in out] == SHORT[1:]
    assert f"{key(CONFIGS[0])}.json is not a whole run record" in err


@pytest.mark.parametrize("text", ['{"key": 1, "key": 1}', '{"wall_s": NaN}'])
def test_a_record_with_what_json_does_not_have_is_no_whole_one(store, capsys, text):
    (store / f"{key(CONFIGS[0])}.json").write_text(text)
    assert main(["list", "--store", str(store)]) == 0
    said = "a name is there twice" if "key" in text else "NaN is no JSON"
    assert said in capsys.readouterr().err


def test_a_run_at_work_is_listed_with_its_process(store, capsys):
    with lock(store / f"{key({'x': 1})}.json"):
        _, out = listed(capsys, store)
    assert f"at work: {key({'x': 1})[:12]} on " in out
    assert f"process {os.getpid()}" in out
    assert "at work" not in listed(capsys, store)[1]


def test_nothing_that_is_in_use_is_an_orphan(store):
    (store / "notes.json").write_text("mine")
    (store / ".hidden").write_text("mine")
    record = store / f"{'a' * 64}.json"
    with lock(store / ".sweep-ab.lock"), lock(record), replacing(record) as temporary:
        assert temporary.exists()
        assert not any(orphans(store).values())


def pruned(capsys, store, *words):
    assert main(["prune", "--yes", *words, "--store", str(store)]) == 0
    return capsys.readouterr().out


KILLED = """
import os, signal, sys
from pathlib import Path
from fsp.runs.locks import lock
from fsp.files import replacing
record = Path(sys.argv[1])
with lock(record), lock(record.with_name(".sweep-cd.lock")), replacing(record):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("answer", ["y", ""])
def test_prune_deletes_what_a_killed_process_and_damage_left_behind_and_asks_first(store, capsys, monkeypatch, answer):
    records = {path: path.read_bytes() for path in store.iterdir()}
    killed = subprocess.run([sys.executable, "-c", KILLED, store / f"{'b' * 64}.json"])
    assert killed.returncode == -signal.SIGKILL
    (store / f"{key(CONFIGS[0])}.json.corrupt").write_text("{")
    left = set(store.iterdir()) - records.keys()
    assert len(left) == 4
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    assert main(["prune", "--store", str(store)]) == 0
    out = capsys.readouterr().out
    assert "3 temporary files of killed processes" in out
    assert "1 damaged records that were set aside" in out
    assert len(asked) == 2
    after = set(store.iterdir())
    assert after == records.keys() | (left if answer == "" else set())
    assert {path: path.read_bytes() for path in records} == records
    if answer:
        assert pruned(capsys, store) == "nothing to delete\n"


def test_scratch_is_deleted_when_no_run_needs_it_any_more(store, capsys):
    finished, failed, unknown = key(CONFIGS[1]), key(CONFIGS[3]), "a" * 64
    scratches = [(finished, "0" * 8), (failed, "0" * 8), (unknown, "0" * 8), (unknown, "1" * 8)]
    folders = [store / f"{run}.scratch-{code}" for run, code in scratches]
    for folder in folders:
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "weights").write_bytes(bytes(10_000))
    with lock(store / f"{unknown}.json"):
        out = pruned(capsys, store)
    assert "1 scratch folders of finished runs (0.01 MB)" in out
    assert [folder.exists() for folder in folders] == [False, True, True, True]
    assert pruned(capsys, store) == "nothing to delete\n"
    assert "3 scratch folders of unfinished runs" in pruned(capsys, store, "--unfinished")
    assert not list(store.glob("*.scratch-*"))


def test_records_of_other_code_go_only_when_asked_for(store, capsys):
    path = store / f"{key(CONFIGS[1])}.json"
    record = json.loads(path.read_text()) | {"schema": 2}  # with no digest, which would not be that of the edited text
    del record["digest"]
    path.write_text(json.dumps(record).replace(provenance()["code"], "0" * 64))
    pruned(capsys, store)
    assert path.exists()
    assert "1 records made by other versions" in pruned(capsys, store, "--other-code")
    assert sorted(p.stem[:12] for p in store.iterdir()) == sorted([SHORT[0], *SHORT[2:]])


def test_the_command_line_starts_as_a_module(store):
    words = [sys.executable, "-m", "fsp.runs", "list", "seed=0", "--store", store]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "2 records, 0 failed" in done.stdout
    assert done.stderr == ""


def command(*words, **environment):
    return {
        "args": [sys.executable, "-m", "fsp.runs", *map(str, words)],
        "env": os.environ | environment,
        "stderr": subprocess.PIPE,
        "text": True,
        "encoding": "utf-8",
    }


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [(["list", "--store"], ""), (["list", "--store"], "1"), (["prune", "--yes", "--store"], ""), (["--help"], "")],
)
def test_a_reader_that_stops_early_ends_the_command_without_a_traceback(store, words, unbuffered):
    (store / f"{key(CONFIGS[0])}.json.corrupt").write_text("{")
    given = [*words, *([store] if "--store" in words else [])]
    reading, writing = os.pipe()
    os.close(reading)  # as head does, when it has its lines
    done = subprocess.run(**command(*given, PYTHONUNBUFFERED=unbuffered), stdout=writing)
    os.close(writing)
    assert (done.stderr, done.returncode) == ("", 141)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_text_that_the_stream_cannot_encode_is_written_with_escapes(tmp_path, encoding):
    sweep(run, [{"seed": 0, "density": 0.5, "method": "Maß 層"}], store=tmp_path)
    (tmp_path / f"{'c' * 64}.json").write_text("{")
    words = ["list", "method=Maß 層", "--store", tmp_path]
    given = command(*words, PYTHONIOENCODING=encoding, PYTHONUTF8="0") | {"encoding": encoding}
    done = subprocess.run(**given, stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert "1 records, 0 failed" in done.stdout
    assert ("層" if encoding == "utf-8" else "\\u5c64") in done.stdout
    assert "is not a whole run record" in done.stderr


def test_prune_without_anybody_to_answer_deletes_nothing(store):
    left = store / f"{key(CONFIGS[0])}.json.corrupt"
    left.write_text("{")
    done = subprocess.run(**command("prune", "--store", store), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert (done.stderr, done.returncode) == ("", 0)
    assert "nobody answers: pass --yes to delete" in done.stdout
    assert left.exists()
