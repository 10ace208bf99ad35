"""Iterative magnitude pruning against hand-written levels: exact counts, rewinding to the last bit, and a directory
that continues where a call was interrupted."""

import dataclasses
import math
import shutil
from collections import OrderedDict
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from fsp import progress
from fsp.data import load
from fsp.files import CannotResume, load_tensors, save_tensors
from fsp.masks import kept_count, prunable
from fsp.masks import load as load_masks
from fsp.models import build
from fsp.models.mlp import mlp
from fsp.pruning import lottery
from fsp.pruning.lottery import imp, kept_by_level, rewind_
from fsp.pruning.methods import prune
from fsp.training.train import TrainConfig, fit, steps

DATA = load("digits")
CONFIG = TrainConfig(epochs=2, batch_size=256, lr=0.1)  # 12 steps
SIZES = {"linear1.weight": 1024, "linear2.weight": 128, "classifier.weight": 80}
TOTAL = 1232
LAST = 3  # levels of most tests, beside the dense one


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net(seed=0):
    """64 inputs, 16 and 8 hidden units with batch norm, 10 classes."""
    model = mlp((1, 8, 8), 10, hidden=(16, 8), norm=True)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3, generator=seeded(seed + parameter.numel()))
        elif len(parameter) == 10:
            nn.init.zeros_(parameter)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def outcome(levels):
    """Everything of some levels but wall times; repr, because nan is not equal to itself."""
    return [
        (
            level.level,
            level.density,
            {name: mask.tolist() for name, mask in level.masks.items()},
            {name: t.tolist() for name, t in level.rewound.items()},
            repr(dataclasses.replace(level.history, seconds=0)),
        )
        for level in levels
    ]


def counts(levels):
    return [sum(int(mask.sum()) for mask in level.masks.values()) for level in levels]


def no_training(*_, **__):
    raise AssertionError("nothing should be trained")


def watched(monkeypatch):
    """Weights and options with which imp starts each training."""
    starts = []

    def note(model, data, config, **options):
        starts.append((state(model), options))
        return fit(model, data, config, **options)

    monkeypatch.setattr(lottery, "fit", note)
    return starts


# ---- how many weights a level keeps ------------------------------------------------------------------------------


@given(n=st.integers(1, 10**8), percent=st.integers(1, 99), levels=st.integers(1, 40))
@example(n=100, percent=29, levels=1)  # .29 * 100 is a little less than 29 in binary
def test_a_level_keeps_what_a_recursion_in_whole_numbers_says(n, percent, levels):
    expected = [n]
    for _ in range(levels):
        expected.append(expected[-1] - expected[-1] * percent // 100)
    if len(set(expected)) == len(expected):
        assert kept_by_level(n, percent / 100, levels=levels) == expected
    else:
        with pytest.raises(ValueError, match="would prune nothing"):
            kept_by_level(n, percent / 100, levels=levels)


@given(n=st.integers(1000, 10**8), percent=st.integers(5, 90), thousandths=st.integers(20, 989))
def test_with_a_density_the_last_level_keeps_exactly_what_pruning_at_initialisation_keeps(n, percent, thousandths):
    density = thousandths / 1000
    found = kept_by_level(n, percent / 100, density=density)
    target, free = kept_count(n, density), [n]
    while free[-1] > target:
        free.append(free[-1] - free[-1] * percent // 100)
    assert found == [*free[:-1], target]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 2, "rate": 0}, r"rate 0 is not in \(0, 1\)"),
        ({"levels": 2, "rate": 1}, "rate 1 is not"),
        ({"levels": 2, "rate": "0.2"}, "rate '0.2' is not"),
        ({}, "levels=None and density=None: give exactly one"),
        ({"levels": 2, "density": 0.5}, "levels=2 and density=0.5: give exactly one"),
        ({"levels": 0}, "levels 0 is not a whole number"),
        ({"density": 0}, r"density 0 is not in \(0, 1\]"),
        ({"density": 1.0}, "density 1.0 keeps all 1232 weights"),
        ({"levels": 60}, r"level \d+ would prune nothing: 4 of 1232 weights are left, fewer than 1 / rate = 5"),
        ({"density": 0.001}, r"level \d+ would prune nothing"),
        ({"levels": 28, "scope": "layer"}, "level 28 would prune nothing: no layer that is still to be pruned"),
        ({"levels": 2, "scope": "all"}, 'scope is "global" or "layer"'),
        ({"levels": 2, "exclude": ["linear9"]}, "exclude='linear9' matches no"),
        ({"levels": 2, "rewind": 12}, r"rewind=12: expected a whole number of steps from 0 to 11"),
        ({"levels": 2, "rewind": -1}, "rewind=-1"),
    ],
)
def test_a_bad_argument_is_refused_before_any_training_and_leaves_no_file(monkeypatch, tmp_path, options, message):
    monkeypatch.setattr(lottery, "fit", no_training)
    with pytest.raises(ValueError, match=message):
        imp(net(), DATA, CONFIG, directory=tmp_path / "imp", **options)
    assert not (tmp_path / "imp").exists()


def test_a_density_that_prunes_no_layer_is_refused_in_layer_scope():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), *(nn.Linear(1, 1) for _ in range(200)), nn.Linear(1, 10))
    with pytest.raises(ValueError, match=r"density 0\.99 keeps all weights of every layer"):
        imp(model, DATA, CONFIG, density=0.99, scope="layer")


# ---- masks -------------------------------------------------------------------------------------------------------


def test_levels_keep_the_recursion_of_the_rate_and_are_nested():
    levels = imp(net(), DATA, CONFIG, levels=4)
    assert [level.level for level in levels] == [0, 1, 2, 3, 4]
    assert counts(levels) == [1232, 986, 789, 632, 506]  # less 246, 197, 157, 126
    assert [level.density for level in levels] == [count / TOTAL for count in counts(levels)]
    for before, after in pairwise(levels):
        assert [*after.masks] == [*SIZES]
        assert all(not (after.masks[name] & ~before.masks[name]).any() for name in SIZES)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_each_level_prunes_the_smallest_weights_that_the_level_before_it_ended_with(tmp_path, scope):
    levels = imp(net(), DATA, CONFIG, levels=LAST, rewind=4, scope=scope, directory=tmp_path)
    groups = [[*SIZES]] if scope == "global" else [[name] for name in SIZES]
    for before, after in pairwise(levels):
        ended = load_file(tmp_path / f"level_{before.level:02d}.safetensors")
        for names in groups:
            size = np.concatenate([np.abs(ended[name][before.masks[name]].numpy()) for name in names])
            kept = np.concatenate([after.masks[name][before.masks[name]].numpy() for name in names])
            cut = np.sort(size)[len(size) // 5]  # without ties: len // 5 weights are smaller
            assert (kept == (size >= cut)).all()


def test_in_layer_scope_every_layer_has_the_recursion_of_its_own():
    levels = imp(net(), DATA, CONFIG, levels=LAST, scope="layer")
    for name, expected in {
        "linear1.weight": [1024, 820, 656, 525],
        "linear2.weight": [128, 103, 83, 67],
        "classifier.weight": [80, 64, 52, 42],
    }.items():
        assert [int(level.masks[name].sum()) for level in levels] == expected


@pytest.mark.parametrize("density", [0.3, 0.64, 0.077])
def test_with_a_density_imp_ends_with_as_many_weights_as_a_method_at_initialisation(density):
    levels = imp(net(), DATA, TrainConfig(epochs=1, batch_size=512), density=density)
    masks = prune(net(), "snip", density, batches=[(DATA.train.images[:20], DATA.train.labels[:20])])
    assert counts(levels)[-1] == sum(int(mask.sum()) for mask in masks.values())
    assert counts(levels)[-2] * 0.8 - 1 < counts(levels)[-1] < counts(levels)[-2]


def test_with_a_density_in_layer_scope_every_layer_ends_at_its_own_count():
    config = TrainConfig(epochs=1, batch_size=512)
    levels = imp(net(), DATA, config, density=0.03, scope="layer")
    last = {name: int(mask.sum()) for name, mask in levels[-1].masks.items()}
    assert last == {name: kept_count(n, 0.03) for name, n in SIZES.items()}
    assert len(levels) == len(kept_by_level(TOTAL, density=0.03))
    assert (np.diff(counts(levels)) < 0).all()


def test_in_layer_scope_no_layer_falls_below_its_last_count_on_the_way():
    """.64 of 25 are 16, less than its last count of 17, but the rounding of the total asks for a third level."""
    plan = lottery._plan({"a": 25, "b": 4}, "layer", 0.2, None, 0.6402)
    assert plan == [{"a": 25, "b": 4}, {"a": 20, "b": 4}, {"a": 17, "b": 4}, {"a": 17, "b": 3}]


def test_excluded_layers_stay_dense_and_outside_the_masks():
    model = net()
    levels = imp(model, DATA, CONFIG, levels=2, exclude=["classifier"])
    assert [*levels[-1].masks] == ["linear1.weight", "linear2.weight"]
    assert counts(levels) == [1152, 922, 738]
    assert (model.classifier.weight != 0).all()


def flat():
    """All weights that may be pruned are equal; `STILL` leaves them so."""
    model = net()
    for parameter in prunable(model).values():
        nn.init.constant_(parameter, 0.1)
    return model


STILL = TrainConfig(epochs=1, batch_size=2000, lr=1e-30, weight_decay=0)


def test_ties_are_drawn_from_the_generator_and_anew_at_each_level():
    first, again, other = (imp(flat(), DATA, STILL, levels=2, generator=seeded(s)) for s in (1, 1, 2))
    assert outcome(first) == outcome(again)
    assert counts(first) == counts(other) == [1232, 986, 789]
    assert not same(first[1].masks, other[1].masks)
    spread = [int(mask.sum()) / mask.numel() for mask in first[2].masks.values()]
    assert max(spread) - min(spread) < 0.2  # not the first ones in memory


# ---- rewinding ---------------------------------------------------------------------------------------------------


def weights_after(step):
    """State of the dense net after some steps of its training, and at the end."""
    model, states = net(), []
    states.append(state(model))
    watch = SimpleNamespace(after_step=lambda number, optimizer: states.append(state(model)))
    fit(model, DATA, CONFIG, hooks=[watch])
    return states[step], states[-1]


@pytest.mark.parametrize("rewind", [0, 1, 4, 6, 11])
def test_every_level_starts_bit_equal_to_the_rewind_point_with_zeros_where_it_is_pruned(monkeypatch, rewind):
    starts = watched(monkeypatch)
    levels = imp(net(), DATA, CONFIG, levels=LAST, rewind=rewind)
    early, _ = weights_after(rewind)
    assert same(starts[0][0], state(net()))  # the dense level starts from the weights it is given
    assert early["norm1.num_batches_tracked"] == rewind
    assert "norm2.running_var" in early
    for level, (start, options) in zip(levels[1:], starts[1:], strict=True):
        assert options["start_step"] == rewind
        assert same(options["masks"], level.masks)
        masked = {name: t * level.masks[name] if name in level.masks else t for name, t in early.items()}
        assert same(start, masked)
    assert all(same(level.rewound, early) for level in levels)


@pytest.mark.parametrize("rewind", [0, 5])
def test_imp_equals_its_levels_written_out_by_hand(rewind):
    model = net()
    levels = imp(model, DATA, CONFIG, levels=2, rewind=rewind)
    early, ended = weights_after(rewind)
    masks = {name: torch.ones_like(ended[name], dtype=torch.bool) for name in SIZES}
    for number in (1, 2):
        sizes = np.sort(torch.cat([ended[name].abs()[masks[name]] for name in SIZES]).numpy())
        masks = {name: masks[name] & (ended[name].abs() >= float(sizes[len(sizes) // 5])) for name in SIZES}
        twin = net()
        twin.load_state_dict(early)
        history = fit(twin, DATA, CONFIG, masks=masks, start_step=rewind)
        ended = state(twin)
        assert same(levels[number].masks, masks)
        assert levels[number].history.epochs == history.epochs
        assert levels[number].history.test_accuracy == history.test_accuracy
    assert same(state(model), ended)
    assert not model.training
    assert levels[1].history.steps == 12 - rewind


@pytest.mark.parametrize(
    ("options", "rate_of"),
    [
        ({"schedule": "cosine"}, lambda t: 0.05 * (1 + math.cos(math.pi * t / 12))),
        ({"schedule": "multistep", "milestones": (0.25, 0.75)}, lambda t: 0.1 * 0.1 ** ((t >= 3) + (t >= 9))),
    ],
)
def test_the_learning_rate_of_a_level_goes_on_from_the_rewind_point(monkeypatch, options, rate_of):
    used = []

    def before_step(step, optimizer):
        used.append((step, optimizer.param_groups[0]["lr"], len(optimizer.state)))

    def note(model, data, config, hooks=(), **options):
        return fit(model, data, config, hooks=[*hooks, SimpleNamespace(before_step=before_step)], **options)

    monkeypatch.setattr(lottery, "fit", note)
    imp(net(), DATA, dataclasses.replace(CONFIG, **options), levels=2, rewind=5)
    numbers, rates, momenta = (list(column) for column in zip(*used, strict=True))
    expected = [*range(1, 13), *range(6, 13), *range(6, 13)]
    assert numbers == expected
    assert rates == pytest.approx([rate_of(number - 1) for number in expected])
    assert [i for i, n in enumerate(momenta) if n == 0] == [0, 12, 19]  # the optimiser of each level is fresh


def test_a_ticket_is_made_from_a_level():
    level = imp(net(), DATA, CONFIG, levels=1, rewind=4)[1]
    model = net(7)
    rewind_(model, level.rewound, level.masks)
    for name, t in model.state_dict().items():
        kept = level.masks.get(name, torch.ones_like(t, dtype=torch.bool))
        assert torch.equal(t[kept], level.rewound[name][kept])
        assert (t[~kept] == 0).all()
    assert (level.rewound["linear1.weight"] != 0).all()  # the rewind point itself is dense


def test_one_call_gives_one_result_and_leaves_the_global_random_state_alone():
    models = net(), net(), net()
    torch_state = torch.get_rng_state()
    results = [outcome(imp(model, DATA, CONFIG, levels=2, rewind=3)) for model in models[:2]]
    assert results[0] == results[1]
    assert same(state(models[0]), state(models[1]))
    other = imp(models[2], DATA, dataclasses.replace(CONFIG, seed=1), levels=2, rewind=3)
    assert outcome(other) != results[0]
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_tickets_of_digits_are_as_good_as_the_dense_net_at_a_third_of_its_weights():
    config = TrainConfig(epochs=8, batch_size=64, lr=0.1)
    model = build("mlp", DATA.shape, DATA.classes, hidden=(64,), generator=seeded())
    levels = imp(model, DATA, config, density=0.3, rewind=steps(DATA, config) // config.epochs)
    accuracies = [level.history.test_accuracy for level in levels]
    assert accuracies[0] > 0.93
    assert accuracies[-1] > accuracies[0] - 0.03


# ---- divergence --------------------------------------------------------------------------------------------------


def test_a_dense_training_that_diverges_ends_the_levels_and_is_not_repeated(monkeypatch, tmp_path):
    config = dataclasses.replace(CONFIG, lr=1e30, epochs=4)
    first = imp(net(), DATA, config, levels=LAST, rewind=20, directory=tmp_path)
    assert [level.history.status for level in first] == ["diverged"]
    assert first[0].rewound == {}  # it never came to step 20
    monkeypatch.setattr(lottery, "fit", no_training)
    assert outcome(imp(net(), DATA, config, levels=LAST, rewind=20, directory=tmp_path)) == outcome(first)


def test_a_later_level_that_diverges_is_the_last(monkeypatch, tmp_path):
    def breaks(model, data, config, **options):
        def after_step(step, optimizer):
            if step == 9 and "masks" in options:
                model.linear1.weight.data.fill_(math.nan)

        hooks = [*options.pop("hooks", ()), SimpleNamespace(after_step=after_step)]
        return fit(model, data, config, hooks=hooks, **options)

    monkeypatch.setattr(lottery, "fit", breaks)
    levels = imp(net(), DATA, CONFIG, levels=LAST, directory=tmp_path)
    assert [level.history.status for level in levels] == ["finished", "diverged"]
    assert counts(levels) == [1232, 986]
    monkeypatch.setattr(lottery, "fit", no_training)
    assert outcome(imp(net(), DATA, CONFIG, levels=LAST, directory=tmp_path)) == outcome(levels)


# ---- the directory -----------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


def crashing(function, when):
    """A function that raises at its call number `when`, counted from 0."""
    calls = iter(range(10**6))

    def call(*arguments, **options):
        if next(calls) == when:
            raise Crash
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("level", range(LAST + 1))
@pytest.mark.parametrize("where", ["fit", "save"])
def test_a_call_that_crashed_in_any_level_continues_to_the_result_of_an_uninterrupted_one(
    monkeypatch, tmp_path, where, level
):
    def run(directory):
        model = net()
        levels = imp(model, DATA, CONFIG, levels=LAST, rewind=4, directory=directory)
        return outcome(levels), state(model)

    whole, ended = run(None)
    with monkeypatch.context() as patch:
        if where == "fit":
            patch.setattr(lottery, "fit", crashing(fit, level))
        else:  # between the masks of a level and its last weights; level 0 writes the rewind point, too
            patch.setattr(lottery, "save_tensors", crashing(save_tensors, level + 1))
        with pytest.raises(Crash):
            run(tmp_path)
    assert len([*tmp_path.glob("level_??.safetensors")]) == level
    starts = watched(monkeypatch)
    continued, last = run(tmp_path)
    assert len(starts) == LAST + 1 - level
    assert continued == whole
    assert same(last, ended)


@pytest.mark.parametrize("level", [0, 2])
def test_a_call_that_was_killed_within_a_level_goes_on_from_its_checkpoint(monkeypatch, tmp_path, level):
    whole, made = imp(net(), DATA, CONFIG, levels=2, rewind=4), []

    def checkpointing(model, data, config, hooks=(), **options):
        def before_step(step, optimizer):
            made.append(step)
            if made.count(9) == level + 1 and step == 9 and killed:
                raise Crash

        watch = SimpleNamespace(before_step=before_step)
        return fit(model, data, config, hooks=[*hooks, watch], checkpoint_every_s=0, **options)

    monkeypatch.setattr(lottery, "fit", checkpointing)
    killed = True
    with pytest.raises(Crash):
        imp(net(), DATA, CONFIG, levels=2, rewind=4, directory=tmp_path)
    killed = False
    made.clear()
    assert outcome(imp(net(), DATA, CONFIG, levels=2, rewind=4, directory=tmp_path)) == outcome(whole)
    assert made[:4] == [9, 10, 11, 12], "the steps before the kill are not made again"
    assert not [*tmp_path.glob("*checkpoint*")]


@pytest.mark.parametrize("level", range(LAST + 1))
def test_a_continued_call_draws_ties_as_an_uninterrupted_one(monkeypatch, tmp_path, level):
    whole = imp(flat(), DATA, STILL, levels=LAST, generator=seeded(3))
    with monkeypatch.context() as patch:
        patch.setattr(lottery, "fit", crashing(fit, level))
        with pytest.raises(Crash):
            imp(flat(), DATA, STILL, levels=LAST, directory=tmp_path, generator=seeded(3))
    continued = imp(flat(), DATA, STILL, levels=LAST, directory=tmp_path, generator=seeded(3))
    assert outcome(continued) == outcome(whole)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Directory and levels of a finished call."""
    directory = tmp_path_factory.mktemp("imp") / "run"
    return directory, imp(net(), DATA, CONFIG, levels=LAST, rewind=4, directory=directory)


def again(directory, **options):
    return imp(net(), DATA, CONFIG, **{"levels": LAST, "rewind": 4, "directory": directory} | options)


def test_a_finished_call_is_read_back_without_training(monkeypatch, finished):
    directory, levels = finished
    monkeypatch.setattr(lottery, "fit", no_training)
    model = net()
    read = imp(model, DATA, CONFIG, levels=LAST, rewind=4, directory=directory)
    assert outcome(read) == outcome(levels)
    assert [level.history.seconds for level in read] == [level.history.seconds for level in levels]
    assert same(state(model), load_file(directory / f"level_{LAST:02d}.safetensors"))
    assert not model.training


def test_a_directory_holds_what_its_documentation_says_and_nothing_else(finished):
    directory, levels = finished
    files = {"settings.json", "rewind.safetensors"}
    parts = ("masks.safetensors", "safetensors")
    files |= {f"level_{n:02d}.{part}" for n in range(LAST + 1) for part in parts}
    assert {path.name for path in directory.iterdir()} == files
    for level in levels:
        assert same(load_masks(directory / f"level_{level.level:02d}.masks.safetensors"), level.masks)
        _, about = load_tensors(directory / f"level_{level.level:02d}.safetensors", "level")
        assert about["history"]["test_accuracy"] == level.history.test_accuracy
    assert same(load_file(directory / "rewind.safetensors"), levels[0].rewound)


def test_more_levels_go_on_where_fewer_ended(monkeypatch, tmp_path, finished):
    directory = shutil.copytree(finished[0], tmp_path / "run")
    starts = watched(monkeypatch)
    longer = again(directory, levels=LAST + 2)
    assert len(starts) == 2
    assert outcome(longer) == outcome(imp(net(), DATA, CONFIG, levels=LAST + 2, rewind=4))
    monkeypatch.setattr(lottery, "fit", no_training)
    assert outcome(again(directory, levels=1)) == outcome(longer[:2])


def test_a_level_made_with_another_density_is_not_taken_for_this_one(tmp_path):
    again(tmp_path, levels=None, density=0.6)
    with pytest.raises(CannotResume, match=r"level_03\.masks.* keeps 740 weights, and not the 632"):
        again(tmp_path, levels=None, density=0.3)


def other_class():
    class Mine(nn.Sequential):
        pass

    return Mine(OrderedDict(net().named_children()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rate": 0.3}, "rate is 0.2 there and 0.3 here"),
        ({"rewind": 5}, "rewind is 4 there and 5 here"),
        ({"scope": "layer"}, "scope is 'global' there and 'layer' here"),
        ({"exclude": ["classifier"]}, "prunable is"),
        ({"generator": seeded(5)}, "seed_of_ties is"),
        ({"config": dataclasses.replace(CONFIG, lr=0.2)}, r"config\.lr is 0\.1 there and 0\.2 here"),
        ({"data": load("digits", seed=1)}, "examples is"),
        ({"model": net(1)}, "initial_weights is .* with the weights it had before the first call"),
        ({"model": other_class()}, "model is 'Sequential' there"),
    ],
)
def test_a_directory_of_other_settings_is_refused_by_name_and_left_as_it_is(monkeypatch, finished, changed, message):
    directory, _ = finished
    before = {path: path.read_bytes() for path in directory.iterdir()}
    monkeypatch.setattr(lottery, "fit", no_training)
    first = {"model": net(), "data": DATA, "config": CONFIG, "levels": LAST, "rewind": 4, "directory": directory}
    with pytest.raises(CannotResume, match=message):
        imp(**(first | changed))
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, lambda path: path.unlink()])
@pytest.mark.parametrize(
    ("file", "level"),
    [
        ("level_02.masks.safetensors", "level_02.safetensors"),
        ("level_02.safetensors", "level_02.safetensors"),
        ("rewind.safetensors", "level_00.safetensors"),
    ],
)
def test_a_damaged_file_is_named_and_its_level_is_trained_again_when_the_named_file_is_deleted(
    monkeypatch, tmp_path, finished, damage, file, level
):
    directory = shutil.copytree(finished[0], tmp_path / "run")
    damage(directory / file)
    if (directory / level).exists():
        with pytest.raises(CannotResume, match=rf"{file} .*delete .*{level}"):
            again(directory)
        (directory / level).unlink()
    starts = watched(monkeypatch)
    assert outcome(again(directory)) == outcome(finished[1])
    assert len(starts) == 1  # the levels after it are the same, so they are kept


def test_a_level_that_does_not_follow_from_the_one_before_is_refused(tmp_path, finished):
    other = dataclasses.replace(CONFIG, seed=9)
    imp(net(), DATA, other, levels=1, rewind=4, directory=tmp_path / "other")
    directory = shutil.copytree(finished[0], tmp_path / "run")
    for path in (tmp_path / "other").glob("level_00.*"):
        shutil.copy(path, directory)
    shutil.copy(tmp_path / "other" / "rewind.safetensors", directory)
    with pytest.raises(
        CannotResume, match=r"level_01\.masks\.safetensors keeps 986 weights, and not the 986 that follow"
    ):
        again(directory)


def test_a_rewind_point_of_another_run_is_refused(tmp_path, finished):
    directory = shutil.copytree(finished[0], tmp_path / "run")
    weights, about = load_tensors(directory / "level_02.safetensors", "level")
    save_tensors(directory / "level_02.safetensors", "level", weights, about | {"rewound": "0" * 64})
    with pytest.raises(CannotResume, match=r"level_02\.safetensors was not made from the weights in .*rewind"):
        again(directory)


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_text("[]"), lambda path: path.unlink()])
def test_levels_without_readable_settings_are_refused(monkeypatch, tmp_path, finished, damage):
    directory = shutil.copytree(finished[0], tmp_path / "run")
    damage(directory / "settings.json")
    monkeypatch.setattr(lottery, "fit", no_training)
    with pytest.raises(CannotResume, match=r"settings\.json is (damaged|missing)"):
        again(directory)


# ---- progress ----------------------------------------------------------------------------------------------------


def test_the_bar_shows_density_and_validation_accuracy(monkeypatch, capsys):
    monkeypatch.setenv("FSP_PROGRESS", "1")
    monkeypatch.setattr(progress, "LINE_S", 0)
    levels = imp(net(), DATA, CONFIG, levels=2)
    shown = capsys.readouterr().err
    accuracy = levels[-1].history.epochs[-1]["validation_accuracy"]
    assert f"density={levels[-1].density:.3g}, validation={accuracy:.3f}" in shown
    assert "3/3" in shown


def test_a_last_batch_of_one_is_refused_before_anything_is_written(tmp_path):
    model = net()  # with batch norm
    before = state(model)
    with pytest.raises(ValueError, match="last batch of every epoch"):
        imp(model, DATA, TrainConfig(1, len(DATA.train.labels) - 1), levels=1, directory=tmp_path / "levels")
    assert same(before, state(model))
    assert not list(tmp_path.iterdir())
