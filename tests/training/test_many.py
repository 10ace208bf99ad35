"""Many networks trained at the same time against each of them trained alone."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from fsp.data import load
from fsp.files import digest
from fsp.models import build
from fsp.pruning.methods import prune
from fsp.training import many
from fsp.training.many import fit_many
from fsp.training.train import TrainConfig, fit

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task(**options):
    """70 training, 10 validation and 20 test images of three classes, 1x6x6."""
    return load("synthetic", **{"shape": (1, 6, 6), "classes": 3, "size": 100, "validation": 0.125} | options)


NETWORKS = {
    "mlp": ("mlp", {"hidden": (12, 8), "norm": True}),
    "plain": ("mlp", {"hidden": (12, 8)}),
    "cnn": ("cnn", {"widths": (4, 6), "kernel": 3}),
    "resnet": ("resnet8", {"width": 4}),
}


def family(kind="mlp", count=3):
    name, options = NETWORKS[kind]
    return [build(name, (1, 6, 6), 3, generator=seeded(number), **options) for number in range(count)]


class Double(nn.Module):
    """To double precision."""

    def forward(self, x):
        return x.double()


def in_double(net):
    return nn.Sequential(Double(), net.double())


def masks_of(nets, density=0.4):
    """Other masks of each network, and none of the last."""
    found = [prune(net, "erk", density, generator=seeded(number)) for number, net in enumerate(nets[:-1])]
    return [*found, None]


def alone(nets, data, config, masks_list, seeds):
    histories = []
    for net, masks, seed in zip(nets, masks_list, seeds, strict=True):
        histories.append(fit(net, data, dataclasses.replace(config, seed=seed), masks=masks))
    return histories


def assert_alike(together, apart, tolerance):
    assert len(together) == len(apart)
    for one, other in zip(together, apart, strict=True):
        assert not one.training
        assert one.state_dict().keys() == other.state_dict().keys()
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(tensor, other.state_dict()[name], rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_same_story(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        assert (one.status, one.best_epoch, one.steps) == (other.status, other.best_epoch, other.steps)
        for a, b in zip(one.epochs, other.epochs, strict=True):
            assert a == pytest.approx(b, rel=tolerance, nan_ok=True)
        for name in ("test_accuracy", "test_accuracy_best", "test_loss"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=tolerance, nan_ok=True)


# ---- the same as one by one --------------------------------------------------------------------------------------


SGD = {"augmented": True, "nesterov": False, "label_smoothing": 0.2}
ADAM = {"schedule": "one_cycle", "optimizer": "adam", "lr": 0.01}
CASES = [(kind, SGD) for kind in NETWORKS] + [(kind, ADAM) for kind in NETWORKS if kind != "mlp"]  # see the next test


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_together_or_one_by_one_is_equal_to_1e_8_in_double_precision(kind, options):
    nets = [in_double(net) for net in family(kind)]
    twins, before, data = copy.deepcopy(nets), copy.deepcopy(nets), task()
    config = TrainConfig(**{"epochs": 3, "batch_size": 16, "lr": 0.05, **options})
    masks_list, seeds = masks_of(nets), [5, 5, 7]
    found = fit_many(nets, data, config, masks_list=masks_list, seeds=seeds)
    assert_same_story(found, alone(twins, data, config, masks_list, seeds))
    assert_alike(nets, twins, 1e-8)
    assert all(not torch.equal(a[1].classifier.bias, b[1].classifier.bias) for a, b in zip(nets, before, strict=True))
    for net, masks in zip(nets, masks_list, strict=True):
        for name, mask in (masks or {}).items():
            weight = net.get_parameter(name)
            assert (weight[~mask] == 0).all()
            assert (weight[mask] != 0).all()


def test_adam_moves_a_bias_before_batch_norm_by_rounding_and_nothing_else_differs():
    nets = [in_double(net) for net in family("mlp")]
    twins, config = copy.deepcopy(nets), TrainConfig(3, 16, **ADAM)
    found = fit_many(nets, task(), config)
    assert_same_story(found, alone(twins, task(), config, [None] * 3, [0] * 3), 0.05)
    for net, twin in zip(nets, twins, strict=True):
        for name, weight in net.named_parameters():
            if not (name.endswith("bias") and "linear" in name):
                torch.testing.assert_close(weight, twin.get_parameter(name), rtol=1e-8, atol=1e-8)


def test_without_seeds_and_masks_each_is_trained_with_the_seed_of_the_config_and_dense():
    nets, data, config = family(), task(validation=0), TrainConfig(2, 16, 0.05, seed=4)
    twins = copy.deepcopy(nets)
    found = fit_many(nets, data, config)
    assert_same_story(found, alone(twins, data, config, [None] * 3, [4] * 3))
    assert_alike(nets, twins, 1e-5)
    assert all(math.isnan(history.epochs[0]["validation_loss"]) for history in found)


def test_the_order_of_the_data_is_that_of_each_seed():
    one, *others = (copy.deepcopy(family()[0]) for _ in range(3))
    fit_many([one, *others], task(), TrainConfig(1, 16), seeds=[1, 1, 2])
    torch.testing.assert_close(one.state_dict(), others[0].state_dict())
    assert not torch.allclose(one.classifier.weight, others[1].classifier.weight, atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_network_that_diverges_stops_where_it_would_alone_and_harms_no_other(kind):
    nets, data, config = family(kind), task(), TrainConfig(4, 16, 0.05)
    with torch.no_grad():
        nets[1].classifier.weight.mul_(1e30)
    twins = copy.deepcopy(nets)
    found = fit_many(nets, data, config, masks_list=masks_of(nets), seeds=[0, 1, 2])
    expected = alone(twins, data, config, masks_of(twins), [0, 1, 2])
    assert [history.status for history in found] == ["finished", "diverged", "finished"]
    assert_same_story(found, expected, 1e-4)
    assert (len(found[1].epochs), math.isnan(found[1].test_accuracy)) == (len(expected[1].epochs), True)
    assert_alike([nets[0], nets[2]], [twins[0], twins[2]], 1e-4)


def test_a_network_that_diverges_keeps_the_weights_of_the_epoch_at_which_it_did():
    nets, data = family("mlp", 2), task()
    with torch.no_grad():
        nets[0].classifier.weight.mul_(1e30)
    short = copy.deepcopy(nets)
    fit_many(short, data, TrainConfig(1, 16, 0.05, schedule="constant"))
    found = fit_many(nets, data, TrainConfig(3, 16, 0.05, schedule="constant"))
    assert [len(history.epochs) for history in found] == [1, 3]
    assert nets[0].norm1.num_batches_tracked == short[0].norm1.num_batches_tracked == 5
    assert nets[1].norm1.num_batches_tracked == 15


def test_when_all_have_diverged_training_stops():
    nets = family("mlp", 2)
    with torch.no_grad():
        for net in nets:
            net.classifier.weight.mul_(1e30)
    found = fit_many(nets, task(), TrainConfig(5, 16, 0.05))
    assert [len(history.epochs) for history in found] == [1, 1]


def test_frozen_tied_and_parametrised_weights_are_those_of_fit():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    def made(seed):
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        net.insert(5, nn.Linear(6, 6))
        net[5].weight = net[3].weight
        net[1].weight.requires_grad_(False)
        parametrize.register_parametrization(net[6], "weight", Doubled())
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3, generator=seeded(seed + parameter.numel()))
        return net

    nets, data, config = [made(0), made(9)], task(), TrainConfig(2, 16, 0.05)
    twins, before = copy.deepcopy(nets), copy.deepcopy(nets)
    kept = {"6.weight": torch.arange(18).view(3, 6) % 2 == 0}
    fit_many(nets, data, config, masks_list=[kept, kept], seeds=[0, 1])
    alone(twins, data, config, [kept, kept], [0, 1])
    assert_alike(nets, twins, 1e-5)
    for net, old in zip(nets, before, strict=True):
        assert net[5].weight is net[3].weight
        assert torch.equal(net[1].weight, old[1].weight)
        assert (net[6].weight[~kept["6.weight"]] == 0).all()


def test_masks_and_every_global_random_state_stay_and_settings_around_do_not_matter():
    nets, twins = family(), family()
    masks_list = masks_of(nets)
    before, state = digest({str(i): m["linear1.weight"] for i, m in enumerate(masks_list[:2])}), torch.get_rng_state()
    fit_many(nets, task(), TrainConfig(1, 16, augmented=True), masks_list=masks_list)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        fit_many(twins, task(), TrainConfig(1, 16, augmented=True), masks_list=masks_list)
    assert digest({str(i): m["linear1.weight"] for i, m in enumerate(masks_list[:2])}) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a.classifier.weight, b.classifier.weight) for a, b in zip(nets, twins, strict=True))


# ---- bfloat16 and reading back -----------------------------------------------------------------------------------


def test_in_bfloat16_layers_compute_in_it_and_weights_statistics_and_loss_do_not(monkeypatch):
    """What happens on CUDA, here on the CPU."""
    config, on_cuda = TrainConfig(1, 16, 0.05, bfloat16=True), torch.device("cuda")
    whole = many._in_bfloat16
    seen, normed, linear, batch_norm = set(), set(), nn.functional.linear, nn.functional.batch_norm

    def spied(x, weight, bias=None):
        seen.add((torch.is_grad_enabled(), x.dtype, weight.dtype))
        return linear(x, weight, bias)

    def spied_norm(x, *others, **options):
        normed.add((torch.is_grad_enabled(), x.dtype))
        return batch_norm(x, *others, **options)

    assert whole(family()[0], config, torch.device("cpu")) == set()
    names = {f"{layer}.{key}" for layer in ("linear1", "linear2", "classifier") for key in ("weight", "bias")}
    assert whole(family()[0], config, on_cuda) == names
    assert whole(nn.Linear(2, 2), config, on_cuda) == {"weight", "bias"}
    plain, low = family(), family()
    masks_list = masks_of(low)
    expected = fit_many(plain, task(), config, masks_list=masks_list)
    monkeypatch.setattr(many, "_in_bfloat16", lambda network, config, device: whole(network, config, on_cuda))
    monkeypatch.setattr(nn.functional, "linear", spied)
    monkeypatch.setattr(nn.functional, "batch_norm", spied_norm)
    found = fit_many(low, task(), config, masks_list=masks_list)
    assert seen == {(True, torch.bfloat16, torch.bfloat16), (False, torch.float32, torch.float32)}
    assert normed == {(True, torch.float32), (False, torch.float32)}
    assert_alike(low, plain, 0.05)
    for one, other, history, story in zip(low, plain, found, expected, strict=True):
        assert {tensor.dtype for tensor in one.state_dict().values()} == {torch.float32, torch.int64}
        assert not torch.equal(one.classifier.weight, other.classifier.weight)
        assert history.epochs[-1]["train_loss"] == pytest.approx(story.epochs[-1]["train_loss"], rel=0.05)


class Reads(TorchDispatchMode):
    """Counts the numbers that are read back from tensors, each of which would stall a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def reads(batch_size):
    nets = family()
    with Reads() as reading:
        fit_many(nets, task(), TrainConfig(1, batch_size, augmented=True), masks_list=masks_of(nets))
    return reading.count


def test_what_is_read_back_does_not_grow_with_the_number_of_steps():
    assert reads(35) == reads(5) > 0


# ---- what cannot be stacked --------------------------------------------------------------------------------------


def hooked():
    nets = family()
    nets[1].linear2.register_forward_hook(lambda *_: None)
    return nets


def sharing():
    nets = family()
    nets[2].linear2.weight = nets[0].linear2.weight
    return nets


def frozen():
    nets = family()
    nets[1].linear1.bias.requires_grad_(False)
    return nets


def with_middle(kind, *sizes, **options):
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(36, 6)) for _ in range(2)]
    return [net.extend([kind(*sizes, **options), nn.Linear(6, 3)]) for net in nets]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (list, {}, "members is empty: expected at least one network"),
        (lambda: [*family(), *family("cnn", 1)], {}, "in member 3 and .* in member 0.*train them one by one with fsp"),
        (lambda: [*with_middle(nn.ReLU), *with_middle(nn.Tanh)], {}, r"member 2 has '\(2\): Tanh.*one by one"),
        (hooked, {}, "module 'linear2' of member 1 has forward or backward hooks.*one by one"),
        (sharing, {}, "'linear2.weight' of member 2 is a weight of member 0, too: copy it"),
        (frozen, {}, r"'linear1.bias' of member 1 has device, dtype and requires_grad .*False\), and that of member 0"),
        (lambda: [nn.DataParallel(net) for net in family()], {}, "member 0 is compiled or data-parallel"),
        (lambda: with_middle(nn.Dropout, 0.5), {}, "draw random numbers in their forward pass, as dropout does; train"),
        (lambda: with_middle(nn.BatchNorm1d, 6, momentum=None), {}, r"cannot be trained together: .*\.item\(\)"),
        (lambda: with_middle(nn.Linear, 5, 5), {}, "cannot be trained together: .*one by one"),
        (family, {"masks_list": [None]}, "masks_list has 1 entries for 3 networks: expected one for each"),
        (family, {"seeds": range(4)}, "seeds has 4 entries for 3 networks: expected one for each"),
        (family, {"seeds": [0, -1, 2]}, "seeds: -1 is not a whole number >= 0"),
        (family, {"masks_list": [None, {"no": torch.ones(3, dtype=torch.bool)}, None]}, "mask 'no' belongs to no"),
    ],
)
def test_what_cannot_be_trained_together_is_refused_by_name_and_nothing_changes(make, options, message):
    nets = make()
    before, modes = [digest(net.state_dict()) for net in nets], [net.training for net in nets]
    with pytest.raises(ValueError, match=message):
        fit_many(nets, task(), TrainConfig(1, 16), **options)
    assert [digest(net.state_dict()) for net in nets] == before
    assert [net.training for net in nets] == modes


def test_a_last_batch_of_one_that_batch_norm_cannot_take_is_refused():
    with pytest.raises(ValueError, match="batch_size=23, has one of 70 training examples"):
        fit_many(family(), task(), TrainConfig(1, 23))


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", NETWORKS)
def test_on_cuda_together_or_one_by_one_is_equal_to_1e_8_in_double_precision(kind):
    nets = [in_double(net).cuda() for net in family(kind)]
    twins, data = copy.deepcopy(nets), task(device="cuda")
    config = TrainConfig(3, 16, 0.05, augmented=True)
    masks_list, seeds = masks_of(nets), [5, 5, 7]
    found = fit_many(nets, data, config, masks_list=masks_list, seeds=seeds)
    assert_same_story(found, alone(twins, data, config, masks_list, seeds), 1e-4)
    assert_alike(nets, twins, 1e-8)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", NETWORKS)
def test_on_cuda_many_in_bfloat16_learn_as_well_as_one_by_one(kind):
    nets = [net.cuda() for net in family(kind)]
    twins, data = copy.deepcopy(nets), task(device="cuda", noise=0.3, size=1000)
    config, masks_list = TrainConfig(5, 32, 0.05, bfloat16=True), masks_of(nets)
    found = fit_many(nets, data, config, masks_list=masks_list, seeds=range(3))
    expected = alone(twins, data, config, masks_list, range(3))
    for net, masks, one, other in zip(nets, masks_list, found, expected, strict=True):
        assert one.test_accuracy == pytest.approx(other.test_accuracy, abs=0.05)
        assert all((net.get_parameter(name)[~mask] == 0).all() for name, mask in (masks or {}).items())


@pytest.mark.gpu
@needs_cuda
def test_on_cuda_the_host_waits_as_often_for_many_steps_as_for_few():
    counts = []
    for size in (5, 35, 5):  # the first one also waits for what is loaded once
        nets, data = [net.cuda() for net in family()], task(device="cuda")
        masks_list = masks_of(nets)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing CUDA operation") as caught:
                fit_many(nets, data, TrainConfig(1, size, augmented=True), masks_list=masks_list)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len([one for one in caught if "synchronizing" in str(one.message)]))
    assert counts[1] == counts[2]
