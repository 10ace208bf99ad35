"""`fsp.allocate` against the values of others.md §1.3 and a bisection that knows nothing of the solver."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsp.allocate import ALLOCATIONS, counts, er, erk, uniform
from fsp.masks import prunable
from fsp.models import MODELS

examples = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def shapes_of(name, *arguments, **options):
    """Shapes of a network's prunable tensors, without its memory."""
    with torch.device("meta"):
        return {n: tuple(p.shape) for n, p in prunable(MODELS[name](*arguments, **options)).items()}


LENET = shapes_of("lenet300", (1, 28, 28), 10)
RESNET20 = shapes_of("resnet20", (3, 32, 32), 10)
VGG16 = shapes_of("vgg16", (3, 32, 32), 10)


def size(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def spent(densities, shapes):
    return sum(d * math.prod(shapes[name]) for name, d in densities.items())


def asked(shapes, density):
    n = size(shapes)
    return max(1, n - math.floor((1 - Fraction(str(density))) * n))


def by_bisection(shapes, density, ratio):
    """min(1, epsilon * ratio) with epsilon from bisection on the budget: the definition, solved another way."""
    low, high = 0.0, 1 / min(map(ratio, shapes.values()))
    for _ in range(200):
        middle = (low + high) / 2
        densities = {name: min(1.0, middle * ratio(shape)) for name, shape in shapes.items()}
        low, high = (middle, high) if spent(densities, shapes) < density * size(shapes) else (low, middle)
    return densities


def er_ratio(shape):
    return 1 / shape[0] + 1 / shape[1]


def erk_ratio(shape):
    return sum(shape) / math.prod(shape)


# ---- the values of others.md §1.3 --------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", [er, erk])  # without kernels the two are one
@pytest.mark.parametrize(
    ("density", "epsilon", "expected"),
    [(0.05, 8.350063, (0.0385, 0.1113, 0.9185)), (0.1, 17.264151, (0.0796, 0.2302, 1.0))],
)
def test_lenet_300_100_has_the_densities_of_the_specification(allocate, density, epsilon, expected):
    densities = allocate(LENET, density)
    assert [round(d, 4) for d in densities.values()] == list(expected)
    name, shape = next(iter(LENET.items()))
    assert densities[name] / erk_ratio(shape) == pytest.approx(epsilon, abs=1e-6)


@pytest.mark.parametrize(
    ("density", "epsilon", "stem", "head"), [(0.05, 8.203998, 0.4748, 0.9486), (0.1, 16.985986, 0.983, 1)]
)
def test_resnet_20_has_the_densities_of_the_specification(density, epsilon, stem, head):
    assert (len(RESNET20), size(RESNET20)) == (22, 270_896)
    densities = erk(RESNET20, density)
    assert round(densities["stem.conv.weight"], 4) == stem
    assert round(densities["classifier.weight"], 4) == head
    name = "blocks.8.conv2.weight"
    assert densities[name] / erk_ratio(RESNET20[name]) == pytest.approx(epsilon, abs=1e-6)


def test_vgg_16_has_the_densities_of_the_specification():
    assert (len(VGG16), size(VGG16)) == (14, 14_715_584)
    densities = erk(VGG16, 0.05)
    assert [round(d, 4) for d in densities.values()][:6] == [1, 0.3335, 0.2464, 0.163, 0.1213, 0.0806]
    assert densities["classifier.weight"] == 1
    assert densities["conv8.weight"] / erk_ratio(VGG16["conv8.weight"]) == pytest.approx(91.758711, abs=1e-6)


def test_a_kernel_counts_for_erk_and_not_for_er():
    shapes = {"point": (4, 3, 1, 1), "square": (4, 3, 3, 3)}  # 12 and 108 weights
    assert er(shapes, 0.2) == pytest.approx({"point": 0.2, "square": 0.2})
    # by hand: the dimensions sum to 9 and 13, the budget is 24 weights, so epsilon is 24 / 22
    assert erk(shapes, 0.2) == pytest.approx({"point": 24 / 22 * 9 / 12, "square": 24 / 22 * 13 / 108})
    # 30 weights: 30 / 22 * 9 > 12, so the small one is full and 18 are left for the other
    assert erk(shapes, 0.25) == pytest.approx({"point": 1, "square": 18 / 108})


# ---- properties of every allocation ------------------------------------------------------------------------------

layers = st.lists(st.integers(1, 40), min_size=2, max_size=2).flatmap(
    lambda fans: st.sampled_from([(), (3,), (1, 1), (3, 3), (5, 3), (3, 3, 3)]).map(lambda kernel: (*fans, *kernel))
)
networks = st.lists(layers, min_size=1, max_size=8).map(lambda shapes: {f"l{i}": s for i, s in enumerate(shapes)})
densities = st.integers(1, 1000).map(lambda k: k / 1000)


@examples
@given(shapes=networks, density=densities)
def test_uniform_gives_every_layer_the_density_of_the_network(shapes, density):
    assert uniform(shapes, density) == dict.fromkeys(shapes, density)


@examples
@given(shapes=networks, density=densities)
@pytest.mark.parametrize("allocate", [er, erk])
def test_no_layer_exceeds_one_and_together_they_spend_the_budget(allocate, shapes, density):
    found = allocate(shapes, density)
    assert list(found) == list(shapes)
    assert all(0 < d <= 1 for d in found.values())
    assert spent(found, shapes) == pytest.approx(density * size(shapes), rel=1e-9)


@examples
@given(shapes=networks, density=densities)
@pytest.mark.parametrize(("allocate", "ratio"), [(er, er_ratio), (erk, erk_ratio)])
def test_densities_below_one_are_proportional_to_their_ratios(allocate, ratio, shapes, density):
    if density == 1:  # every epsilon that is large enough solves it
        assert allocate(shapes, density) == pytest.approx(dict.fromkeys(shapes, 1.0))
    else:
        assert allocate(shapes, density) == pytest.approx(by_bisection(shapes, density, ratio), rel=1e-6)


@examples
@given(shapes=networks, density=st.integers(1, 10**6).map(lambda k: k / 10**6))
@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_whole_counts_are_exact_in_total_and_within_one_of_every_quota(allocate, shapes, density):
    quotas = allocate(shapes, density)
    found = counts(quotas, shapes, density)
    assert list(found) == list(shapes)
    assert sum(found.values()) == asked(shapes, density)
    for name, shape in shapes.items():
        assert type(found[name]) is int
        assert 0 <= found[name] <= math.prod(shape)
        assert abs(found[name] - quotas[name] * math.prod(shape)) < 1 + 1e-9


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
@pytest.mark.parametrize("shapes", [LENET, RESNET20, VGG16], ids=["lenet300", "resnet20", "vgg16"])
@pytest.mark.parametrize("density", [1.0, 1, 0.9, 0.5, 0.1, 0.05, 0.01, 1e-3, 1e-4])
def test_networks_of_the_papers_get_exact_counts(allocate, shapes, density):
    found = counts(allocate(shapes, density), shapes, density)
    assert sum(found.values()) == asked(shapes, density)
    if density == 1:
        assert found == {name: math.prod(shape) for name, shape in shapes.items()}


# ---- rounding ----------------------------------------------------------------------------------------------------


def test_the_spare_weights_go_to_the_largest_remainders():
    # quotas 2.6, 1.2 and 0.2 of 4 weights: the floors keep 3, and one more goes to the .6
    shapes = {"a": (10, 1), "b": (10, 1), "c": (20, 1)}
    assert counts({"a": 0.26, "b": 0.12, "c": 0.01}, shapes, 0.1) == {"a": 3, "b": 1, "c": 0}


def test_a_full_layer_gets_no_spare_weight():
    # quotas 2, 0.5 and 0.5; equal remainders go by order
    shapes = {"full": (2, 1), "a": (4, 1), "b": (4, 1)}
    assert counts({"full": 1.0, "a": 0.125, "b": 0.125}, shapes, 0.3) == {"full": 2, "a": 1, "b": 0}


@pytest.mark.parametrize("given_density", [0.2, 0.8])
def test_densities_that_do_not_spend_the_budget_are_refused_with_both_numbers(given_density):
    shapes = {"a": (10, 10), "b": (10, 10)}
    with pytest.raises(ValueError, match=rf"{200 * given_density:.1f} weights, density 0.5 keeps 100"):
        counts(dict.fromkeys(shapes, given_density), shapes, 0.5)


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
@pytest.mark.parametrize("density", [0, -0.5, 1.5, math.nan, True, "0.1"])
def test_what_is_no_density_is_refused(allocate, density):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        allocate(LENET, density)
