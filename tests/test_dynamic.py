"""Moving masks: exact counts, what is dropped and grown, and what an update does to weights, momentum and the step."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fsp.data import load
from fsp.dynamic import PRESETS, DynamicSparsity, drop_and_grow, stepper, zeta
from fsp.masks import Masks
from fsp.prune import prune
from fsp.train import TrainConfig, fit


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def on(*indices, of):
    mask = torch.zeros(of, dtype=torch.bool)
    mask[list(indices)] = True
    return mask


# ---- zeta --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_zeta_goes_from_zeta0_over_their_mean_to_zeta_min(preset):
    config = PRESETS[preset]
    end = config.t_end_frac * 1000
    assert zeta(config, 0, 1000) == config.zeta0
    assert zeta(config, end / 2, 1000) == pytest.approx((config.zeta0 + config.zeta_min) / 2)
    assert zeta(config, end, 1000) == pytest.approx(config.zeta_min, abs=1e-15)
    assert zeta(config, 1000, 1000) == pytest.approx(config.zeta_min, abs=1e-15)  # and stays there


def test_zeta_follows_the_cosine_and_never_rises():
    config = DynamicSparsity(zeta0=0.5, zeta_min=0.1, t_end_frac=0.8)
    values = [zeta(config, step, 100) for step in range(101)]
    expected = [0.1 + 0.2 * (1 + math.cos(math.pi * min(step / 80, 1))) for step in range(101)]
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_zeta_can_stay_constant():
    config = DynamicSparsity(zeta0=0.3, anneal="constant")
    assert {zeta(config, step, 100) for step in range(101)} == {0.3}


def test_presets_are_those_of_the_papers():
    table = {
        "set": (100, 0.3, 0.0, "cosine", 0.75, "random", False),
        "rigl": (100, 0.3, 0.0, "cosine", 0.75, "gradient", True),
        "set_itop": (1500, 0.5, 0.005, "cosine", 1.0, "random", False),
        "rigl_itop": (4000, 0.5, 0.005, "cosine", 1.0, "gradient", False),
    }
    assert {name: dataclasses.astuple(PRESETS[name]) for name in table} == table
    assert PRESETS.keys() == table.keys() | {"static"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("update_every", 0),
        ("update_every", 1.5),
        ("zeta0", 1.0),
        ("zeta0", -0.1),
        ("zeta0", math.nan),
        ("zeta_min", 0.4),
        ("zeta_min", -0.1),
        ("anneal", "linear"),
        ("t_end_frac", 0.0),
        ("t_end_frac", 1.1),
        ("grow", "momentum"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"DynamicSparsity: {name} = ") as error:
        DynamicSparsity(**{name: value})
    assert repr(value) in str(error.value)


# ---- drop_and_grow -----------------------------------------------------------------------------------------------


def by_sorting(weight, mask, fraction, growth):
    """One update with plain lists; weights and growths must have no ties."""
    kept = [i for i in range(len(weight)) if mask[i]]
    n = min(math.ceil(fraction * len(kept)), len(weight) - len(kept))
    survivors = sorted(kept, key=lambda i: -abs(weight[i]))[: len(kept) - n]
    pruned = [i for i in range(len(weight)) if i not in survivors]
    return sorted(survivors + sorted(pruned, key=lambda i: -growth[i])[:n])


@settings(deadline=None)
@given(st.data(), st.integers(1, 40), st.floats(0, 1))
def test_an_update_drops_the_smallest_and_grows_the_largest_growth(data, size, fraction):
    weight = data.draw(st.permutations(range(1, size + 1)))
    signs = data.draw(st.lists(st.sampled_from([-1, 1]), min_size=size, max_size=size))
    growth = data.draw(st.permutations(range(size)))
    mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    weight = [w * s for w, s in zip(weight, signs, strict=True)]
    new = drop_and_grow(
        torch.tensor(weight, dtype=torch.float32),
        torch.tensor(mask),
        fraction,
        torch.tensor(growth, dtype=torch.float32),
        generator=seeded(),
    )
    assert new.nonzero().flatten().tolist() == by_sorting(weight, mask, fraction, growth)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.integers(0, 3), st.integers(0, 1000))
def test_the_count_is_exact_under_any_ties(rows, columns, fraction, levels, seed):
    generator = seeded(seed)
    weight, growth = torch.randint(-levels, levels + 1, (2, rows, columns), generator=generator).float()
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    before = weight.clone(), mask.clone(), growth.clone()
    new = drop_and_grow(weight, mask, fraction, growth, generator=generator)
    assert new.dtype == torch.bool
    assert new.shape == mask.shape
    assert new.sum() == mask.sum()
    assert all(torch.equal(a, b) for a, b in zip((weight, mask, growth), before, strict=True))


def test_nothing_moves_at_fraction_zero_and_in_dense_and_empty_layers():
    weight, growth = torch.randn(50, generator=seeded()), torch.rand(50, generator=seeded(1))
    some = torch.arange(50) % 3 == 0
    for mask, fraction in [(some, 0.0), (some | True, 0.7), (some & False, 0.7)]:
        assert torch.equal(drop_and_grow(weight, mask, fraction, growth, generator=seeded()), mask)


def test_no_more_is_dropped_than_there_is_room_to_grow():
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])
    new = drop_and_grow(weight, on(0, 1, 2, 3, of=5), 1.0, torch.tensor([0, 0, 0, 0, 1.0]), generator=seeded())
    assert torch.equal(new, on(1, 2, 3, 4, of=5))


def test_a_weight_just_dropped_may_come_back():
    weight, growth = torch.tensor([0.1, 5.0, 0.0, 0.0]), torch.tensor([9.0, 0.0, 1.0, 2.0])
    assert torch.equal(drop_and_grow(weight, on(0, 1, of=4), 0.5, growth, generator=seeded()), on(0, 1, of=4))


def test_what_is_stored_under_pruned_weights_does_not_matter():
    weight = torch.tensor([3.0, 2.0, 1.0, 100.0, -100.0, math.nan])
    new = drop_and_grow(weight, on(0, 1, 2, of=6), 0.3, torch.tensor([0, 0, 0, 1.0, 2, 3]), generator=seeded())
    assert torch.equal(new, on(0, 1, 5, of=6))


def test_a_weight_that_is_kept_at_zero_is_still_told_from_a_pruned_one():
    weight = torch.zeros(6)
    new = drop_and_grow(weight, on(0, 1, 2, of=6), 0.0, torch.ones(6), generator=seeded())
    assert torch.equal(new, on(0, 1, 2, of=6))


def test_ties_are_drawn_by_the_generator_and_evenly():
    weight, growth, mask = torch.ones(8), torch.ones(8), on(0, 1, 2, 3, of=8)
    one = [drop_and_grow(weight, mask, 0.25, growth, generator=seeded(s)) for s in range(400)]
    two = [drop_and_grow(weight, mask, 0.25, growth, generator=seeded(s)) for s in range(400)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    shares = torch.stack(one).float().mean(0)
    # one of four is dropped, then one of the five pruned grows: kept 3/4 + 1/4 * 1/5, grown 1/5
    np.testing.assert_allclose(shares, [0.8] * 4 + [0.2] * 4, atol=4 * math.sqrt(0.16 / 400))


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    drop_and_grow(torch.ones(8), on(0, 1, 2, of=8), 0.5, torch.ones(8), generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


# ---- exploration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "total_steps", "published"),
    [(0.02, 88_000, 0.271), (0.05, 88_000, 0.555), (0.1, 88_000, 0.816), (0.2, 88_000, 0.975), (0.05, 440_000, 0.980)],
)
def test_random_growth_explores_a_layer_at_the_rate_of_in_time_overparameterisation(density, total_steps, published):
    """u <- u (1 - z d / (1 - d + z d)) for the fraction u never active, one factor an update (others.md 2.2)."""
    config, size, generator = PRESETS["set_itop"], 20_000, seeded(1)
    steps = range(config.update_every, total_steps, config.update_every)
    mask = torch.arange(size) < density * size
    fired, unexplored = mask.clone(), 1 - density
    for step in steps:
        z = zeta(config, step, total_steps)
        unexplored *= 1 - z * density / (1 - density + z * density)
        weight = torch.randn(size, generator=generator)  # drawn anew, so that what is dropped is random
        mask = drop_and_grow(weight, mask, z, torch.rand(size, generator=generator), generator=generator)
        fired |= mask
    assert len(steps) == {88_000: 58, 440_000: 293}[total_steps]
    assert 1 - unexplored == pytest.approx(published, abs=6e-4)
    deviation = math.sqrt(unexplored * (1 - unexplored) / size)
    assert fired.float().mean().item() == pytest.approx(1 - unexplored, abs=4 * deviation)


# ---- inside fit --------------------------------------------------------------------------------------------------


def task(size=100):
    """80 training images of three classes and 20 for testing; 5 steps an epoch in batches of 16."""
    return load("synthetic", shape=(1, 4, 4), classes=3, size=size, validation=0)


def small(seed=0):
    """Two prunable layers around a batch norm: 16 inputs, 12 hidden units, 3 classes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    for name, parameter in net.named_parameters():
        if not name.startswith("2."):
            nn.init.normal_(parameter, std=0.4, generator=seeded(seed + parameter.numel()))
    return net


def train(config, epochs, *, density=0.3, seed=0, watch=None, on_update=None, **options):
    """Train the small net with a moving mask; ``watch(step, optimizer, net, masks, take_step)`` takes each step."""
    net = small()
    masks = prune(net, "erk", density, generator=seeded(seed))
    training = TrainConfig(epochs, 16, **{"lr": 0.05, "weight_decay": 1e-3} | options)
    take = stepper(net, masks, config, 5 * epochs, generator=seeded(seed), on_update=on_update)
    step = take if watch is None else lambda number, optimizer: watch(number, optimizer, net, masks, take)
    history = fit(net, task(), training, masks=masks, take_step=step)
    return net, masks, history


@pytest.mark.parametrize("preset", PRESETS)
def test_every_layer_keeps_its_count_at_each_of_thousands_of_steps(preset):
    config = dataclasses.replace(PRESETS[preset], update_every=3)
    counts, updates = set(), []

    def watch(step, optimizer, net, masks, take):
        take(step, optimizer)
        counts.add(tuple(int(mask.sum()) for mask in masks.values()))
        assert all((net.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())

    _, masks, history = train(config, 400, watch=watch, on_update=lambda step, masks: updates.append(step))
    started = prune(small(), "erk", 0.3, generator=seeded())
    assert counts == {tuple(int(mask.sum()) for mask in started.values())}
    assert history.status == "finished"
    assert updates == [step for step in range(3, 2000, 3) if step < config.t_end_frac * 2000]
    moved = any(not torch.equal(masks[name], started[name]) for name in masks)
    assert moved == (preset != "static")


def momentum(optimizer, parameter):
    return optimizer.state[parameter]["momentum_buffer"]


@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("replace_step", [False, True])
def test_grown_weights_start_at_zero_and_without_momentum(grow, replace_step):
    config = DynamicSparsity(4, 0.5, anneal="constant", t_end_frac=1.0, grow=grow, replace_step=replace_step)
    grown_in_all = 0

    def watch(step, optimizer, net, masks, take):
        nonlocal grown_in_all
        if step % 4 or step == 40:  # no update at the last step
            return take(step, optimizer)
        old = dict(masks)
        take(step, optimizer)
        for name, mask in masks.items():
            weight = net.get_parameter(name)
            grown = mask & ~old[name]
            grown_in_all += int(grown.sum())
            assert (weight[grown] == 0).all()
            assert (momentum(optimizer, weight)[grown] == 0).all()
            assert (weight[~mask] == 0).all()

    train(config, 8, watch=watch)
    assert grown_in_all > 50


def test_grown_weights_are_trained_from_the_next_step_on():
    config = DynamicSparsity(4, 0.5, anneal="constant", grow="gradient")
    grown, trained = {}, []

    def watch(step, optimizer, net, masks, take):
        old = dict(masks)
        take(step, optimizer)
        if step == 4:
            grown.update({name: masks[name] & ~old[name] for name in masks})
        if step == 5:
            for name, new in grown.items():
                weight = net.get_parameter(name)
                trained.append(weight[new & (weight.grad != 0)] != 0)

    train(config, 2, watch=watch)
    assert torch.cat(trained).all()
    assert len(torch.cat(trained)) > 5


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_a_weight_dropped_and_grown_at_once_keeps_its_value(grow):
    config = DynamicSparsity(2, 0.5, anneal="constant", t_end_frac=1.0, grow=grow, replace_step=True)
    came_back = 0

    def watch(step, optimizer, net, masks, take):
        nonlocal came_back
        if step % 2 or step == 40:  # no update at the last step
            return take(step, optimizer)
        before = {name: (mask, net.get_parameter(name).detach().clone()) for name, mask in masks.items()}
        take(step, optimizer)
        for name, (old, weight) in before.items():
            kept = weight[old].abs()
            n = min(math.ceil(0.5 * len(kept)), int((~old).sum()))
            smallest = old & (weight.abs() <= kept.sort().values[n - 1])
            back = smallest & masks[name]
            came_back += int(back.sum())
            assert torch.equal(net.get_parameter(name)[back], weight[back])

    train(config, 8, density=0.6, watch=watch)
    assert came_back > 20


@pytest.mark.parametrize("preset", ["rigl", "set", "set_itop", "rigl_itop"])
def test_only_the_update_of_rigl_takes_the_place_of_the_optimiser_step(preset):
    config = dataclasses.replace(PRESETS[preset], update_every=5)
    changed = {True: [], False: []}  # at updates and at other steps

    def watch(step, optimizer, net, masks, take):
        old, before = dict(masks), {name: p.detach().clone() for name, p in net.named_parameters()}
        buffers = {name: momentum(optimizer, p).clone() for name, p in net.named_parameters()} if step > 1 else {}
        take(step, optimizer)
        moved = []
        for name, parameter in net.named_parameters():
            stay = masks[name] & old[name] if name in masks else torch.ones_like(parameter, dtype=torch.bool)
            moved.append(not torch.equal(parameter[stay], before[name][stay]))
            if step > 1:
                moved.append(not torch.equal(momentum(optimizer, parameter)[stay], buffers[name][stay]))
        changed[step % 5 == 0].append(moved)

    train(config, 3, watch=watch)
    assert len(changed[True]) == 3
    last_updates = changed[True][:2]  # the third falls after t_end for some and is an ordinary step
    assert all(all(moved) for moved in changed[False])
    assert all(not any(m) if preset == "rigl" else all(m) for m in last_updates)


def test_gradient_growth_takes_the_largest_gradients_among_what_is_pruned():
    config = DynamicSparsity(5, 0.3, anneal="constant", grow="gradient", replace_step=True)
    compared = 0

    def watch(step, optimizer, net, masks, take):
        nonlocal compared
        old = dict(masks)
        before = {name: net.get_parameter(name).detach().flatten().tolist() for name in masks}
        slopes = {name: net.get_parameter(name).grad.abs().flatten().tolist() for name in masks}
        take(step, optimizer)
        if step == 5:
            for name, mask in masks.items():
                expected = by_sorting(before[name], old[name].flatten().tolist(), 0.3, slopes[name])
                assert mask.flatten().nonzero().flatten().tolist() == expected
                assert any(slopes[name][i] > 0 for i in range(mask.numel()) if not old[name].flatten()[i])
                compared += 1

    train(config, 2, watch=watch)
    assert compared == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DynamicSparsity(10, t_end_frac=0.5), [10, 20]),  # an update at the end itself would drop nothing
        (DynamicSparsity(10, t_end_frac=0.51), [10, 20]),
        (DynamicSparsity(10, t_end_frac=1.0), [10, 20, 30, 40]),  # what would grow at the last step is never trained
        (DynamicSparsity(7, t_end_frac=0.75, grow="gradient", replace_step=True), [7, 14, 21, 28, 35]),
        (DynamicSparsity(100), []),
    ],
)
def test_updates_come_every_so_many_steps_and_end_in_time(config, expected):
    found, last = [], []

    def watch(step, optimizer, net, masks, take):
        old = dict(masks)
        take(step, optimizer)
        if any(old[name] is not masks[name] for name in masks):
            last.append(step)

    train(config, 10, watch=watch, on_update=lambda step, masks: found.append(step))
    assert found == last == [step for step in expected if step < config.t_end_frac * 50]


def test_every_update_is_reported_with_its_masks_already_on_the_weights():
    config, seen = DynamicSparsity(4, 0.5, anneal="constant", grow="gradient"), []
    net = small()
    masks: Masks = prune(net, "erk", 0.3, generator=seeded())

    def on_update(step, given):
        assert given is masks
        for name, mask in given.items():
            assert (net.get_parameter(name)[~mask] == 0).all()
        seen.append((step, [mask.clone() for mask in given.values()]))

    take = stepper(net, masks, config, 40, generator=seeded(), on_update=on_update)
    fit(net, task(), TrainConfig(8, 16), masks=masks, take_step=take)
    assert [step for step, _ in seen] == [4, 8, 12, 16, 20, 24, 28]
    assert all(not torch.equal(a[0], b[0]) for (_, a), (_, b) in itertools.pairwise(seen))


def topologies(config, seed, epochs=8):
    """All masks of a training, in order."""
    found = []

    def note(step, masks):
        found.append(torch.cat([mask.flatten() for mask in masks.values()]))

    train(config, epochs, seed=seed, on_update=note)
    return torch.stack(found)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_seed_gives_one_sequence_of_topologies(preset):
    config = dataclasses.replace(PRESETS[preset], update_every=4)
    first, again, other = (topologies(config, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_static_masks_never_move_but_are_reported_as_often_as_the_others():
    config = dataclasses.replace(PRESETS["static"], update_every=2)
    found = topologies(config, 0, epochs=40)
    assert len(found) == 99
    assert (found == found[0]).all()
    plain, moving = small(), small()
    masks = prune(plain, "erk", 0.3, generator=seeded())
    fit(plain, task(), TrainConfig(4, 16), masks=dict(masks))
    take = stepper(moving, masks, config, 20, generator=seeded())
    fit(moving, task(), TrainConfig(4, 16), masks=masks, take_step=take)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), moving.parameters(), strict=True))


def test_moving_masks_leave_the_global_random_state_alone():
    net, data = small(), task()
    masks = prune(net, "erk", 0.3, generator=seeded())
    take = stepper(net, masks, DynamicSparsity(2), 20, generator=seeded())
    before = torch.get_rng_state()
    fit(net, data, TrainConfig(4, 16), masks=masks, take_step=take)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mask_that_fits_no_parameter_is_refused_at_once():
    with pytest.raises(ValueError, match="belongs to no parameter"):
        stepper(small(), {"elsewhere": on(0, of=3)}, DynamicSparsity(), 10, generator=seeded())


@pytest.mark.parametrize("preset", ["set", "rigl"])
def test_a_training_with_moving_masks_that_diverges_ends_with_a_record_that_says_so(preset):
    config = dataclasses.replace(PRESETS[preset], update_every=2)
    updates = []
    _, masks, history = train(
        config, 10, lr=1e18, schedule="constant", on_update=lambda step, masks: updates.append(step)
    )
    started = prune(small(), "erk", 0.3, generator=seeded())
    assert [mask.sum() for mask in masks.values()] == [mask.sum() for mask in started.values()]
    assert len(updates) < history.steps // 2  # broken weights have no order, so nothing moves any more
    assert history.status == "diverged"
    assert math.isnan(history.test_accuracy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["set", "rigl"])
def test_masks_move_on_cuda_with_exact_counts(preset):
    data = load("synthetic", shape=(1, 4, 4), classes=3, size=100, validation=0, device="cuda")
    net = small().cuda()
    masks = prune(net, "erk", 0.3, generator=seeded())
    before = {name: mask.clone() for name, mask in masks.items()}
    take = stepper(net, masks, dataclasses.replace(PRESETS[preset], update_every=3), 50, generator=seeded())
    history = fit(net, data, TrainConfig(10, 16), masks=masks, take_step=take)
    assert history.status == "finished"
    for name, mask in masks.items():
        assert mask.is_cuda
        assert mask.sum() == before[name].sum()
        assert not torch.equal(mask, before[name])
        assert (net.get_parameter(name)[~mask] == 0).all()
