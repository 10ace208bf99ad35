"""`fsp.pruning`: every method hits its count exactly, repeats itself, and leaves pruned what it has pruned."""

import copy
import inspect
import math
import re
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import asked, generator, same, size, total
from torch import nan, nn
from torch.nn.functional import cross_entropy

from fsp.masks import apply_, layer_densities, prunable
from fsp.models import build
from fsp.pruning import scores
from fsp.pruning.allocate import ALLOCATIONS
from fsp.pruning.methods import METHODS, REFERENCES, at_random, by_score, options_of, prune

ALLOCATED = ["uniform", "uniform_plus", "er", "erk", "igq", "balanced", "pyramidal", "smart_ratio", "ratio_of"]
RANDOM = ["random", *ALLOCATED]
ROUNDS = {"iterative_snip": 60, "force": 60, "synflow": 100, "synflow_l2": 100}
ON_DATA = ["snip", "taylor", "iterative_snip", "force", "grasp"]
SCORED = ["magnitude", *ON_DATA, "synflow", "synflow_l2"]
REFUSALS = {  # methods that have no mask at some densities, and what they say then
    "uniform_plus": "uniform_plus keeps .* but density {density} pays for {count}: use a higher density or `uniform`",
    "smart_ratio": "smart_ratio keeps from .*, but density {density} keeps {count}: use another density or another cl",
    "ratio_of": "like= have .* weights, density {density} keeps {count}: use a lower density or other masks",
    "phew": r"density {density} keeps {count} of \d+ weights(, but|: \d+ are missing)",
}
REFUSED = {  # where exactly that is, of `DENSITIES`
    ("mlp", "uniform_plus"): [0.01, 1e-3, 1e-4],
    ("mlp", "smart_ratio"): [1, 0.01, 1e-3, 1e-4],
    ("mlp", "phew"): [1e-4],
    ("resnet8", "uniform_plus"): [0.01, 1e-3, 1e-4],
    ("resnet8", "smart_ratio"): [1, 1e-3, 1e-4],
    ("resnet8", "phew"): [1e-4],
    ("vgg16", "uniform_plus"): [1e-4],
    ("vgg16", "smart_ratio"): [1, 1e-4],
}
SHAPES = {"mlp": (1, 8, 8), "resnet8": (3, 8, 8)}
MODELS = {
    "mlp": build("mlp", SHAPES["mlp"], 10, hidden=(48, 32)),
    "resnet8": build("resnet8", SHAPES["resnet8"], 10, width=8),  # convolutions, batch norm, both kinds of shortcut
}


def batches_of(shape, classes=10, n=20):
    x, y = torch.randn(n, *shape, generator=generator(11)), torch.arange(n) % classes
    return [(x[: n // 2], y[: n // 2]), (x[n // 2 :], y[n // 2 :])]


BATCHES = {name: batches_of(shape) for name, shape in SHAPES.items()}


def brief(method, model, rounds=3):
    """Options that make a method quick, or possible."""
    if method == "ratio_of":
        return {"like": prune(model, "erk", 0.3)}
    return {"rounds": rounds} if method in ROUNDS else {}


def flow(model, kept, shape):
    """R of the masked network by its definition: absolute state, eval mode, an input of ones, float64."""
    model = copy.deepcopy(model).double().eval()
    apply_(model, kept)
    for t in model.state_dict().values():
        t.abs_()
    with torch.no_grad():
        return model(torch.ones(1, *shape, dtype=torch.float64)).sum().item()


# ---- every method ------------------------------------------------------------------------------------------------


def assert_exact(model, method, asked_density, batches, *, refused=False):
    """Exactly the asked number is kept, or the method says why not; either way the model stays as it was.

    `refused`: whether it must say so; None: either will do.
    """
    before, flags = {key: t.clone() for key, t in model.state_dict().items()}, [m.training for m in model.modules()]
    count, options = asked(size(model), asked_density), brief(method, model, rounds=2)
    try:
        kept = prune(model, method, asked_density, batches=batches, **options)
    except (ValueError, RuntimeError) as error:
        reason = REFUSALS.get(method, "never").format(density=re.escape(repr(asked_density)), count=count)
        if refused is False or not re.search(reason, str(error)):
            raise
    else:
        assert not refused
        assert total(kept) == count
        assert {key: (m.shape, m.dtype) for key, m in kept.items()} == {
            key: (p.shape, torch.bool) for key, p in prunable(model).items()
        }
        assert list(kept) == list(prunable(model))
    assert same(before, model.state_dict())
    assert [m.training for m in model.modules()] == flags


DENSITIES = [1, 0.5, 0.1, 0.01, 1e-3, 1e-4]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("asked_density", DENSITIES)
def test_every_method_keeps_exactly_the_asked_number_and_leaves_the_model_alone(method, asked_density, name):
    refused = asked_density in REFUSED.get((name, method), [])
    assert_exact(MODELS[name], method, asked_density, BATCHES[name], refused=refused)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exact_on_a_vgg_16(method, vgg16):
    for asked_density in DENSITIES:
        refused = asked_density in REFUSED.get(("vgg16", method), [])
        assert_exact(vgg16, method, asked_density, batches_of(COLOUR, n=4), refused=refused)


@st.composite
def networks(draw):
    """Small convolutional networks and perceptrons, the shape of their inputs, and a few examples."""
    convolutional = draw(st.booleans())
    widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    layers, channels = [], draw(st.integers(1, 3))
    shape = (channels, 4, 4) if convolutional else (channels,)
    for width in widths:
        bias = draw(st.booleans())
        if convolutional:
            groups = draw(st.sampled_from([1, math.gcd(channels, width)]))
            layers.append(
                nn.Conv2d(channels, width, draw(st.sampled_from([1, 3])), padding=1, groups=groups, bias=bias)
            )
            layers += [nn.BatchNorm2d(width)] * draw(st.booleans())
        else:
            layers.append(nn.Linear(channels, width, bias=bias))
        layers.append(draw(st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.Identity]))())
        channels = width
    if convolutional:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(channels, 3)).train(draw(st.booleans()))
    rng = generator(draw(st.integers(0, 99)))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng)
        p.requires_grad_(draw(st.booleans()))
    return model, batches_of(shape, classes=3, n=6)


@given(networks(), st.sampled_from(list(METHODS)), st.floats(1e-4, 1).map(lambda d: float(f"{d:.4g}")))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_method_is_exact_on_any_small_network(network, method, asked_density):
    model, batches = network
    assert_exact(model, method, asked_density, batches, refused=None)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_and_nothing_else_decides_on_the_masks(method):
    model, batches = MODELS["resnet8"], BATCHES["resnet8"]
    make = partial(prune, model, method, 0.1, batches=batches, **brief(method, model))
    torch.manual_seed(1)
    first, default = make(generator=generator(3)), make()
    torch.manual_seed(2)
    assert same(first, make(generator=generator(3)))
    assert same(default, make(generator=generator(0)))
    assert same(first, make(generator=generator(4))) == (method in SCORED)  # nothing here is tied or dropped out


@pytest.mark.parametrize("method", METHODS)
def test_constant_weights_are_tied_counts_still_exact_and_the_generator_draws(method):
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Linear(30, 4, bias=False))
    for p in model.parameters():
        p.data.fill_(0.1)
    make = partial(prune, model, method, 0.3, batches=batches_of((20,), classes=4), **brief(method, model))
    first = make(generator=generator(1))
    assert total(first) == asked(720, 0.3)
    assert same(first, make(generator=generator(1)))
    if method not in ON_DATA:  # whose data tell the inputs apart
        assert not same(first, make(generator=generator(2)))


def test_a_generator_is_advanced_so_that_two_prunings_in_a_row_differ():
    rng = generator(1)
    first = prune(MODELS["mlp"], "erk", 0.1, generator=rng)
    assert not same(first, prune(MODELS["mlp"], "erk", 0.1, generator=rng))


@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("rounds", [1, 3])
def test_layer_scope_keeps_the_asked_fraction_of_every_tensor(method, rounds):
    model = MODELS["resnet8"]
    kept = prune(model, method, 0.07, batches=BATCHES["resnet8"], scope="layer", rounds=rounds)
    assert {name: int(m.sum()) for name, m in kept.items()} == {
        name: asked(m.numel(), 0.07) for name, m in kept.items()
    }


OPTIONS = {"smart_ratio": {"vgg": True, "classifier": 0.5}, "ratio_of": {"like": prune(MODELS["resnet8"], "erk", 0.2)}}


@pytest.mark.parametrize("method", ALLOCATED)
def test_random_methods_follow_their_allocation_with_its_options_to_one_weight(method):
    model = MODELS["resnet8"]
    options = OPTIONS.get(method, {})
    kept = prune(model, method, 0.1, generator=generator(2), **options)
    quotas = ALLOCATIONS[method]({name: tuple(m.shape) for name, m in kept.items()}, 0.1, **options)
    assert all(abs(int(m.sum()) - quotas[name] * m.numel()) < 1 + 1e-9 for name, m in kept.items())


def test_the_ratio_of_other_masks_keeps_their_counts_and_moves_their_positions():
    model = MODELS["resnet8"]
    like = prune(model, "snip", 0.05, batches=BATCHES["resnet8"])
    kept = prune(model, "ratio_of", 0.05, like=like)
    assert {name: int(m.sum()) for name, m in kept.items()} == {name: int(m.sum()) for name, m in like.items()}
    assert not same(kept, like)


@pytest.mark.parametrize("method", RANDOM)
def test_random_positions_are_uniform_within_a_layer(method):
    model = nn.Sequential(nn.Linear(400, 400))
    options = {"classifier": 0.2} if method == "smart_ratio" else brief(method, model)
    kept = prune(model, method, 0.2, generator=generator(3), **options)["0.weight"].double()
    # 80 of 400 in a row or column, standard deviation 8: five of them over 400 draws
    assert (kept.sum(0) - 80).abs().max() < 40
    assert (kept.sum(1) - 80).abs().max() < 40
    assert abs(torch.corrcoef(torch.stack([kept[:-1].flatten(), kept[1:].flatten()]))[0, 1]) < 0.0125


@pytest.mark.parametrize("method", METHODS)
def test_what_is_excluded_stays_out_of_masks_and_counts(method):
    model = MODELS["resnet8"]
    options = brief(method, model)
    if method == "ratio_of":
        options["like"] = {
            n: m for n, m in options["like"].items() if n not in ("classifier.weight", "stem.conv.weight")
        }
    d = 0.3 if method in ("uniform_plus", "smart_ratio") else 0.05  # at .05 what is last now is too large for these
    kept = prune(model, method, d, batches=BATCHES["resnet8"], exclude=["classifier", "stem.conv.weight"], **options)
    assert list(kept) == [name for name in prunable(model) if name not in ("classifier.weight", "stem.conv.weight")]
    assert total(kept) == asked(sum(m.numel() for m in kept.values()), d)


# ---- rounds ------------------------------------------------------------------------------------------------------


def recording(score, rounds):
    """The score as it is, with the masks of every round noted."""

    def recorded(model, masks, *, batches=None, generator=None):
        found = score(
            model, masks, **({"batches": batches} if "batches" in inspect.signature(score).parameters else {})
        )
        rounds.append((masks, found))
        return found

    return recorded


@pytest.mark.parametrize("method", ["magnitude", "snip", "taylor", "grasp", "synflow", "synflow_l2"])
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("d", [0.8, 0.03])
def test_rounds_follow_the_schedule_and_never_bring_a_weight_back(method, schedule, d):
    model, n, rounds = MODELS["resnet8"], size(MODELS["resnet8"]), []
    final = by_score(
        recording(getattr(scores, method), rounds),
        model,
        d,
        generator=generator(),
        batches=BATCHES["resnet8"],
        rounds=5,
        schedule=schedule,
    )
    seen = [masks for masks, _ in rounds] + [final]
    assert len(seen) == 6
    for k, masks in enumerate(seen):
        target = d ** (k / 5) if schedule == "exponential" else 1 - (1 - d) * k / 5
        assert abs(total(masks) - target * n) <= 1
    assert total(final) == asked(n, d)
    for before, after in pairwise(seen):
        assert not any((after[name] & ~before[name]).any() for name in after)
    if method == "grasp" and d == 0.8:  # here pruned weights with score 0 would outrank some that are kept
        assert any((found[final[name]] < 0).any() for name, found in rounds[-1][1].items())


def test_iterated_snip_is_snip_on_what_is_left():
    model, batches, n = MODELS["mlp"], BATCHES["mlp"], size(MODELS["mlp"])
    kept = {name: torch.ones_like(p) for name, p in prunable(model).items()}
    for k in range(1, 4):
        masked = copy.deepcopy(model)
        for name, p in prunable(masked).items():
            p.data *= kept[name]
        sum(cross_entropy(masked(x), y) for x, y in batches).backward()
        s = {name: (p * p.grad).detach().abs() for name, p in prunable(masked).items()}
        flat = torch.cat([v.flatten() for v in s.values()]).sort(descending=True).values
        threshold = flat[n - math.floor((1 - 0.02 ** (k / 3)) * n) - 1]
        kept = {name: (v >= threshold).float() for name, v in s.items()}
    assert same(prune(model, "snip", 0.02, batches=batches, rounds=3), {name: m.bool() for name, m in kept.items()})


@pytest.mark.parametrize("method", SCORED)
def test_iterated_methods_take_their_exponential_rounds_and_the_others_one(method):
    make = partial(prune, MODELS["mlp"], method, 0.02, batches=BATCHES["mlp"])
    default = make()
    assert same(default, make(rounds=ROUNDS.get(method, 1), schedule="exponential"))
    assert same(default, make(rounds=1)) == (method not in ROUNDS)


def test_iterative_snip_is_snip_in_rounds():
    make = partial(prune, MODELS["resnet8"], density=0.05, batches=BATCHES["resnet8"], rounds=4)
    assert same(make(method="snip"), make(method="iterative_snip"))


def test_force_brings_back_a_weight_and_iterative_snip_never_does():
    # outputs w1 and w2 + w3 with targets 0 and 2.9: w2 and w3 seem worth little until one of them is gone
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[0.5, 2.0, 1.0]])
    data = [(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), torch.tensor([[0.0], [2.9]]))]
    make = partial(
        prune, model, density=0.4, batches=data, loss=lambda outputs, targets: ((outputs - targets) ** 2).mean()
    )
    # scores .25, .2, .1 of the whole; then the error is .9: .25, 1.8 and, where it may come back, .9
    assert make(method="force", rounds=1)["weight"].tolist() == [[True, True, False]]
    assert make(method="force", rounds=2)["weight"].tolist() == [[False, True, True]]
    assert make(method="iterative_snip", rounds=2)["weight"].tolist() == [[True, True, False]]


def test_force_counts_the_kept_weights_among_all_in_every_round():
    model, n, rounds = MODELS["resnet8"], size(MODELS["resnet8"]), []
    final = by_score(
        recording(scores.force, rounds), model, 0.03, generator=generator(), batches=BATCHES["resnet8"], rounds=5
    )
    seen = [masks for masks, _ in rounds] + [final]
    assert all(abs(total(masks) - 0.03 ** (k / 5) * n) <= 1 for k, masks in enumerate(seen))
    assert any((after[name] & ~before[name]).any() for before, after in pairwise(seen) for name in after)


# ---- examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ON_DATA)
def test_a_callable_is_asked_for_the_examples_of_each_round(method):
    model, calls = MODELS["mlp"], []

    def fresh(k):
        calls.append(k)
        return iter(BATCHES["mlp"][k % 2 :])  # both, then one, then both

    kept = prune(model, method, 0.05, batches=fresh, rounds=3)
    assert calls == [1, 2, 3]
    assert total(kept) == asked(size(model), 0.05)
    assert not same(kept, prune(model, method, 0.05, batches=BATCHES["mlp"], rounds=3))


def test_iterated_snip_on_fresh_examples_is_snip_on_each_in_turn():
    model = MODELS["mlp"]
    parts = [[part] for part in BATCHES["mlp"]]
    found = prune(model, "iterative_snip", 0.05, batches=lambda k: parts[k - 1], rounds=2)
    first = prune(model, "snip", 0.05**0.5, batches=parts[0])
    s = scores.snip(model, first, batches=parts[1])
    threshold = torch.cat([v.flatten() for v in s.values()]).sort(descending=True).values[asked(size(model), 0.05) - 1]
    assert same(found, {name: v >= threshold for name, v in s.items()})


@pytest.mark.parametrize("method", ["random", "erk", "magnitude"])
def test_a_method_without_data_asks_no_callable(method):
    def never(k):
        raise AssertionError(k)

    assert total(prune(MODELS["mlp"], method, 0.1, batches=never)) == asked(size(MODELS["mlp"]), 0.1)


@pytest.mark.parametrize("method", ["synflow", "phew"])
def test_the_shape_of_an_input_may_come_from_a_callable(method):
    make = partial(prune, MODELS["mlp"], method, 0.1, **brief(method, MODELS["mlp"]))
    assert same(make(batches=lambda k: BATCHES["mlp"]), make(shape=SHAPES["mlp"]))


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_neither_used_up_nor_changed(method):
    model, batches = MODELS["mlp"], batches_of(SHAPES["mlp"])
    copies, before = copy.deepcopy(batches), [(id(x), id(y)) for x, y in batches]
    first = prune(model, method, 0.1, batches=batches, **brief(method, model))
    assert [(id(x), id(y)) for x, y in batches] == before
    assert all(
        torch.equal(a, b) for old, new in zip(copies, batches, strict=True) for a, b in zip(old, new, strict=True)
    )
    assert same(first, prune(model, method, 0.1, batches=tuple(batches), **brief(method, model)))


# ---- upside down -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [0.5, 0.3])
def test_inverted_masks_and_the_others_share_no_weight_even_where_all_scores_are_tied(d):
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 4))
    for p in model.parameters():
        p.data.fill_(0.1)
    kept, inverted = (prune(model, "magnitude", d, invert=i, generator=generator(3)) for i in (False, True))
    assert not any((kept[name] & inverted[name]).any() for name in kept)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_an_inverted_ranking_keeps_the_lowest_scores(scope):
    kept = prune(MODELS["mlp"], "magnitude", 0.1, invert=True, scope=scope)
    weights = {name: p.detach().abs() for name, p in prunable(MODELS["mlp"]).items()}
    groups = [[name] for name in kept] if scope == "layer" else [list(kept)]
    for names in groups:
        inside = torch.cat([weights[name][kept[name]] for name in names])
        outside = torch.cat([weights[name][~kept[name]] for name in names])
        assert inside.max() <= outside.min()
        assert len(inside) == asked(len(inside) + len(outside), 0.1)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_inverted_rounds_leave_pruned_what_is_pruned(scope):
    model, rounds = MODELS["resnet8"], []
    final = by_score(
        recording(scores.grasp, rounds),
        model,
        0.05,
        generator=generator(),
        batches=BATCHES["resnet8"],
        rounds=4,
        invert=True,
        scope=scope,
    )
    seen = [masks for masks, _ in rounds] + [final]
    assert len({total(masks) for masks in seen}) == 5
    for before, after in pairwise(seen):
        assert not any((after[name] & ~before[name]).any() for name in after)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("bad", [nan, math.inf])
def test_scores_that_cannot_be_ranked_are_refused_upside_down_too(scope, bad):
    model = copy.deepcopy(MODELS["mlp"])
    model.linear2.weight.data[3, 4] = bad
    with pytest.raises(ValueError, match=r"scores of 'linear2\.weight' hold nan or inf"):
        prune(model, "magnitude", 0.1, invert=True, scope=scope)


# ---- settings of published code ----------------------------------------------------------------------------------

SETTINGS = [(reference, method) for reference, methods in REFERENCES.items() for method in methods]


@pytest.mark.parametrize(("reference", "method"), SETTINGS)
def test_a_reference_stands_for_its_options_and_an_option_goes_before_it(reference, method):
    make = partial(prune, MODELS["mlp"], method, 0.1, batches=BATCHES["mlp"])
    assert same(make(reference=reference), make(**REFERENCES[reference][method]))
    fewer = {"rounds": 2, "training": True, "temperature": 1.0}
    fewer = {name: value for name, value in fewer.items() if name in REFERENCES[reference][method]}
    assert same(make(reference=reference, **fewer), make(**REFERENCES[reference][method] | fewer))


def test_the_synflow_repository_scores_in_eval_mode():
    model, data = MODELS["resnet8"], BATCHES["resnet8"]
    for method in ("snip", "grasp"):
        by_repository = prune(model, method, 0.1, batches=data, reference="synflow_repo")
        assert same(by_repository, prune(model, method, 0.1, batches=data, training=False))
        assert not same(by_repository, prune(model, method, 0.1, batches=data))


def test_settings_that_do_not_exist_are_refused_naming_those_that_do():
    model = MODELS["mlp"]
    with pytest.raises(
        ValueError, match=r"'synflow_repo' has no settings for.*'force'.*'original' for snip, iterative_s"
    ):
        prune(model, "force", 0.1, reference="synflow_repo", batches=BATCHES["mlp"])
    with pytest.raises(ValueError, match=r"'mine' has no settings.*'synflow_repo' for random"):
        prune(model, "snip", 0.1, reference="mine", batches=BATCHES["mlp"])


def test_magnitude_does_not_change_with_rounds():
    one = prune(MODELS["resnet8"], "magnitude", 0.03)
    assert same(one, prune(MODELS["resnet8"], "magnitude", 0.03, rounds=7))
    assert same(one, prune(MODELS["resnet8"], "magnitude", 0.03, rounds=7, schedule="linear"))


# ---- collapse, with and without rounds ----------------------------------------------------------

COLOUR = (3, 32, 32)
SHORTCUTS = ["blocks.2.shortcut.conv.weight", "blocks.4.shortcut.conv.weight", "blocks.6.shortcut.conv.weight"]


def empty(kept):
    return [name for name, mask in kept.items() if not mask.any()]


@pytest.fixture(scope="module")
def vgg16():
    return build("vgg16", COLOUR, 10)


@pytest.fixture(scope="module")
def resnet18():
    return build("resnet18", COLOUR, 10, init="kaiming_normal_fan_out")


@pytest.mark.parametrize(
    ("network", "rounds", "emptied"),
    [
        ("vgg16", 1, [f"conv{i}.weight" for i in range(8, 14)]),
        ("vgg16", 5, []),
        ("resnet18", 1, None),
        ("resnet18", 5, SHORTCUTS),
    ],
)
def test_one_round_of_synflow_cuts_a_network_in_two_and_five_rounds_keep_it_connected(
    network, rounds, emptied, request
):
    model = request.getfixturevalue(network)
    kept = prune(model, "synflow", 0.01, shape=COLOUR, rounds=rounds)
    assert empty(kept) == emptied if emptied is not None else len(empty(kept)) > 3
    assert (flow(model, kept, COLOUR) > 0) == (rounds > 1)


@pytest.mark.slow
def test_a_hundred_rounds_of_synflow_leave_every_layer_of_a_vgg_16_alive(vgg16):
    kept = prune(vgg16, "synflow", 0.01, shape=COLOUR)
    assert empty(kept) == []
    assert flow(vgg16, kept, COLOUR) > 0
    # densities known from other weights of the same law
    published = (0.941, 0.308, 0.160, 0.083, 0.040, 0.020, 0.020, 0.010, 0.005, 0.005, 0.005, 0.004, 0.005, 0.716)
    assert list(layer_densities(kept).values()) == pytest.approx(published, rel=0.05, abs=1e-3)


@pytest.mark.slow
def test_a_hundred_rounds_of_synflow_empty_only_the_projections_of_a_resnet_18(resnet18):
    kept = prune(resnet18, "synflow", 0.01, shape=COLOUR)
    assert empty(kept) == SHORTCUTS
    assert 1e16 < flow(resnet18, kept, COLOUR) < 1e17  # 2.8e16 with other weights of the same law


# ---- models of one's own -----------------------------------------------------------------------------------------


TORCHVISION = {
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
    "vit": lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=10),
    "vgg11": lambda: torchvision.models.vgg11(num_classes=10),
}
NETWORKS = ["mobilenet", "vit", pytest.param("vgg11", marks=pytest.mark.slow)]  # VGG-11: 129 million weights


@pytest.fixture(scope="module")
def torchvision_network(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TORCHVISION[request.param]()


@pytest.mark.filterwarnings("ignore:synaptic flow is not conserved")
@pytest.mark.parametrize("torchvision_network", NETWORKS, indirect=True)
@pytest.mark.parametrize("method", [*SCORED, "random", "erk", "igq"])
def test_torchvision_networks_can_be_pruned(torchvision_network, method):
    assert_exact(torchvision_network, method, 0.02, batches_of(COLOUR, n=4))


def test_of_attention_only_the_projection_of_the_outputs_is_prunable():
    names = list(prunable(nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 2))))
    assert names == ["0.out_proj.weight", "1.weight"]


def test_a_network_that_does_not_conserve_flow_is_warned_of_once_in_all_rounds():
    model = nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 3))
    for d in (0.1, 1):
        with pytest.warns(UserWarning, match=r"GELU \(1\)") as caught:
            prune(model, "synflow", d, shape=(8,))
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(model, "snip", 0.1, batches=batches_of((8,), classes=3))


def test_a_model_with_several_outputs_and_a_task_of_its_own_is_pruned():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.mean, self.spread = nn.Linear(6, 9), nn.Linear(9, 1), nn.Linear(9, 1)

        def forward(self, x):
            h = torch.relu(self.body(x))
            return self.mean(h), self.spread(h)

    x, targets = torch.randn(10, 6, generator=generator()), torch.randn(10, 1, generator=generator(1))
    task = {"forward": lambda model, inputs: model(inputs)[0], "loss": nn.functional.mse_loss}
    for method in ON_DATA:
        kept = prune(Pair(), method, 0.4, batches=[(x[:7], targets[:7]), (x[7:], targets[7:])], **task)
        assert total(kept) == asked(72, 0.4)
        assert method == "grasp" or not kept["spread.weight"].any()
    kept = prune(Pair(), "synflow", 0.4, shape=(6,), forward=task["forward"])
    assert not kept["spread.weight"].any()


@pytest.mark.filterwarnings("ignore:synaptic flow is not conserved")
@pytest.mark.parametrize("method", METHODS)
def test_a_network_of_one_dimensional_convolutions_can_be_pruned(method):
    model = nn.Sequential(
        nn.Conv1d(2, 8, 5), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv1d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(80, 4)
    )
    options = {"classifier": 0.75} if method == "smart_ratio" else brief(method, model)
    kept = prune(model, method, 0.75, batches=batches_of((2, 16), classes=4), **options)
    assert list(kept) == ["0.weight", "3.weight", "5.weight"]
    assert total(kept) == (80 + 48 + 320) * 3 // 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions_are_pruned_by_magnitude_to_the_exact_count(dtype):
    model = build("mlp", (1, 8, 8), 10).to(dtype)  # short mantissas: ties by the thousand
    kept = prune(model, "magnitude", 0.123)
    assert total(kept) == asked(size(model), 0.123)
    weights = dict(model.named_parameters())
    inside = torch.cat([weights[name][mask].abs() for name, mask in kept.items()]).double()
    outside = torch.cat([weights[name][~mask].abs() for name, mask in kept.items()]).double()
    assert inside.min() >= outside.max()


# ---- bad input ---------------------------------------------------------------------------------------------------

BAD = [
    *(({"density": d}, ValueError, r"\(0, 1\]") for d in (0, 1.5, nan, True, "0.1")),
    ({"method": "snup"}, ValueError, "'snup'.*'random', 'uniform', .*'er', 'erk', .*'phew'"),
    ({"keep": 3}, TypeError, "'snip' has no option keep; it takes exclude, scope, rounds, schedule"),
    ({"temperature": 1.0}, TypeError, "no option temperature.*training, dtype, forward, loss"),
    ({"method": "erk", "scope": "layer"}, TypeError, "scope.*exclude"),
    ({"method": "magnitude", "score": scores.snip}, TypeError, "no option score"),
    ({"method": "ratio_of"}, TypeError, "like"),
    ({"method": "balanced", "density": 0.5, "redistribute": False}, ValueError, r"keep \d+\.\d weights, density 0\.5 "),
    ({"schedule": "cosine"}, ValueError, "'cosine'"),
    ({"scope": "local"}, ValueError, "'local'"),
    ({"rounds": 0}, ValueError, "rounds=0"),
    ({"invert": "yes"}, ValueError, "invert='yes': expected one of True, False"),
    ({"batches": None}, ValueError, "pass batches"),
    ({"method": "grasp", "batches": []}, ValueError, "pass batches"),
    ({"method": "grasp", "temperature": 0}, ValueError, "temperature 0"),
    ({"method": "synflow", "batches": None}, ValueError, "shape="),
    ({"reference": "paper"}, ValueError, "'paper' has no settings.*'original' for snip"),
    ({"exclude": ["head"]}, ValueError, "'head'.*linear1.weight"),
    ({"exclude": "linear2"}, ValueError, "'linear2'"),
    ({"exclude": ["linear1", "linear2", "classifier"]}, ValueError, "no prunable weight"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD)
def test_bad_input_is_refused_by_name_before_the_model_is_run(given, error, message):
    model, calls = copy.deepcopy(MODELS["mlp"]), []
    model.register_forward_hook(lambda *_: calls.append(1))
    call = {"method": "snip", "density": 0.1, "batches": BATCHES["mlp"]} | given
    with pytest.raises(error, match=message):
        prune(model, call.pop("method"), call.pop("density"), **call)
    assert not calls


@pytest.mark.parametrize("method", ["magnitude", "snip", "grasp", "synflow"])
def test_weights_that_are_not_numbers_are_refused_by_name(method):
    model = copy.deepcopy(MODELS["mlp"])
    model.linear2.weight.data[3, 4] = nan
    with pytest.raises(
        ValueError, match=rf"scores of '{'linear2.weight' if method == 'magnitude' else '.*'}' hold nan or inf"
    ):
        prune(model, method, 0.1, batches=BATCHES["mlp"])


def test_a_method_that_misses_its_density_is_reported_with_the_numbers(monkeypatch):
    def short(model, density, *, generator, batches=None):
        kept = at_random(ALLOCATIONS["uniform"], model, density, generator=generator)
        name = next(iter(kept))
        return kept | {name: torch.zeros_like(kept[name])}

    monkeypatch.setitem(METHODS, "short", partial(short))
    n, first = size(MODELS["mlp"]), MODELS["mlp"].linear1.weight.numel()
    with pytest.raises(RuntimeError, match=rf"{asked(n, 0.5) - first // 2} of {n} .* asks for {asked(n, 0.5)}"):
        prune(MODELS["mlp"], "short", 0.5)


def test_a_method_takes_its_options_and_nothing_internal():
    ranking = ("exclude", "scope", "rounds", "schedule", "invert")
    assert {method: options_of(method) for method in METHODS} == {
        "random": ("exclude", "scope"),
        **dict.fromkeys(ALLOCATED, ("exclude",)),
        "balanced": ("exclude", "redistribute"),
        "smart_ratio": ("exclude", "vgg", "classifier"),
        "ratio_of": ("exclude", "like"),
        **dict.fromkeys(["regular", "ramanujan"], ("exclude", "allocation", "like")),
        "magnitude": ranking,
        **dict.fromkeys(ON_DATA, (*ranking, "training", "dtype", "forward", "loss")),
        "grasp": (*ranking, "temperature", "training", "dtype", "forward", "loss"),
        **dict.fromkeys(["synflow", "synflow_l2"], (*ranking, "shape", "training", "dtype", "forward")),
        "phew": ("shape", "exclude", "identity", "kernels"),
    }


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_masks_lie_on_the_gpu_with_the_model_and_a_random_choice_does_not_depend_on_it(method):
    model = MODELS["resnet8"]
    there = copy.deepcopy(model).cuda()
    batches = [(x.cuda(), y.cuda()) for x, y in BATCHES["resnet8"]]
    options = brief(method, model)
    kept = prune(there, method, 0.1, batches=batches, generator=generator(2), **options)
    assert all(mask.is_cuda for mask in kept.values())
    assert total(kept) == asked(size(model), 0.1)
    if method in RANDOM:
        assert same(
            {name: mask.cpu() for name, mask in kept.items()},
            prune(model, method, 0.1, generator=generator(2), **options),
        )
