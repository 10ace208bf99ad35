"""Sweeps through an SSH server and a one-node Slurm of the tests' own on this machine: `make cluster`."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import cloudpickle
import psutil
import pytest

from fsp.paths import PACKAGE
from fsp.runs import load, sweep

pytestmark = [pytest.mark.services, pytest.mark.filterwarnings("ignore")]
CONFIGS = [{"seed": seed} for seed in range(8)]

# Functions of this file travel whole, as a notebook's do: no worker can import them.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def trained(config):
    """A training of a second or two."""
    import torch

    from fsp import data, models, training

    digits = data.load("digits", seed=config["seed"])
    generator = torch.Generator().manual_seed(config["seed"])
    network = models.build("mlp", digits.shape, digits.classes, generator=generator)
    history = training.fit(network, digits, training.TrainConfig(epochs=12, seed=config["seed"]))
    return {"accuracy": history.test_accuracy, "loss": history.epochs[-1]["train_loss"]}


def until(happened, seconds=120):
    """Wait for an event, and fail rather than wait for ever."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def program(name):
    """Path of a program, or the test is skipped."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed: on Debian, apt-get install openssh-server munge slurm-wlm")
    return path


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(port):
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def started(*words, **options):
    """A service in the foreground, ended with all its children."""
    service = subprocess.Popen([str(word) for word in words], **options)
    try:
        yield service
    finally:
        family = [*psutil.Process(service.pid).children(recursive=True), service] if service.poll() is None else []
        for process in family:
            process.kill()
        service.wait()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The table of a sweep in this process, with one thread as workers have."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield sweep(trained, CONFIGS, store=tmp_path_factory.mktemp("alone"))
    torch.set_num_threads(threads)


def swept_under_a_kill(store, scheduler, kill):
    """Sweep, and kill what `kill` finds as soon as two runs are done; the table."""
    killed = []

    def disturb():
        until(lambda: len(list(store.glob("*.json"))) >= 2)
        killed.append(kill())

    store.mkdir()
    thread = Thread(target=disturb)
    thread.start()
    table = sweep(trained, CONFIGS, store=store, scheduler=scheduler)
    thread.join()
    assert killed != [None]
    return table


def workers_of(store):
    """Processes and machines that wrote the records of a store."""
    from fsp.runs.records import read_record, record_paths

    made = [read_record(path)["provenance"] for path in record_paths(store)]
    return {(provenance["host"], provenance["process"]) for provenance in made}


# ---- SSH ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ssh(tmp_path):
    """Port and private key of an SSH server on the loopback address."""
    server, keygen = program("sshd"), program("ssh-keygen")
    pytest.importorskip("paramiko", reason="dask ssh needs paramiko")
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "rsa", "-m", "PEM", "-N", "", "-f", tmp_path / name], check=True)
    port = free_port()
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
    with started(server, "-D", "-f", tmp_path / "sshd_config", "-E", tmp_path / "sshd.log"):
        until(lambda: answers(port))
        yield port, tmp_path / "user"


def test_over_ssh_a_sweep_survives_the_kill_of_a_worker_and_gives_the_same_table(ssh, tmp_path, alone):
    (port, private_key), scheduler_port = ssh, free_port()
    hosts = ["127.0.0.1", "127.0.0.1"]
    words = [Path(sys.executable).with_name("dask"), "ssh", *hosts, "--nthreads", 1, "--memory-limit", 0]
    words += ["--remote-python", sys.executable, "--ssh-username", getpass.getuser(), "--ssh-port", port]
    words += ["--ssh-private-key", private_key, "--scheduler-port", scheduler_port]

    def kill():
        mine = [process for process in psutil.process_iter(["cmdline"]) if is_worker(process, scheduler_port)]
        mine[0].kill()
        return mine[0].pid

    with started(*words, cwd=PACKAGE.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        until(lambda: answers(scheduler_port))
        table = swept_under_a_kill(tmp_path / "store", f"tcp://127.0.0.1:{scheduler_port}", kill)
    assert table.equals(alone)
    processes = {process for _, process in workers_of(tmp_path / "store")}
    assert os.getpid() not in processes
    assert len(processes) >= 2
    assert len(load(tmp_path / "store")) == len(CONFIGS)


def is_worker(process, port):
    """Whether a process does the runs of a Dask worker that was told this port: a child of the worker's nanny."""
    try:
        parent = process.parent()
        return (
            parent is not None
            and "dask_worker" in " ".join(parent.cmdline())
            and f":{port}" in " ".join(parent.cmdline())
            and "spawn_main" in " ".join(process.cmdline())
        )
    except psutil.Error:
        return False


# ---- Slurm ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of one node with a partition "main", and commands that talk to it."""
    munged, controller, node = program("munged"), program("slurmctld"), program("slurmd")
    pytest.importorskip("dask_jobqueue")
    user, host = getpass.getuser(), socket.gethostname().split(".")[0]
    key, munge = tmp_path / "munge.key", tmp_path / "munge"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for folder in (munge, tmp_path / "state", tmp_path / "spool"):
        folder.mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # munge wants to be reached by all
    settings = {
        "ClusterName": "fsp",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "AuthInfo": f"socket={munge}/socket",
        "SlurmUser": user,
        "SlurmdUser": user,
        "SlurmctldPort": free_port(),
        "SlurmdPort": free_port(),
        "StateSaveLocation": tmp_path / "state",
        "SlurmdSpoolDir": tmp_path / "spool",
        "SlurmctldPidFile": tmp_path / "slurmctld.pid",
        "SlurmdPidFile": tmp_path / "slurmd.pid",
        "SlurmctldLogFile": tmp_path / "slurmctld.log",
        "SlurmdLogFile": tmp_path / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "AccountingStorageType": "accounting_storage/none",
        "JobAcctGatherType": "jobacct_gather/none",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=4000 State=UNKNOWN"]
    lines += [f"PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP"]
    (tmp_path / "slurm.conf").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    options = {"socket": munge / "socket", "key-file": key, "pid-file": munge / "pid", "log-file": munge / "log"}
    options["seed-file"] = munge / "seed"
    words = [f"--{name}={path}" for name, path in options.items()]
    with (
        started(munged, "--foreground", "--force", *words, stderr=subprocess.DEVNULL),
        started(controller, "-D", stderr=subprocess.DEVNULL),
        started(node, "-D", stderr=subprocess.DEVNULL),
    ):
        until(lambda: "idle" in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout)
        yield


def test_on_slurm_a_job_that_is_ended_in_the_middle_is_replaced_and_the_table_is_the_same(slurm, tmp_path, alone):
    from dask_jobqueue import SLURMCluster
    from distributed import Client

    def kill():
        jobs = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%i"], capture_output=True, text=True, check=True)
        job = jobs.stdout.split()[0]
        subprocess.run(["scancel", "--signal=KILL", job], check=True)
        return job

    cluster = SLURMCluster(
        queue="main",
        cores=1,
        processes=1,
        memory="1GB",
        walltime="00:10:00",
        python=sys.executable,
        log_directory=str(tmp_path / "logs"),
        interface="lo",
        scheduler_options={"dashboard": False},
        job_script_prologue=[f"export PYTHONPATH={PACKAGE.parent}"],
    )
    with cluster, Client(cluster, set_as_default=False) as client:
        cluster.adapt(minimum_jobs=2, maximum_jobs=2, interval="1s")
        table = swept_under_a_kill(tmp_path / "store", client, kill)
    assert table.equals(alone)
    processes = {process for _, process in workers_of(tmp_path / "store")}
    assert os.getpid() not in processes
    assert len(processes) >= 2
