"""Sweeps through an SSH server and a one-node Slurm of the tests' own on this machine: `make cluster`."""

import getpass
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from threading import Thread

import cloudpickle
import psutil
import pytest
import torch

from fsp import data, models, training
from fsp.paths import PACKAGE
from fsp.runs import load, read_record, sweep
from fsp.runs.records import record_paths

pytestmark = [pytest.mark.services, pytest.mark.filterwarnings("ignore")]
CONFIGS = [{"seed": seed} for seed in range(8)]
PORTS = range(20000, 32000)  # the kernel gives others to who asks for none in particular
PATIENCE_S = 300

# Functions of this file travel whole, as a notebook's do: no worker can import them.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def trained(config):
    """A training of a second or two."""
    digits = data.load("digits", seed=config["seed"])
    generator = torch.Generator().manual_seed(config["seed"])
    network = models.build("mlp", digits.shape, digits.classes, generator=generator)
    history = training.fit(network, digits, training.TrainConfig(epochs=12, seed=config["seed"]))
    return {"accuracy": history.test_accuracy, "loss": history.epochs[-1]["train_loss"]}


def until(happened):
    """Wait for an event, and fail rather than wait for ever."""
    end = time.monotonic() + PATIENCE_S
    while not (found := happened()):
        assert time.monotonic() < end, f"not within {PATIENCE_S} s"
        time.sleep(0.1)
    return found


def program(name):
    """Path of a program, or the test is skipped."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed: on Debian, apt-get install openssh-server munge slurm-wlm")
    return path


def package(name):
    """Version of a Python package, or the test is skipped."""
    pytest.importorskip(name.replace("-", "_"), reason=f'{name} is not installed: pip install -e ".[cluster]"')
    return f"{name} {metadata.version(name)}"


def said(*words):
    """What a command prints."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout.strip()


def answers(port):
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def free_ports(number):
    return random.sample([port for port in random.sample(PORTS, 20) if not answers(port)], number)


@contextmanager
def started(*words, ready, log):
    """A service in the foreground; yields when it is ready, ends it with all its children."""
    with log.open("w") as file:
        service = subprocess.Popen([str(word) for word in words], stdout=file, stderr=file)
    try:
        until(lambda: ready() or service.poll() is not None)
        assert service.poll() is None, log.read_text()
        yield
    finally:
        family = [] if service.poll() is not None else psutil.Process(service.pid).children(recursive=True)
        for process in [*family, service]:
            process.kill()
        service.wait()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The table of a sweep in this process, with one thread as workers have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield sweep(trained, CONFIGS, store=tmp_path_factory.mktemp("alone"))
    torch.set_num_threads(threads)


REPORT = """# Sweeps over SSH and on Slurm

Eight short trainings (digits, MLP, 12 epochs) through an SSH server and through a one-node Slurm, both started for this
on the loopback address. In the middle of each sweep a worker or a job is killed. Afterwards the table is compared, to
the last bit, with that of a sweep in one process. `make cluster` repeats the test and writes this page. Kubernetes was
not run.

| way | started | killed | runs | processes that did them | same table | seconds |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

{where}
"""


@pytest.fixture(scope="module")
def summary():
    """Rows of the report, written at the end where FSP_CLUSTER says."""
    rows = []
    yield rows
    if (report := os.environ.get("FSP_CLUSTER")) and rows:
        lines = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
        packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "dask", "distributed"))
        where = f"{datetime.now(UTC):%Y-%m-%d}, {platform.system()}, {os.cpu_count()} cores, "
        where += f"Python {platform.python_version()}, {packages}."
        Path(report).write_text(REPORT.format(rows=lines, where=where))


def check(store, scheduler, kill, alone, row):
    """Sweep, kill when two runs are done, and compare; the row of the report."""
    killed = []

    def disturb():
        until(lambda: len(record_paths(store)) >= 2)
        killed.append(kill())

    store.mkdir()
    thread = Thread(target=disturb)
    thread.start()
    start = time.monotonic()
    table = sweep(trained, CONFIGS, store=store, scheduler=scheduler)
    seconds = time.monotonic() - start
    thread.join()
    assert len(killed) == 1
    assert table.equals(alone)
    assert sorted(load(store)["key"]) == sorted(table["key"])
    workers = {read_record(path)["provenance"]["process"] for path in record_paths(store)}
    assert os.getpid() not in workers
    assert len(workers) >= 2
    return [*row, *killed, len(table), len(workers), "yes", round(seconds)]


# ---- SSH ------------------------------------------------------------------------------------------------------------


def test_over_ssh_a_sweep_survives_the_kill_of_a_worker_and_gives_the_same_table(tmp_path, alone, summary):
    server, keygen, paramiko = program("sshd"), program("ssh-keygen"), package("paramiko")
    port, scheduler_port = free_ports(2)
    for name in ("host", "user"):
        said(keygen, "-q", "-t", "rsa", "-m", "PEM", "-N", "", "-f", tmp_path / name)
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
    }
    (tmp_path / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd run by root wants it
    python = f"env PYTHONPATH={PACKAGE.parent} {sys.executable}"
    words = [Path(sys.executable).with_name("dask"), "ssh", "127.0.0.1", "127.0.0.1", "--remote-python", python]
    words += ["--nthreads", 1, "--memory-limit", 0, "--scheduler-port", scheduler_port]
    words += ["--ssh-username", getpass.getuser(), "--ssh-port", port, "--ssh-private-key", tmp_path / "user"]

    def kill():
        process = read_record(record_paths(tmp_path / "store")[0])["provenance"]["process"]
        os.kill(process, signal.SIGKILL)
        return "a worker"

    with (
        started(
            server, "-D", "-e", "-f", tmp_path / "sshd_config", ready=lambda: answers(port), log=tmp_path / "sshd.log"
        ),
        started(*words, ready=lambda: answers(scheduler_port), log=tmp_path / "dask.log"),
    ):
        row = ["`dask ssh`", f"{said('ssh', '-V').split(',')[0]}, {paramiko}: a scheduler, two workers"]
        summary.append(check(tmp_path / "store", f"tcp://127.0.0.1:{scheduler_port}", kill, alone, row))


# ---- Slurm ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(monkeypatch):
    """A Slurm of one node with a partition "main"; the folder of its files."""
    munged, controller, node = program("munged"), program("slurmctld"), program("slurmd")
    host = socket.gethostname().split(".")[0]
    with tempfile.TemporaryDirectory(prefix="fsp-slurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # munge wants all to reach its socket
        for inner in ("munge", "state", "spool"):
            (folder / inner).mkdir(mode=0o755)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        controller_port, node_port = free_ports(2)
        settings = {
            "ClusterName": "fsp",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "AuthInfo": f"socket={folder}/munge/socket",
            "SlurmUser": getpass.getuser(),
            "SlurmdUser": getpass.getuser(),
            "SlurmctldPort": controller_port,
            "SlurmdPort": node_port,
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=4000 State=UNKNOWN",
            "PartitionName": f"main Nodes={host} Default=YES MaxTime=INFINITE State=UP",
        }
        (folder / "slurm.conf").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        own = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={folder / 'munge' / file}" for option, file in own.items()]

        def idle():
            return "idle" in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout

        with (
            started(munged, "-F", *words, ready=(folder / "munge" / "socket").exists, log=folder / "munged.log"),
            started(controller, "-D", ready=lambda: answers(controller_port), log=folder / "slurmctld.log"),
            started(node, "-D", ready=idle, log=folder / "slurmd.log"),
        ):
            yield folder


def test_on_slurm_a_job_that_is_ended_in_the_middle_is_replaced_and_the_table_is_the_same(
    slurm, tmp_path, alone, summary
):
    jobqueue = package("dask-jobqueue")
    from dask_jobqueue import SLURMCluster
    from distributed import Client

    def running():
        return said("squeue", "-h", "-t", "R", "-o", "%i").split()

    def kill():
        job = running()[0]
        said("scancel", "--full", "--signal=KILL", job)
        until(lambda: job not in running())
        return "a job"

    cluster = SLURMCluster(
        queue="main",
        cores=1,
        processes=1,
        memory="3GB",  # its nanny ends a worker that has more, and torch alone takes half a gigabyte
        walltime="00:30:00",
        python=sys.executable,
        log_directory=str(slurm / "logs"),
        interface="lo",
        scheduler_options={"dashboard": False},
        job_script_prologue=[f"export PYTHONPATH={PACKAGE.parent}"],
    )
    with cluster, Client(cluster, set_as_default=False) as client:
        cluster.adapt(minimum_jobs=2, maximum_jobs=2, interval="1s")
        row = ["`SLURMCluster`", f"{said('sinfo', '-V')}, {jobqueue}: one node, two jobs"]
        summary.append(check(tmp_path / "store", client, kill, alone, row))
