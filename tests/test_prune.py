"""`fsp.prune`: every method hits its count exactly, repeats itself, and leaves pruned what it has pruned."""

import copy
import inspect
import math
from fractions import Fraction
from functools import partial
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import nan, nn
from torch.nn.functional import cross_entropy

from fsp import scores
from fsp.allocate import ALLOCATIONS
from fsp.masks import apply_, density, layer_densities, prunable
from fsp.models import build
from fsp.prune import METHODS, at_random, by_score, options_of, prune

RANDOM = ["random", "uniform", "er", "erk"]
SCORED = ["magnitude", "snip", "grasp", "synflow"]
SHAPES = {"mlp": (1, 8, 8), "resnet8": (3, 8, 8)}
MODELS = {
    "mlp": build("mlp", SHAPES["mlp"], 10, hidden=(48, 32)),
    "resnet8": build("resnet8", SHAPES["resnet8"], 10, width=8),  # convolutions, batch norm, both kinds of shortcut
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batches_of(shape, classes=10, n=20):
    x, y = torch.randn(n, *shape, generator=generator(11)), torch.arange(n) % classes
    return [(x[: n // 2], y[: n // 2]), (x[n // 2 :], y[n // 2 :])]


BATCHES = {name: batches_of(shape) for name, shape in SHAPES.items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def size(model):
    return sum(p.numel() for p in prunable(model).values())


def total(kept):
    return sum(int(mask.sum()) for mask in kept.values())


def asked(n, density):
    return max(1, n - math.floor((1 - Fraction(str(density))) * n))


def flow(model, kept, shape):
    """R of the masked network by its definition: absolute state, eval mode, an input of ones, float64."""
    model = copy.deepcopy(model).double().eval()
    apply_(model, kept)
    for t in model.state_dict().values():
        t.abs_()
    with torch.no_grad():
        return model(torch.ones(1, *shape, dtype=torch.float64)).sum().item()


# ---- every method ------------------------------------------------------------------------------------------------


def test_the_methods_are_those_of_the_compendium():
    assert list(METHODS) == RANDOM + SCORED


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("asked_density", [1, 0.5, 0.1, 0.01, 1e-3])
def test_every_method_keeps_exactly_the_asked_number_and_leaves_the_model_alone(method, asked_density, name):
    model = MODELS[name]
    before = {key: t.clone() for key, t in model.state_dict().items()}
    rounds = {"rounds": 4} if method == "synflow" else {}
    kept = prune(model, method, asked_density, batches=BATCHES[name], **rounds)
    assert total(kept) == asked(size(model), asked_density)
    assert {key: (m.shape, m.dtype) for key, m in kept.items()} == {
        key: (p.shape, torch.bool) for key, p in prunable(model).items()
    }
    assert list(kept) == list(prunable(model))
    assert same(before, model.state_dict())
    assert model.training


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_and_nothing_else_decides_on_the_masks(method):
    model, batches = MODELS["resnet8"], BATCHES["resnet8"]
    make = partial(prune, model, method, 0.1, batches=batches, **({"rounds": 3} if method == "synflow" else {}))
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
    make = partial(prune, model, method, 0.3, batches=batches_of((20,), classes=4))
    first = make(generator=generator(1))
    assert total(first) == asked(720, 0.3)
    assert same(first, make(generator=generator(1)))
    if method not in ("snip", "grasp"):  # whose data tell the inputs apart
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


@pytest.mark.parametrize("method", ["uniform", "er", "erk"])
def test_random_methods_follow_their_allocation_to_one_weight(method):
    model = MODELS["resnet8"]
    kept = prune(model, method, 0.1, generator=generator(2))
    quotas = ALLOCATIONS[method]({name: tuple(m.shape) for name, m in kept.items()}, 0.1)
    assert all(abs(int(m.sum()) - quotas[name] * m.numel()) < 1 + 1e-9 for name, m in kept.items())


@pytest.mark.parametrize("method", RANDOM)
def test_random_positions_are_uniform_within_a_layer(method):
    kept = prune(nn.Sequential(nn.Linear(400, 400)), method, 0.2, generator=generator(3))["0.weight"].double()
    # 80 of 400 in a row or column, standard deviation 8: five of them over 400 draws
    assert (kept.sum(0) - 80).abs().max() < 40
    assert (kept.sum(1) - 80).abs().max() < 40
    assert abs(torch.corrcoef(torch.stack([kept[:-1].flatten(), kept[1:].flatten()]))[0, 1]) < 0.0125


@pytest.mark.parametrize("method", METHODS)
def test_what_is_excluded_stays_out_of_masks_and_counts(method):
    model = MODELS["resnet8"]
    kept = prune(model, method, 0.05, batches=BATCHES["resnet8"], exclude=["classifier", "stem.conv.weight"])
    assert list(kept) == [name for name in prunable(model) if name not in ("classifier.weight", "stem.conv.weight")]
    assert total(kept) == asked(sum(m.numel() for m in kept.values()), 0.05)


def test_one_round_keeps_the_highest_scores():
    model, batches = MODELS["mlp"], BATCHES["mlp"]
    copied = copy.deepcopy(model)
    sum(cross_entropy(copied(x), y) for x, y in batches).backward()
    s = {name: (p * p.grad).detach().abs() for name, p in prunable(copied).items()}
    threshold = torch.cat([v.flatten() for v in s.values()]).sort(descending=True).values[asked(size(model), 0.1) - 1]
    assert same(prune(model, "snip", 0.1, batches=batches), {name: v >= threshold for name, v in s.items()})


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


@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("d", [0.8, 0.03])
def test_rounds_follow_the_schedule_and_never_bring_a_weight_back(method, schedule, d):
    model, n, rounds = MODELS["resnet8"], size(MODELS["resnet8"]), []
    final = by_score(
        recording(scores.SCORES[method], rounds),
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


def test_synflow_takes_100_exponential_rounds_and_the_others_one():
    model, kwargs = MODELS["mlp"], {"batches": BATCHES["mlp"]}
    assert same(
        prune(model, "synflow", 0.02, **kwargs),
        prune(model, "synflow", 0.02, rounds=100, schedule="exponential", **kwargs),
    )
    assert not same(prune(model, "synflow", 0.02, **kwargs), prune(model, "synflow", 0.02, rounds=1, **kwargs))
    for method in ("magnitude", "snip", "grasp"):
        assert same(prune(model, method, 0.02, **kwargs), prune(model, method, 0.02, rounds=1, **kwargs))


def test_magnitude_does_not_change_with_rounds():
    one = prune(MODELS["resnet8"], "magnitude", 0.03)
    assert same(one, prune(MODELS["resnet8"], "magnitude", 0.03, rounds=7))
    assert same(one, prune(MODELS["resnet8"], "magnitude", 0.03, rounds=7, schedule="linear"))


# ---- collapse, with and without rounds (others.md §1.8) ----------------------------------------------------------

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


def test_one_round_of_synflow_cuts_a_vgg_16_in_two(vgg16):
    kept = prune(vgg16, "synflow", 0.01, shape=COLOUR, rounds=1)
    assert empty(kept) == [f"conv{i}.weight" for i in range(8, 14)]
    assert flow(vgg16, kept, COLOUR) == 0


def test_ten_rounds_of_synflow_leave_every_layer_of_a_vgg_16_alive(vgg16):
    kept = prune(vgg16, "synflow", 0.01, shape=COLOUR, rounds=10)
    assert empty(kept) == []
    assert flow(vgg16, kept, COLOUR) > 0


def test_one_round_of_synflow_cuts_a_resnet_18_in_two(resnet18):
    kept = prune(resnet18, "synflow", 0.01, shape=COLOUR, rounds=1)
    assert len(empty(kept)) > 3
    assert flow(resnet18, kept, COLOUR) == 0


def test_ten_rounds_of_synflow_empty_only_the_projections_of_a_resnet_18(resnet18):
    kept = prune(resnet18, "synflow", 0.01, shape=COLOUR, rounds=10)
    assert empty(kept) == SHORTCUTS
    assert flow(resnet18, kept, COLOUR) > 0


@pytest.mark.slow
def test_a_hundred_rounds_of_synflow_leave_every_layer_of_a_vgg_16_alive(vgg16):
    kept = prune(vgg16, "synflow", 0.01, shape=COLOUR)
    assert empty(kept) == []
    assert flow(vgg16, kept, COLOUR) > 0
    # densities of others.md §1.8, from other weights of the same law
    published = (0.941, 0.308, 0.160, 0.083, 0.040, 0.020, 0.020, 0.010, 0.005, 0.005, 0.005, 0.004, 0.005, 0.716)
    assert list(layer_densities(kept).values()) == pytest.approx(published, rel=0.05, abs=1e-3)


@pytest.mark.slow
def test_a_hundred_rounds_of_synflow_empty_only_the_projections_of_a_resnet_18(resnet18):
    kept = prune(resnet18, "synflow", 0.01, shape=COLOUR)
    assert empty(kept) == SHORTCUTS
    assert 1e16 < flow(resnet18, kept, COLOUR) < 1e17  # others.md §1.8: 2.8e16


# ---- models of one's own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_torchvision_network_can_be_pruned(method):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.resnet18(weights=None)
    rounds = {"rounds": 2} if method == "synflow" else {}
    kept = prune(model, method, 0.1, batches=batches_of(COLOUR, n=4), **rounds)
    assert size(model) == 11_678_912  # 11,689,512 parameters less 9,600 of batch norms and 1,000 biases
    assert total(kept) == 1_167_892
    assert density(kept) == 1_167_892 / 11_678_912


@pytest.mark.parametrize("method", METHODS)
def test_a_network_of_one_dimensional_convolutions_can_be_pruned(method):
    model = nn.Sequential(
        nn.Conv1d(2, 8, 5), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv1d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(80, 4)
    )
    kept = prune(model, method, 0.25, batches=batches_of((2, 16), classes=4))
    assert list(kept) == ["0.weight", "3.weight", "5.weight"]
    assert total(kept) == (80 + 48 + 320) // 4


class Parallel(nn.Module):
    """A module that uses functions, holds a parameter of its own, and never calls one of its layers."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.idle = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.ones(5, 5))

    def forward(self, x):
        return torch.relu(self.left(x)) @ self.scale + self.right(x)


@pytest.mark.parametrize("method", ["snip", "synflow"])
def test_a_layer_that_is_never_called_goes_first(method):
    kept = prune(Parallel(), method, 0.5, batches=batches_of((6,), classes=5))
    assert total(kept) == 43
    assert not kept["idle.weight"].any()


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

NOT_DENSITIES = [0, 1.5, -0.1, nan, True, "0.1", None]
BAD = {
    **{f"density {d!r}": ({"density": d}, ValueError, r"\(0, 1\]") for d in NOT_DENSITIES},
    "method": ({"method": "snup"}, ValueError, "'snup'.*random, uniform, er, erk, magnitude, snip, grasp, synflow"),
    "method none": ({"method": None}, ValueError, "None.*random, uniform"),
    "option": ({"keep": 3}, TypeError, r"'snip' has no option \['keep'\].*exclude, scope, rounds, schedule"),
    "other's option": ({"method": "snip", "temperature": 1.0}, TypeError, "temperature.*training, dtype"),
    "scope of an allocation": ({"method": "erk", "scope": "layer"}, TypeError, "scope.*exclude"),
    "internal option": ({"method": "magnitude", "score": scores.random}, TypeError, "score"),
    "schedule": ({"schedule": "cosine"}, ValueError, "'cosine'"),
    "scope": ({"scope": "local"}, ValueError, "'local'"),
    **{f"rounds {r!r}": ({"rounds": r}, ValueError, f"rounds {r!r}") for r in (0, -1, 2.5, "3", None)},
    "rounds True": ({"rounds": True}, ValueError, "rounds True"),
    "no batches": ({"batches": None}, ValueError, "pass batches"),
    "empty batches": ({"batches": []}, ValueError, "pass batches"),
    "no batches for GraSP": ({"method": "grasp", "batches": None}, ValueError, "pass batches"),
    "no shape": ({"method": "synflow", "batches": None}, ValueError, "shape="),
    "temperature": ({"method": "grasp", "temperature": 0}, ValueError, "temperature 0"),
    "exclude": ({"exclude": ["head"]}, ValueError, "'head'.*linear1.weight"),
    "exclude as a string": ({"exclude": "linear2"}, ValueError, "'linear2'"),
    "exclude all": ({"exclude": ["linear1", "linear2", "classifier"]}, ValueError, "no prunable weight"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name_before_the_model_is_run(case):
    given, error, message = case
    model = copy.deepcopy(MODELS["mlp"])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    call = {"method": "snip", "density": 0.1, "batches": BATCHES["mlp"]} | given
    with pytest.raises(error, match=message):
        prune(model, call.pop("method"), call.pop("density"), **call)
    assert not calls


def test_a_model_without_prunable_layers_is_refused():
    with pytest.raises(ValueError, match="no prunable weight"):
        prune(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), "magnitude", 0.5)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_weights_that_are_not_numbers_are_refused_by_name(method):
    model = copy.deepcopy(MODELS["mlp"])
    model.linear2.weight.data[3, 4] = nan
    with pytest.raises(ValueError, match=r"scores of '.*' hold nan or inf"):
        prune(model, method, 0.1, batches=BATCHES["mlp"])


def test_magnitude_names_the_tensor_that_is_not_a_number():
    model = copy.deepcopy(MODELS["mlp"])
    model.linear2.weight.data[3, 4] = nan
    with pytest.raises(ValueError, match=r"scores of 'linear2\.weight' hold nan"):
        prune(model, "magnitude", 0.1)


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
    ranking = ("exclude", "scope", "rounds", "schedule")
    assert {method: options_of(method) for method in METHODS} == {
        "random": ranking,
        "uniform": ("exclude",),
        "er": ("exclude",),
        "erk": ("exclude",),
        "magnitude": ranking,
        "snip": (*ranking, "training", "dtype"),
        "grasp": (*ranking, "temperature", "training", "dtype"),
        "synflow": (*ranking, "shape", "dtype"),
    }


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_masks_lie_on_the_gpu_with_the_model_and_a_random_choice_does_not_depend_on_it(method):
    model = MODELS["resnet8"]
    there = copy.deepcopy(model).cuda()
    batches = [(x.cuda(), y.cuda()) for x, y in BATCHES["resnet8"]]
    kept = prune(
        there, method, 0.1, batches=batches, generator=generator(2), **({"rounds": 3} if method == "synflow" else {})
    )
    assert all(mask.is_cuda for mask in kept.values())
    assert total(kept) == asked(size(model), 0.1)
    if method in RANDOM:
        assert same(
            {name: mask.cpu() for name, mask in kept.items()}, prune(model, method, 0.1, generator=generator(2))
        )
