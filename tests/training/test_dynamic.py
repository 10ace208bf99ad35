"""Moving masks: exact counts, what is dropped and grown, and what an update does to weights, momentum and the step."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fsp import spectrum
from fsp.data import load
from fsp.masks import density, hold_, layer_densities
from fsp.pruning.methods import prune
from fsp.training.dynamic import GROWTHS, PRESETS, DynamicConfig, DynamicTraining, drop_and_grow, zeta
from fsp.training.train import TrainConfig, fit


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


def test_zeta_follows_the_cosine_to_its_end_and_stays_there_or_is_constant():
    constant = DynamicConfig(zeta0=0.3, anneal="constant")
    assert {zeta(constant, step, 100) for step in range(101)} == {0.3}
    config = DynamicConfig(zeta0=0.5, zeta_min=0.1, t_end_frac=0.8)
    values = [zeta(config, step, 100) for step in range(101)]
    expected = [0.1 + 0.2 * (1 + math.cos(math.pi * min(step / 80, 1))) for step in range(101)]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_presets_are_those_of_the_papers():
    names = ("update_every", "zeta0", "zeta_min", "anneal", "t_end_frac", "grow", "replace_step")
    table = {
        "set": (100, 0.3, 0.0, "cosine", 0.75, "random", False),
        "rigl": (100, 0.3, 0.0, "cosine", 0.75, "gradient", True),
        "set_itop": (1500, 0.5, 0.005, "cosine", 1.0, "random", False),
        "rigl_itop": (4000, 0.5, 0.005, "cosine", 1.0, "gradient", False),
    }
    for preset, values in table.items():
        assert PRESETS[preset] == DynamicConfig(**dict(zip(names, values, strict=True)))
        assert (PRESETS[preset].drop, PRESETS[preset].new_weights) == ("magnitude", "zero")
        assert (PRESETS[preset].exact_counts, PRESETS[preset].candidates, PRESETS[preset].plateau) == (True, 1, None)
    assert PRESETS["set_itop_guided"] == dataclasses.replace(PRESETS["set_itop"], candidates=3, plateau=0.05)
    assert PRESETS.keys() == table.keys() | {"set_itop_guided", "static"}


REFUSED = {
    "update_every": [0, 1.5, True],
    "zeta0": [1.0, -0.1, math.nan, "0.3"],
    "zeta_min": [0.4, -0.1],
    "anneal": ["linear"],
    "t_end_frac": [0.0, 1.1],
    "grow": ["loss"],
    "drop": ["positive"],
    "replace_step": [1],
    "exact_counts": [None],
    "new_weights": ["one"],
    "candidates": [0, 2.0],
    "plateau": [-0.1, math.nan, True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in REFUSED.items() for value in bad])
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"DynamicConfig: {name} = ") as error:
        DynamicConfig(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("grow", ["gradient", "momentum", "random_unfired"])
def test_settings_that_do_not_go_with_a_growth_are_refused(grow):
    with pytest.raises(ValueError, match="exact_counts = False is not True"):
        DynamicConfig(grow=grow, exact_counts=False)
    if grow != "random_unfired":
        with pytest.raises(ValueError, match=f"candidates = 3 is not 1: growth by {grow} gives one mask"):
            DynamicConfig(grow=grow, candidates=3)


# ---- drop_and_grow -----------------------------------------------------------------------------------------------


def update(weight, mask, fraction, growth, **options):
    """The new mask for one growth."""
    return drop_and_grow(weight, mask, fraction, [growth], **{"generator": seeded()} | options)[0]


@pytest.mark.parametrize("fraction", [-0.1, 1.5, math.nan, True])
def test_a_share_to_drop_outside_0_and_1_is_refused_by_its_value(fraction):
    weight, mask = torch.ones(3), torch.tensor([True, False, True])
    with pytest.raises(ValueError, match=rf"fraction={fraction}: expected a number in \[0, 1\]"):
        update(weight, mask, fraction, weight)


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
    new = update(
        torch.tensor(weight, dtype=torch.float32),
        torch.tensor(mask),
        fraction,
        torch.tensor(growth, dtype=torch.float32),
    )
    assert new.nonzero().flatten().tolist() == by_sorting(weight, mask, fraction, growth)


SIZES, SEEDS = st.integers(1, 6), st.integers(0, 1000)


@settings(deadline=None)
@given(SIZES, SIZES, st.floats(0, 1), st.integers(0, 3), SEEDS, st.sampled_from(["magnitude", "set"]))
def test_the_count_is_exact_under_any_ties(rows, columns, fraction, levels, seed, drop):
    generator = seeded(seed)
    weight, growth = torch.randint(-levels, levels + 1, (2, rows, columns), generator=generator).float()
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    before = weight.clone(), mask.clone(), growth.clone()
    new = update(weight, mask, fraction, growth, generator=generator, drop=drop)
    assert (new.dtype, new.shape, new.sum()) == (torch.bool, mask.shape, mask.sum())
    assert all(torch.equal(a, b) for a, b in zip((weight, mask, growth), before, strict=True))


def test_nothing_moves_at_fraction_zero_and_in_dense_and_empty_layers():
    weight, growth = torch.randn(50), torch.rand(50, generator=seeded(1))
    some = torch.arange(50) % 3 == 0
    for mask, fraction in [(some, 0.0), (some | True, 0.7), (some & False, 0.7)]:
        assert torch.equal(update(weight, mask, fraction, growth), mask)


def test_no_more_is_dropped_than_there_is_room_to_grow():
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])
    new = update(weight, on(0, 1, 2, 3, of=5), 1.0, torch.tensor([0, 0, 0, 0, 1.0]))
    assert torch.equal(new, on(1, 2, 3, 4, of=5))


def test_a_weight_just_dropped_may_come_back():
    weight, growth = torch.tensor([0.1, 5.0, 0.0, 0.0]), torch.tensor([9.0, 0.0, 1.0, 2.0])
    assert torch.equal(update(weight, on(0, 1, of=4), 0.5, growth), on(0, 1, of=4))


def test_what_is_stored_under_pruned_weights_does_not_matter():
    weight = torch.tensor([3.0, 2.0, 1.0, 100.0, -100.0, math.nan])
    new = update(weight, on(0, 1, 2, of=6), 0.3, torch.tensor([0, 0, 0, 1.0, 2, 3]))
    assert torch.equal(new, on(0, 1, 5, of=6))


def test_a_weight_that_is_kept_at_zero_is_still_told_from_a_pruned_one():
    weight = torch.zeros(6)
    new = update(weight, on(0, 1, 2, of=6), 0.0, torch.ones(6))
    assert torch.equal(new, on(0, 1, 2, of=6))


@pytest.mark.parametrize(
    ("weight", "fraction", "dropped"),
    [
        ([0.1, 0.2, 0.3, -5.0, -6.0, -7.0], 1 / 3, [0, 3]),  # by magnitude it would be 0 and 1
        ([0.1, 0.2, 0.3, -5.0, -6.0, -7.0], 1 / 2, [0, 1, 3]),
        ([1.0, 2.0, 3.0, 4.0, 5.0, -0.1], 2 / 3, [0, 1, 2, 5]),  # one negative weight only
        ([9.0, -1.0, -2.0, -3.0, -4.0, -5.0], 2 / 3, [0, 1, 2, 3]),
        ([0.0, 0.0, 1.0, -1.0, -2.0, -3.0], 1 / 2, [0, 1, 3]),
        ([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], 1 / 3, [0, 1]),
    ],
)
def test_the_drop_of_set_takes_half_from_each_sign_closest_to_zero(weight, fraction, dropped):
    growth = torch.zeros(12).index_fill(0, torch.arange(6, 12), 1.0)  # nothing that is dropped comes back
    new = update(torch.tensor(weight + [0.0] * 6), torch.arange(12) < 6, fraction, growth, drop="set")
    assert sorted(set(range(6)) - set(new.nonzero().flatten().tolist())) == dropped
    assert new.sum() == 6


def test_counts_drawn_by_bernoulli_vary_around_the_exact_one():
    size, kept, fraction, trials = 500, 100, 0.3, 2000
    weight, mask, generator = torch.rand(size) + 1, torch.arange(500) < 100, seeded(3)
    counts = []
    for _ in range(trials):
        growth = torch.rand(size, generator=generator, dtype=torch.float64)
        new = update(weight, mask, fraction, growth, generator=generator, exact_counts=False)
        counts.append(int(new.sum()))
    chance = 30 / 430  # 30 are dropped, 430 may grow
    variance = 430 * chance * (1 - chance)
    assert np.mean(counts) == pytest.approx(kept, abs=4 * math.sqrt(variance / trials))
    assert np.var(counts) == pytest.approx(variance, rel=4 * math.sqrt(2 / trials))


def test_bernoulli_growth_leaves_full_and_empty_layers_as_they_are():
    growth = torch.rand(50, generator=seeded(), dtype=torch.float64)
    for mask in (torch.ones(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool)):
        new = update(torch.randn(50), mask, 0.5, growth, exact_counts=False)
        assert torch.equal(new, mask)


def test_ties_are_drawn_by_the_generator_and_evenly():
    weight, growth, mask = torch.ones(8), torch.ones(8), on(0, 1, 2, 3, of=8)
    one = [update(weight, mask, 0.25, growth, generator=seeded(s)) for s in range(400)]
    two = [update(weight, mask, 0.25, growth, generator=seeded(s)) for s in range(400)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    shares = torch.stack(one).float().mean(0)
    # one of four is dropped, then one of the five pruned grows: kept 3/4 + 1/4 * 1/5, grown 1/5
    np.testing.assert_allclose(shares, [0.8] * 4 + [0.2] * 4, atol=4 * math.sqrt(0.16 / 400))


# ---- exploration -------------------------------------------------------------------------------------------------


def moved(config, density, total_steps, *, size=(100, 200), refresh=False, criterion=None, seed=1, layers=1):
    """Layers whose masks are moved without a training, after the last update."""
    model = nn.Sequential(*(nn.Linear(*reversed(size), bias=False) for _ in range(layers)))
    generator = seeded(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    masks = {name: torch.rand(size, generator=generator) for name, _ in model.named_parameters()}
    masks = {name: r <= r.flatten().kthvalue(round(density * r.numel())).values for name, r in masks.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    moving = DynamicTraining(model, masks, config, total_steps, generator=generator, criterion=criterion)
    for step in range(config.update_every, total_steps, config.update_every):
        if refresh:
            for parameter in model.parameters():
                nn.init.normal_(parameter, generator=generator)
        moving.take_step(step, optimizer)
    return moving


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize(
    ("kept", "total_steps", "published"),
    [(0.02, 88_000, 0.271), (0.05, 88_000, 0.555), (0.1, 88_000, 0.816), (0.2, 88_000, 0.975), (0.05, 440_000, 0.980)],
)
def test_random_growth_explores_a_layer_at_the_rate_of_in_time_overparameterisation(
    kept, total_steps, published, refresh
):
    """u <- u (1 - z d / (1 - d + z d)) for the fraction u never active, one factor an update.

    What was never active is pruned, and what is pruned grows with one chance whatever was dropped: the recursion holds
    for weights drawn anew, where the drop is random, and for weights left alone, where the last to grow drops first.
    """
    config = PRESETS["set_itop"]
    moving = moved(config, kept, total_steps, refresh=refresh)
    expected = [1 - kept]
    for step in range(1500, total_steps, 1500):
        z = zeta(config, step, total_steps)
        expected.append(expected[-1] * (1 - z * kept / (1 - kept + z * kept)))
    rows = moving.exploration()
    assert len(rows) - 1 == {88_000: 58, 440_000: 293}[total_steps]
    assert 1 - expected[-1] == pytest.approx(published, abs=6e-4)
    for row, unexplored in zip(rows, expected, strict=True):
        deviation = math.sqrt(unexplored * (1 - unexplored) / 20_000)
        assert row["fired"] == pytest.approx(1 - unexplored, abs=4 * deviation)


def test_what_is_reported_as_fired_is_the_union_of_all_masks_so_far():
    union, seen, rates = {}, [], []

    def note(step, masks):
        for name, mask in masks.items():
            union[name] = union.get(name, mask) | mask
        seen.append(step)
        rates.append(density(union))

    net = small()
    masks = prune(net, "erk", 0.2, generator=seeded())
    note(0, masks)
    config = DynamicConfig(3, 0.4, anneal="constant", t_end_frac=1.0)
    moving = DynamicTraining(net, masks, config, 40, generator=seeded(), on_update=note)
    fit(net, task(), TrainConfig(8, 16), masks=masks, hooks=[moving])
    assert all(torch.equal(moving.fired[name], union[name]) for name in masks)
    rows = moving.exploration()
    assert [row["step"] for row in rows] == seen
    assert [row["fired"] for row in rows] == rates == [row["explored"] for row in rows]
    assert rows[-1]["layers"] == layer_densities(union)
    assert rates[0] < rates[-1]


def test_growth_among_the_unfired_explores_everything_first_and_at_the_greatest_rate():
    config = DynamicConfig(1, 0.5, anneal="constant", t_end_frac=1.0, grow="random_unfired")
    unfired, random = (
        moved(dataclasses.replace(config, grow=grow), 0.1, 200).exploration() for grow in ("random_unfired", "random")
    )
    # 2,000 of 20,000 are kept and 1,000 grow at an update, each for the first time: all after 18
    assert [row["fired"] for row in unfired[:20]] == pytest.approx([0.1 + 0.05 * i for i in range(19)] + [1.0])
    full = [next(row["step"] for row in rows if row["fired"] > 0.99) for rows in (unfired, random)]
    assert full[0] == 18 < full[1]


def test_growth_among_the_unfired_fills_up_at_random_when_they_run_out():
    model = nn.Sequential(nn.Linear(20, 1, bias=False))
    masks, config = {"0.weight": torch.ones(1, 20).bool()}, DynamicConfig(1, 0.5, grow="random_unfired")
    masks["0.weight"][0, 10:] = False
    moving = DynamicTraining(model, masks, config, 1000, generator=seeded())
    moving.fired["0.weight"][0, 10:17] = True  # 3 of 10 pruned weights were never active, 5 grow
    with torch.no_grad():
        model[0].weight[0, :10] = torch.arange(1.0, 11.0)
    moving.take_step(1, torch.optim.SGD(model.parameters(), 0.1))
    assert masks["0.weight"][0, 17:].all()
    assert masks["0.weight"].sum() == 10
    assert masks["0.weight"][0, :17].sum() == 7
    assert moving.fired["0.weight"].all()


# ---- guided growth -----------------------------------------------------------------------------------------------


def by_place(mask, weight, name):
    """A criterion that depends on where the mask lies."""
    return float((mask.flatten().nonzero() % 7).sum())


@pytest.mark.parametrize("quantity", ["norm", "imdb"])
def test_guided_growth_takes_in_every_layer_the_candidate_with_the_largest_criterion(quantity):
    asked, met = [], []

    def criterion(mask, weight, name):
        assert (weight[~mask] == 0).all()
        asked.append((name, mask.clone(), getattr(spectrum.coordinate(mask, weight), quantity)))
        return asked[-1][2]

    def compare(step, masks):
        for name, mask in masks.items():
            values = [-math.inf if math.isnan(value) else value for n, _, value in asked if n == name]
            candidates = [m for n, m, _ in asked if n == name]
            assert len(values) == 3
            best = max(i for i, value in enumerate(values) if value == max(values))  # the later of equals
            assert torch.equal(mask, candidates[best])
            met.append((len(set(values)), best))
        asked.clear()

    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3))
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, std=0.4, generator=seeded(len(name) + parameter.numel()))
    masks = prune(net, "erk", 0.4, generator=seeded())
    config = DynamicConfig(2, 0.5, anneal="constant", t_end_frac=1.0, candidates=3)
    moving = DynamicTraining(net, masks, config, 40, generator=seeded(), criterion=criterion, on_update=compare)
    fit(net, task(), TrainConfig(8, 16, lr=0.05), masks=masks, hooks=[moving])
    assert len(met) == 19 * 3
    assert {best for different, best in met if different == 3} == {0, 1, 2}
    rows = moving.exploration()
    assert all(row["fired"] < row["explored"] for row in rows[1:8])
    assert rows[0]["fired"] == rows[0]["explored"]
    assert all((moving.explored[name] | ~moving.fired[name]).all() for name in masks)


def test_candidates_differ_in_what_they_grow_and_not_in_what_they_drop():
    candidates = []

    def first(mask, weight, name):
        candidates.append(mask.clone())
        return -len(candidates)

    model = nn.Sequential(nn.Linear(40, 10, bias=False))
    mask = torch.arange(400).view(10, 40) % 4 == 0
    masks = {"0.weight": mask}
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # ties everywhere
    config = DynamicConfig(1, 0.3, anneal="constant", candidates=5)
    moving = DynamicTraining(model, masks, config, 10, generator=seeded(), criterion=first)
    moving.take_step(1, torch.optim.SGD(model.parameters(), 0.1))
    assert torch.equal(masks["0.weight"], candidates[0])
    survivors = torch.stack(candidates).all(0)
    assert 70 <= survivors.sum() < 80  # 30 of 100 are dropped; one drop each would leave about 100 * .7^5 = 17
    assert all((c & ~survivors).sum() == 100 - survivors.sum() for c in candidates)


def test_a_criterion_that_is_undefined_loses_and_all_undefined_is_no_error():
    model, answers = nn.Sequential(nn.Linear(40, 10, bias=False)), [math.nan, -5.0, math.nan]
    asked, masks = [], {"0.weight": torch.arange(400).view(10, 40) < 100}

    def criterion(mask, weight, name):
        asked.append(mask.clone())
        return answers[(len(asked) - 1) % 3]

    config = DynamicConfig(1, 0.3, anneal="constant", candidates=3)
    moving = DynamicTraining(model, masks, config, 10, generator=seeded(), criterion=criterion)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    moving.take_step(1, optimizer)
    assert torch.equal(masks["0.weight"], asked[1])
    answers[1] = math.nan
    moving.take_step(2, optimizer)
    assert torch.equal(masks["0.weight"], asked[5])


def test_guided_growth_stops_at_a_plateau_and_the_training_goes_on():
    config = DynamicConfig(1, 0.5, anneal="constant", t_end_frac=1.0, candidates=3, plateau=0.5)
    moving = moved(config, 0.1, 400, criterion=by_place)
    rates = [100 * row["fired"] for row in moving.exploration()]
    rises = [abs(b - a) / 5 for a, b in zip(rates[:-5], rates[5:], strict=True)]
    assert 10 < moving.stopped < 300
    assert len(rates) == moving.stopped + 1
    assert rises[-1] <= 0.5
    assert all(rise > 0.5 for rise in rises[:-1])
    still = {name: mask.clone() for name, mask in moving.masks.items()}
    moving.take_step(400, torch.optim.SGD(moving.model.parameters(), 0.1))
    assert all(torch.equal(still[name], mask) for name, mask in moving.masks.items())


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
    """Train the small net with a moving mask; ``watch(step, optimizer, net, masks, take)`` takes each step."""
    net = small()
    masks = prune(net, "erk", density, generator=seeded(seed))
    training = TrainConfig(epochs, 16, **{"lr": 0.05, "weight_decay": 1e-3} | options)
    moving = DynamicTraining(
        net, masks, config, 5 * epochs, generator=seeded(seed), criterion=by_place, on_update=on_update
    )
    hook = moving
    if watch is not None:
        hook = SimpleNamespace(take_step=lambda step, optimizer: watch(step, optimizer, net, masks, moving.take_step))
    history = fit(net, task(), training, masks=masks, hooks=[hook])
    return net, masks, history


@pytest.mark.parametrize("preset", PRESETS)
def test_every_layer_keeps_its_count_at_each_step_of_a_long_training(preset):
    config = dataclasses.replace(PRESETS[preset], update_every=3, plateau=None)
    counts, updates = set(), []

    def watch(step, optimizer, net, masks, take):
        take(step, optimizer)
        counts.add(tuple(int(mask.sum()) for mask in masks.values()))
        assert all((net.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())

    _, masks, history = train(config, 200, watch=watch, on_update=lambda step, masks: updates.append(step))
    started = prune(small(), "erk", 0.3, generator=seeded())
    assert counts == {tuple(int(mask.sum()) for mask in started.values())}
    assert history.status == "finished"
    assert updates == [step for step in range(3, 1000, 3) if step < config.t_end_frac * 1000]
    moved = any(not torch.equal(masks[name], started[name]) for name in masks)
    assert moved == (preset != "static")


@pytest.mark.parametrize("grow", ["gradient", "momentum", "random"])
def test_growth_by_gradients_that_a_loop_of_ones_own_masks_is_refused(grow):
    net, config = small(), DynamicConfig(2, 0.5, t_end_frac=1.0, grow=grow)
    masks = prune(net, "erk", 0.3, generator=seeded())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    moving = DynamicTraining(net, masks, config, 10, generator=seeded())
    handle = hold_(optimizer, net, masks)
    if grow == "random":
        moving.take_step(1, optimizer)
    else:
        with pytest.raises(ValueError, match=r"those of '1\.weight' are masked: pass dense_gradients=True"):
            moving.take_step(1, optimizer)
    handle.remove()
    with hold_(optimizer, net, masks, dense_gradients=True):
        moving.take_step(1, optimizer)


def momentum(optimizer, parameter):
    return optimizer.state[parameter]["momentum_buffer"]


@pytest.mark.parametrize("grow", GROWTHS)
@pytest.mark.parametrize("replace_step", [False, True])
def test_grown_weights_start_at_zero_and_without_momentum(grow, replace_step):
    config = DynamicConfig(4, 0.5, anneal="constant", t_end_frac=1.0, grow=grow, replace_step=replace_step)
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
    config = DynamicConfig(4, 0.5, anneal="constant", grow="gradient")
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
    config = DynamicConfig(2, 0.5, anneal="constant", t_end_frac=1.0, grow=grow, replace_step=True)
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
    config = DynamicConfig(5, 0.3, anneal="constant", grow="gradient", replace_step=True)
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


def test_momentum_growth_takes_the_largest_running_averages_of_the_dense_gradient():
    config = DynamicConfig(5, 0.3, anneal="constant", grow="momentum")
    averages, compared = {}, 0

    def watch(step, optimizer, net, masks, take):
        nonlocal compared
        for name in masks:
            averages[name] = 0.9 * averages.get(name, 0) + net.get_parameter(name).grad
        old = dict(masks)
        take(step, optimizer)
        if step in (5, 10):
            for name, mask in masks.items():
                grown = mask & ~old[name]
                assert grown.any()
                worst = averages[name][grown].abs().min()
                assert (averages[name][~mask & ~old[name]].abs() <= worst).all()
                compared += 1

    train(config, 3, watch=watch)
    assert compared == 4


def test_new_weights_can_take_their_initial_values():
    config = DynamicConfig(4, 0.5, anneal="constant", new_weights="initial")
    net = small()
    initial = {name: t.clone() for name, t in net.state_dict().items()}
    masks = prune(net, "erk", 0.3, generator=seeded())
    old, grown_in_all = dict(masks), 0

    def note(step, masks):
        nonlocal grown_in_all
        for name, mask in masks.items():
            weight, grown = net.get_parameter(name), mask & ~old[name]
            assert torch.equal(weight[grown], initial[name][grown])
            assert (weight[~mask] == 0).all()
            grown_in_all += int(grown.sum())
        old.update(masks)

    moving = DynamicTraining(net, masks, config, 40, generator=seeded(), initial=initial, on_update=note)
    fit(net, task(), TrainConfig(8, 16), masks=masks, hooks=[moving])
    assert grown_in_all > 50


def test_masks_and_weights_are_shown_as_they_leave_and_as_they_come():
    events, net = [], small()
    masks = prune(net, "erk", 0.3, generator=seeded())

    def note(kind):
        return lambda step, given: events.append((kind, step, dict(given), net.state_dict()["1.weight"].clone()))

    moving = DynamicTraining(
        net, masks, DynamicConfig(4, 0.5), 40, generator=seeded(), before_update=note("end"), on_update=note("start")
    )
    fit(net, task(), TrainConfig(8, 16), masks=masks, hooks=[moving])
    assert [event[:2] for event in events] == [(kind, step) for step in range(4, 30, 4) for kind in ("end", "start")]
    for (_, _, incoming, after), (_, _, outgoing, _) in zip(events[1:-1:2], events[2::2], strict=True):
        assert all(torch.equal(incoming[name], outgoing[name]) for name in masks)
        assert (after[~incoming["1.weight"]] == 0).all()
    for (_, _, old, before), (_, _, new, after) in zip(events[::2], events[1::2], strict=True):
        stay = old["1.weight"] & new["1.weight"]
        assert torch.equal(before[stay], after[stay])
        assert (before[~old["1.weight"]] == 0).all()
        assert not torch.equal(old["1.weight"], new["1.weight"])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DynamicConfig(10, t_end_frac=0.5), [10, 20]),  # an update at the end itself would drop nothing
        (DynamicConfig(10, t_end_frac=0.51), [10, 20]),
        (DynamicConfig(10, t_end_frac=1.0), [10, 20, 30, 40]),  # what would grow at the last step is never trained
        (DynamicConfig(7, t_end_frac=0.75, grow="gradient", replace_step=True), [7, 14, 21, 28, 35]),
        (DynamicConfig(100), []),
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


def topologies(config, seed, epochs=8):
    """All masks of a training, in order."""
    found = []

    def note(step, masks):
        found.append(torch.cat([mask.flatten() for mask in masks.values()]))

    train(config, epochs, seed=seed, on_update=note)
    return torch.stack(found)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_seed_gives_one_sequence_of_topologies(preset):
    config = dataclasses.replace(PRESETS[preset], update_every=4, plateau=None)
    first, again, other = (topologies(config, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_static_masks_never_move_but_are_reported_as_often_as_the_others():
    config = dataclasses.replace(PRESETS["static"], update_every=2)
    found = topologies(config, 0, epochs=40)
    assert len(found) == 99
    assert (found == found[0]).all()
    plain, net = small(), small()
    masks = prune(plain, "erk", 0.3, generator=seeded())
    fit(plain, task(), TrainConfig(4, 16), masks=dict(masks))
    moving = DynamicTraining(net, masks, config, 20, generator=seeded())
    fit(net, task(), TrainConfig(4, 16), masks=masks, hooks=[moving])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters(), strict=True))


def test_moving_masks_leave_the_global_random_state_alone():
    net, data = small(), task()
    masks = prune(net, "erk", 0.3, generator=seeded())
    moving = DynamicTraining(net, masks, DynamicConfig(2), 20, generator=seeded())
    before = torch.get_rng_state()
    fit(net, data, TrainConfig(4, 16), masks=masks, hooks=[moving])
    assert torch.equal(torch.get_rng_state(), before)


# ---- going on after an interruption ------------------------------------------------------------------------------

KINDS = {
    "random": DynamicConfig(3, 0.5, t_end_frac=1.0),
    "bernoulli": DynamicConfig(3, 0.5, t_end_frac=1.0, exact_counts=False),
    "unfired": DynamicConfig(3, 0.5, t_end_frac=1.0, grow="random_unfired", drop="set"),
    "rigl": DynamicConfig(3, 0.5, grow="gradient", replace_step=True),
    "momentum": DynamicConfig(3, 0.5, t_end_frac=1.0, grow="momentum"),
    "initial": DynamicConfig(3, 0.5, t_end_frac=1.0, new_weights="initial"),
    "guided": DynamicConfig(3, 0.5, t_end_frac=1.0, candidates=3, plateau=2.0),
}


class Killed(Exception):
    """Ends a training from outside."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_is_killed_and_continued_is_the_same_to_the_last_bit(kind, tmp_path):
    def run(checkpoint, until=None):
        def before_step(step, optimizer):
            if step == until:
                raise Killed

        net = small()
        masks = prune(net, "erk", 0.3, generator=seeded())
        options = {"generator": seeded(), "criterion": by_place, "initial": net.state_dict()}
        moving = DynamicTraining(net, masks, KINDS[kind], 60, **options)
        hooks = [SimpleNamespace(before_step=before_step), moving]
        fit(net, task(), TrainConfig(12, 16), masks=masks, hooks=hooks, checkpoint=checkpoint, checkpoint_every_s=0)
        return net, moving

    whole, moved = run(None)
    for until in (2, 30, 31, 46):  # in the middle, and after and before an update
        with pytest.raises(Killed):
            run(tmp_path / "c.safetensors", until)
    net, moving = run(tmp_path / "c.safetensors")
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in whole.state_dict().items())
    ours, theirs = moved.state_dict(), moving.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if isinstance(ours[name], torch.Tensor))
    assert moving.exploration() == moved.exploration()
    assert moving.stopped == moved.stopped
    assert kind != "guided" or 0 < moving.stopped < 60
    assert moving.exploration()[-1]["fired"] > moving.exploration()[0]["fired"]


@pytest.mark.parametrize("spoil", ["fired.1.weight", "momentum.1.weight"])
def test_a_state_is_a_copy_and_one_of_another_network_or_growth_is_refused_and_changes_nothing(spoil):
    net = small()
    masks = prune(net, "erk", 0.3, generator=seeded())
    moving = DynamicTraining(net, masks, KINDS["random"], 60, generator=seeded())
    saved = moving.state_dict()
    twin = copy.deepcopy(saved)
    moving.take_step(3, torch.optim.SGD(net.parameters(), 0.1))
    assert repr(saved) == repr(twin) != repr(moving.state_dict())
    saved[spoil] = torch.zeros(5, 16)
    before = repr(moving.state_dict())
    with pytest.raises(ValueError, match=rf"saved with other masks or another `grow`: {spoil} is "):
        moving.load_state_dict(saved)
    assert repr(moving.state_dict()) == before
    moving.load_state_dict(twin)
    assert repr(moving.state_dict()) == repr(twin)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (PRESETS["set_itop_guided"], {}, "candidates = 3 needs criterion="),
        (DynamicConfig(new_weights="initial"), {}, "needs initial=, .* initial weights of '1.weight'"),
        (DynamicConfig(new_weights="initial"), {"initial": {"1.weight": torch.zeros(2)}}, "of '1.weight', shape"),
        (DynamicConfig(), {"masks": {"elsewhere": on(0, of=3)}}, "belongs to no parameter"),
    ],
)
def test_what_a_config_needs_is_asked_for_at_once(config, options, message):
    net = small()
    options = {"masks": prune(net, "erk", 0.3, generator=seeded()), "generator": seeded()} | options
    with pytest.raises(ValueError, match=message):
        DynamicTraining(net, config=config, total_steps=10, **options)


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
@pytest.mark.parametrize("preset", ["set", "rigl", "set_itop_guided"])
def test_masks_move_on_cuda_with_exact_counts(preset):
    data = load("synthetic", shape=(1, 4, 4), classes=3, size=100, validation=0, device="cuda")
    net = small().cuda()
    masks = prune(net, "erk", 0.3, generator=seeded())
    before = {name: mask.clone() for name, mask in masks.items()}
    config = dataclasses.replace(PRESETS[preset], update_every=3)
    moving = DynamicTraining(net, masks, config, 50, generator=seeded(), criterion=by_place)
    history = fit(net, data, TrainConfig(10, 16), masks=masks, hooks=[moving])
    assert history.status == "finished"
    for name, mask in masks.items():
        assert mask.is_cuda
        assert mask.sum() == before[name].sum()
        assert not torch.equal(mask, before[name])
        assert (net.get_parameter(name)[~mask] == 0).all()
