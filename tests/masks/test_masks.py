"""`fsp.masks`: exact counts, honest ties, weights that stay pruned, files that come back."""

import copy
import hashlib
import json
import math
import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from scipy.stats import chisquare
from torch import inf, nan, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

from fsp import masks
from fsp.files import DamagedFile
from fsp.masks import holding, randomise

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bools(*entries):
    return torch.tensor(entries, dtype=torch.bool)


def total(kept):
    return sum(int(mask.sum()) for mask in kept.values())


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# ---- how many ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "density", "kept"),
    [
        (10, 0.9, 9),  # 10 * (1 - 0.9) is a little less than 1 in binary: a naive floor keeps 10
        (3, 0.5, 2),  # one and a half: the floor is of what is removed
        (14_761_664, 0.1, 1_476_167),  # read out of Synaptic-Flow's published masks
        (14_761_664, 1e-6, 15),
        (5, 1e-12, 1),
        (7, 1.0, 7),
    ],
)
def test_a_density_keeps_n_minus_the_floor_of_what_it_removes(n, density, kept):
    assert masks.kept_count(n, density) == kept
    assert type(masks.kept_count(n, density)) is int


@examples
@given(n=st.integers(1, 10**8), thousandths=st.integers(1, 1000))
def test_counts_are_those_of_exact_decimal_arithmetic(n, thousandths):
    removed = (1000 - thousandths) * n // 1000
    assert masks.kept_count(n, thousandths / 1000) == n - removed


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, 1.5, nan, inf, True, False, "0.1", None])
def test_what_is_no_density_is_refused_by_value(density):
    with pytest.raises(ValueError, match=r"\(0, 1\]") as caught:
        masks.keep_top({"w": torch.rand(4)}, density)
    assert repr(density) in str(caught.value)


# ---- which -------------------------------------------------------------------------------------------------------


@st.composite
def scored_networks(draw):
    """Up to four tensors of up to three dimensions with scores from few values, so that most are tied."""
    shapes = draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4))
    levels = draw(st.integers(1, 4))
    rng = generator(draw(st.integers(0, 99)))
    return {f"t{i}": torch.randint(levels, shape, generator=rng).double() - 1 for i, shape in enumerate(shapes)}


densities = st.integers(1, 200).map(lambda k: k / 200)


@pytest.mark.parametrize("scope", ["global", "layer"])
@examples
@given(scores=scored_networks(), density=densities, seed=st.integers(0, 9))
def test_counts_are_exact_under_ties_and_nothing_kept_is_below_anything_pruned(scope, scores, density, seed):
    kept = masks.keep_top(scores, density, scope=scope, generator=generator(seed))
    assert list(kept) == list(scores)
    assert all(kept[name].shape == s.shape and kept[name].dtype == torch.bool for name, s in scores.items())
    for ranked in [list(scores)] if scope == "global" else [[name] for name in scores]:  # what is ranked together
        inside = torch.cat([scores[name][kept[name]] for name in ranked])
        outside = torch.cat([scores[name][~kept[name]] for name in ranked])
        n = len(inside) + len(outside)
        assert len(inside) == max(1, n - math.floor((1 - Fraction(str(density))) * n))
        assert not len(outside) or inside.min() >= outside.max()


def test_given_counts_are_kept_from_none_to_all():
    scores = {"none": torch.tensor([1.0, 2.0]), "one": torch.tensor([5.0, 7.0, 6.0]), "all": torch.tensor([-1.0, 0.0])}
    kept = masks.keep_counts(scores, {"none": 0, "one": 1, "all": 2})
    assert [m.tolist() for m in kept.values()] == [[False, False], [False, True, False], [True, True]]


@pytest.mark.parametrize("count", [-1, 3])
def test_a_count_that_a_tensor_cannot_hold_is_refused(count):
    with pytest.raises(ValueError, match=f"fc.*{count}"):
        masks.keep_counts({"fc": torch.rand(2)}, {"fc": count})


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_lower_density_keeps_a_subset_when_scores_differ(scope):
    scores = {"a": torch.rand(30, 20, generator=generator(1)), "b": torch.rand(400, generator=generator(2))}
    inner, outer = masks.keep_top(scores, 0.1, scope=scope), masks.keep_top(scores, 0.5, scope=scope)
    assert all(not (inner[name] & ~outer[name]).any() for name in scores)
    assert total(inner) < total(outer)


def test_minus_infinity_is_never_kept():
    s = torch.tensor([-inf, -3.0, -inf, -2.0, -inf])
    for seed in range(20):
        assert masks.keep_top({"w": s}, 0.4, generator=generator(seed))["w"].tolist() == [
            False,
            True,
            False,
            True,
            False,
        ]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_more_weights_than_may_be_kept_is_an_error_with_both_numbers(scope):
    with pytest.raises(ValueError, match=r"3 weights .* only 2 may be; lower the density"):
        masks.keep_top({"w": torch.tensor([-inf, -3.0, -inf, -2.0, -inf])}, 0.6, scope=scope)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("bad", [nan, inf])
def test_scores_that_cannot_be_ranked_are_refused_by_name(bad, scope):
    with pytest.raises(ValueError, match=r"blocks\.3\.conv1") as caught:
        masks.keep_top({"stem": torch.zeros(3), "blocks.3.conv1": torch.tensor([1.0, bad])}, 0.5, scope=scope)
    assert "float64" in str(caught.value)
    with pytest.raises(ValueError, match=r"blocks\.3\.conv1"):
        masks.keep_counts({"blocks.3.conv1": torch.tensor([1.0, bad])}, {"blocks.3.conv1": 1})


@pytest.mark.parametrize("function", [masks.keep_top, masks.shuffle])
def test_an_unknown_scope_names_the_two_there_are(function):
    options = {"density": 0.5} if function is masks.keep_top else {"generator": generator()}
    with pytest.raises(ValueError, match='"global" or "layer", not \'local\''):
        function({"w": bools(True)}, scope="local", **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_dtype_can_be_ranked(dtype):
    kept = masks.keep_top({"w": torch.randn(50, 50, generator=generator()).to(dtype)}, 0.3)
    assert total(kept) == 750


# ---- ties --------------------------------------------------------------------------------------------------------


def test_ties_depend_on_the_generator_and_on_nothing_global():
    scores = {"a": torch.zeros(60), "b": torch.zeros(6, 10)}
    torch.manual_seed(1)
    first, fresh = masks.keep_top(scores, 0.5, generator=generator(3)), masks.keep_top(scores, 0.5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, masks.keep_top(scores, 0.5, generator=generator(3)))
    assert same(fresh, masks.keep_top(scores, 0.5))
    assert torch.equal(state, torch.get_rng_state())
    assert not same(first, masks.keep_top(scores, 0.5, generator=generator(4)))


def test_ties_fall_on_every_position_equally_often():
    # one certain, eight tied for three places, one hopeless; the two tensors share the tie
    scores = {"a": torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]), "b": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])}
    rng, draws = generator(5), 2000
    counts = torch.zeros(10)
    for _ in range(draws):
        counts += torch.cat(list(masks.keep_top(scores, 0.4, generator=rng).values()))
    assert counts[1] == draws
    assert counts[7] == 0
    tied = counts[[0, 2, 3, 4, 5, 6, 8, 9]]
    expected, variance = draws * 3 / 8, draws * 3 / 8 * 5 / 8
    # chi-square, 7 degrees of freedom (places of a draw exclude each other, hence 7 / 8): above 40 once in a million
    assert ((tied - expected) ** 2).sum() / variance * 7 / 8 < 40


def test_ties_in_separate_layers_are_not_broken_alike():
    kept = masks.keep_top({"a": torch.zeros(64), "b": torch.zeros(64)}, 0.5, scope="layer")
    assert not torch.equal(kept["a"], kept["b"])


# ---- drawn at random ---------------------------------------------------------------------------------------------

LARGE = {"a": torch.ones(300, 400).bool(), "b": torch.ones(200, 100).bool()}  # positions are drawn
LITTLE = {"a": torch.ones(30, 40).bool(), "b": torch.ones(20, 10).bool()}  # all entries are ranked


@pytest.mark.parametrize("among", [LARGE, LITTLE], ids=["large", "little"])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.5, 0.997, 1.0])
def test_drawn_masks_have_exactly_the_counts_asked_for(among, share):
    counts = {name: round(share * mask.numel()) for name, mask in among.items()}
    assert {name: int(m.sum()) for name, m in masks.draw(among, counts, generator=generator()).items()} == counts
    together = masks.draw(among, sum(counts.values()), generator=generator())
    assert total(together) == sum(counts.values())
    assert {name: m.shape for name, m in together.items()} == {name: m.shape for name, m in among.items()}


@pytest.mark.parametrize("among", [LARGE, LITTLE], ids=["large", "little"])
def test_only_what_may_be_kept_is_drawn_and_no_more_than_there_is(among):
    half = {"a": among["a"].clone(), "b": among["b"]}
    half["a"][::2] = False
    there = int(half["a"].sum())
    drawn = masks.draw(half, {"a": there - 1, "b": 3}, generator=generator())
    assert not (drawn["a"] & ~half["a"]).any()
    with pytest.raises(ValueError, match=f"a: {there + 1} weights are to be kept, only {there} may be"):
        masks.draw(half, {"a": there + 1, "b": 3}, generator=generator())


def test_masks_that_are_not_bool_are_refused_by_name_before_anything_is_drawn():
    counted = {"w": torch.ones(400, 400, dtype=torch.int64)}
    for function in (masks.shuffle, masks.rewire, lambda kept, **given: masks.draw(kept, 3, **given)):
        state = generator()
        with pytest.raises(ValueError, match=r"mask 'w' is torch\.int64: expected bool"):
            function(counted, generator=state)
        assert torch.equal(state.get_state(), generator().get_state())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_set_of_positions_is_drawn_equally_often(count):
    order = generator()
    sets = [tuple(randomise._drawn(5, count, order).nonzero().flatten().tolist()) for _ in range(4000)]
    often = Counter(sets)
    assert len(often) == math.comb(5, count)
    assert chisquare(list(often.values())).pvalue > 1e-3


def test_positions_over_all_tensors_fall_into_each_by_its_size():
    kept = sum(int(masks.draw(LARGE, 1000, generator=generator(seed))["b"].sum()) for seed in range(100))
    assert abs(kept / 100_000 - 1 / 7) < 0.005  # four and a half standard errors


def test_a_draw_depends_on_its_generator_and_on_no_setting():
    def draw():
        return masks.draw(LARGE, 5000, generator=generator(3))

    first, threads = draw(), torch.get_num_threads()
    torch.manual_seed(9)
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    try:
        assert same(first, draw())
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    assert not same(first, masks.draw(LARGE, 5000, generator=generator(4)))


# ---- what is prunable --------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """One of each: convolutions of three kinds, norms, an embedding, a shared and a frozen linear layer."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.conv1d = nn.Conv1d(4, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.up = nn.ConvTranspose2d(2, 3, 2)
        self.group = nn.GroupNorm(1, 3)
        self.layer = nn.LayerNorm(4)
        self.volume = nn.Conv3d(1, 2, 2, bias=False)
        self.head = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.head.weight
        self.frozen = nn.Linear(4, 2).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(4, 4))


def test_weights_of_convolutions_and_linear_layers_are_prunable_and_nothing_else_is():
    model = Everything()
    found = masks.prunable(model)
    assert list(found) == ["conv1d.weight", "up.weight", "volume.weight", "head.weight", "frozen.weight"]
    assert all(found[name] is dict(model.named_parameters())[name] for name in found)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["block"], ["block2.weight", "classifier.weight"]),
        (["block.0"], ["block.1.weight", "block2.weight", "classifier.weight"]),
        (["block.0.weight", "classifier"], ["block.1.weight", "block2.weight"]),
        ((name for name in ["block2"]), ["block.0.weight", "block.1.weight", "classifier.weight"]),
    ],
)
def test_parameters_and_whole_modules_are_excluded_by_name(exclude, left):
    model = nn.ModuleDict(
        {
            "block": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            "block2": nn.Linear(2, 2),  # "block" is its prefix, not its module
            "classifier": nn.Linear(2, 2),
        }
    )
    assert list(masks.prunable(model, exclude=exclude)) == left


@pytest.mark.parametrize("name", ["head", "0.bias", "0.weigh", "1", ""])
def test_an_exclusion_that_matches_no_prunable_weight_is_refused_with_those_there_are(name):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"0\.weight, 2\.weight") as caught:
        masks.prunable(model, exclude=[name])
    assert repr(name) in str(caught.value)
    with pytest.raises(ValueError, match="is a text: expected a list of names"):
        masks.prunable(model, exclude="0")


@pytest.mark.parametrize(
    ("model", "exclude"), [(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), []), (nn.Sequential(nn.Linear(2, 2)), ["0"])]
)
def test_a_model_with_nothing_left_to_prune_is_refused(model, exclude):
    with pytest.raises(ValueError, match="no prunable weight"):
        masks.prunable(model, exclude=exclude)


# ---- applying and holding ----------------------------------------------------------------------------------------


def network():
    """A small network with a convolution, a norm and a linear layer, the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(8)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3))


def half_masks(model, seed=0):
    rng = generator(seed)
    return {name: torch.rand(p.shape, generator=rng) < 0.5 for name, p in masks.prunable(model).items()}


def train(model, optimizer, steps=5, seed=0):
    rng = generator(seed)
    for _ in range(steps):
        x, y = torch.randn(12, 1, 6, 6, generator=rng), torch.randint(3, (12,), generator=rng)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def pruned_entries(model, kept):
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[name][~mask] for name, mask in kept.items()]).detach()


def test_applied_masks_zero_what_is_pruned_and_touch_nothing_else():
    model, kept = network(), half_masks(network())
    before = {name: p.clone() for name, p in model.named_parameters()}
    masks.apply_(model, kept)
    for name, p in model.named_parameters():
        expected = torch.where(kept[name], before[name], torch.zeros(())) if name in kept else before[name]
        assert torch.equal(p, expected)
        assert p.requires_grad


def test_applied_masks_clear_even_a_weight_that_is_not_a_number():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[nan, 1.0]])
    masks.apply_(layer, {"weight": bools([False, True])})
    assert layer.weight.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    "kept",
    [
        {"4.wait": bools(True)},
        {"4.weight": torch.ones(3, 64)},
        {"4.weight": torch.ones(64, 3, dtype=torch.bool)},
        {"4.weight": torch.ones(64, dtype=torch.bool)},  # it would broadcast
    ],
)
def test_masks_that_fit_no_parameter_are_refused_by_name_and_before_any_change(kept):
    model = network()
    before = {name: p.clone() for name, p in model.named_parameters()}
    some = {"0.weight": torch.zeros(4, 1, 3, 3, dtype=torch.bool)} | kept
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for attempt in (
        lambda: masks.apply_(model, some),
        lambda: masks.hold_(optimizer, model, some),
        lambda: masks.scattered(some, model, generator=generator()),
    ):
        with pytest.raises(ValueError, match=next(iter(kept))):
            attempt()
    assert same(before, dict(model.named_parameters()))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


@pytest.fixture(params=[False, True], ids=["one by one", "together"])
def together(request, monkeypatch):
    """Weights masked layer by layer, and all together as on CUDA."""
    if request.param:
        monkeypatch.setattr(holding, "_in_few_kernels", lambda optimizer, parameter: True)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_and_their_momentum_stay_exactly_zero_in_training(name):
    model, kept = network(), half_masks(network())
    start = {key: p.clone() for key, p in model.named_parameters()}
    optimizer = OPTIMIZERS[name](model.parameters())
    masks.hold_(optimizer, model, kept)
    assert not pruned_entries(model, kept).any()  # already before the first step
    train(model, optimizer)
    assert not pruned_entries(model, kept).any()
    parameters = dict(model.named_parameters())
    for key, mask in kept.items():
        assert (parameters[key][mask] != start[key][mask]).all()  # the rest has learnt
        buffers = [s for s in optimizer.state[parameters[key]].values() if s is not None and s.shape == mask.shape]
        assert len(buffers) == {"SGD": 0, "AdamW": 2, "RMSprop": 3}.get(name, 1)
        assert all(not buffer[~mask].any() and buffer[mask].any() for buffer in buffers)
    assert (parameters["4.bias"] != start["4.bias"]).all()


def test_training_under_masks_is_training_of_the_masked_network():
    model, oracle, kept = network(), network(), half_masks(network())
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    masks.hold_(optimizer, model, kept)
    train(model, optimizer)
    # oracle: the gradient itself is masked, so nothing has to be put back
    masks.apply_(oracle, kept)
    for key, p in oracle.named_parameters():
        if key in kept:
            p.register_hook(lambda g, mask=kept[key]: g * mask)
    train(oracle, OPTIMIZERS["momentum"](oracle.parameters()))
    for key, p in oracle.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[key], p)


def test_a_removed_handle_lets_go():
    model, kept = network(), half_masks(network())
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    handle = masks.hold_(optimizer, model, kept)
    train(model, optimizer, steps=2)
    handle.remove()
    train(model, optimizer, steps=1)
    assert pruned_entries(model, kept).all()


@pytest.mark.usefixtures("together")
def test_a_replaced_mask_takes_effect_at_the_next_step_and_growth_starts_without_momentum():
    model, kept = network(), half_masks(network())
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    masks.hold_(optimizer, model, kept)
    train(model, optimizer, steps=3)
    old, weight = kept["4.weight"], dict(model.named_parameters())["4.weight"]
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert not momentum[~old].any()
    kept["4.weight"] = ~old
    train(model, optimizer, steps=1)
    assert not weight[old].any()
    assert weight[~old].all()
    assert not momentum[old].any()


@pytest.mark.usefixtures("together")
def test_a_pruned_weight_with_an_infinite_gradient_stays_zero():
    layer = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    masks.hold_(optimizer, layer, {"weight": bools([True, False])})
    layer.weight.grad = torch.tensor([[1.0, inf]])
    optimizer.step()
    assert layer.weight[0, 1] == 0
    assert optimizer.state[layer.weight]["momentum_buffer"].tolist() == [[1.0, 0.0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("of_masks", ["cpu", "cuda"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_cuda_pruned_weights_and_momentum_stay_zero_and_replaced_masks_take_effect(layout, name, of_masks):
    model, kept = network().to("cuda", memory_format=layout), half_masks(network())
    kept = {key: mask.to(of_masks) for key, mask in kept.items()}
    optimizer = OPTIMIZERS[name](model.parameters())
    masks.hold_(optimizer, model, kept)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for key, mask in kept.items():
            parameter, mask = model.get_parameter(key), mask.cuda()
            states = [s for s in optimizer.state[parameter].values() if s is not None and s.shape == mask.shape]
            for tensor in (parameter, *states):
                assert torch.equal(tensor != 0, mask)
        kept["4.weight"] = ~kept["4.weight"]


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_is_changed_in_place_takes_effect_at_the_next_step(inference):
    model = network()
    with torch.inference_mode(inference):
        kept = {name: mask.clone() for name, mask in half_masks(model).items()}
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    masks.hold_(optimizer, model, kept)
    train(model, optimizer, steps=2)
    with torch.inference_mode(inference):
        kept["4.weight"].logical_not_()
    train(model, optimizer, steps=1)
    weight = dict(model.named_parameters())["4.weight"]
    assert torch.equal(weight != 0, kept["4.weight"])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_masked_together_are_those_masked_one_by_one_to_the_last_bit(name, layout, monkeypatch):
    states, calls = [], []
    monkeypatch.setattr(holding, "_in_few_kernels", lambda optimizer, parameter: calls.append(1) or len(states) == 1)
    for _ in range(2):
        model, kept = network(), half_masks(network())
        model.to(memory_format=layout)
        optimizer = OPTIMIZERS[name](model.parameters())
        masks.hold_(optimizer, model, kept)
        train(model, optimizer)
        momenta = [t for p in model.parameters() for t in optimizer.state[p].values() if t is not None]
        states.append([*model.parameters(), *momenta])
    assert calls
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_holding_costs_no_randomness_and_no_gradient_graph():
    model, kept = network(), half_masks(network())
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    state = torch.get_rng_state()
    masks.hold_(optimizer, model, kept)
    train(model, optimizer, steps=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())


# ---- holding: optimisers that mix coordinates, copies and wrappers -----------------------------------------------


def dense_network():
    """Three matrices, because Muon takes nothing else; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Linear(36, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh()]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, 3, bias=False))


class Masked(nn.Module):
    """Weights that are masked in the forward pass: a masked network without any trick."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def masked_network(model, kept):
    """The oracle: the model with every weight multiplied by its mask in the forward pass."""
    masks.apply_(model, kept)
    for name, mask in kept.items():
        nn.utils.parametrize.register_parametrization(model.get_submodule(name.split(".")[0]), "weight", Masked(mask))
    return model


MIXING = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=5),
    "LBFGS with line search": lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),  # with clipping, which mixes too
}


def losses(model, optimizer, *, clip, steps=8, watch=lambda: None):
    """Losses of a training in which `watch` is called whenever the loss is asked for."""
    rng, found = generator(5), []
    for _ in range(steps):
        x, y = torch.randn(12, 1, 6, 6, generator=rng), torch.randint(3, (12,), generator=rng)

        def closure(x=x, y=y):
            watch()
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            return loss

        found.append(optimizer.step(closure).item())
    return found


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", MIXING)
def test_optimisers_that_mix_coordinates_and_clipping_train_the_masked_network(name, clip):
    if not hasattr(torch.optim, name.split()[0]):
        pytest.skip(f"this torch has no {name}")
    ours, kept = dense_network(), half_masks(dense_network())
    optimizer = MIXING[name](ours.parameters())
    masks.hold_(optimizer, ours, kept)

    def pruned_weights_are_zero():
        assert not pruned_entries(ours, kept).any()

    found = losses(ours, optimizer, clip=clip, watch=pruned_weights_are_zero)
    pruned_weights_are_zero()
    theirs = masked_network(dense_network(), kept)
    expected = losses(theirs, MIXING[name](theirs.parameters()), clip=clip)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[-1] != found[0]


def test_accumulated_gradients_and_those_that_are_set_by_hand_are_masked_too():
    model, kept = dense_network(), half_masks(dense_network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.hold_(optimizer, model, kept)
    for seed in (0, 1):
        cross_entropy(model(torch.randn(4, 36, generator=generator(seed))), torch.arange(4) % 3).backward()
    for name, p in model.named_parameters():
        assert not p.grad[~kept[name]].any()
        assert p.grad[kept[name]].any()
        p.grad = torch.ones_like(p)
    optimizer.register_step_pre_hook(lambda *_: [seen.append(p.grad.clone()) for p in model.parameters()] and None)
    seen = []
    optimizer.step()
    assert all(torch.equal(g != 0, mask) for g, mask in zip(seen, kept.values(), strict=True))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_weight_that_is_frozen_when_it_is_held_has_masked_gradients_once_it_trains():
    model, kept = dense_network(), half_masks(dense_network())
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.hold_(optimizer, model, kept)
    assert not model[1].weight.requires_grad
    model[1].requires_grad_(True)
    model(torch.ones(2, 36)).square().sum().backward(create_graph=True)
    assert not model[1].weight.grad[~kept["1.weight"]].any()
    model[1].weight.grad.square().sum().backward()  # a gradient of a gradient goes the same way
    assert not model[1].weight.grad[~kept["1.weight"]].any()


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "Muon", "LBFGS"])
def test_gradients_stay_dense_when_asked_for_and_the_step_is_of_the_masked_network_all_the_same(name):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    results = []
    for dense in (False, True):
        model, kept = dense_network(), half_masks(dense_network())
        optimizer = MIXING[name](model.parameters())
        masks.hold_(optimizer, model, kept, dense_gradients=dense)
        results.append(losses(model, optimizer, clip=False))
        outside = torch.cat([p.grad[~kept[key]] for key, p in model.named_parameters()])
        assert outside.any() == dense
        assert not pruned_entries(model, kept).any()
    assert results[0] == results[1]


@pytest.mark.parametrize("how", ["it had made steps before", "a mask was replaced"])
def test_lbfgs_is_refused_where_its_history_holds_pruned_weights(how):
    model, kept = dense_network(), half_masks(dense_network())
    optimizer = MIXING["LBFGS"](model.parameters())
    if how == "it had made steps before":
        losses(model, optimizer, clip=False)
    masks.hold_(optimizer, model, kept)
    if how == "a mask was replaced":
        losses(model, optimizer, clip=False)
        kept["1.weight"] = ~kept["1.weight"]
    with pytest.raises(ValueError, match=r"LBFGS remembers directions .* make a new optimiser"):
        losses(model, optimizer, clip=False)


def test_momentum_from_before_the_masks_is_forgotten_at_pruned_weights_before_the_first_step():
    model, kept = dense_network(), half_masks(dense_network())
    optimizer = MIXING["SGD"](model.parameters())
    losses(model, optimizer, clip=False)
    dense = copy.deepcopy(optimizer.state_dict())

    def momentum():
        buffers = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
        return torch.cat([buffers[name][~mask] for name, mask in kept.items()])

    assert momentum().all()
    masks.hold_(optimizer, model, kept)
    assert not momentum().any()
    optimizer.load_state_dict(dense)
    assert not momentum().any()


def test_the_newest_hold_of_a_weight_decides_its_gradient_and_one_that_is_over_leaves_it_alone():
    model, kept = dense_network(), half_masks(dense_network())
    other = {name: ~mask for name, mask in kept.items()}

    def outside(some):
        model.zero_grad()
        model(torch.ones(2, 36)).square().sum().backward()
        return torch.cat([p.grad[~some[name]] for name, p in model.named_parameters()]).any()

    start = copy.deepcopy(model.state_dict())
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.hold_(first, model, kept)
    second = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = masks.hold_(second, model, other)
    model.load_state_dict(start)
    assert outside(kept)
    assert not outside(other)
    with pytest.raises(ValueError, match="held with other masks by a later optimiser"):
        first.step()
    handle.remove()
    assert not outside(kept)
    first.step()
    model.load_state_dict(start)
    del first
    assert outside(kept)  # the optimiser is gone, and the weights train densely


def test_two_optimisers_share_a_held_model():
    model, kept = dense_network(), half_masks(dense_network())
    matrices, rest = list(model.parameters())[:2], list(model.parameters())[2:]
    optimizers = [torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.1)]
    for optimizer in optimizers:
        masks.hold_(optimizer, model, dict(kept))
    cross_entropy(model(torch.ones(4, 36)), torch.arange(4) % 3).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert not pruned_entries(model, kept).any()


def test_an_optimiser_of_another_model_is_refused():
    model, kept = dense_network(), half_masks(dense_network())
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="trains no parameter of this model"):
        masks.hold_(torch.optim.SGD(twin.parameters(), lr=0.1), model, kept)


@pytest.mark.parametrize("how", ["assigned", "replaced"])
def test_weights_that_the_optimiser_has_lost_are_named_at_the_next_step(how):
    model, kept = dense_network(), half_masks(dense_network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.hold_(optimizer, model, kept)
    if how == "assigned":
        model.load_state_dict({name: p + 1 for name, p in model.state_dict().items()}, assign=True)
    else:
        model[1].weight = nn.Parameter(torch.ones(8, 36))
    with pytest.raises(ValueError, match=r"'1\.weight' is no longer the weight .*\(assign=True\)"):
        optimizer.step()


def pair(model):
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_of_model_and_optimiser_are_free_until_they_are_held_again(copied):
    (model, optimizer), kept = pair(dense_network()), half_masks(dense_network())
    masks.hold_(optimizer, model, kept)
    losses(model, optimizer, clip=True)
    twin, again = copied((model, optimizer))
    free, loose = copied((model, optimizer))
    losses(free, loose, clip=True)
    assert pruned_entries(free, kept).all()
    masks.hold_(again, twin, kept)
    assert losses(twin, again, clip=True) == losses(model, optimizer, clip=True)
    assert same(twin.state_dict(), model.state_dict())


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)}])
def test_averages_of_a_held_model_are_zero_where_it_is(average):
    (model, optimizer), kept = pair(dense_network()), half_masks(dense_network())
    averaged = torch.optim.swa_utils.AveragedModel(model, **average)  # before the masks: with dense weights
    masks.hold_(optimizer, model, kept)
    for _ in range(3):
        losses(model, optimizer, clip=False, steps=1)
        averaged.update_parameters(model)
    assert not pruned_entries(averaged.module, kept).any()


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "twice": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "inside": lambda model: nn.Sequential(*[torch.compile(layer, backend="eager") for layer in model]),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_masks_fit_a_model_in_a_wrapper_and_masks_of_a_wrapper_fit_the_model(name):
    model, kept = dense_network(), half_masks(dense_network())
    wrapped = WRAPPERS[name](model)
    masks.apply_(wrapped, kept)
    assert not pruned_entries(getattr(wrapped, "module", model) if name == "averaged" else model, kept).any()
    if name == "averaged":
        return
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.3, momentum=0.9)
    masks.hold_(optimizer, wrapped, kept)
    found = losses(wrapped, optimizer, clip=True)
    assert not pruned_entries(model, kept).any()
    of_wrapper = dict(zip(dict(wrapped.named_parameters()), kept.values(), strict=True))
    plain = dense_network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9)
    masks.hold_(optimizer, plain, of_wrapper)
    assert losses(plain, optimizer, clip=True) == found


def test_a_name_that_only_looks_like_that_of_a_wrapper_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'module\.1\.weight' belongs to no parameter"):
        masks.apply_(model, {"module.1.weight": torch.ones(2, 2, dtype=torch.bool)})


# ---- shuffles ----------------------------------------------------------------------------------------------------


@pytest.fixture
def lopsided():
    """Masks of very different densities, one tensor empty and one full."""
    rng = generator(1)
    return {
        "thin": torch.rand(20, 10, 3, 3, generator=rng) < 0.02,
        "thick": torch.rand(40, 30, generator=rng) < 0.9,
        "empty": torch.zeros(5, 5, dtype=torch.bool),
        "full": torch.ones(4, 4, dtype=torch.bool),
    }


def test_a_layer_shuffle_keeps_every_count_and_does_change_the_mask(lopsided):
    before = {name: mask.clone() for name, mask in lopsided.items()}
    new = masks.shuffle(lopsided, generator=generator())
    assert {name: (mask.shape, int(mask.sum())) for name, mask in new.items()} == {
        name: (mask.shape, int(mask.sum())) for name, mask in lopsided.items()
    }
    # the published code rebinds a local variable and so never shuffles (D48)
    for name in ("thin", "thick"):
        overlap = (new[name] & lopsided[name]).sum() / lopsided[name].sum()
        assert abs(overlap - lopsided[name].float().mean()) < 0.1
    assert same(lopsided, before)
    assert all(new[name].data_ptr() != lopsided[name].data_ptr() for name in new)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16])
def test_kept_weights_are_counted_in_masks_of_any_type(dtype):
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]]).to(dtype)
    assert masks.number_kept(mask) == masks.number_kept(mask.T) == 3
    assert masks.layer_densities({"w": mask}) == {"w": 0.5}


def test_a_global_shuffle_keeps_the_total_and_levels_the_densities(lopsided):
    new = masks.shuffle(lopsided, scope="global", generator=generator())
    assert not same(new, lopsided)
    assert total(new) == total(lopsided)
    assert [mask.shape for mask in new.values()] == [mask.shape for mask in lopsided.values()]
    overall = masks.density(lopsided)
    assert abs(masks.layer_densities(new)["thin"] - overall) < 0.05
    assert abs(masks.layer_densities(new)["thick"] - overall) < 0.05


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_shuffle_depends_only_on_its_generator(lopsided, scope):
    torch.manual_seed(1)
    first = masks.shuffle(lopsided, scope=scope, generator=generator(2))
    torch.manual_seed(9)
    assert same(first, masks.shuffle(lopsided, scope=scope, generator=generator(2)))
    assert not same(first, masks.shuffle(lopsided, scope=scope, generator=generator(3)))


def test_a_shuffle_reaches_every_position_equally_often():
    rng, counts = generator(4), torch.zeros(6)
    for _ in range(1200):
        counts += masks.shuffle({"w": bools(True, True, False, False, False, False)}, generator=rng)["w"]
    assert ((counts - 400) ** 2).sum() / (1200 * 2 / 9) * 5 / 6 < 35  # as above, with 5


def test_large_masks_are_shuffled_by_drawing_as_many_positions():
    kept = {"w": torch.zeros(400, 400).bool(), "v": torch.ones(400, 400).bool()}
    kept["w"][0, :300] = True
    kept["v"][5] = False
    new = masks.shuffle(kept, generator=generator())
    assert {name: int(m.sum()) for name, m in new.items()} == {"w": 300, "v": 399 * 400}
    assert int(new["w"][0].sum()) < 10
    assert int((~new["v"][5]).sum()) < 10


def test_scattering_keeps_counts_and_the_multiset_of_kept_weights_but_not_their_places():
    model, kept = network(), half_masks(network())
    before = {name: p.clone() for name, p in model.named_parameters()}
    new, weights = masks.scattered(kept, model, generator=generator(7))
    assert list(new) == list(weights) == list(kept)
    for name, mask in kept.items():
        assert int(new[name].sum()) == int(mask.sum())
        assert not torch.equal(new[name], mask)
        assert not weights[name][~new[name]].any()
        moved, original = weights[name][new[name]], before[name][mask].detach()
        assert torch.equal(moved.sort().values, original.sort().values)
        assert not torch.equal(moved, original)  # the order is random too, not only the places
        assert not weights[name].requires_grad
    assert same(before, dict(model.named_parameters()))


# ---- densities ---------------------------------------------------------------------------------------------------


def test_densities_weigh_tensors_by_size_and_layers_alone():
    kept = {"a": bools(True, False, False, False), "b": bools(True, True), "c": bools(False, False)}
    assert masks.density(kept) == 3 / 8
    assert masks.layer_densities(kept) == {"a": 0.25, "b": 1.0, "c": 0.0}
    assert type(masks.density(kept)) is float


# ---- masks of torch.nn.utils.prune -------------------------------------------------------------------------------


def pruned_by_torch(model):
    return [module for module in model.modules() if hasattr(module, "weight_mask")]


def test_a_model_pruned_by_torch_computes_and_learns_what_one_pruned_here_does():
    ours, theirs, kept = network(), network(), half_masks(network())
    theirs.load_state_dict(ours.state_dict())
    masks.apply_(ours, kept)
    masks.to_torch_(theirs, kept)
    x = torch.randn(6, 1, 6, 6, generator=generator(1))
    assert torch.equal(ours(x), theirs(x))
    first, second = (OPTIMIZERS["momentum"](model.parameters()) for model in (ours, theirs))
    masks.hold_(first, ours, kept)
    train(ours, first)
    train(theirs, second)
    assert torch.equal(ours(x), theirs(x))
    assert same(masks.from_torch(theirs), kept)
    for module in pruned_by_torch(theirs):
        prune.remove(module, "weight")
    assert list(dict(masks.prunable(theirs))) == list(kept)
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    for name, mask in kept.items():
        assert not theirs[name][~mask].any()


def test_masks_of_torch_come_back_by_the_names_of_the_plain_weights():
    model = network()
    prune.random_unstructured(next(m for m in model.modules() if isinstance(m, nn.Linear)), "weight", amount=3)
    (name, mask), *rest = masks.from_torch(model).items()
    assert not rest
    assert name in masks.prunable(network())
    assert mask.dtype == torch.bool
    assert int((~mask).sum()) == 3
    biased = prune.random_unstructured(nn.Linear(2, 4), "bias", amount=1)
    assert list(masks.from_torch(biased)) == ["bias"]


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    return model


def test_a_shared_weight_is_pruned_by_torch_in_each_of_its_modules():
    model, kept = tied(), {"0.weight": torch.eye(3, dtype=torch.bool)}
    here, x = tied(), torch.randn(4, 3, generator=generator())
    here.load_state_dict(model.state_dict())
    masks.apply_(here, kept)
    masks.to_torch_(model, kept)
    assert torch.equal(model(x), here(x))
    assert same(masks.from_torch(model), kept)
    for layer in (model[0], model[2]):
        prune.remove(layer, "weight")
    assert model[0].weight is model[2].weight
    assert torch.equal(model[0].weight, here[0].weight)


def test_a_shared_weight_with_two_masks_of_torch_is_refused():
    model = tied()
    prune.custom_from_mask(model[0], "weight", torch.eye(3))
    prune.custom_from_mask(model[2], "weight", torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"'0\.weight' and '2\.weight' are one parameter with two different masks"):
        masks.from_torch(model)


def test_a_model_that_torch_has_not_pruned_has_no_masks_to_read():
    with pytest.raises(ValueError, match="holds no masks of torch"):
        masks.from_torch(network())


@pytest.mark.parametrize(
    ("second", "name", "message"),
    [
        (nn.Linear(2, 2), "1.wait", r"'1\.wait' belongs to no parameter"),
        (nn.Linear(2, 3), "1.weight", r"needs bool \(3, 2\)"),
        (prune.identity(nn.Linear(2, 2), "weight"), "1.weight_orig", "prune.remove"),
        (
            parametrizations.orthogonal(nn.Linear(2, 2)),
            "1.parametrizations.weight.original",
            "remove_parametrizations",
        ),
    ],
)
def test_what_torch_cannot_prune_is_refused_before_any_change(second, name, message):
    model = nn.Sequential(nn.Linear(2, 2), second)
    ones = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        masks.to_torch_(model, {"0.weight": ones, name: ones})
    assert not prune.is_pruned(model[0])


# ---- files -------------------------------------------------------------------------------------------------------


def test_a_file_is_plain_one_bit_a_weight_first_weight_first_with_densities_and_metadata(tmp_path):
    # anyone with safetensors and numpy can read it
    path = tmp_path / "m.safetensors"
    empty = torch.zeros(3, 1, 3, 1, dtype=torch.bool)
    kept = {"view": bools([True, True], [False, True], [False, False]).T, "Maß.層": empty}
    masks.save(path, kept, method="snip", options={"rounds": 5, "exclude": ["classifier"]}, density=0.45)
    assert same(masks.load(path), kept)  # names, their order, shapes, bits
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["fsp_masks"])
        assert file.get_tensor("view").dtype == np.uint8
        assert [file.get_tensor(name).tolist() for name in kept] == [[0b10011000], [0, 0]]
    found = masks.metadata(path)
    assert found == {
        "method": "snip",
        "options": {"rounds": 5, "exclude": ["classifier"]},
        "density": 0.45,  # what was asked for
        "shapes": {"view": [2, 3], "Maß.層": [3, 1, 3, 1]},
        "achieved_density": 0.2,
        "achieved_layer_densities": {"view": 0.5, "Maß.層": 0.0},
        "checksum": hashlib.sha256(json.dumps(header["shapes"]).encode() + b"\x98\0\0").hexdigest(),
    }


def test_damaged_masks_are_refused_and_their_metadata_can_be_read_still(tmp_path):
    path = tmp_path / "m.safetensors"
    masks.save(path, {"w": bools([True, False], [False, False])}, seed=3)
    path.write_bytes(path.read_bytes()[:-1] + b"\x40")  # the same density
    with pytest.raises(DamagedFile, match=r"m\.safetensors is no whole file of masks"):
        masks.load(path)
    assert masks.metadata(path)["seed"] == 3


def write_old(path, bits=b"\x80\x98", **changes):
    """A file as it was before `fsp.files`, byte for byte; a change to None leaves an entry out."""
    content = {
        "shapes": {"w": [2, 3], "b": [1]},
        "layer_densities": {"w": 0.5, "b": 1.0},
        "density": 4 / 7,
        "checksum": "fd366cddd0772389255d5f9f347ab2fad6985af8cdfd088838302a058b156305",
        "metadata": {"method": "snip", "seed": 3},
    } | changes
    content = {name: value for name, value in content.items() if value is not None}
    header = {
        "__metadata__": {"fsp_masks": json.dumps(content)},
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bits)


@pytest.mark.parametrize("changes", [{}, {"checksum": None}])
def test_files_of_earlier_versions_are_read(tmp_path, changes):
    path = tmp_path / "m.safetensors"
    write_old(path, **changes)
    assert same(masks.load(path), {"w": bools([True, False, False], [True, True, False]), "b": bools(True)})
    found = masks.metadata(path)
    assert (found["method"], found["seed"], found["achieved_density"]) == ("snip", 3, 4 / 7)
    assert (found["checksum"] is None) == ("checksum" in changes)


@pytest.mark.parametrize(
    "damage",
    [
        {"bits": b"\x80\xc8"},  # as many weights elsewhere: the checksum tells
        {"bits": b"\x80\xd8", "checksum": None},  # one weight more: its density tells
        {"shapes": {"w": [3, 2], "b": [1]}},
        {"shapes": None},
        {"shapes": {"v": [2, 3], "b": [1]}, "checksum": None},
    ],
)
def test_files_of_earlier_versions_are_checked_as_far_as_they_can_be(tmp_path, damage):
    path = tmp_path / "m.safetensors"
    write_old(path, **damage)
    with pytest.raises(DamagedFile, match=r"m\.safetensors is no whole file of masks"):
        masks.load(path)


@pytest.mark.parametrize("name", ["shapes", "achieved_density", "achieved_layer_densities", "checksum"])
def test_metadata_may_not_take_a_name_of_the_files_own(tmp_path, name):
    with pytest.raises(ValueError, match=f"may not be called {name}"):
        masks.save(tmp_path / "m.safetensors", {"w": bools(True)}, **{name: 1})
    assert not list(tmp_path.iterdir())


def test_masks_that_are_not_bool_are_not_saved(tmp_path):
    with pytest.raises(TypeError):
        masks.save(tmp_path / "m.safetensors", {"w": torch.tensor([0.2, 0.7, 0.1])})
    assert not list(tmp_path.iterdir())


def test_a_path_in_place_of_masks_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"^masks is a str: expected save\(path, masks\)"):
        masks.save(tmp_path / "x", str(tmp_path / "y"))
    assert list(tmp_path.iterdir()) == []
