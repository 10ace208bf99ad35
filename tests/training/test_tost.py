"""ToST: ghosts that add what they should while they are there and leave nothing behind, and factors of the weights."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from fsp.data import load
from fsp.files import CannotResume
from fsp.models import MODELS, build
from fsp.pruning.methods import prune
from fsp.training import rescaling, tost, train
from fsp.training.ghosts import Ghosted, SoftReLU, places_of, strip, strip_
from fsp.training.hooks import Snapshots
from fsp.training.rescaling import Rescaling, rescale_
from fsp.training.tost import Recipe, fit
from fsp.training.train import TrainConfig, evaluate

SHAPE = (1, 16, 16)
SHAPES = {"signal": (1, 1, 40), "vgg11": (1, 1, 16)}
GHOSTS = Recipe(rescale=None, labels=0.0)
SHORT = Rescaling(iterations=3, batch_size=16)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task(**options):
    """56 training, 8 validation and 16 test images of three classes."""
    return load("synthetic", **{"shape": SHAPE, "classes": 3, "size": 80, "validation": 0.125} | options)


def config(**options):
    return TrainConfig(**{"epochs": 2, "batch_size": 16, "lr": 0.05} | options)


def bottlenecks(shape=SHAPE):
    """Torchvision's bottleneck blocks, one a stage, with an eighth of their channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ResNet(_Narrow, [1, 1, 1, 1], num_classes=3, width_per_group=8)
    net.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    return net


class _Narrow(Bottleneck):
    expansion = 1


def networks():
    small = {
        "mlp": {"hidden": (12, 8)},
        "cnn": {"widths": (6, 8)},
        "lenet_s": {},
        "resnet8": {"width": 4},
    }
    made = {
        name: lambda name=name, options=options: build(name, SHAPE, 3, **options) for name, options in small.items()
    }
    made["vgg11"] = lambda: build("vgg11", SHAPES["vgg11"], 3)  # a third of the weights
    made["signal"] = lambda: build("resnet8", SHAPES["signal"], 3, width=4)
    return made | {"bottlenecks": bottlenecks}


NETWORKS = networks()


def ghosted(net, shape=SHAPE, activation="swish"):
    return Ghosted(net, places_of(net, shape, activation=activation, skips=True), activation)


def images(shape=SHAPE, n=6):
    return torch.randn(n, *shape, generator=seeded(1))


def bits(state):
    return {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in state.items()}


class Looks:
    """A hook that calls a function of the step after each step."""

    def __init__(self, look):
        self.look = look

    def after_step(self, step, optimizer):
        self.look(step)


# ---- ghosts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "conv", "norm"), [("resnet18", 1_220_608, 7_680), ("resnet34", 2_342_912, 15_104)])
def test_ghosts_have_the_parameters_of_the_published_code(name, conv, norm):
    with torch.device("meta"):
        net = MODELS[name]((3, 32, 32), 10)
    found = tost.overhead(net, (3, 32, 32))
    assert found["parameters"] == conv + norm
    assert found["share"] == pytest.approx(0.11, abs=0.002)
    sparse = {n: torch.arange(p.numel()).reshape(p.shape) % 20 == 0 for n, p in net.named_parameters() if p.ndim > 1}
    if name == "resnet18":
        assert tost.overhead(net, (3, 32, 32), masks=sparse)["share"] == pytest.approx(2.2, abs=0.05)


def test_where_ghosts_go_follows_from_the_network_and_not_from_its_names():
    places = {
        name: places_of(make(), SHAPES.get(name, SHAPE), activation="swish", skips=True)
        for name, make in NETWORKS.items()
    }
    around = {name: [tuple(at) for at in found.branches] for name, found in places.items()}
    assert around["mlp"] == around["lenet_s"] == []
    assert around["cnn"] == [("conv1", "norm1"), ("conv2", "norm2")]
    assert around["vgg11"] == [(f"conv{i}", f"norm{i}") for i in range(1, 9)]
    blocks = [(f"blocks.{b}.conv{i}", f"blocks.{b}.norm{i}") for b in range(3) for i in (1, 2)]
    assert around["resnet8"] == around["signal"] == blocks
    assert around["bottlenecks"] == [
        (f"layer{s}.0.conv{i}", f"layer{s}.0.bn{i}") for s in range(1, 5) for i in (1, 2, 3)
    ]
    families = {"mobilenet": 27, "wrn16_4": 12, "ecn3": 6, "densenet121": 120, "resnet104b": 153}
    for name, branches in families.items():
        with torch.device("meta"):
            net = MODELS[name]((3, 32, 32), 10)
        found = places_of(net, (3, 32, 32), activation="swish", skips=True)
        assert len(found.branches) == branches, "every convolution of a main path, the stem of MobileNet's too"
    plain = build("resnet8", SHAPE, 3, width=4, skip=False)
    assert len(places_of(plain, SHAPE, activation=None, skips=True).branches) == 7, "without additions, the stem too"


def test_a_block_with_ghosts_computes_the_sums_of_the_paper():
    net = build("resnet8", SHAPE, 3, width=4).eval()
    block = copy.deepcopy(net.blocks[1])
    wrapped = ghosted(net)
    wrapped.set_(alpha=0.7, over=0.25)
    for i, branch in enumerate(wrapped.ghosts):
        assert bool((branch.conv.weight == 1e-4).all())
        assert branch.conv.bias is None
        nn.init.normal_(branch.conv.weight, generator=seeded(i))
        nn.init.normal_(branch.norm.running_mean, generator=seeded(10 + i))
    one, two = (branch.eval() for branch in wrapped.ghosts[2:4])

    def act(x):
        return x / (1 + torch.exp(-(50**0.25) * x))

    def way(branch, x, stride):
        return 0.7 * branch.norm(F.conv2d(x, branch.conv.weight, stride=stride))

    x = images((4, 16, 16))
    with torch.no_grad():
        first = act(block.norm1(block.conv1(x)) + way(one, x, 2))
        expected = act(block.norm2(block.conv2(first)) + way(two, first, 1) + block.shortcut(x))
        torch.testing.assert_close(net.blocks[1](x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_whose_ghosts_are_over_is_the_network_without_them(name):
    shape = SHAPES.get(name, SHAPE)
    net, x = NETWORKS[name](), images(shape)
    plain, keys = copy.deepcopy(net), list(net.state_dict())
    modules = dict(net.named_modules(remove_duplicate=False))
    wrapped = ghosted(net, shape)
    assert list(net.state_dict()) == keys
    with torch.no_grad():
        for mode in (True, False):
            softened = copy.deepcopy(wrapped).train(mode)(x)
            hard = copy.deepcopy(wrapped).train(mode)
            hard.set_(alpha=0.0, over=1.0)
            expected = copy.deepcopy(plain).train(mode)(x)
            assert torch.equal(hard(x), expected)
            assert torch.equal(strip(net).train(mode)(x), expected)
            assert not torch.allclose(softened, expected, atol=1e-4)
        assert any(isinstance(m, SoftReLU) for m in net.modules()), "strip works on a copy"
    strip_(net)
    assert dict(net.named_modules(remove_duplicate=False)) == modules
    assert [m for m in net.modules() if m._forward_hooks] == []


@pytest.mark.parametrize("kind", ["swish", "mish"])
def test_activations_begin_as_named_and_end_as_relu(kind):
    soft, x = SoftReLU(nn.ReLU(inplace=True), kind), torch.linspace(-9, 9, 181)
    begins = x * torch.sigmoid(x) if kind == "swish" else x * torch.tanh(torch.log1p(torch.exp(x)))
    torch.testing.assert_close(soft(x), begins, rtol=1e-5, atol=1e-6)
    away = []
    for soft.over in (0.0, 0.3, 0.6, 0.9, 0.999):
        away.append(float((soft(x) - x.clamp(min=0)).abs().max()))
    assert away == sorted(away, reverse=True)
    soft.over = math.nextafter(1, 0)
    torch.testing.assert_close(soft(x), x * torch.sigmoid(50 * x) if kind == "swish" else x.clamp(min=0))
    soft.over = 1.0
    assert torch.equal(soft(x.clone()), x.clamp(min=0))


def test_schedules_move_at_every_step_and_end_at_e1():
    recipe, seen, data = dataclasses.replace(GHOSTS, e0=0.25), {}, task()
    net = build("cnn", SHAPE, 3, widths=(6, 8))
    softs = []

    def look(step):  # called before the recipe's own hook, so it sees what this step was made with
        softs.append(net.relu1)
        branch = net.norm1._forward_hooks[next(iter(net.norm1._forward_hooks))].__self__
        seen[step] = branch.alpha, net.relu1.over

    fit(net, data, config(epochs=2), recipe=recipe, hooks=[Looks(look)])
    over = [(step - 1) / 8 for step in range(1, 9)]
    assert list(seen) == list(range(1, 9))
    assert [alpha for alpha, _ in seen.values()] == pytest.approx([max(0, 1 - 2 * p) for p in over])
    assert [w for _, w in seen.values()] == pytest.approx([min(1, max(0, 4 * p - 1)) for p in over])
    assert isinstance(softs[0], SoftReLU)
    assert type(net.relu1) is nn.ReLU


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_with_every_part_and_keeps_its_masks(name):
    shape = SHAPES.get(name, SHAPE)
    net, data = NETWORKS[name](), task(shape=shape)
    masks = prune(net, "random", 0.4, generator=seeded())
    keys, parameters, nonzero = list(net.state_dict()), dict(net.named_parameters()), []

    def look(step):
        nonzero.append(sum(int(parameters[n][~mask].count_nonzero()) for n, mask in masks.items()))

    kept = Snapshots(net, [0, 3])
    few = dataclasses.replace(SHORT, iterations=1) if name == "vgg11" else SHORT
    recipe = Recipe(rescale=few, activation="mish" if name == "cnn" else "swish")
    history = fit(net, data, config(augmented=shape == SHAPE), masks=masks, recipe=recipe, hooks=[kept, Looks(look)])
    assert (history.status, history.steps, history.best_epoch) == ("finished", 8, 2)
    assert nonzero == [0] * 8
    assert list(net.state_dict()) == list(kept.states[0]) == list(kept.states[3]) == keys
    assert evaluate(net, data, "test")["accuracy"] == history.test_accuracy
    assert not any(module.training for module in net.modules())
    assert not any(isinstance(module, SoftReLU) for module in net.modules())


def test_without_any_part_the_training_is_the_plain_one():
    data, off = task(), Recipe(activation=None, skips=False, rescale=None, labels=0.0)
    net, plain = build("cnn", SHAPE, 3, widths=(6, 8)), build("cnn", SHAPE, 3, widths=(6, 8))
    history, expected = fit(net, data, config(), recipe=off), train.fit(plain, data, config())
    assert bits(net.state_dict()) == bits(plain.state_dict())
    assert history.epochs == expected.epochs


def test_smoothed_labels_have_the_published_loss():
    logits, labels, a = torch.randn(9, 10, generator=seeded()), torch.arange(9), 0.1
    target = torch.full((9, 10), a / 9).scatter(1, labels[:, None], 1 - a)
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    data = load("digits")
    smoothing = tost._with_labels(config(), data, Recipe(labels=a)).label_smoothing
    assert smoothing == pytest.approx(1 / 9)
    torch.testing.assert_close(F.cross_entropy(logits, labels, label_smoothing=smoothing), expected)


def test_the_best_epoch_is_one_that_began_without_ghosts(monkeypatch):
    accuracies = iter([0.9, 0.8, 0.3, 0.5, 0.4, 0.0, 0.0])
    monkeypatch.setattr(train, "evaluate", lambda *args: {"accuracy": next(accuracies), "loss": 1.0})
    net = build("mlp", SHAPE, 3, hidden=(4,))
    assert fit(net, task(), config(epochs=5), recipe=dataclasses.replace(GHOSTS, e1=0.3)).best_epoch == 4
    accuracies = iter([0.9, 0.8, 0.3, 0.5, 0.4, 0.0, 0.0])
    assert fit(net, task(), config(epochs=5), recipe=dataclasses.replace(GHOSTS, annealed=False)).best_epoch == 1


def test_ghosts_that_are_not_annealed_stay_in_the_network_that_was_measured():
    data, net = task(), build("cnn", SHAPE, 3, widths=(6, 8))
    keys = list(net.state_dict())
    history = fit(net, data, config(), recipe=dataclasses.replace(GHOSTS, annealed=False))
    assert evaluate(net, data, "test") == {"accuracy": history.test_accuracy, "loss": history.test_loss}
    assert [net.conv1.ghost.alpha, net.conv2.ghost.alpha] == [1.0, 1.0]
    with pytest.raises(ValueError, match="has ghosts already"):
        fit(net, data, config(), recipe=GHOSTS)
    stripped, x = strip(net), images()
    assert list(stripped.state_dict()) == keys
    assert len(net.state_dict()) > len(keys)
    with torch.no_grad():
        assert not torch.allclose(stripped(x), net(x))


# ---- kill and resume ---------------------------------------------------------------------------------------------


class Killed(Exception):
    """Ends a training from outside."""


def resumable(path=None, *, until=None, recipe=None):
    """Outcome of a training of 3 epochs of 4 steps, killed before a step."""
    net, data = build("resnet8", SHAPE, 3, width=4), task()
    masks, made = prune(net, "random", 0.5, generator=seeded()), []
    snapshots = Snapshots(net, [0, 3, 9])

    def count(net, inputs):
        if net.training and isinstance(net.stem.relu, SoftReLU):  # not while weights are rescaled
            if until == len(made):
                raise Killed
            made.append(1)

    net.register_forward_pre_hook(count)
    recipe = recipe or Recipe(e1=0.6, rescale=SHORT)
    options = {"checkpoint": path, "checkpoint_every_s": 0, "hooks": [snapshots], "generator": seeded(3)}
    try:
        history = fit(net, data, config(epochs=3), masks=masks, recipe=recipe, **options)
    finally:
        assert type(net.stem.relu) is nn.ReLU
        assert not any(module._forward_hooks for module in net.modules())
    states = {f"{step}/{name}": t for step, state in snapshots.states.items() for name, t in state.items()}
    return bits(net.state_dict() | states), repr(dataclasses.replace(history, seconds=0)), len(made)


def test_a_training_killed_in_the_middle_of_the_annealing_ends_bit_equal(tmp_path):
    *expected, made = resumable()
    for step in (1, 6, 10):
        path = tmp_path / f"{step}.safetensors"
        with pytest.raises(Killed):
            resumable(path, until=step)
        *found, left = resumable(path)
        assert (found, left) == (expected, made - step)


def test_a_training_goes_on_with_its_own_recipe_alone(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(Killed):
        resumable(path, until=5)
    with pytest.raises(CannotResume, match=r"hooks is .*'e1': 0\.6.* there and .*'e1': 0\.5"):
        resumable(path, recipe=Recipe(e1=0.5, rescale=SHORT))


# ---- factors of the weights --------------------------------------------------------------------------------------


def linear():
    """One layer of 8 inputs and 3 classes with a bias, and a mask of it."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    nn.init.normal_(net[1].weight, generator=seeded(2))
    nn.init.normal_(net[1].bias, std=0.1, generator=seeded(3))
    return net, {"1.weight": torch.rand(3, 16, generator=seeded(4)) < 0.5}


def ahead(weight, bias, x, labels, mask, eta):
    """Norm of the gradient, and loss after the look-ahead step, of a linear layer: by the formulas of softmax."""
    away = (torch.softmax(x @ weight.T + bias, 1) - F.one_hot(labels, 3)) / len(x)
    by_weight, by_bias = away.T @ x * mask, away.sum(0)
    norm = math.sqrt(float(by_weight.square().sum() + by_bias.square().sum()))
    weight, bias = weight - eta * by_weight / norm, bias - eta * by_bias / norm
    return norm, float(F.cross_entropy(x @ weight.T + bias, labels))


@pytest.mark.parametrize("mask_lookahead", [True, False])
@pytest.mark.parametrize("gamma", [100.0, 1e-3])
def test_a_factor_follows_the_derivative_of_its_objective(gamma, mask_lookahead):
    net, masks = linear()
    data = task(shape=(1, 4, 4))
    n = len(data.train.labels)  # of which each batch holds all, so that all batches are one
    x, labels = data.normalise(data.train.images).flatten(1).double(), data.train.labels
    start, bias = (net[1].weight * masks["1.weight"]).detach().double(), net[1].bias.detach().double()
    under = masks["1.weight"] if mask_lookahead else torch.ones(3, 16)

    def objective(factor):
        norm, loss = ahead(factor * start, bias, x, labels, under, 0.1)
        return norm if norm > gamma else loss / 0.1

    factor, first, second, settings = (
        1.0,
        0.0,
        0.0,
        Rescaling(gamma=gamma, iterations=4, batch_size=n, clip=0.5, mask_lookahead=mask_lookahead),
    )
    for t in range(1, 5):
        slope = (objective(factor + 1e-5) - objective(factor - 1e-5)) / 2e-5
        slope = min(0.5, max(-0.5, slope))
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        factor -= 0.01 * (first / (1 - 0.9**t)) / (math.sqrt(second / (1 - 0.999**t)) + 1e-8)
    # Adam hardly sees how large a derivative is, so the derivative itself is compared, too
    weights = {"1.weight": start.float(), "1.bias": bias.float()}
    pruned = {"1.weight": ~masks["1.weight"]} if mask_lookahead else {}
    of_loss = rescaling._Objective(net, weights, ["1.weight"], pruned, settings)
    kind, derivative = of_loss.derivative(torch.ones(1), [(data.normalise(data.train.images), labels)] * 3)
    assert kind == ("norm" if gamma < 1 else "loss")
    assert float(derivative) == pytest.approx((objective(1 + 1e-5) - objective(1 - 1e-5)) / 2e-5, rel=1e-3)
    found = rescale_(net, data, masks=masks, settings=settings, generator=seeded())
    assert found["1.weight"] == pytest.approx(factor, abs=2e-5)
    assert found["1.weight"] != pytest.approx(1.0, abs=1e-3)
    assert objective(found["1.weight"]) < objective(1.0)


@pytest.mark.parametrize("name", ["resnet8", "lenet_s"])
def test_rescaling_multiplies_tensors_and_leaves_everything_else(name):
    net, data = NETWORKS[name](), task()
    for parameter in net.parameters():  # biases that are 0 could not be seen to change
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.1, 0.2, generator=seeded())
    net.train()
    list(net.modules())[2].eval()
    masks = prune(net, "random", 0.3, generator=seeded())
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    flags, random = [p.requires_grad for p in net.parameters()], torch.get_rng_state()
    found = rescale_(net, data, masks=masks, settings=dataclasses.replace(SHORT, lr=0.6), generator=seeded())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in net.modules()] == modes
    assert [(p.requires_grad, p.grad) for p in net.parameters()] == [(flag, None) for flag in flags]
    weights = {n for n, p in net.named_parameters() if n.endswith("weight")}
    assert found.keys() == weights
    assert min(found.values()) >= 0.01 - 1e-9
    assert any(value == pytest.approx(0.01) for value in found.values()), "a learning rate of .6 reaches the floor"
    for key, tensor in net.state_dict().items():
        pruned = ~masks[key] if key in masks else torch.zeros(tensor.shape, dtype=torch.bool)
        assert torch.equal(tensor, found.get(key, 1) * before[key].masked_fill(pruned, 0))


def test_rescaling_that_is_not_finite_changes_nothing():
    net, masks = linear()
    nn.init.constant_(net[1].weight, math.inf)
    before = bits(net.state_dict())
    with pytest.raises(ValueError, match="at iteration 1 the derivative of the loss is not finite"):
        rescale_(net, task(shape=(1, 4, 4)), masks=masks, settings=SHORT, generator=seeded())
    assert bits(net.state_dict()) == before


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_a_network_with_nothing_to_rescale_is_refused_by_name():
    with pytest.raises(ValueError, match="Flatten has no weight of a convolution, linear layer or norm to rescale"):
        rescale_(nn.Flatten(), task(shape=(1, 4, 4)), settings=SHORT, generator=seeded())


REFUSED = {
    "e0": [-0.1, 0.6, "0"],
    "e1": [1.0, -0.1, math.nan, True],
    "activation": ["relu", False],
    "skips": [1],
    "rescale": [True],
    "labels": [-0.1, 1.0, None],
    "annealed": [0],
}
REFUSED_RESCALING = {"eta": [0.0], "gamma": [-1], "iterations": [0], "floor": [-0.1, 2], "mask_lookahead": [1]}


@pytest.mark.parametrize(
    ("made", "name", "value"),
    [(Recipe, name, value) for name, bad in REFUSED.items() for value in bad]
    + [(Rescaling, name, value) for name, bad in REFUSED_RESCALING.items() for value in bad],
)
def test_a_setting_out_of_range_is_refused_by_name(made, name, value):
    with pytest.raises(ValueError, match=f"{made.__name__}: {name} = ") as error:
        made(**{name: value})
    assert repr(value) in str(error.value)


class Branching(nn.Module):
    """Its forward pass depends on values; with functions for ReLUs if asked."""

    def __init__(self, traceable):
        super().__init__()
        self.conv, self.linear, self.traceable = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(2, 3), traceable

    def forward(self, x):
        if not self.traceable and x.sum() > 0:
            x = -x
        return self.linear(F.relu(self.conv(x)).mean((2, 3)))


class Shared(nn.Module):
    """Calls a convolution twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.linear = nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Linear(1, 3)

    def forward(self, x):
        return self.linear(self.relu(self.conv(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": Recipe(e1=0.6)}, r"e1=0\.6: no epoch of 2 begins .* expected at most 0\.5"),
        ({"masks": {"ghosts.0.conv.weight": torch.ones(6, 1, 1, 1) > 0}}, "'ghosts.0.conv.weight' belongs to no param"),
        ({"config": config(label_smoothing=0.1)}, r"label_smoothing=0\.1 .* labels=0\.1 .* set one of them to 0"),
        ({"recipe": Recipe(labels=0.7)}, r"labels=0\.7: with 3 classes expected less than 0\.667"),
        ({"model": Branching(False)}, r"Branching cannot be traced by torch\.fx .*activation=None and skips=False"),
        ({"model": Branching(True)}, "Branching calls ReLU as a function, in relu of its trace"),
        ({"model": Shared()}, "'conv' is called 2 times in a forward pass.* skips=False"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(256, 3))}, "has no nn.ReLU that could begin as swish"),
        ({"model": nn.Sequential(nn.Linear(9, 3), nn.ReLU())}, r"does not take an image of shape \(1, 16, 16\)"),
        ({"generator": 3}, "generator=3: expected a torch.Generator on the CPU"),
        ({"hooks": [object()]}, "has none of the methods"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_has_changed(options, message):
    options = {"model": build("cnn", SHAPE, 3, widths=(6, 8)), "config": config()} | options
    model = options.pop("model")
    before, modules = bits(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match=message):
        fit(model, task(), options.pop("config"), **options)
    assert bits(model.state_dict()) == before
    assert list(model.modules()) == modules
