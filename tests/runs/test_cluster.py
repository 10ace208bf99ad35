"""Sweeps on worker processes: the same results as in this process, whatever dies meanwhile."""

import json
import multiprocessing
import os
import platform
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import cloudpickle
import dask
import distributed
import psutil
import pytest
import torch
from threadpoolctl import threadpool_info

from fsp import models, progress, runs
from fsp.data import load as load_data
from fsp.runs import attempt, cluster, key, read_record, sweep, tables
from fsp.runs.housekeeping import orphans
from fsp.runs.locks import lock
from fsp.runs.records import record_paths
from fsp.training.train import TrainConfig, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:distributed"),
    # tests show what is reused by another function in its place
    pytest.mark.filterwarnings("ignore:[0-9]+ of [0-9]+ runs were reused"),
]
XS = [{"x": x} for x in (1, 2, 3)]

# Functions of this file travel whole, as a notebook's do: no worker can import them.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def client():
    """Two local workers, shared by the tests of this file, though they are started with four threads each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "4")
        patch.setenv("OPENBLAS_NUM_THREADS", "4")
        with cluster.connect("local", workers=2) as client:
            yield client


def until(happened, seconds=120):
    """Wait for an event, and fail rather than wait for ever."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def counts(frame):
    return [frame.attrs[word] for word in ("computed", "reused", "failed")]


def square(config):
    return {"square": config["x"] ** 2}


def never(config):
    raise AssertionError(f"{config} was computed")


def trained(config):
    data = load_data("digits", seed=config["seed"])
    generator = torch.Generator().manual_seed(config["seed"])
    net = models.build("mlp", data.shape, data.classes, generator=generator)
    training = TrainConfig(epochs=config["epochs"], seed=config["seed"])
    # Written over and over, so that a run that is killed goes on in the middle of an epoch.
    history = fit(net, data, training, checkpoint=runs.scratch("training.safetensors"), checkpoint_every_s=0.01)
    weights = sum(p.detach().double().sum().item() for p in net.parameters())
    last = history.epochs[-1]
    return {"accuracy": history.test_accuracy, "loss": last["train_loss"], "weights": weights}


def test_results_are_the_same_bits_in_this_process_on_local_workers_at_an_address_and_through_a_client(
    tmp_path, client
):
    configs = [{"seed": seed, "epochs": 2} for seed in range(3)]
    here = sweep(trained, configs, store=tmp_path / "here")
    table = tables.save(here, tmp_path / "here.csv").read_bytes()
    for name, scheduler in [("address", client.scheduler.address), ("client", client)]:
        frame = sweep(trained, configs, store=tmp_path / name, scheduler=scheduler)
        assert counts(frame) == [3, 0, 0]
        assert frame.equals(here)
        assert tables.save(frame, tmp_path / f"{name}.csv").read_bytes() == table
    local = sweep(trained, configs, store=tmp_path / "local", scheduler="local", workers=1, timeout=600)
    assert local.equals(here)
    assert sweep(never, configs, store=tmp_path / "local", scheduler="local", workers=1).equals(here)
    assert client.status == "running"


def test_a_worker_has_one_thread_of_everything_and_may_have_children(tmp_path, client):
    def circumstances(config):
        child = multiprocessing.get_context("fork").Process(target=lambda: None)
        child.start()
        child.join()
        names = (*cluster.THREADS, "FSP_PROGRESS")
        return {
            "torch": torch.get_num_threads(),
            "most": max([1, *(library["num_threads"] for library in threadpool_info())]),
            "variables": "variables " + ",".join(os.environ[name] for name in names),
            "child": child.exitcode,
            "elsewhere": os.getpid() != config["driver"],
        }

    frame = sweep(circumstances, [{"driver": os.getpid(), **x} for x in XS], store=tmp_path, scheduler=client)
    found = frame[["torch", "most", "variables", "child", "elsewhere"]]
    assert found.values.tolist() == [[1, 1, "variables 1,1,1,0", 0, True]] * 3


def test_workers_have_the_environment_of_this_process_which_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("FSP_SAID", "late")  # after the server that forks workers was started
    before = dict(os.environ)
    with cluster.connect("local", workers=1) as client:
        frame = sweep(lambda c: {"said": os.environ["FSP_SAID"]}, XS[:1], store=tmp_path, scheduler=client)
    assert frame["said"].tolist() == ["late"]
    assert dict(os.environ) == before


SCRIPT = """
import sys
from fsp import runs

offset = 10

def shifted(config):
    return {"y": config["x"] + offset}

if __name__ == "__main__":
    store, scheduler = sys.argv[1:]
    for function in (shifted, lambda config: {"y": config["x"] * offset}):
        name = function.__name__.strip("<>")
        print(runs.sweep(function, [{"x": 1}, {"x": 2}], store=f"{store}/{name}", scheduler=scheduler)["y"].tolist())
"""


def test_functions_of_main_and_lambdas_reach_the_workers(tmp_path, client):
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, tmp_path / "script.py", tmp_path, client.scheduler.address]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "[11, 12]\n[10, 20]\n"


def test_failures_on_workers_are_data(tmp_path, client):
    def fail(config):
        if config["how"] == "timeout":
            while True:
                sum(range(1000))
        if config["how"] == "memory":
            torch.empty(1 << 60)
        return {"y": 1}

    configs = [{"how": how} for how in ("timeout", "well", "memory")]
    message = r"2 of 3 runs failed, the first with not finished after 1 s \(1 timeout, 1 out of memory\)"
    with pytest.warns(UserWarning, match=message):
        frame = sweep(fail, configs, store=tmp_path, scheduler=client, timeout=1)
    assert frame["status"].tolist() == ["failed", "finished", "failed"]
    records = [read_record(tmp_path / f"{key(config)}.json") for config in configs]
    assert [record["kind"] for record in records] == ["timeout", None, "out of memory"]
    assert "in fail" in records[2]["error"]
    with pytest.warns(UserWarning, match=message):
        assert sweep(never, configs, store=tmp_path, scheduler=client, retry_failed=False).equals(frame)


def test_a_run_that_kills_three_workers_fails_and_the_sweep_goes_on(tmp_path, client):
    def deadly(config):
        if config["x"] == 2:
            os._exit(9)
        return square(config)

    with pytest.warns(UserWarning, match=r"1 of 5 runs failed, the first with worker died 3 times .*1 worker died"):
        frame = sweep(deadly, [{"x": x} for x in range(5)], store=tmp_path, scheduler=client)
    assert frame["status"].tolist() == ["finished", "finished", "failed", "finished", "finished"]
    record = read_record(tmp_path / f"{key({'x': 2})}.json")
    assert (record["kind"], record["config"]) == ("worker died", {"x": 2})
    assert record["error"].startswith("worker died 3 times on this run, the last at tcp://")
    assert sweep(square, [{"x": 2}], store=tmp_path).attrs["computed"] == 1


def test_a_worker_that_is_stuck_past_its_time_is_ended_and_the_run_has_timed_out(tmp_path, client):
    def stuck(config):
        from fsp.runs import attempt, deadline

        deadline.GRACE = attempt.GRACE = 0.2
        if config["x"] == 2:
            time.sleep(3600)  # outside the main thread nothing wakes it
        return square(config)

    with pytest.warns(UserWarning, match=r"1 of 3 runs failed, the first with not finished after 0.5 s, and stuck"):
        frame = sweep(stuck, XS, store=tmp_path, scheduler=client, timeout=0.5)
    assert frame["status"].tolist() == ["finished", "failed", "finished"]
    assert read_record(tmp_path / f"{key({'x': 2})}.json")["kind"] == "timeout"


def test_a_run_locked_elsewhere_is_waited_for(tmp_path, client):
    with ThreadPoolExecutor() as pool:
        with lock(tmp_path / f"{key(XS[0])}.json"):
            sweeping = pool.submit(sweep, square, XS, store=tmp_path, scheduler=client)
            until(lambda: len(record_paths(tmp_path)) == 2)
            assert not sweeping.done()
        assert sweeping.result(60)["square"].tolist() == [1, 4, 9]


def test_a_function_that_cannot_travel_or_be_loaded_is_named(tmp_path, client):
    lock = multiprocessing.Lock()
    with pytest.raises(TypeError, match="cannot be sent to workers"):
        sweep(lambda c: {"y": lock.acquire()}, XS, store=tmp_path, scheduler=client)

    class Unloadable:
        def __call__(self, config):
            return {"y": 1}

        def __reduce__(self):
            return exec, ("import a_module_that_is_not_there",)

    with pytest.raises(RuntimeError, match=r"a worker cannot start run .*ModuleNotFoundError.*a_module_that_is_not_t"):
        sweep(Unloadable(), XS, store=tmp_path, scheduler=client)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_does_not_see_the_store_says_so(tmp_path, client):
    task = attempt.Task(XS[0], tmp_path / "run.json", {"x"}, recompute=False, timeout=None, failed_before=None)
    sign, tasks = tmp_path / "none" / ".sweep-1.lock", {"run": task}
    ended = cluster.distribute(client, sign, never, 0, tasks, lambda running: None)
    with pytest.raises(FileNotFoundError, match=r"does not see the store .*share under one path"):
        next(ended)


def test_a_result_that_no_table_can_hold_stops_the_sweep_on_workers_too(tmp_path, client):
    with pytest.raises(TypeError, match=r"run {'x': 2} returned 3: expected a dict"):
        sweep(lambda c: 3 if c["x"] == 2 else {"y": 1}, XS, store=tmp_path, scheduler=client)
    assert not (tmp_path / f"{key({'x': 2})}.json").exists()


def test_an_unknown_address_is_named_within_ten_seconds(tmp_path, monkeypatch):
    assert cluster.CONNECT_S <= 5
    monkeypatch.setattr(cluster, "CONNECT_S", 0.5)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9: start one with `dask"):
        sweep(never, XS, store=tmp_path, scheduler="tcp://127.0.0.1:9")
    assert time.monotonic() - start < 5


def test_a_scheduler_that_goes_away_is_told_of(tmp_path):
    file = tmp_path / "scheduler.json"
    words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", *words, "--scheduler-file", file]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as scheduler, ThreadPoolExecutor() as pool:
        try:
            until(lambda: file.exists() and file.read_text().rstrip().endswith("}"))
            address = json.loads(file.read_text())["address"]
            with distributed.Client(address, set_as_default=False) as own:
                sweeping = pool.submit(sweep, never, XS, store=tmp_path / "runs", scheduler=own)
                until(lambda: own.futures)
                scheduler.kill()
                with pytest.raises(ConnectionError, match=f"scheduler at {address} is gone: records are kept"):
                    sweeping.result(60)
        finally:
            scheduler.kill()


def test_the_progress_bar_counts_runs_on_workers(tmp_path, client, monkeypatch, capsys):
    monkeypatch.setenv("FSP_PROGRESS", "1")
    monkeypatch.setattr(progress, "LINE_S", 0)
    sweep(square, XS, store=tmp_path, scheduler=client)
    shown = capsys.readouterr().err
    assert re.search(r"square: 100%.* 3/3 .*run.*finished=3, running=0, failed=0", shown)
    assert "running=2" in shown


def test_local_workers_that_cannot_be_started_any_more_are_told_of(tmp_path):
    with cluster.connect("local", workers=1) as client:
        (nanny,) = client.cluster.workers.values()
        client.sync(nanny.close)
        with pytest.raises(RuntimeError, match="no local worker can be started any more: records are kept"):
            sweep(square, XS, store=tmp_path, scheduler=client)


def place_of(config):
    """Which GPUs the process of a run may use, whether torch finds them, and the process."""
    return {
        "gpu": f"GPU {os.environ['CUDA_VISIBLE_DEVICES']}",
        "found": torch.cuda.device_count(),
        "process": os.getpid(),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_each_local_worker_has_one_gpu_that_several_may_share(tmp_path):
    table = sweep(
        place_of, [{"x": x} for x in range(4 * torch.cuda.device_count())], store=tmp_path, scheduler="local", per_gpu=2
    )
    assert set(table.gpu) == {f"GPU {name}" for name in cluster._gpus()}
    assert table.found.eq(1).all()
    assert table.process.nunique() == 2 * torch.cuda.device_count()


@pytest.mark.parametrize(
    ("gpus", "variable", "options", "places"),
    [
        (2, None, {}, ["0", "1"]),
        (2, None, {"per_gpu": 2}, ["0", "1", "0", "1"]),
        (2, "3, 5", {"workers": 3}, ["3", "5", "3"]),
        (1, "GPU-ab", {}, ["GPU-ab"]),
        (0, "", {"workers": 3}, [""] * 3),
        (0, None, {}, [None] * distributed.nanny.CPU_COUNT),
    ],
)
def test_local_workers_share_the_gpus_that_this_process_may_use(monkeypatch, gpus, variable, options, places):
    class Asked(Exception):
        pass

    def capture(workers, **rest):
        method = dask.config.get("distributed.worker.multiprocessing-method")
        raise Asked([worker["options"]["env"].get("CUDA_VISIBLE_DEVICES") for worker in workers.values()], method)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr(distributed, "SpecCluster", capture)
    with pytest.raises(Asked) as asked, cluster.connect("local", **options):
        pass
    # a forked worker would have torch before it has its GPU
    method = "spawn" if gpus or sys.platform != "linux" else "forkserver"
    assert asked.value.args == (places, method)


# ---- faults: workers and the sweeping process are killed at random moments, until everything is done ---------------

DRIVER = """
if __name__ == "__main__":  # a worker imports this file, and needs nothing of it
    import sys
    from pathlib import Path

    import torch

    sys.path.insert(0, sys.argv[2])
    from test_cluster import trained

    from fsp import runs

    folder = Path(sys.argv[1])

    def noted(config):
        path = folder / "runs" / (runs.key(config) + ".json")
        done = path.exists() and runs.read_record(path)["status"] == "finished"  # three kills of one run are a failure
        with (folder / "log").open("a") as log:
            log.write(f"{config['seed']} {runs.scratch('training.safetensors').exists()} {done}\\n")
        return trained(config)

    configs = [{"seed": seed, "epochs": 3} for seed in range(int(sys.argv[3]))]
    torch.set_num_threads(1)
    frame = runs.sweep(noted, configs, store=folder / "runs", scheduler="local", workers=2)
    sys.exit(3 if frame.attrs["failed"] else 0)
"""


REPORT = """# Fault test

A sweep of short trainings (digits, MLP, 3 epochs, a checkpoint every ten milliseconds) on two local workers. At random
moments a worker or the sweeping process gets SIGKILL, and the sweep is started again until it is done. Afterwards every
training had exactly one finished record, none that was finished had been done again, and the table was, byte for byte,
that of an undisturbed sweep in one process. `make faults` repeats the test and writes this page.

| | |
| --- | --- |
{rows}

{where}
"""


def is_forked(process):
    """Whether a process is a worker: it has the command line of the server that forked it."""
    parent = process.parent()
    return parent is not None and parent.cmdline() == process.cmdline()


def disturb(folder, number, victims, seed):
    """Sweep `number` trainings, killing the `victims`; how many hit a worker, how many the sweeping process."""
    (folder / "driver.py").write_text(DRIVER)
    words = [sys.executable, folder / "driver.py", folder, Path(__file__).parent, str(number)]
    log = folder / "log"
    moments, hit = random.Random(seed), {"worker": 0, "driver": 0}

    def begun():
        return len(log.read_text().splitlines()) if log.exists() else 0

    for _ in range(2 * len(victims) + 5):
        with (folder / "errors").open("a") as errors:
            driver = subprocess.Popen(words, stderr=errors, stdout=errors)
        while driver.poll() is None and sum(hit.values()) < len(victims):
            before = begun()
            until(lambda: begun() > before or driver.poll() is not None, 600)  # noqa: B023
            time.sleep(moments.uniform(0, 0.3))
            try:
                processes = psutil.Process(driver.pid).children(recursive=True)
                workers = [each for each in processes if is_forked(each)]
                victim = victims[sum(hit.values())] if workers else "driver"
                (psutil.Process(driver.pid) if victim == "driver" else moments.choice(workers)).kill()
            except psutil.Error:  # somebody ended between the look and the kill
                continue
            hit[victim] += 1
            if victim == "driver":
                break
        if driver.wait(900) == 0:
            return hit
    raise AssertionError((folder / "errors").read_text()[-3000:])


def survive(folder, number, victims, seed):
    """All that must hold after a disturbed sweep; what happened, by name."""
    start = time.monotonic()
    hit = disturb(folder, number, victims, seed)
    seconds = time.monotonic() - start
    configs = [{"seed": seed, "epochs": 3} for seed in range(number)]
    found = [read_record(path) for path in record_paths(folder / "runs")]
    assert sorted(record["key"] for record in found) == sorted(map(key, configs))
    assert {record["status"] for record in found} == {"finished"}
    assert list((folder / "runs").glob("*.corrupt")) == []
    frame = sweep(never, configs, store=folder / "runs").drop(columns="code")  # of the function in the driver
    whole = sweep(trained, configs, store=folder / "undisturbed").drop(columns="code")
    assert frame.equals(whole)
    one, other = tables.save(frame, folder / "1.csv"), tables.save(whole, folder / "2.csv")
    assert one.read_bytes() == other.read_bytes()
    starts = (folder / "log").read_text().splitlines()
    assert not [line for line in starts if line.endswith("True")]  # nothing finished was done again
    assert len(starts) <= number + hit["worker"] + 2 * hit["driver"]
    left = sum(map(len, orphans(folder / "runs").values()))
    resumed = sum(line.split()[1] == "True" for line in starts)
    kills = {f"kills of a {who}": n for who, n in hit.items()}
    begun = {"trainings begun": len(starts), "of them gone on with from a checkpoint": resumed}
    return {"trainings": number, **kills, **begun, "files left behind": left, "seconds": round(seconds)}


def test_a_sweep_survives_kills_of_its_workers_and_of_itself(tmp_path):
    happened = survive(tmp_path, number=16, victims=["worker", "driver", "worker"], seed=1)
    assert happened["kills of a worker"] >= 1
    assert happened["kills of a driver"] >= 1


@pytest.mark.slow
def test_a_long_sweep_survives_fifty_kills(tmp_path):
    victims = random.Random(3).choices(["worker", "driver"], [0.7, 0.3], k=55)
    happened = survive(tmp_path, number=150, victims=victims, seed=2)
    assert happened["kills of a worker"] + happened["kills of a driver"] >= 50
    if report := os.environ.get("FSP_FAULTS"):
        rows = "\n".join(f"| {name} | {value} |" for name, value in happened.items())
        versions = f"Python {platform.python_version()}, torch {torch.__version__}, dask {distributed.__version__}"
        where = f"{datetime.now(UTC):%Y-%m-%d}, {platform.system()}, {os.cpu_count()} cores, {versions}."
        Path(report).write_text(REPORT.format(rows=rows, where=where))
