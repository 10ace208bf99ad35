"""`fsp.pruning.allocate` against known values, and against definitions solved another way than there."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsp.masks import density as density_of
from fsp.masks import keep_counts, keep_top, layer_densities, prunable
from fsp.models import MODELS
from fsp.pruning.allocate import (
    ALLOCATIONS,
    balanced,
    counts,
    er,
    erk,
    igq,
    pyramidal,
    ratio_of,
    smart_ratio,
    uniform,
    uniform_plus,
)

examples = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def shapes_of(name, *arguments, **options):
    """Shapes of a network's prunable tensors, without its memory."""
    with torch.device("meta"):
        return {n: tuple(p.shape) for n, p in prunable(MODELS[name](*arguments, **options)).items()}


LENET = shapes_of("lenet300", (1, 28, 28), 10)
RESNET20 = shapes_of("resnet20", (3, 32, 32), 10)
RESNET18 = shapes_of("resnet18", (3, 32, 32), 10)
VGG16 = shapes_of("vgg16", (3, 32, 32), 10)
PAPERS = {"lenet300": LENET, "resnet20": RESNET20, "resnet18": RESNET18, "vgg16": VGG16}

# These spend any budget; uniform_plus, smart_ratio and ratio_of refuse one that their rule cannot spend.
ALWAYS = {name: ALLOCATIONS[name] for name in ("uniform", "er", "erk", "igq", "balanced", "pyramidal")}


def size(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def weights(densities, shapes):
    return sum(d * math.prod(shapes[name]) for name, d in densities.items())


def asked(shapes, density):
    n = size(shapes)
    return max(1, n - math.floor((1 - Fraction(str(density))) * n))


def kept(masks):
    return {name: int(m.sum()) for name, m in masks.items()}


def random_masks(shapes, density, seed=0):
    """Masks of random scores whose scale differs from layer to layer, so that layer densities do too."""
    rng = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(shape, generator=rng) * torch.rand((), generator=rng) for name, shape in shapes.items()}
    return keep_top(scores, density)


def check_counts(quotas, shapes, density):
    found = counts(quotas, shapes, density)
    assert list(found) == list(quotas) == list(shapes)
    assert sum(found.values()) == asked(shapes, density)
    for name, shape in shapes.items():
        assert 0 <= quotas[name] <= 1
        assert type(found[name]) is int
        assert 0 <= found[name] <= math.prod(shape)
        assert abs(found[name] - quotas[name] * math.prod(shape)) < 1 + 1e-9


def by_bisection(shapes, density, ratio):
    """min(1, epsilon * ratio) with epsilon from bisection on the budget: the definition, solved another way."""
    low, high = 0.0, 1 / min(map(ratio, shapes.values()))
    for _ in range(200):
        middle = (low + high) / 2
        densities = {name: min(1.0, middle * ratio(shape)) for name, shape in shapes.items()}
        low, high = (middle, high) if weights(densities, shapes) < density * size(shapes) else (low, middle)
    return densities


def er_ratio(shape):
    return 1 / shape[0] + 1 / shape[1]


def erk_ratio(shape):
    return sum(shape) / math.prod(shape)


# ---- known values ------------------------------------------------------------------------------------------------


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


def test_pyramidal_vgg_16_has_the_ratio_of_the_specification():
    densities = list(pyramidal(VGG16, 0.1).values())
    assert densities[0] == pytest.approx(0.783743, abs=1e-6)
    assert densities == pytest.approx([densities[0] ** depth for depth in range(1, 15)])


def test_literal_balanced_vgg_16_falls_short_as_in_the_reference_and_says_by_how_much():
    literal = balanced(VGG16, 0.01, redistribute=False)
    with pytest.raises(ValueError, match=r"132981\.6 weights, density 0\.01 keeps 147156: .* they spend 0\.00903679"):
        counts(literal, VGG16, 0.01)
    # a fourteenth of 147,155.84 is 10,511.1: more than the first convolution and the classifier have
    assert [literal[name] for name in ("conv1.weight", "classifier.weight")] == [1, 1]


# ---- small networks by hand --------------------------------------------------------------------------------------


def test_uniform_plus_spares_a_first_convolution_and_the_last_layer():
    shapes = {"stem": (10, 1, 5, 2), "body": (20, 20), "point": (10, 40, 1, 1), "head": (10, 10)}  # 100, 400, 400, 100
    # 200 of 1000: all of the stem, 20 of the head, 80 of the 800 between, of which a convolution is one like any other
    assert uniform_plus(shapes, 0.2) == pytest.approx({"stem": 1, "body": 0.1, "point": 0.1, "head": 0.2})
    # 150: the head still keeps a fifth.  500: the head keeps a half
    assert uniform_plus(shapes, 0.15) == pytest.approx({"stem": 1, "body": 30 / 800, "point": 30 / 800, "head": 0.2})
    assert uniform_plus(shapes, 0.5) == pytest.approx({"stem": 1, "body": 350 / 800, "point": 350 / 800, "head": 0.5})


def test_uniform_plus_spends_all_it_has_on_the_two_ends():
    shapes = {"stem": (10, 1, 5, 2), "body": (20, 40), "head": (10, 10)}
    densities = uniform_plus(shapes, 0.12)  # 120 of 1000: the stem and a fifth of the head
    assert densities == pytest.approx({"stem": 1, "body": 0, "head": 0.2}, abs=1e-12)
    assert counts(densities, shapes, 0.12) == {"stem": 100, "body": 0, "head": 20}
    # 119.5 are rounded up to 120 whole weights, so that is still paid for
    assert counts(uniform_plus(shapes, 0.1195), shapes, 0.1195) == {"stem": 100, "body": 0, "head": 20}
    with pytest.raises(ValueError, match=r"uniform_plus keeps 120\.0 weights of head, stem, .* 0\.119 pays for 119"):
        uniform_plus(shapes, 0.119)


def test_balanced_gives_equal_counts_and_the_surplus_of_full_layers_to_the_others():
    shapes = {"a": (10, 10), "b": (2, 10), "c": (10, 10)}
    assert balanced(shapes, 0.25) == pytest.approx({"a": 55 / 300, "b": 55 / 60, "c": 55 / 300})
    assert balanced(shapes, 0.5) == pytest.approx({"a": 0.45, "b": 1, "c": 0.45})
    # as long as no layer is full both variants are one
    assert balanced(shapes, 0.25, redistribute=False) == pytest.approx(balanced(shapes, 0.25))
    assert balanced(shapes, 0.5, redistribute=False) == pytest.approx({"a": 110 / 300, "b": 1, "c": 110 / 300})


def test_smart_ratio_pushes_the_surplus_of_a_full_layer_forward():
    shapes = {"fc1": (5, 2), "fc2": (4, 5), "fc3": (5, 2)}  # k = 3, 2: ratios 12 and 6; the classifier keeps 3
    assert smart_ratio(shapes, 0.3) == pytest.approx({"fc1": 0.45, "fc2": 0.225, "fc3": 0.3})  # 9 in parts 1 : 1
    assert smart_ratio(shapes, 0.675) == pytest.approx({"fc1": 1, "fc2": 0.7, "fc3": 0.3})  # 24: 12 of 10, 12 of 20


def test_smart_ratio_has_the_variants_of_its_paper():
    shapes = {"fc1": (5, 2), "fc2": (4, 5), "fc3": (5, 2)}
    # 9 weights; by i squared 12 and 1.5, so in parts 120 : 30
    assert smart_ratio(shapes, 0.3, vgg=True) == pytest.approx({"fc1": 0.72, "fc2": 0.09, "fc3": 0.3})
    # 12 - 8 weights in parts 1 : 1
    assert smart_ratio(shapes, 0.3, classifier=0.8) == pytest.approx({"fc1": 0.2, "fc2": 0.1, "fc3": 0.8})


def test_ratio_of_scales_the_densities_of_masks_and_fills_up_what_is_full():
    shapes = {"a": (10, 10), "b": (10, 10), "c": (10, 10)}
    like = keep_counts({name: torch.rand(s) for name, s in shapes.items()}, {"a": 60, "b": 30, "c": 0})
    assert ratio_of(shapes, 0.3, like=like) == pytest.approx({"a": 0.6, "b": 0.3, "c": 0})
    assert ratio_of(shapes, 0.1, like=like) == pytest.approx({"a": 0.2, "b": 0.1, "c": 0})
    assert ratio_of(shapes, 0.6, like=like) == pytest.approx({"a": 1, "b": 0.8, "c": 0})
    assert ratio_of(shapes, 2 / 3, like=like) == {"a": 1, "b": 1, "c": 0}


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
@pytest.mark.parametrize(("allocate", "ratio"), [(er, er_ratio), (erk, erk_ratio)])
def test_densities_below_one_are_proportional_to_their_ratios(allocate, ratio, shapes, density):
    if density == 1:  # every epsilon that is large enough solves it
        assert allocate(shapes, density) == pytest.approx(dict.fromkeys(shapes, 1.0))
    else:
        assert allocate(shapes, density) == pytest.approx(by_bisection(shapes, density, ratio), rel=1e-6)


@examples
@given(shapes=networks, density=densities)
def test_balanced_is_the_bisection_of_one_count_for_all(shapes, density):
    found = balanced(shapes, density)
    if density < 1:
        assert found == pytest.approx(by_bisection(shapes, density, lambda shape: 1 / math.prod(shape)), rel=1e-6)


@examples
@given(shapes=networks, density=densities.filter(lambda d: d < 1))
def test_ideal_gas_quotas_share_one_constant(shapes, density):
    constants = [(1 / d - 1) / math.prod(shapes[name]) for name, d in igq(shapes, density).items()]
    assert constants == pytest.approx([constants[0]] * len(constants), rel=1e-9)


@examples
@given(shapes=networks, density=densities)
def test_pyramidal_densities_are_the_powers_of_the_first(shapes, density):
    found = list(pyramidal(shapes, density).values())
    assert found == pytest.approx([found[0] ** depth for depth in range(1, len(found) + 1)], rel=1e-9)


@examples
@given(shapes=networks, density=st.integers(1, 10**6).map(lambda k: k / 10**6))
@pytest.mark.parametrize("allocate", ALWAYS.values(), ids=ALWAYS)
def test_whole_counts_are_exact_in_total_and_within_one_of_every_quota(allocate, shapes, density):
    check_counts(allocate(shapes, density), shapes, density)


@examples
@given(shapes=networks, density=densities)
def test_uniform_plus_spends_the_budget_or_says_that_its_ends_cost_more(shapes, density):
    first, *_, last = [*shapes, *shapes]  # twice: one layer is both
    ends = {last: max(Fraction(str(density)), Fraction(1, 5))}
    if len(shapes[first]) > 2:
        ends[first] = 1
    if math.floor(weights(ends, shapes)) > asked(shapes, density):
        with pytest.raises(ValueError, match=rf"uniform_plus keeps .* pays for {asked(shapes, density)}:"):
            uniform_plus(shapes, density)
        return
    found = uniform_plus(shapes, density)
    check_counts(found, shapes, density)
    assert {name: found[name] for name in ends} == pytest.approx({name: float(d) for name, d in ends.items()})
    assert len({d for name, d in found.items() if name not in ends}) <= 1


def by_the_rules_of_smart_ratio(shapes, density, vgg, classifier):
    """Densities in exact fractions, one layer after the other."""
    n = {name: math.prod(shape) for name, shape in shapes.items()}
    *others, last = shapes
    budget = Fraction(str(density)) * sum(n.values()) - Fraction(str(classifier)) * n[last]
    g = {}
    for i in range(1, len(others) + 1):
        k = len(shapes) - i + 1
        g[others[i - 1]] = Fraction(k**2 + k, i**2 if vgg else 1)
    densities, extra = {}, 0
    for name in others:
        wanted = g[name] * budget / sum(g[m] * n[m] for m in others) * n[name] + extra
        extra = wanted - n[name] if wanted > n[name] else 0
        densities[name] = (wanted - extra) / n[name]
    return {**densities, last: classifier}


@examples
@given(shapes=networks, density=densities, vgg=st.booleans(), classifier=st.sampled_from([0.1, 0.3, 1]))
def test_smart_ratio_is_its_definition_or_says_that_the_budget_cannot_be_spent(shapes, density, vgg, classifier):
    last = math.prod(list(shapes.values())[-1])
    cost, room = Fraction(str(classifier)) * last, size(shapes) - last
    total = asked(shapes, density)
    if math.floor(cost) > total or total >= room + cost + 1:
        with pytest.raises(ValueError, match=rf"density {density} keeps {total}:"):
            smart_ratio(shapes, density, vgg=vgg, classifier=classifier)
        return
    found = smart_ratio(shapes, density, vgg=vgg, classifier=classifier)
    check_counts(found, shapes, density)
    if cost <= Fraction(str(density)) * size(shapes) <= cost + room:  # else only rounding makes it possible
        expected = by_the_rules_of_smart_ratio(shapes, density, vgg, classifier)
        assert found == pytest.approx({name: float(d) for name, d in expected.items()}, rel=1e-9, abs=1e-12)


@examples
@given(shapes=networks, density=densities, data=st.data())
def test_ratio_of_any_masks_at_their_own_density_gives_their_own_densities_and_counts(shapes, density, data):
    like = {
        name: torch.arange(math.prod(shape)).view(shape) < data.draw(st.integers(0, math.prod(shape)))
        for name, shape in shapes.items()
    }
    own = kept(like)
    if sum(own.values()) > 0:
        exact = math.nextafter(density_of(like), 0)  # a rounded quotient may lie above k / N and ask for k + 1
        assert ratio_of(shapes, exact, like=like) == pytest.approx(layer_densities(like), rel=1e-12)
        assert counts(ratio_of(shapes, exact, like=like), shapes, exact) == own
    if asked(shapes, density) <= sum(m.numel() for m in like.values() if m.any()):
        found = ratio_of(shapes, density, like=like)
        check_counts(found, shapes, density)
        assert all(own[name] > 0 for name, k in counts(found, shapes, density).items() if k > 0)
        free = [d * math.prod(shapes[name]) / own[name] for name, d in found.items() if 0 < d < 1]
        assert free == pytest.approx(free[:1] * len(free))  # one common factor below 1


def test_ratio_of_fills_every_layer_that_is_not_empty_and_no_other_when_the_budget_is_just_theirs():
    # the last of the three to fill up ends a hair above 1 in floating point, and nothing is left but the empty one
    shapes = {"a": (17, 1), "b": (31, 1), "c": (5, 1), "empty": (47, 1)}
    like = keep_counts(
        {name: torch.rand(shape) for name, shape in shapes.items()}, {"a": 3, "b": 22, "c": 2, "empty": 0}
    )
    assert ratio_of(shapes, 0.53, like=like) == {"a": 1, "b": 1, "c": 1, "empty": 0}


ASCENDING = [1e-4, 1e-3, 0.0102, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 0.99]


@pytest.mark.parametrize("shapes", PAPERS.values(), ids=PAPERS)
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_no_layer_gets_sparser_when_the_network_gets_denser(name, shapes):
    options = {"like": random_masks(shapes, 0.05)} if name == "ratio_of" else {}
    found = []
    for density in ASCENDING:
        try:
            found.append(list(ALLOCATIONS[name](shapes, density, **options).values()))
        except ValueError:
            assert name in ("uniform_plus", "smart_ratio", "ratio_of")
    assert len(found) >= 6
    assert all(np.all(np.array(b) >= np.array(a) - 1e-12) for a, b in pairwise(found))


@pytest.mark.parametrize("allocate", ALWAYS.values(), ids=ALWAYS)
@pytest.mark.parametrize("shapes", PAPERS.values(), ids=PAPERS)
@pytest.mark.parametrize("density", [1.0, 1, 1 - 1e-15, 0.999999, 0.9, 0.5, 0.1, 0.05, 0.01, 1e-3, 1e-4, 1e-6, 1e-9])
def test_networks_of_the_papers_get_exact_counts(allocate, shapes, density):
    densities = allocate(shapes, density)
    assert weights(densities, shapes) == pytest.approx(density * size(shapes), rel=1e-10)
    check_counts(densities, shapes, density)
    if density == 1:
        assert counts(densities, shapes, density) == {name: math.prod(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("shapes", PAPERS.values(), ids=PAPERS)
@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 0.1, 0.05, 0.01, 0.004])
def test_allocations_that_spare_a_layer_get_exact_counts_where_they_can_pay_for_it(shapes, density):
    check_counts(uniform_plus(shapes, density), shapes, density)
    if density < 1:
        check_counts(smart_ratio(shapes, density), shapes, density)
    check_counts(smart_ratio(shapes, density, classifier=max(0.3, density)), shapes, density)


# ---- rounding ----------------------------------------------------------------------------------------------------


def test_the_spare_weights_go_to_the_largest_remainders():
    # quotas 2.6, 1.2 and 0.2 of 4 weights: the floors keep 3, and one more goes to the .6
    shapes = {"a": (10, 1), "b": (10, 1), "c": (20, 1)}
    assert counts({"a": 0.26, "b": 0.12, "c": 0.01}, shapes, 0.1) == {"a": 3, "b": 1, "c": 0}


def test_a_full_layer_gets_no_spare_weight():
    # quotas 2, 0.5 and 0.5; equal remainders go by order
    shapes = {"full": (2, 1), "a": (4, 1), "b": (4, 1)}
    assert counts({"full": 1.0, "a": 0.125, "b": 0.125}, shapes, 0.3) == {"full": 2, "a": 1, "b": 0}


def test_an_empty_layer_gets_no_spare_weight():
    # a hair above 0.3 asks for 4 of 10 where the quotas are 0 and 3 sharp: neither has a remainder
    shapes = {"empty": (5, 1), "a": (5, 1)}
    assert counts({"empty": 0.0, "a": 0.6}, shapes, 0.3000000000000001) == {"empty": 0, "a": 4}


def test_a_quota_below_one_weight_may_round_to_none():
    assert counts({"a": 0.01, "b": 0.01}, {"a": (10, 1), "b": (10, 9)}, 0.01) == {"a": 0, "b": 1}


@pytest.mark.parametrize("wrong", [1.1, -0.1, math.nan])
def test_a_layer_density_outside_0_and_1_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"layer 'b' has density .*: expected one in \[0, 1\]"):
        counts({"a": 0.5, "b": wrong}, {"a": (10, 1), "b": (10, 1)}, 0.5)


@pytest.mark.parametrize("given_density", [0.2, 0.8])
def test_densities_that_do_not_spend_the_budget_are_refused_with_both_numbers(given_density):
    shapes = {"a": (10, 10), "b": (10, 10)}
    with pytest.raises(ValueError, match=rf"{200 * given_density:.1f} weights, density 0.5 keeps 100"):
        counts(dict.fromkeys(shapes, given_density), shapes, 0.5)


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("density", [0, -0.5, 1.5, math.nan, True, "0.1"])
def test_what_is_no_density_is_refused(name, density):
    options = {"like": random_masks(LENET, 0.5)} if name == "ratio_of" else {}
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        ALLOCATIONS[name](LENET, density, **options)


@pytest.mark.parametrize("name", [name for name in ALLOCATIONS if name != "uniform"])
def test_a_network_without_layers_is_refused(name):
    with pytest.raises(ValueError, match="shapes is empty"):
        ALLOCATIONS[name]({}, 0.5, **({"like": {}} if name == "ratio_of" else {}))


@pytest.mark.parametrize(
    ("shapes", "density", "numbers"),
    [
        (VGG16, 1e-4, r"from 1536\.0 weights \(0\.3 of the 5120 of the classifier 'clas.* 0\.0001 keeps 1472:"),
        (VGG16, 1, r"to 14712000\.0, but density 1 keeps 14715584:"),
        ({"only": (10, 10)}, 0.5, r"from 30\.0 weights .* to 30\.0, but density 0\.5 keeps 50:"),
    ],
)
def test_smart_ratio_says_what_it_cannot_spend(shapes, density, numbers):
    with pytest.raises(ValueError, match=numbers):
        smart_ratio(shapes, density)


def test_smart_ratio_refuses_a_classifier_that_keeps_nothing():
    with pytest.raises(ValueError, match=r"density 0 is not in \(0, 1"):
        smart_ratio(LENET, 0.1, classifier=0)


ONES = torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": ONES}, r"\['b'\] have no mask, \[\] no tensor"),
        ({"a": ONES, "b": ONES, "c": ONES}, r"\[\] have no mask, \['c'\] no tensor"),
        ({"a": ONES, "b": ONES[:1]}, r"like\['b'\] is torch\.bool \(1, 2\): expected bool \(2, 2\)"),
        ({"a": ONES, "b": ONES.float()}, r"like\['b'\] is torch\.float32 \(2, 2\): expected bool"),
        ({"a": ONES, "b": ~ONES}, r"the 1 of 2 layers .* have 4 weights, density 0\.6 keeps 5:"),
        ({"a": ~ONES, "b": ~ONES}, r"the 0 of 2 layers .* have 0 weights, density 0\.6 keeps 5:"),
    ],
)
def test_ratio_of_refuses_masks_of_another_network_and_masks_that_cannot_hold_the_budget(like, message):
    with pytest.raises(ValueError, match=message):
        ratio_of({"a": (2, 2), "b": (2, 2)}, 0.6, like=like)
