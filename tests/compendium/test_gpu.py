"""What `make gpu` measures, in small and on the CPU; what it writes; that it says where there is no GPU."""

import math
import subprocess

import pandas as pd
import pytest
import torch
from torch import nn

from fsp.compendium import gpu
from fsp.data import Split
from fsp.paths import PACKAGE

CPU = torch.device("cpu")
TINY = gpu.Sizes(
    networks=("resnet8",),
    compiled=("resnet8",),
    member="resnet8",
    members=2,
    searched="resnet8",
    options={"width": 4},
    shape=(3, 8, 8),
    examples=64,
    batch_size=8,
    seconds=0.02,
    population=5,
    drawn=2,
    search_density=0.3,
    search_population=2,
    side=32,
    workers=0,
)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


@pytest.fixture(scope="module")
def rows():
    return list(gpu.measure(CPU, TINY))


def test_without_a_gpu_the_command_says_so_writes_nothing_and_is_no_failure(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("skipped: this needs a CUDA device, and torch finds none here")
    assert list(tmp_path.iterdir()) == []
    assert "-m fsp.compendium.gpu" in (PACKAGE.parent / "Makefile").read_text("utf-8")


def test_everything_is_measured_once(rows):
    found = [(row["measured"], row["network"], row["way"]) for row in rows]
    ways = ["one by one", "together", "one by one, bfloat16", "together, bfloat16"]
    assert found == [
        ("matrix product", "", "bfloat16"),
        *(("training", "resnet8", way) for way in gpu.WAYS),
        *(("2 networks", "resnet8", way) for way in ways),
        ("coordinates of masks", "resnet8", "erk, density 0.3"),
        ("search", "resnet8", "erk, density 0.3"),
    ]
    assert [row["note"] for row in rows if "Error" in row["note"]] == []
    assert all(row["value"] > 0 for row in rows)
    assert all(math.isnan(row["share"]) != (row["measured"] == "training") for row in rows)
    assert all(row["share"] > 0 for row in rows if row["measured"] == "training")
    assert rows[-2]["note"].startswith("5 masks in ")
    assert rows[-1]["note"].startswith("2 candidates in ")


def test_the_share_is_the_arithmetic_of_the_network_by_that_of_the_product(monkeypatch):
    work = {"matmul": {"value": 100.0, "unit": ""}, "trained": {"value": 4.0, "unit": "", "flops": 5.0}}
    for name, result in work.items():
        monkeypatch.setattr(gpu, name, lambda *_, result=result: dict(result))
    rows = list(gpu.measure(CPU, TINY))
    assert [row["share"] for row in rows if row["measured"] == "training"] == [0.2] * 4
    assert all("flops" not in row for row in rows)


def test_what_fails_is_a_row_that_says_why_and_the_others_are_measured(monkeypatch):
    def fails(*_):
        raise torch.cuda.OutOfMemoryError("out of memory\nand more")

    for name in ("trained", "many", "measured_masks", "searched"):
        monkeypatch.setattr(gpu, name, lambda *_: {"value": 1.0, "unit": ""})
    monkeypatch.setattr(gpu, "matmul", fails)
    rows = list(gpu.measure(CPU, TINY))
    assert rows[0]["note"] == "OutOfMemoryError: out of memory"
    assert math.isnan(rows[0]["value"])
    assert all(row["value"] > 0 for row in rows[1:])


def test_what_would_begin_too_late_does_not_begin():
    rows = list(gpu.measure(CPU, TINY, limit_s=-1))
    assert {row["note"] for row in rows} == {"no time left"}
    assert all(math.isnan(row["value"]) for row in rows)
    assert len(rows) == 11


def test_operations_of_an_image_are_those_of_their_formula():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.ReLU(), nn.Linear(10, 10))
    first, second = 2 * 192 * 10, 2 * 10 * 10  # of the products forward
    assert gpu._operations(net, gpu._images(TINY)) == 2 * first + 3 * second  # no gradient of the input
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_rate_counts_the_steps_after_the_first_ones_and_waits_at_both_ends(monkeypatch):
    clock, waits = [0.0], []
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(gpu, "_wait", lambda device: waits.append(clock[0]))
    watch = gpu._Stopwatch(CPU, gpu.Sizes(seconds=3.0, batch_size=10))
    for step in range(1, gpu.FIRST_STEPS + 7):
        clock[0] += 100 if step <= gpu.FIRST_STEPS else 0.5
        watch.after_step(step, None)
    clock[0] += 0.5
    with pytest.raises(gpu._Enough):
        watch.after_step(step + 1, None)
    assert watch.rate() == pytest.approx(10 / 0.5)
    assert waits == [100 * gpu.FIRST_STEPS, 100 * gpu.FIRST_STEPS + 3.5]


def test_the_plain_loop_trains_and_holds_its_masks():
    data = gpu._images(TINY)
    net = gpu._network("resnet8", TINY)
    masks = {"classifier.weight": torch.arange(160).view(10, 16) % 2 == 0}
    before = net.stem.conv.weight.clone()
    watch = gpu._Stopwatch(CPU, TINY)
    gpu._plain_loop(net, masks, data, CPU, TINY, watch)
    assert watch.rate() > 0
    assert not torch.equal(net.stem.conv.weight, before)
    assert torch.equal(net.classifier.weight != 0, masks["classifier.weight"])


def test_its_pictures_are_the_normalised_images_cropped_and_perhaps_flipped():
    data = gpu._images(TINY)
    bright = Split(torch.full_like(data.train.images[:1], 255), data.train.labels[:1])
    image, label = gpu._Pictures(gpu.replace(data, train=bright))[0]
    assert image.shape == TINY.shape
    assert label == bright.labels[0]
    white = data.normalise(bright.images)[0]
    black = data.normalise(torch.zeros_like(bright.images))[0]
    close = torch.isclose(image, white, atol=1e-5) | torch.isclose(image, black, atol=1e-5)
    assert close.all()
    assert torch.isclose(image, white, atol=1e-5).any()


def test_tests_of_a_gpu_are_run_and_their_failures_counted(tmp_path):
    gpu_tests = "@pytest.mark.gpu\ndef test_a():\n    pass\n@pytest.mark.gpu\ndef test_b():\n    assert False\n"
    (tmp_path / "test_some.py").write_text(f"import pytest\n{gpu_tests}def test_c():\n    assert False\n")
    row = gpu.run_tests(tmp_path, 300)
    assert row["value"] == 1
    assert row["note"].startswith("1 failed, 1 passed, 1 deselected")


@pytest.mark.parametrize(
    ("outcome", "value", "note"),
    [
        (("1 passed in 2.00s", 0), 0, "1 passed in 2.00s"),
        (("== 3 failed, 2 errors in 2.00s ==", 1), 5, "3 failed, 2 errors in 2.00s"),
        (("no tests ran in 0.01s", 5), math.nan, "pytest ended with 5: no tests ran in 0.01s"),
        (None, math.nan, "stopped after 8 s"),
    ],
)
def test_what_pytest_says_becomes_a_row(monkeypatch, tmp_path, outcome, value, note):
    def run(command, timeout, **_):
        assert command[-1] == str(tmp_path)
        if outcome is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, outcome[1], stdout=outcome[0] + "\n", stderr="")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    row = gpu.run_tests(tmp_path, 8)
    assert row["value"] == pytest.approx(value, nan_ok=True)
    assert row["note"] == note


def test_rows_are_written_with_the_machine_as_a_table_and_as_a_page(rows, tmp_path):
    gpu.write(rows, tmp_path)
    table = pd.read_csv(tmp_path / "gpu.csv")
    assert table["value"].tolist() == pytest.approx([row["value"] for row in rows])
    assert {"gpu", "cpu", "torch", "cuda", "date"} <= set(table.columns)
    assert table["torch"].unique().tolist() == [str(torch.__version__)]
    lines = (tmp_path / "gpu.md").read_text("utf-8").splitlines()
    assert len([line for line in lines if line.startswith("| training |")]) == 4
    assert {line.count("|") for line in lines if line.startswith("|")} == {8}


@pytest.mark.parametrize(("value", "status"), [(0, 0), (2, 1), (math.nan, 1)])
def test_the_command_fails_where_a_test_or_a_measurement_does(monkeypatch, tmp_path, capsys, value, status):
    """With the CPU in the place of a GPU."""
    row = {"measured": "tests", "network": "", "way": "", "value": value, "unit": "failures", "note": ""}
    row |= {"peak_bytes": math.nan, "share": math.nan}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "device", lambda name: CPU)
    monkeypatch.setattr(gpu, "run_tests", lambda folder, seconds: row)
    monkeypatch.setattr(gpu, "measure", lambda device, sizes, limit_s: [dict(row, unit="images/s", value=1.0)])
    assert gpu.main(["--out", str(tmp_path)]) == status
    assert f"2 rows, {status} of them failed" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "gpu.csv")) == 2
