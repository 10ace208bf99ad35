"""The training loop against hand-written loops and formulas, and the rules of selection: validation selects, test is
read once, at the end."""

import copy
import dataclasses
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fsp.data import Split, load, scoring_batches
from fsp.data.batching import augment, batches
from fsp.data.datasets import _channel_constants
from fsp.masks import apply_, prunable
from fsp.models import build
from fsp.pruning.methods import prune
from fsp.training import train
from fsp.training.hooks import Snapshots
from fsp.training.train import SCHEDULES, TrainConfig, evaluate, fit, predict


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task(**options):
    """70 training, 10 validation and 20 test images of three classes, 4x4."""
    return load("synthetic", **{"shape": (1, 4, 4), "classes": 3, "size": 100, "validation": 0.125} | options)


def small(seed=0, *middle):
    """Linear, middle, ReLU, Linear: 16 inputs, 8 hidden units, 3 classes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), *middle, nn.ReLU(), nn.Linear(8, 3))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4, generator=seeded(seed + parameter.numel()))
    return net


def state(net):
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def outcome(history):
    """All of a History but the wall time; repr, because nan is not equal to itself."""
    return repr(dataclasses.replace(history, seconds=0))


def hook(**methods):
    return SimpleNamespace(**methods)


# ---- training ----------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_learns_separable_data():
    data = task(noise=0.3, size=300)
    history = fit(small(), data, TrainConfig(epochs=8, batch_size=16, lr=0.05))
    losses = [entry["train_loss"] for entry in history.epochs]
    assert losses[-1] < 0.1 * losses[0]
    assert history.status == "finished"
    assert history.test_accuracy > 0.95
    assert history.steps == 8 * math.ceil(len(data.train.labels) / 16)
    assert [entry["epoch"] for entry in history.epochs] == list(range(1, 9))
    assert history.seconds > 0


def by_hand(net, data, config, masks, augmented):
    """The whole training in plain tensor operations, at a constant learning rate; the mean loss of each epoch."""
    parameters = dict(net.named_parameters())
    momenta, losses, generator = {}, [], seeded(config.seed)
    for name in masks:
        parameters[name].data *= masks[name]
    for _ in range(config.epochs):
        total = torch.zeros(())
        for images, labels in batches(data.train, config.batch_size, generator=generator):
            if augmented:
                images = augment(images, generator=generator)
            loss = nn.functional.cross_entropy(net(data.normalise(images)), labels)
            gradients = torch.autograd.grad(loss, parameters.values())
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                gradient = gradient.add(parameter.data, alpha=config.weight_decay)
                momenta[name] = gradient if name not in momenta else momenta[name] * config.momentum + gradient
                direction = gradient.add(momenta[name], alpha=config.momentum) if config.nesterov else momenta[name]
                parameter.data.add_(direction, alpha=-config.lr)
                if name in masks:
                    parameter.data *= masks[name]
                    momenta[name] = momenta[name] * masks[name]
            total += loss.detach() * len(labels)
        losses.append(total.item() / len(data.train.labels))
    return losses


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("augmented", [False, True])
def test_fit_equals_a_hand_written_loop_to_the_last_bit(nesterov, pruned, augmented):
    data, net = task(), small(1)
    config = TrainConfig(3, 16, 0.05, 0.9, nesterov, 5e-3, "constant", augmented=augmented, seed=7)
    masks = prune(net, "random", 0.3, generator=seeded()) if pruned else {}
    twin = copy.deepcopy(net)
    history = fit(net, data, config, masks=masks or None)
    losses = by_hand(twin, data, config, masks, augmented)
    assert same(state(net), state(twin))
    assert [entry["train_loss"] for entry in history.epochs] == losses


@pytest.mark.parametrize("pruned", [False, True])
def test_adam_with_masks_is_its_formula_on_a_network_that_multiplies_by_its_masks(pruned):
    data, net = task(), small(1)
    config = TrainConfig(3, 16, 0.01, 0.8, weight_decay=5e-3, schedule="constant", seed=7, optimizer="adam")
    masks = prune(net, "random", 0.3, generator=seeded()) if pruned else {}
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    kept = {name: masks.get(name, torch.ones_like(w)).float() for name, w in weights.items()}
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    generator, t = seeded(config.seed), 0
    for _ in range(config.epochs):
        for images, labels in batches(data.train, config.batch_size, generator=generator):
            t += 1
            leaves = {name: (w * kept[name]).requires_grad_() for name, w in weights.items()}
            logits = torch.func.functional_call(small(), leaves, data.normalise(images))
            nn.functional.cross_entropy(logits, labels).backward()
            for name, leaf in leaves.items():
                gradient = (leaf.grad + config.weight_decay * leaf.detach()) * kept[name]
                first[name] = 0.8 * first[name] + 0.2 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                step = first[name] / (1 - 0.8**t) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
                weights[name] = leaf.detach() - config.lr * step
    fit(net, data, config, masks=masks or None)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-4, atol=1e-6)


def test_one_seed_gives_one_result_and_another_seed_another():
    results = []
    for seed in (3, 3, 4):
        net = small()
        history = fit(net, task(), TrainConfig(epochs=3, batch_size=16, seed=seed, augmented=True))
        results.append((outcome(history), state(net)))
    (first, weights), (again, weights_again), (other, weights_other) = results
    assert first == again
    assert same(weights, weights_again)
    assert first != other
    assert not same(weights, weights_other)


def test_training_leaves_every_global_random_state_alone():
    net, data = small(), task()
    masks = prune(net, "random", 0.4)
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    fit(net, data, TrainConfig(epochs=2, augmented=True), masks=masks)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert repr(np.random.get_state()) == before[2]  # noqa: NPY002


def test_dropout_of_a_model_draws_from_the_global_state_which_therefore_decides_the_result():
    results = []
    with torch.random.fork_rng():
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            results.append(outcome(fit(small(0, nn.Dropout(0.5)), task(), TrainConfig(epochs=2, batch_size=16))))
            assert not torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1] != results[2]


# ---- masks -------------------------------------------------------------------------------------------------------


def test_pruned_weights_are_zero_at_every_step_and_free_afterwards():
    net, seen, optimizers = small(), [], []
    masks = prune(net, "random", 0.4, generator=seeded())

    def after_step(step, optimizer):
        optimizers.append(optimizer)
        seen.append(all((net.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items()))

    config = TrainConfig(epochs=4, batch_size=16, momentum=0.9, weight_decay=0.1)
    fit(net, task(), config, masks=masks, hooks=[hook(after_step=after_step)])
    assert seen == [True] * 20
    for name, mask in masks.items():
        weight = net.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()

    # the masks are released: a further step of the same optimiser moves pruned weights
    optimizers[0].param_groups[0]["lr"] = 0.1
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    assert all((net.get_parameter(name)[~mask] != 0).all() for name, mask in masks.items())


def test_masks_given_are_not_changed_and_dense_masks_change_nothing():
    net, twin = small(), small()
    masks = prune(net, "random", 0.4, generator=seeded())
    before = {name: mask.clone() for name, mask in masks.items()}
    fit(small(), task(), TrainConfig(epochs=1), masks=masks)
    assert same(masks, before)
    dense = {name: torch.ones_like(mask) for name, mask in masks.items()}
    fit(net, task(), TrainConfig(epochs=2), masks=dense)
    fit(twin, task(), TrainConfig(epochs=2))
    assert same(state(net), state(twin))


# ---- hooks -------------------------------------------------------------------------------------------------------


def test_hooks_are_called_at_their_moments_in_the_order_in_which_they_are_given():
    net, calls = small(), []

    def noting(name):
        def at_step(step, optimizer):
            calls.append((name, step, net[1].weight.grad is not None, net[1].weight.detach().clone()))

        return at_step

    def take_step(step, optimizer):
        noting("take")(step, optimizer)
        optimizer.step()

    def epoch_end(epoch):
        calls.append(("epoch", epoch, net.training, None))

    one = hook(before_step=noting("before"), take_step=take_step, epoch_end=epoch_end)
    other = hook(before_step=noting("also before"), after_step=noting("after"))
    history = fit(net, task(), TrainConfig(epochs=2, batch_size=64), hooks=[one, other])
    in_a_step = ["before", "also before", "take", "after"]
    assert [call[:2] for call in calls] == [
        *((name, step) for step in (1, 2) for name in in_a_step),
        ("epoch", 1),
        *((name, step) for step in (3, 4) for name in in_a_step),
        ("epoch", 2),
    ]
    before, _, take, after = calls[:4]
    assert before[2], "gradients are in place"
    assert torch.equal(before[3], take[3])
    assert not torch.equal(take[3], after[3])
    assert not calls[8][2], "an epoch ends in eval mode"
    plain = small()
    assert outcome(fit(plain, task(), TrainConfig(epochs=2, batch_size=64))) == outcome(history)
    assert same(state(plain), state(net)), "a hook that only looks changes nothing"


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ([lambda step, optimizer: None], "has none of the methods before_step, take_step, after_step, epoch_end"),
        ([hook(take_step=print), hook(take_step=print)], "more than one hook has `take_step`"),
        ([hook(after_step=print, state_dict=dict)], "has only one of `state_dict` and `load_state_dict`"),
        ([hook(after_step=print, load_state_dict=dict)], "has only one of `state_dict` and `load_state_dict`"),
    ],
)
def test_hooks_that_would_do_nothing_or_contradict_each_other_are_refused(hooks, message):
    with pytest.raises(ValueError, match=message):
        fit(small(), task(), TrainConfig(epochs=1), hooks=hooks)


def test_snapshots_are_copies_of_all_weights_and_statistics_after_their_steps():
    net, states = small(0, nn.BatchNorm1d(8)), []
    first = state(net)
    kept = Snapshots(net, [0, 2, 5, 99])
    watch = hook(after_step=lambda step, optimizer: states.append(state(net)))
    fit(net, task(), TrainConfig(epochs=2, batch_size=16), hooks=[kept, watch])
    assert list(kept.states) == [0, 2, 5], "a step that the training does not reach is missing"
    assert all(same(kept.states[step], expected) for step, expected in [(0, first), (2, states[1]), (5, states[4])])


# ---- schedules ---------------------------------------------------------------------------------------------------


def rates(config, *, size=100):
    """Learning rate and momentum with which each step of a training is made."""
    used = []

    def before_step(step, optimizer):
        group = optimizer.param_groups[0]
        used.append((group["lr"], group["momentum"]))
        assert step == len(used)

    data = task(size=size)
    history = fit(small(), data, config, hooks=[hook(before_step=before_step)])
    assert history.steps == len(used) == config.epochs * math.ceil(len(data.train.labels) / config.batch_size)
    return np.array(used).T


def half_cosine(start, end, phase):
    return start + (end - start) * (1 - np.cos(np.pi * phase)) / 2


def one_cycle(steps, warm_up, first, peak, last):
    """Both halves are cosines; the peak is at step warm_up * steps - 1, the end at the last step, counted from 0."""
    t, top = np.arange(steps), warm_up * steps - 1
    up, down = half_cosine(first, peak, t / top), half_cosine(peak, last, (t - top) / (steps - 1 - top))
    return np.where(t <= top, up, down)


def test_cosine_schedule_falls_from_the_peak_to_zero_over_all_steps():
    lr, momentum = rates(TrainConfig(epochs=6, batch_size=16, lr=0.2, schedule="cosine"))
    steps = np.arange(30)
    np.testing.assert_allclose(lr, 0.1 * (1 + np.cos(np.pi * steps / 30)), rtol=1e-12)
    assert (momentum == 0.9).all()


@pytest.mark.parametrize(
    ("milestones", "gamma", "drops"), [((0.5, 0.75), 0.1, (20, 30)), ((0.3,), 0.2, (12,)), ((0.8, 0.2), 0.5, (8, 32))]
)
def test_multistep_schedule_drops_at_its_fractions_of_the_training(milestones, gamma, drops):
    config = TrainConfig(epochs=8, batch_size=16, lr=0.1, schedule="multistep", milestones=milestones, gamma=gamma)
    lr, _ = rates(config)
    expected = [0.1 * gamma ** sum(step >= drop for drop in drops) for step in range(40)]
    np.testing.assert_allclose(lr, expected, rtol=1e-12)


@pytest.mark.parametrize(("schedule", "epochs"), [("constant", 15), ("one_cycle", 1), ("one_cycle", 2)])
def test_a_constant_rate_and_a_one_cycle_without_room_stay_the_same_to_the_last_bit(schedule, epochs):
    lr, momentum = rates(TrainConfig(epochs=epochs, batch_size=1000, lr=0.3, momentum=0.8, schedule=schedule))
    assert set(lr) == {0.3}
    assert set(momentum) == {0.8}


@pytest.mark.parametrize(("epochs", "warm_up"), [(20, 0.1), (10, 0.3), (4, 0.5)])
def test_one_cycle_schedule_is_that_of_prune_and_tune(epochs, warm_up):
    lr, momentum = rates(TrainConfig(epochs=epochs, batch_size=16, lr=0.1, schedule="one_cycle", warm_up=warm_up))
    steps = 5 * epochs
    np.testing.assert_allclose(lr, one_cycle(steps, warm_up, 1e-3, 0.1, 1e-7), rtol=1e-9)
    np.testing.assert_allclose(momentum, one_cycle(steps, warm_up, 0.95, 0.85, 0.95), rtol=1e-9)


def planned(schedule, steps, at):
    """Learning rate and first beta or momentum of SGD and Adam at some steps of a training of so many."""
    found = {}
    for name in ("sgd", "adam"):
        config = TrainConfig(lr=0.1, schedule=schedule, optimizer=name)
        optimizer = train.optimizer_of(nn.Linear(1, 1), config)
        planned = train.schedule_of(optimizer, config, steps)
        for t in range(steps):
            group = optimizer.param_groups[0]
            momentum = group["momentum"] if name == "sgd" else group["betas"][0]
            found.setdefault(t, []).append((group["lr"], momentum))
            optimizer.step()
            if t + 1 < steps:
                planned.step()
    return [found[t] for t in at]


def test_the_one_cycle_of_ten_epochs_of_cifar_has_its_published_start_peak_and_end_with_either_optimiser():
    start, peak, end = planned("one_cycle", 3910, (0, 390, 3909))
    for found, rate, momentum in ((start, 1e-3, 0.95), (peak, 0.1, 0.85), (end, 1e-7, 0.95)):
        np.testing.assert_allclose(found, [(rate, momentum)] * 2, rtol=1e-9)


def test_the_schedule_of_a_parent_holds_falls_in_a_line_and_holds_a_hundredth():
    found = planned("pat_parent", 1000, (0, 250, 500, 700, 900, 999))
    for both, rate in zip(found, (0.1, 0.1, 0.1, 0.0505, 0.001, 0.001), strict=True):
        np.testing.assert_allclose(both, [(rate, 0.9)] * 2, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 9, 10, 11, 19, 20, 21])
def test_every_schedule_works_for_trainings_of_a_few_steps(schedule, steps):
    lr, momentum = rates(TrainConfig(epochs=steps, batch_size=1000, schedule=schedule))
    assert ((lr > 0) & (lr <= 0.1 + 1e-12)).all()
    assert ((momentum > 0.85 - 1e-12) & (momentum < 0.95 + 1e-12)).all()


@pytest.mark.parametrize("steps", [3, 8, 9, 10, 11, 20])
def test_one_cycle_has_its_start_its_peak_and_its_end_in_short_trainings_too(steps):
    lr, momentum = rates(TrainConfig(epochs=steps, batch_size=1000, lr=0.1, schedule="one_cycle"))
    assert lr[[0, 1, -1]] == pytest.approx([1e-3, 0.1, 1e-7])
    assert momentum[[0, 1, -1]] == pytest.approx([0.95, 0.85, 0.95])


# ---- starting at a later step ------------------------------------------------------------------------------------


def watched(net, data, config, **options):
    """Number, learning rate, momentum and inputs of each step, the states after them, and the history."""
    made, states, inputs = [], [], []
    handle = net.register_forward_pre_hook(lambda net, x: inputs.append(x[0].clone()) if net.training else None)

    def before_step(step, optimizer):
        group = optimizer.param_groups[0]
        made.append((step, group["lr"], group["momentum"], inputs[-1]))

    def after_step(step, optimizer):
        states.append(state(net))

    history = fit(net, data, config, hooks=[hook(before_step=before_step, after_step=after_step)], **options)
    handle.remove()
    return made, states, history


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("start", [1, 5, 7, 14])  # in the first of three epochs of five steps, at its end, later, last
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_training_that_starts_later_sees_the_batches_and_rates_of_a_whole_one(schedule, start, momentum):
    config = TrainConfig(3, 16, 0.1, momentum, schedule=schedule, milestones=(0.2, 0.6), augmented=True, seed=3)
    whole, states, _ = watched(small(0, nn.BatchNorm1d(8)), task(), config)
    net = small(0, nn.BatchNorm1d(8))
    net.load_state_dict(states[start - 1])
    late, _, history = watched(net, task(), config, start_step=start)
    assert [entry[:3] for entry in late] == [entry[:3] for entry in whole[start:]]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(late, whole[start:], strict=True))
    assert history.steps == 15 - start


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("start", [0, 1, 5, 7, 14])
def test_without_momentum_a_training_that_starts_later_ends_bit_equal_to_the_whole_one(start, pruned):
    config = TrainConfig(3, 16, 0.1, momentum=0, augmented=True, weight_decay=5e-3, seed=3)
    net = small(0, nn.BatchNorm1d(8))
    masks = prune(net, "random", 0.5) if pruned else None
    states = [state(net)]
    _, later, whole = watched(net, task(), config, masks=masks)
    twin = small(1, nn.BatchNorm1d(8))
    twin.load_state_dict([*states, *later][start])
    late = fit(twin, task(), config, masks=masks, start_step=start)
    assert same(state(twin), state(net))
    skipped = start // 5
    assert [entry["epoch"] for entry in late.epochs] == [1, 2, 3][skipped:]
    assert [entry["lr"] for entry in late.epochs] == [entry["lr"] for entry in whole.epochs][skipped:]
    for a, b in zip(late.epochs, whole.epochs[skipped:], strict=True):
        assert a["validation_loss"] == b["validation_loss"]
    whole_epochs = slice(math.ceil(start / 5) - skipped, None)
    assert late.epochs[whole_epochs] == whole.epochs[skipped:][whole_epochs]
    assert late.test_accuracy == whole.test_accuracy


def test_the_loss_of_a_partly_skipped_epoch_is_the_mean_over_the_rest():
    data, net = task(), small()
    config = TrainConfig(epochs=1, batch_size=16, lr=1e-30, weight_decay=0)
    history = fit(net, data, config, start_step=3)
    order = torch.randperm(70, generator=seeded(config.seed))[48:]
    with torch.no_grad():
        logits = net(data.normalise(data.train.images[order]))
    expected = nn.functional.cross_entropy(logits, data.train.labels[order]).item()
    assert history.epochs[0]["train_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("error")
def test_skipped_steps_move_nothing_although_gradients_are_left_from_before():
    net, data = small(0, nn.BatchNorm1d(8)), task()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, seen = state(net), []
    net.register_forward_pre_hook(lambda net, x: seen.append(state(net)) if not seen else None)
    fit(net, data, TrainConfig(epochs=2, batch_size=16), start_step=6)
    assert same(seen[0], before)


@pytest.mark.parametrize("start", [-1, 10, 1.0, "3", True, None])
def test_a_first_step_that_leaves_nothing_to_train_is_refused_before_training(start):
    net = small()
    before = state(net)
    with pytest.raises(ValueError, match=rf"start_step={start!r}: expected a whole number from 0 to 9"):
        fit(net, task(), TrainConfig(epochs=2, batch_size=16), start_step=start)
    assert same(state(net), before)


# ---- loss and evaluation -----------------------------------------------------------------------------------------


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def test_label_smoothing_is_in_the_training_loss_and_nowhere_else():
    data, net = task(), small()
    config = TrainConfig(epochs=1, lr=1e-30, label_smoothing=0.3, weight_decay=0)
    before = state(net)
    history = fit(net, data, config)
    assert same(state(net), before)  # at this rate nothing moves, so each loss is that of the initial weights

    def losses(split):
        images = data.normalise(split.images).flatten(1).double().numpy()
        w1, b1, w2, b2 = (p.detach().double().numpy() for p in net.parameters())
        log_p = log_softmax(np.maximum(images @ w1.T + b1, 0) @ w2.T + b2)
        plain = -log_p[np.arange(len(log_p)), split.labels.numpy()]
        return plain.mean(), (0.7 * plain - 0.3 * log_p.mean(1)).mean()

    assert history.epochs[0]["train_loss"] == pytest.approx(losses(data.train)[1], rel=1e-5)
    assert history.epochs[0]["validation_loss"] == pytest.approx(losses(data.validation)[0], rel=1e-5)
    assert history.test_loss == pytest.approx(losses(data.test)[0], rel=1e-5)
    assert abs(losses(data.train)[1] - losses(data.train)[0]) > 0.01


def four_images():
    """Two inputs straight to two logits; classes 0 1 1 0, of which the third is wrong."""
    images = torch.tensor([[3.0, 1.0], [0.0, 2.0], [1.0, 0.0], [5.0, 5.5]]).view(4, 2, 1, 1)
    labels = torch.tensor([0, 1, 1, 1])
    split = Split(images, labels)
    data = dataclasses.replace(task(), test=split, mean=(0.0, 0.0), std=(1.0, 1.0), classes=2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    nn.init.eye_(net[1].weight)
    return net, data


@pytest.mark.parametrize("batch_size", [1, 3, 4, 1000])
def test_evaluate_equals_a_calculation_by_hand(batch_size):
    net, data = four_images()
    margins = [2, 2, -1, 0.5]  # logit of the right class minus the other
    found = evaluate(net, data, "test", batch_size=batch_size)
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 4, rel=1e-6)
    assert evaluate(net, data, data.test, batch_size=batch_size) == found
    assert evaluate(net, data, Split(data.test.images, 1 - data.test.labels))["accuracy"] == 0.25
    assert evaluate(net, dataclasses.replace(data, mean=(0.0, 3.0)), "test")["accuracy"] == 0.25, (
        "images are normalised"
    )


def test_evaluate_uses_running_statistics_and_leaves_the_weights_alone_in_eval_mode():
    net, data = small(0, nn.BatchNorm1d(8)), task()
    fit(net, data, TrainConfig(epochs=1, batch_size=16))
    net.train()
    before = state(net)
    found = [evaluate(net, data, "validation", batch_size=size) for size in (1, 4, 1000)]
    assert not net.training
    assert same(state(net), before)
    assert all(p.requires_grad for p in net.parameters())
    assert len({f["accuracy"] for f in found}) == 1
    np.testing.assert_allclose([f["loss"] for f in found], found[0]["loss"], rtol=1e-5)


def test_predictions_are_the_softmax_of_the_logits_of_normalised_images_in_eval_mode():
    net, data = small(0, nn.BatchNorm1d(8)), task()
    fit(net, data, TrainConfig(epochs=1, batch_size=16))
    net.train()
    found = predict(net, data, "test", batch_size=7)
    assert not net.training
    with torch.no_grad():
        logits = net(data.normalise(data.test.images))
    assert (found.shape, found.dtype, found.requires_grad) == ((20, 3), torch.float32, False)
    torch.testing.assert_close(found, logits.exp() / logits.exp().sum(1, keepdim=True))
    torch.testing.assert_close(found.sum(1), torch.ones(20))
    assert torch.equal(predict(net, data, data.test, batch_size=7), found)
    assert torch.equal(predict(net, data, data.test.images, batch_size=7), found)
    assert (found.argmax(1) == data.test.labels).float().mean() == pytest.approx(
        evaluate(net, data, "test")["accuracy"]
    )


def test_an_empty_split_has_no_accuracy_no_loss_and_no_predictions():
    net, data = small(), task(validation=0)
    assert repr(evaluate(net, data, "validation")) == "{'accuracy': nan, 'loss': nan}"
    assert predict(net, data, "validation").shape == (0, 3)


# ---- selection on validation, test read once ---------------------------------------------------------------------


def scripted(monkeypatch, net, accuracies):
    """Replace evaluate: validation accuracies as given, and a note of split and weights for each call."""
    calls, left = [], iter(accuracies)

    def read(model, data, split, **options):
        assert model is net
        model.eval()
        calls.append((split, state(model)))
        accuracy = next(left) if split == "validation" else len(calls) / 100
        return {"accuracy": accuracy, "loss": 1.0}

    monkeypatch.setattr(train, "evaluate", read)
    return calls


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        ([0.5, 0.8, 0.8, 0.7], 2),
        ([0.9, 0.1, 0.9, 0.9], 1),
        ([0.1, 0.2, 0.3, 0.4], 4),
        ([0.0, 0.0, 0.0, 0.0], 1),
        ([math.nan] * 4, 4),
    ],
)
def test_the_best_epoch_is_the_first_with_the_highest_validation_accuracy(monkeypatch, accuracies, best):
    net = small(0, nn.BatchNorm1d(8))
    calls = scripted(monkeypatch, net, accuracies)
    history = fit(net, task(), TrainConfig(epochs=4, batch_size=16))
    splits, weights = zip(*calls, strict=True)
    assert splits == ("validation",) * 4 + ("test",) * 2  # test is read only when training is over
    assert history.best_epoch == best
    assert [repr(e["validation_accuracy"]) for e in history.epochs] == [repr(a) for a in accuracies]
    # first the weights (and batch-norm statistics) of the best epoch are tested, then those of the last
    assert same(weights[4], weights[best - 1])
    assert same(weights[5], weights[3])
    assert (history.test_accuracy_best, history.test_accuracy) == (0.05, 0.06)
    assert same(state(net), weights[3])
    assert not net.training


def test_nothing_but_the_test_numbers_depends_on_the_test_split():
    data, config = task(), TrainConfig(epochs=4, batch_size=16)
    other = dataclasses.replace(data, test=Split(-data.test.images, data.test.labels.flip(0)))
    nets = small(), small()
    first, second = fit(nets[0], data, config), fit(nets[1], other, config)
    assert same(state(nets[0]), state(nets[1]))
    assert (first.epochs, first.best_epoch) == (second.epochs, second.best_epoch)
    assert first.test_accuracy != second.test_accuracy


def test_training_without_a_validation_split_reports_the_last_epoch():
    history = fit(small(), task(validation=0), TrainConfig(epochs=3))
    assert all(math.isnan(e["validation_accuracy"]) and math.isnan(e["validation_loss"]) for e in history.epochs)
    assert history.best_epoch == 3
    assert history.test_accuracy_best == history.test_accuracy
    assert 0 <= history.test_accuracy <= 1
    assert history.status == "finished"


# ---- divergence --------------------------------------------------------------------------------------------------


def test_a_training_that_diverges_stops_and_its_record_says_so(monkeypatch):
    read, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda m, d, split: read.append(split) or evaluate(m, d, split))
    history = fit(small(), task(), TrainConfig(epochs=50, batch_size=16, lr=1e6, schedule="constant"))
    assert history.status == "diverged"
    assert len(history.epochs) < 50
    assert not math.isfinite(history.epochs[-1]["train_loss"])
    assert all(math.isfinite(entry["train_loss"]) for entry in history.epochs[:-1])
    assert history.steps == 5 * len(history.epochs)
    assert math.isnan(history.test_accuracy)
    assert math.isnan(history.test_loss)
    assert history.best_epoch < len(history.epochs)
    assert read.count("test") == (history.best_epoch > 0)  # nothing is tested but the best epoch before


def breaks_at(net, when):
    """A hook after whose step the weights are broken."""
    return hook(after_step=lambda step, optimizer: net[1].weight.data.fill_(math.nan) if step == when else None)


def test_after_divergence_the_best_epoch_before_it_is_still_reported():
    net, twin, config = small(), small(), TrainConfig(epochs=6, batch_size=16, schedule="constant", lr=0.05)
    history = fit(net, task(), config, hooks=[breaks_at(net, 12)])  # in the third epoch
    whole = fit(twin, task(), dataclasses.replace(config, epochs=2))
    assert history.status == "diverged"
    assert [math.isfinite(entry["train_loss"]) for entry in history.epochs] == [True, True, False]
    assert (history.best_epoch, history.test_accuracy_best) == (whole.best_epoch, whole.test_accuracy_best)
    assert math.isnan(history.test_accuracy)


@pytest.mark.parametrize("validation", [0.125, 0])
def test_weights_that_break_in_the_very_last_step_count_as_diverged(validation):
    net, data = small(), task(validation=validation)
    last = 2 * math.ceil(len(data.train.labels) / 16)
    history = fit(net, data, TrainConfig(epochs=2, batch_size=16), hooks=[breaks_at(net, last)])
    assert history.status == "diverged"
    assert math.isnan(history.test_accuracy)


# ---- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_data", [False, True])
@pytest.mark.parametrize("asked", [None, False, True])
def test_images_are_augmented_when_the_recipe_or_the_config_says_so(monkeypatch, of_data, asked):
    sizes = []

    def note(images, *, generator):
        sizes.append(len(images))
        return augment(images, generator=generator)

    monkeypatch.setattr(train, "augment", note)
    data = dataclasses.replace(task(), augmented=of_data)
    fit(small(), data, TrainConfig(epochs=2, batch_size=32, augmented=asked))
    wanted = of_data if asked is None else asked
    assert sizes == ([32, 32, 6] * 2 if wanted else [])  # training images only: evaluation is never augmented


def test_without_cuda_autocast_memory_format_and_compiling_change_nothing():
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    for parameter in conv.parameters():
        nn.init.normal_(parameter, generator=seeded(parameter.numel()))
    results = []
    for fast in (False, True):
        net = copy.deepcopy(conv)
        history = fit(net, task(), TrainConfig(2, 16, bfloat16=fast, channels_last=fast, compiled=fast))
        results.append((outcome(history), state(net)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


def convolutional(norm=nn.BatchNorm2d):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4, generator=seeded(parameter.numel()))
    return net


def test_compiling_changes_no_number_and_is_done_once_for_all_masks_and_weights(monkeypatch):
    torch.compiler.reset()
    shapes, twin = [], convolutional()

    def backend(module, inputs):
        shapes.append(inputs[0].shape)
        return module.forward

    config = TrainConfig(3, 16, 0.05)  # four full batches and a smaller one
    monkeypatch.setattr(train, "is_cuda", lambda device: True)  # as on a GPU, but for autocast
    whole = train.compiled_for
    monkeypatch.setattr(train, "compiled_for", lambda size, model: whole(size, model, backend))
    stories = []
    for seed in range(3):
        net = convolutional()
        masks = prune(net, "random", 0.3 + seed / 5, generator=seeded(seed))
        stories.append((outcome(fit(net, task(), dataclasses.replace(config, compiled=True), masks=masks)), net))
        assert len(shapes) == 1
    masks = prune(twin, "random", 0.7, generator=seeded(2))
    assert outcome(fit(twin, task(), config, masks=masks)) == stories[2][0]
    assert same(state(twin), state(stories[2][1]))
    torch.compiler.reset()


def test_a_model_that_is_compiled_already_is_not_compiled_again():
    net = torch.compile(small(), backend="eager")
    assert train.compiled_for(16, net) is net


class Reads(TorchDispatchMode):
    """Counts the numbers that are read back from tensors, each of which would stall a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def reads(function, *args, **options):
    with Reads() as reading:
        function(*args, **options)
    return reading.count


def test_what_is_read_back_does_not_grow_with_the_number_of_steps_or_of_batches():
    def training(batch_size):
        net = small(0, nn.BatchNorm1d(8))
        config = TrainConfig(1, batch_size, augmented=True, schedule="one_cycle")
        return reads(fit, net, task(), config, masks=prune(net, "random", 0.5, generator=seeded()))

    assert training(35) == training(5) > 0
    assert reads(evaluate, small(), task(), "train", batch_size=3) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fast", [False, True])
def test_on_cuda_the_host_waits_as_often_for_many_steps_as_for_few(fast):
    counts = []
    for size in (5, 35, 5):  # the first one also waits for what is loaded once
        net, data = convolutional().cuda(), task(device="cuda")
        masks = prune(net, "random", 0.5, generator=seeded())
        config = TrainConfig(1, size, augmented=True, bfloat16=fast, channels_last=fast)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing CUDA operation") as caught:
                fit(net, data, config, masks=masks)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len([one for one in caught if "synchronizing" in str(one.message)]))
    assert counts[1] == counts[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_on_cuda_a_training_is_that_of_the_cpu_to_1e_8_in_double_precision(optimizer):
    class Double(nn.Module):
        def forward(self, x):
            return x.double()

    nets = [nn.Sequential(Double(), convolutional(lambda n: nn.GroupNorm(2, n)).double()) for _ in range(2)]
    masks = prune(nets[0], "random", 0.5, generator=seeded())
    config = TrainConfig(3, 16, 0.01, augmented=True, optimizer=optimizer)
    fit(nets[0], task(), config, masks=masks)
    kept = {name: mask.cuda() for name, mask in masks.items()}
    used = []
    watch = hook(after_step=lambda step, optimizer: used.append(optimizer.param_groups[0]["fused"]))
    fit(nets[1].cuda(), task(device="cuda"), config, masks=kept, hooks=[watch])
    assert used == [True] * 15
    for here, there in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-8, atol=1e-8)
    for name, mask in kept.items():
        assert (nets[1].get_parameter(name)[~mask] == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_compiled_training_is_close_to_one_that_is_not_and_other_masks_are_not_compiled_again():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    data, made = task(device="cuda"), []
    for seed, compiled in ((0, False), (0, True), (1, True)):
        net = convolutional().cuda()
        masks = prune(net, "random", 0.5, generator=seeded(seed))
        fit(net, data, TrainConfig(2, 16, 0.01, compiled=compiled), masks=masks)
        assert all((net.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
        made.append((net, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    assert [graphs for _, graphs in made] == [0, 1, 1]
    for plain, quick in zip(made[0][0].parameters(), made[1][0].parameters(), strict=True):
        torch.testing.assert_close(plain, quick, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fast", [False, True])
def test_on_cuda_bfloat16_and_channels_last_are_used_when_asked_and_learn_as_well(fast):
    data = load("digits", device="cuda")
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU())
    net.extend([nn.Flatten(), nn.Linear(256, 10)])
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=seeded(parameter.numel()))
    net.cuda()
    masks, seen = prune(net, "random", 0.5, generator=seeded()), set()

    def note(conv, inputs, output):
        if net.training:
            seen.add((output.dtype, output.is_contiguous(memory_format=torch.channels_last)))

    net[3].register_forward_hook(note)
    config = TrainConfig(epochs=5, lr=0.05, bfloat16=fast, channels_last=fast)
    history = fit(net, data, config, masks=masks)
    assert seen == {(torch.bfloat16 if fast else torch.float32, fast)}
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert net[3].weight.is_contiguous(memory_format=torch.channels_last) == fast
    assert all((net.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
    assert history.test_accuracy > 0.85


# ---- a last batch of one, global settings, wrappers --------------------------------------------------------------


class Squeezed(nn.Module):
    """A network that loses the dimension of the batch where that is one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, x):
        return self.linear(x.flatten(1).squeeze())


@pytest.mark.parametrize("batch_size", [69, 23, 3, 1])  # of 70 examples
@pytest.mark.parametrize("make", [lambda: small(0, nn.BatchNorm1d(8)), Squeezed])
def test_a_batch_of_one_that_the_network_cannot_take_is_refused_before_the_first_step(make, batch_size):
    net = make()
    before, random_state = state(net), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"last batch of every epoch, .* has one of 70 .* such as \d+") as caught:
        fit(net, task(), TrainConfig(1, batch_size))
    assert same(before, state(net))
    assert torch.equal(random_state, torch.get_rng_state())
    remedy = int(str(caught.value).split("such as ")[1].split()[0])
    assert fit(net, task(), TrainConfig(1, remedy)).status == "finished"


@pytest.mark.parametrize("batch_size", [69, 1])
def test_a_batch_of_one_is_trained_on_where_the_network_takes_it(batch_size):
    spatial = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3))
    twin = copy.deepcopy(spatial)
    torch.manual_seed(0)
    history = fit(spatial, task(), TrainConfig(1, batch_size, 0.01))
    assert history.steps == math.ceil(70 / batch_size)
    assert spatial[1].num_batches_tracked == history.steps  # the look ahead left no trace
    torch.manual_seed(0)
    fit(twin, task(), TrainConfig(1, batch_size, 0.01))
    assert same(state(spatial), state(twin))


def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(before)


def _deterministic():
    torch.use_deterministic_algorithms(True)
    return lambda: torch.use_deterministic_algorithms(False)


def _context(make):
    def enter():
        entered = make()
        entered.__enter__()
        return lambda: entered.__exit__(None, None, None)

    return enter


GLOBALS = {
    "float64": _float64,
    "meta": _context(lambda: torch.device("meta")),
    "no_grad": _context(torch.no_grad),
    "inference": _context(torch.inference_mode),
    "autocast": _context(lambda: torch.autocast("cpu", torch.bfloat16)),
    "deterministic": _deterministic,
}


def whole_training():
    """Data, network, masks, training and predictions, all made here."""
    data = task(seed=3)
    net = build("resnet8", data.shape, data.classes, width=4, generator=seeded(1))
    draws = {"generator": seeded(), "dtype": torch.float32, "device": "cpu"}
    masks = {name: torch.rand(p.shape, **draws) < 0.5 for name, p in prunable(net).items()}
    batch = scoring_batches(data, per_class=4, generator=seeded(2))
    config = TrainConfig(2, 16, 0.05, schedule="one_cycle", augmented=True)
    history = fit(net, data, config, masks=masks)
    apply_(net, {name: ~mask for name, mask in masks.items() if name == "classifier.weight"})
    results = {"predicted": predict(net, data, "test"), "images": batch[0][0], "raw": data.train.images}
    return outcome(history), state(net) | results, evaluate(net, data, "validation")


@pytest.mark.parametrize("name", GLOBALS)
def test_no_global_setting_changes_or_breaks_a_training(name, monkeypatch):
    expected = whole_training()
    _channel_constants.cache_clear()
    leave = GLOBALS[name]()
    try:
        found = whole_training()
    finally:
        leave()
    after = whole_training()  # nothing is left from before
    _channel_constants.cache_clear()
    for history, tensors, measured in (found, after):
        assert (history, measured) == (expected[0], expected[2])
        assert {key: t.dtype for key, t in tensors.items()} == {key: t.dtype for key, t in expected[1].items()}
        assert same(tensors, expected[1])


def clip(step, optimizer):
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 0.1)


def test_gradients_that_a_hook_sees_are_masked_unless_a_hook_wants_them_dense():
    seen = []

    def take_step(step, optimizer):
        clip(step, optimizer)
        optimizer.step()

    masking = [hook(before_step=clip)], [hook(take_step=take_step, dense_gradients=False)]
    leaving = [hook(before_step=clip, dense_gradients=True)], [hook(take_step=take_step)]
    for hooks in (*masking, *leaving, "oracle"):
        net = small()
        masks = prune(net, "random", 0.3, generator=seeded())
        pruned = [(p, ~masks[name]) for name, p in net.named_parameters() if name in masks]

        def look(step, optimizer, pruned=pruned):
            seen.append(any(parameter.grad[zero].any() for parameter, zero in pruned))

        if hooks == "oracle":
            for name, parameter in net.named_parameters():
                if name in masks:
                    parameter.register_hook(lambda g, mask=masks[name]: g * mask)
            hooks = [hook(before_step=clip)]
        fit(net, task(), TrainConfig(1, 70), masks=masks, hooks=[hook(before_step=look), *hooks])
        seen.append(state(net))
    assert seen[0:8:2] == [False, False, True, True]
    assert [same(weights, seen[-1]) for weights in seen[1:8:2]] == [True, True, False, False]


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel])
def test_a_network_in_a_wrapper_trains_as_it_does_without(wrap):
    results = []
    for around in (lambda net: net, wrap):
        net = small()
        masks = prune(net, "random", 0.3, generator=seeded())
        history = fit(around(net), task(), TrainConfig(2, 16), masks=masks)
        results.append((outcome(history), state(net)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


# ---- bad settings ------------------------------------------------------------------------------------------------

REFUSED = {
    "epochs": [0, -1, 2.0, "3", True],
    "batch_size": [0, 16.0, None],
    "lr": [0, -0.1, math.nan, math.inf, "0.1"],
    "momentum": [-0.1, 1, math.nan],
    "weight_decay": [-1e-4, math.inf, math.nan],
    "schedule": ["cosin", "", None],
    "milestones": [(0.5, 1.0), (0,), (math.nan,), 0.5],
    "gamma": [0, 1.5, -0.1],
    "warm_up": [0, 1, math.nan, None],
    "label_smoothing": [-0.1, 1],
    "seed": [-1, 0.5, True],
    "augmented": ["yes"],
    "optimizer": ["Adam", None],
    "nesterov": [1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in REFUSED.items() for value in bad])
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"TrainConfig: {name} = ") as error:
        TrainConfig(**{name: value})
    assert repr(value) in str(error.value)


def test_training_without_momentum_needs_one_setting_only():
    nets = small(), small()
    for net, nesterov in zip(nets, (True, False), strict=True):
        fit(net, task(), TrainConfig(epochs=2, momentum=0, nesterov=nesterov))
    assert same(state(nets[0]), state(nets[1]))


def test_what_has_no_parameters_is_evaluated_too():
    class First(nn.Module):
        def forward(self, images):
            return nn.functional.one_hot(torch.zeros(len(images), dtype=torch.long), 10).float()

    data = load("digits")
    share = float((data.test.labels == 0).double().mean())
    assert evaluate(First(), data, "test")["accuracy"] == pytest.approx(share)
    assert predict(First(), data, "test").argmax(1).eq(0).all()
