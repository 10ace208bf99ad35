"""A training spread over processes that torchrun starts: one training on the batches of all."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fsp.data import batches, load
from fsp.files import digest
from fsp.masks import apply_
from fsp.models import build
from fsp.paths import PACKAGE
from fsp.pruning.methods import prune
from fsp.training import distributed, dynamic
from fsp.training.train import TrainConfig, fit, steps

CONFIG = TrainConfig(2, 8, 0.05, nesterov=False, schedule="constant", seed=3)
KINDS = {"plain": {"hidden": (8,)}, "norm": {"hidden": (8,), "norm": True}}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task(**options):
    """71 training examples, so that one is left over by two processes."""
    return load("synthetic", shape=(1, 4, 4), classes=3, size=101, validation=0.12, **options)


def made(kind, seed):
    net = build("mlp", (1, 4, 4), 3, generator=seeded(seed), **KINDS[kind])
    return net, prune(net, "random", 0.5, generator=seeded(seed))


def work(out):
    """What each process does: other weights and masks at first, trained together."""
    dist.init_process_group("gloo")
    number, results = dist.get_rank(), {}
    for kind in KINDS:
        for moving in (False, True):
            net, masks = made(kind, seed=number)
            average = distributed.Averaged(net, masks)
            first = digest(masks)
            data, config = distributed.part(task(), CONFIG)
            hooks = [average]
            if moving:
                rule = dataclasses.replace(dynamic.PRESETS["rigl"], update_every=3)
                hooks.append(dynamic.DynamicTraining(net, masks, rule, steps(data, config), generator=seeded()))
            history = fit(net, data, config, masks=masks, hooks=hooks)
            results[kind, moving] = {
                "first": first,
                "masks": digest(masks),
                "state": {name: t.clone() for name, t in net.state_dict().items()},
                "held": all((net.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items()),
                "found": (history.test_loss, history.best_epoch, history.status),
                "losses": [entry["train_loss"] for entry in history.epochs],
                "train": digest(data.train._asdict()),
            }
    try:
        distributed.Averaged(build("mlp", (1, 4, 4), 3, hidden=(4 + number,)))
    except ValueError as error:
        results["refused"] = str(error)
    torch.save(results, Path(out) / f"{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes found."""
    out = tmp_path_factory.mktemp("two")
    environment = os.environ | {"PYTHONPATH": f"{PACKAGE.parent}", "OMP_NUM_THREADS": "1", "FSP_PROGRESS": "0"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{number}.pt") for number in range(2)]


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_same_weights_statistics_and_masks_which_are_held(both, kind, moving):
    one, other = (results[kind, moving] for results in both)
    for name in ("first", "masks", "found"):
        assert one[name] == other[name]
    assert digest(one["state"]) == digest(other["state"])
    assert one["held"]
    assert other["held"]
    assert (one["masks"] != one["first"]) == moving
    assert one["first"] == digest(made(kind, seed=0)[1]), "masks of process 0"
    assert one["train"] != other["train"]
    assert one["losses"] != other["losses"]


def test_together_they_train_as_one_process_on_the_batches_of_both(both):
    """In plain operations, without batch norm; pruned weights get no gradient."""
    data, (net, masks) = task(), made("plain", seed=0)
    parts = [(data.train.images[i:70:2], data.train.labels[i:70:2]) for i in range(2)]
    apply_(net, masks)
    momenta, generators = {}, [seeded(CONFIG.seed * 2 + i) for i in range(2)]
    for _ in range(CONFIG.epochs):
        orders = [batches(part, CONFIG.batch_size, generator=g) for part, g in zip(parts, generators, strict=True)]
        for two in zip(*orders, strict=True):
            losses = [nn.functional.cross_entropy(net(data.normalise(images)), labels) for images, labels in two]
            gradients = torch.autograd.grad(sum(losses) / 2, list(net.parameters()))
            for (name, p), gradient in zip(net.named_parameters(), gradients, strict=True):
                gradient = gradient.add(p.detach(), alpha=CONFIG.weight_decay) * masks.get(name, 1)
                momenta[name] = gradient + CONFIG.momentum * momenta.get(name, 0)
                p.data.sub_(CONFIG.lr * momenta[name])
    for results in both:
        for name, tensor in results["plain", False]["state"].items():
            torch.testing.assert_close(tensor, net.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_models_that_differ_between_processes_are_refused_by_name_in_both(both):
    message = "'linear1.weight' has shape [5, 16] in process 1 and [4, 16] in process 0: make the same model and masks"
    assert all(results["refused"].startswith(message) for results in both)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_one_process_alone_trains_as_without_the_hook_to_the_last_bit():
    (net, masks), (twin, same) = made("norm", 0), made("norm", 0)
    data, config = distributed.part(task(), CONFIG)
    fit(net, data, config, masks=masks, hooks=[distributed.Averaged(net, masks)])
    fit(twin, task(), CONFIG, masks=same)
    assert digest(net.state_dict()) == digest(twin.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_one_process_alone_trains_as_without_the_hook(tmp_path):
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        (net, masks), (twin, same) = made("norm", 0), made("norm", 0)
        net, twin, on_gpu = net.cuda(), twin.cuda(), {"device": "cuda"}
        data, config = distributed.part(task(**on_gpu), CONFIG)
        fit(net, data, config, masks=masks, hooks=[distributed.Averaged(net, masks)])
        fit(twin, task(**on_gpu), CONFIG, masks=same)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=1e-5)
    assert all((net.get_parameter(name)[~mask.cuda()] == 0).all() for name, mask in masks.items())


@pytest.mark.usefixtures("alone")
def test_fewer_examples_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 72)
    with pytest.raises(ValueError, match="71 training examples for 72 processes: start fewer"):
        distributed.part(task(), CONFIG)


@pytest.mark.parametrize(
    "call", [lambda: distributed.Averaged(nn.Linear(2, 2)), lambda: distributed.part(None, CONFIG)]
)
def test_without_a_group_of_processes_the_message_names_torchrun(call):
    with pytest.raises(ValueError, match="no group of processes: start with torchrun, and call torch"):
        call()


if __name__ == "__main__":
    work(sys.argv[1])
