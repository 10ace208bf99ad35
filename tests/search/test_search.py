"""Search over masks: which layers are taken, exact counts at every step, and a directory that continues to the bit."""

import copy
import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fsp import models, progress, spectrum
from fsp.data import load
from fsp.files import CannotResume, load_content, load_tensors
from fsp.masks import density as density_of
from fsp.masks import kept_count
from fsp.masks import load as load_masks
from fsp.pruning.methods import METHODS, prune
from fsp.search import RANDOMNESS, candidates, matched, mini_batches, optimise, recombine, search
from fsp.search import population as search_module
from fsp.search.acceptance import ACCEPTANCE
from fsp.search.candidates import CandidateSource
from fsp.search.recombine import leading_vectors, resized, swapped
from fsp.spectrum import Wiring, biadjacency, coordinates, population, singular_values

DATA = load("digits")
BATCHES = mini_batches(DATA, number=1, size=32)
KEPT = 0.1


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net(seed=0, hidden=(32, 24)):
    return models.build("mlp", DATA.shape, 10, hidden=hidden, generator=seeded(seed))


def few(i):
    """Scoring examples of candidate i, few for mask 0 as well."""
    return BATCHES(i)[:2]


def layer_counts(masks):
    return [int(m.sum()) for m in masks.values()]


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def same(a, b):
    """Two results, but for wall times."""
    pd.testing.assert_frame_equal(a.trajectory, b.trajectory, check_exact=True)
    assert repr(a.coordinates) == repr(b.coordinates)  # nan is not equal to itself
    assert equal(a.masks, b.masks)
    assert list(a.tickets) == list(b.tickets)
    assert all(equal(a.tickets[i], b.tickets[i]) for i in a.tickets)


def quick(function=search, method="snip", model=None, **options):
    options = {"population": 12, "every": 4, "batches": few, "generator": seeded()} | options
    return function(model or net(), method, KEPT, **options)


# ---- acceptance, by hand -----------------------------------------------------------------------------------------

NAN = math.nan
# Ramanujan gap, weighted gap, IMDB, IMSG of two layers of mask 0 and four candidates
VALUES = [
    [(1, 0, 1, 1), (NAN, NAN, NAN, NAN)],
    [(1, 0, 1, 1), (NAN, NAN, NAN, NAN)],  # ties
    [(3, 0, 0.5, 1), (-1, 0.5, NAN, 0.2)],  # norm up and IMDB down; a layer that becomes valid
    [(0.5, 2, 1, 2), (NAN, 9, -0.1, 0)],  # norm and IMSG up, gap down; a layer that becomes invalid
    [(0, 0, 1.2, 0), (0.1, 0, 0.1, 0)],  # IMDB up, norm down in the first layer
]


@pytest.mark.parametrize(
    ("accept", "owners", "accepted"),
    [
        ("published", (3, 2), [0, 2, 3, 4, 4]),
        ("alt", (3, 0), [0, 0, 0, 1, 1]),
        ("strict", (1, 4), [0, 2, 2, 2, 3]),
        ("norm", (2, 3), [0, 2, 4, 5, 5]),
        ("gap", (2, 4), [0, 2, 4, 4, 5]),
    ],
)
def test_each_layer_is_taken_as_the_rule_says_by_itself(monkeypatch, accept, owners, accepted):
    shapes = {"0.weight": (4, 4), "1.weight": (2, 4)}
    drawn = [{name: torch.arange(math.prod(s)).view(s) == i for name, s in shapes.items()} for i in range(5)]

    def measured(masks_list, *_, **__):
        indices = [[m["0.weight"].flatten().tolist().index(True)] for m in masks_list]
        return torch.tensor([VALUES[i] for (i,) in indices], dtype=torch.float64)

    monkeypatch.setattr(CandidateSource, "draw", lambda _, i: drawn[i])
    monkeypatch.setattr(spectrum, "population", measured)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    for chunk in (1, 2, 3):
        found = search(model, "erk", 0.1, population=4, accept=accept, density_control="none", chunk=chunk, every=1)
        assert [torch.equal(found.masks[n], drawn[i][n]) for n, i in zip(shapes, owners, strict=True)] == [True, True]
        assert found.trajectory["accepted"].tolist() == accepted
        expected = [math.hypot(*np.nan_to_num(VALUES[i][layer])) for layer, i in enumerate(owners)]
        assert found.trajectory["norm"].iloc[-1] == pytest.approx(sum(expected) / 2, rel=1e-15)


@pytest.mark.parametrize("accept", ACCEPTANCE)
@pytest.mark.parametrize("control", ["exact", "none"])
@pytest.mark.parametrize("method", ["erk", "snip"])
def test_what_a_rule_asks_for_never_falls_in_a_layer(method, accept, control):
    found = quick(method=method, accept=accept, density_control=control, every=1)
    measured = [coordinates(masks, net()) for masks in found.tickets.values()]
    for before, after in pairwise(measured):
        if accept == "gap":
            gaps = [(before[name].ramanujan_gap, after[name].ramanujan_gap) for name in after]
            assert all(math.isnan(old) or new >= old - 1e-12 for old, new in gaps)
            continue
        assert all(after[name].norm >= before[name].norm - 1e-12 for name in after)
        if accept in ("published", "strict"):
            assert all(np.nan_to_num(after[n].imdb) >= np.nan_to_num(before[n].imdb) - 1e-12 for n in after)
    assert repr(found.coordinates) == repr(measured[-1])
    if accept in ("published", "norm"):
        assert found.trajectory["accepted"].iloc[-1] > 0


# ---- density -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [search, optimise])
@pytest.mark.parametrize(("method", "options"), [("snip", {}), ("random", {}), ("synflow", {"rounds": 2})])
def test_an_exact_search_keeps_the_asked_count_at_every_step(function, method, options):
    found = quick(function, method, every=1, accept="norm", **options)
    assert len(found.tickets) == 13
    asked = layer_counts(found.tickets[0])
    assert sum(asked) == kept_count(sum(m.numel() for m in found.masks.values()), KEPT)
    assert all(layer_counts(masks) == asked for masks in found.tickets.values())
    assert not equal(found.masks, found.tickets[0])


def test_an_exact_search_measures_every_candidate_at_the_counts_of_mask_0(monkeypatch):
    seen = []

    def measured(masks_list, *rest, **options):
        seen.extend(masks_list)
        return population(masks_list, *rest, **options)

    monkeypatch.setattr(spectrum, "population", measured)
    quick(method="random")
    assert len(seen) == 13
    assert len({tuple(layer_counts(masks)) for masks in seen}) == 1
    assert len({tuple(layer_counts(prune(net(), "random", KEPT, generator=seeded(i)))) for i in range(5)}) > 1


@pytest.mark.parametrize("function", [search, optimise])
def test_all_masks_are_measured_in_the_precision_that_is_asked_for(function, monkeypatch):
    seen = []

    def measured(*given, precision, **options):
        seen.append(precision)
        return population(*given, precision=precision, **options)

    monkeypatch.setattr(spectrum, "population", measured)
    quick(function)
    assert set(seen) == {"float64"}
    seen.clear()
    quick(function, precision="float32")
    assert set(seen) == {"float32"}
    with pytest.raises(ValueError, match=r"precision='float16'.*'float64', 'float32'"):
        quick(function, precision="float16")


def test_without_control_the_density_drifts_and_is_told():
    found = quick(method="random", accept="norm", density_control="none", every=1)
    assert found.trajectory["density"].tolist() == [density_of(masks) for masks in found.tickets.values()]
    assert found.trajectory["density"].nunique() > 1


def test_a_layer_is_resized_by_votes():
    masks = {"more": torch.tensor([[True, True, True, False]]), "fewer": torch.tensor([[True, False, False, False]])}
    votes = {"more": torch.tensor([[3, 1, 2, 9]]), "fewer": torch.tensor([[1, 4, 0, 5]])}
    found = resized(masks, {"more": 2, "fewer": 3}, votes, seeded())
    assert found["more"].tolist() == [[True, False, True, False]]
    assert found["fewer"].tolist() == [[True, True, False, True]]
    assert resized(masks, {"more": 3, "fewer": 1}, votes, seeded())["more"] is masks["more"]


# ---- candidates --------------------------------------------------------------------------------------------------


def test_every_method_but_magnitude_has_its_randomness_listed():
    listed = {name for methods in RANDOMNESS.values() for name in methods}
    assert listed == METHODS.keys() - {"magnitude"}


@pytest.mark.parametrize("function", [search, optimise])
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("magnitude", {}, "has no randomness"),
        ("snip", {"batches": None}, r"pass batches as a callable, batches\(i\)"),
        ("snip", {"batches": few(1)}, "would be the same mask"),
        ("synflow", {"noise": 0}, "pass noise above 0"),
        ("iterative_snip", {"noise": 0, "batches": few(1)}, "batches as a callable.* or noise above 0"),
        ("nothing", {}, "method='nothing'"),
        ("erk", {"noise": math.nan}, "noise nan"),
        ("erk", {"accept": "loose"}, "accept='loose'"),
        ("erk", {"population": 0}, "population=0"),
        ("erk", {"every": 2.5}, "every=2.5"),
        ("erk", {"rules": "none"}, "rules 'none' are unknown"),
        ("erk", {"generator": 3}, "generator=3"),
        (
            "erk",
            {search: {"density_control": "trim"}, optimise: {"explore": 0.0}},
            "density_control='trim'|explore 0.0",
        ),
    ],
)
def test_bad_arguments_are_refused_before_a_mask_is_drawn(monkeypatch, tmp_path, function, method, options, message):
    monkeypatch.setattr(candidates, "prune", lambda *_, **__: pytest.fail("a mask was drawn"))
    with pytest.raises(ValueError, match=message):
        quick(function, method, directory=tmp_path, **options.get(function, options))
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_the_method_does_not_have_is_refused():
    with pytest.raises(TypeError, match="has no option"):
        quick(method="erk", temperature=2.0)


@pytest.mark.parametrize(
    ("method", "options"), [("snip", {}), ("erk", {}), ("synflow", {"rounds": 2}), ("iterative_snip", {"rounds": 2})]
)
def test_mask_0_is_the_method_itself_and_the_others_differ_from_it(method, options):
    found = quick(method=method, density_control="none", **options)
    if method != "erk":
        assert equal(found.tickets[0], prune(net(), method, KEPT, batches=few(0), **options))
    explored = found.trajectory["explored"]
    assert explored[0] == pytest.approx(KEPT, abs=1e-3)
    assert explored.is_monotonic_increasing
    assert explored.iloc[-1] > explored[0] + 0.01


def test_the_noise_has_the_standard_deviation_of_each_layer_and_is_drawn_anew(monkeypatch):
    seen = []
    ones = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net().named_parameters() if p.ndim > 1}
    monkeypatch.setattr(candidates, "prune", lambda model, *_, **__: seen.append(copy.deepcopy(model)) or ones)
    model = net(hidden=(300, 300))
    source = CandidateSource(model, "synflow", KEPT, None, 0.5, seeded(1), {})
    for i in (0, 1, 2, 1):
        source.draw(i)
    clean, first, second, again = (dict(m.named_parameters()) for m in seen)
    for name, parameter in model.named_parameters():
        assert torch.equal(clean[name], parameter)
        assert torch.equal(first[name], again[name])
        if parameter.ndim > 1:
            ratios = [float(((noisy[name] - parameter).std() / parameter.std()).detach()) for noisy in (first, second)]
            assert ratios == pytest.approx([0.5, 0.5], rel=0.05)
            assert not torch.equal(first[name], second[name])
        else:
            assert torch.equal(first[name], parameter)


def test_mini_batches_are_all_examples_for_mask_0_and_fresh_ones_for_each_candidate():
    batches = mini_batches(DATA, number=3, size=50, seed=7)
    assert sum(len(y) for _, y in batches(0)) == len(DATA.train.labels)
    assert [x.shape for x, _ in batches(1)] == [(50, *DATA.shape)] * 3
    chosen = [torch.cat([x for x, _ in batches(i)]) for i in (1, 2, 1)]
    assert torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0], chosen[1])
    assert len(chosen[0].flatten(1).unique(dim=0)) == 150  # without replacement
    for options in ({"number": 0}, {"size": 2.5}, {"number": 100, "size": 100}, {"augmented": True}):
        with pytest.raises(ValueError, match=r"number|size|more than|augmented"):
            mini_batches(DATA, **options)


@pytest.mark.parametrize("function", [search, optimise])
@pytest.mark.parametrize(("method", "options"), [("snip", {}), ("synflow", {"rounds": 2}), ("phew", {})])
def test_a_model_and_the_global_random_state_are_left_bit_identical(function, method, options):
    model, state = net(), torch.random.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    function(model, method, KEPT, population=6, batches=few, **options)
    assert equal(dict(model.state_dict()), dict(before))
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("function", [search, optimise])
def test_one_generator_state_gives_one_result(function):
    first, again, other = (quick(function, "random", generator=seeded(seed)) for seed in (3, 3, 4))
    same(first, again)
    assert not equal(first.masks, other.masks)


def test_the_size_of_a_chunk_changes_nothing():
    same(quick(method="random", chunk=1), quick(method="random", chunk=7))


# ---- the directory -----------------------------------------------------------------------------------------------


def interrupted_at(candidate):
    def batches(i):
        if i == candidate:
            raise KeyboardInterrupt
        return few(i)

    return batches


@pytest.mark.parametrize("stops", [(1,), (3, 10), (6, 7, 12)])
def test_an_interrupted_search_continues_to_the_result_of_an_uninterrupted_one(tmp_path, stops):
    options = {"chunk": 3, "every": 4, "population": 14}
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            quick(batches=interrupted_at(stop), directory=tmp_path, **options)
    same(quick(directory=tmp_path, **options), quick(**options))


def test_swaps_that_were_interrupted_continue_to_the_bit(monkeypatch, tmp_path):
    options = {"chunk": 3, "every": 5, "population": 20, "method": "erk"}
    whole, calls = quick(optimise, **options), []

    def fails(*arguments):
        calls.append(0)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return swapped(*arguments)

    monkeypatch.setattr(search_module, "swapped", fails)
    with pytest.raises(KeyboardInterrupt):
        quick(optimise, directory=tmp_path, **options)
    same(quick(optimise, directory=tmp_path, **options), whole)


def test_whatever_stops_a_search_its_incumbent_is_written_and_at_every_row_before_that(tmp_path):
    path, left = tmp_path / "state.safetensors", []

    def batches(i):
        if i == 11:
            left.append(load_content(path, "search")["candidate"])  # what a kill would leave
            raise ZeroDivisionError
        return few(i)

    with pytest.raises(ZeroDivisionError):
        quick(batches=batches, directory=tmp_path, chunk=3, every=4)
    tensors, content = load_tensors(path, "search")
    assert (left, content["candidate"]) == ([8], 9)
    expected = quick(population=9).masks
    assert all(torch.equal(tensors[f"mask.{name}"], mask) for name, mask in expected.items())
    same(quick(directory=tmp_path, chunk=3, every=4), quick(chunk=3, every=4))
    with pytest.raises(ZeroDivisionError):  # without a directory
        quick(batches=batches)


def test_a_finished_search_is_read_back_without_drawing_and_a_larger_one_goes_on(monkeypatch, tmp_path):
    first = quick(directory=tmp_path, population=10)
    assert first.trajectory["candidate"].tolist() == [0, 4, 8, 10]
    longer = quick(population=13)
    same(quick(directory=tmp_path, population=13), longer)
    monkeypatch.setattr(candidates, "prune", lambda *_, **__: pytest.fail("a mask was drawn"))
    same(quick(directory=tmp_path, population=13), longer)


def test_a_search_that_has_gone_further_than_asked_is_refused(tmp_path):
    quick(directory=tmp_path)
    with pytest.raises(CannotResume, match="12 candidates already, more than population=11"):
        quick(directory=tmp_path, population=11)


def test_tickets_lie_in_files_of_masks_and_settings_in_the_state(tmp_path):
    found = quick(directory=tmp_path, exclude={"linear2"})
    assert load_content(tmp_path / "state.safetensors", "search")["settings"]["options"] == {"exclude": ["linear2"]}
    names = [f"ticket_{i:06d}.masks.safetensors" for i in (0, 4, 8, 12)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.safetensors", *names]
    assert all(equal(load_masks(tmp_path / name), found.tickets[4 * k]) for k, name in enumerate(names))


OTHERS = {  # what a directory remembers, and another value of it
    "accept is 'published' there and 'norm' here": {"accept": "norm"},
    "density_control": {"density_control": "none"},
    "every is 4 there and 5 here": {"every": 5},
    "seed": {"generator": seeded(9)},
    "rules": {"rules": "iclr2023"},
    "precision is 'float64' there and 'float32' here": {"precision": "float32"},
    "method": {"method": "taylor"},
    "options": {"rounds": 2},
    "scoring_examples": {"batches": lambda i: few(i + 1)},
    "initial_weights": {"model": net(1)},
    "search is 'population' there and 'optimise' here": {"function": optimise},
}


def test_a_directory_of_another_search_is_refused_by_name_and_left_as_it_is(tmp_path):
    quick(directory=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for message, changed in OTHERS.items():
        with pytest.raises(CannotResume, match=f"holds another search: .*{message}"):
            quick(directory=tmp_path, **changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_with_a_damaged_or_missing_file_is_refused_by_its_name(tmp_path):
    quick(directory=tmp_path)
    state, ticket = tmp_path / "state.safetensors", tmp_path / "ticket_000004.masks.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[:-1])
    with pytest.raises(CannotResume, match=r"state\.safetensors"):
        quick(directory=tmp_path)
    state.unlink()
    with pytest.raises(CannotResume, match=r"ticket_000000.* without .*state\.safetensors"):
        quick(directory=tmp_path)
    state.write_bytes(content)
    ticket.unlink()
    with pytest.raises(CannotResume, match=r"ticket_000004.* is missing"):
        quick(directory=tmp_path)
    ticket.write_bytes(b"")
    with pytest.raises(CannotResume, match=r"ticket_000004.* is no whole file"):
        quick(directory=tmp_path)


def test_the_bar_shows_norm_and_masks(monkeypatch, capsys):
    monkeypatch.setenv("FSP_PROGRESS", "1")
    monkeypatch.setattr(progress, "LINE_S", 0)
    found = quick()
    shown = capsys.readouterr().err
    assert "mask/s" in shown
    assert "12/12" in shown
    assert f"norm={found.trajectory['norm'].iloc[-1]:.4g}" in shown


# ---- the optimiser -----------------------------------------------------------------------------------------------


def test_the_promise_of_an_edge_is_its_first_order_effect_on_a_singular_value():
    mask, weight = torch.rand(7, 9, generator=seeded(1)) < 0.5, torch.randn(7, 9, generator=seeded(2)).double()
    B, strength = mask.double(), weight.abs()
    vectors = leading_vectors(mask, weight)
    for k, sign, mix, matrix, scale in (
        (0, 1, [1, 0, 0, 0], B, torch.ones_like(B)),
        (1, -1, [0, 1, 0, 0], B, torch.ones_like(B)),
        (0, 1, [0, 0, 1, 0], B * strength, strength),
        (1, -1, [0, 0, 0, 1], B * strength, strength),
    ):
        found = recombine._promise(strength[None], vectors, mix)[0] * (strength.mean() if matrix is not B else 1)
        for i, j in ((0, 0), (3, 5), (6, 8)):
            step = torch.zeros_like(B)
            step[i, j] = 1e-6 * scale[i, j]
            change = (singular_values(matrix + step)[k] - singular_values(matrix - step)[k]) / 2e-6
            assert float(found[i, j]) == pytest.approx(sign * float(change), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([((8, 12), Wiring()), ((6, 3, 3, 3), Wiring(2)), ((6, 4, 3), Wiring(2, True))]),
)
def test_a_swap_keeps_the_count_and_every_vertex_and_takes_explored_weights_alone(seed, layer):
    (shape, wiring), generator = layer, seeded(seed)
    explored = torch.rand(shape, generator=generator) < 0.6
    mask = explored & (torch.rand(shape, generator=generator) < 0.5)
    mask.view(-1)[0] = explored.view(-1)[0] = True
    weight = torch.randn(shape, generator=generator)
    new = swapped(mask, weight, explored, leading_vectors(mask, weight, wiring), generator, wiring)
    assert int(new.sum()) == int(mask.sum())
    assert not (new & ~explored).any()
    old_graph, new_graph = biadjacency(mask, wiring), biadjacency(new, wiring)
    for side in (0, 1):
        assert bool(new_graph.any(side)[old_graph.any(side)].all())


@pytest.mark.parametrize(("shape", "kept"), [((1, 9), 1), ((9, 1), 1), ((1, 1), 1), ((4, 5), 0)])
def test_layers_with_one_unit_or_no_weight_can_be_swapped(shape, kept):
    mask = torch.arange(math.prod(shape)).view(shape) < kept
    weight = torch.randn(shape, generator=seeded())
    new = swapped(mask, weight, torch.ones_like(mask), leading_vectors(mask, weight), seeded())
    assert int(new.sum()) == kept


def test_the_optimiser_keeps_only_weights_that_the_method_has_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(candidates, "prune", lambda *a, **o: drawn.append(prune(*a, **o)) or drawn[-1])
    found = quick(optimise, "erk", population=40)
    assert len(drawn) == 11  # mask 0 and a quarter of 40
    for name, mask in found.masks.items():
        assert not (mask & ~torch.stack([masks[name] for masks in drawn]).any(0)).any()


@pytest.mark.parametrize("control", ["none", "exact"])
def test_the_optimiser_gains_at_least_twice_the_norm_of_the_published_rule(control):
    """The published rule lets the density drift."""

    def gain(function, **options):
        return quick(function, population=60, every=60, **options).trajectory["norm"].diff().iloc[-1]

    ratios = []
    for method in ("snip", "erk", "grasp"):
        searched = gain(search, method=method, accept="published", density_control=control)
        ratios.append(gain(optimise, method=method) / searched)
    assert np.median(ratios) >= 2


# ---- controls ----------------------------------------------------------------------------------------------------


def test_random_controls_have_the_layer_counts_of_the_search_and_other_positions():
    found = quick(method="snip")
    for options in ({}, {"method": "random"}, {"method": "erk"}):
        control = matched(found.masks, seeded(1), **options)
        assert layer_counts(control) == layer_counts(found.masks)
        assert not equal(control, found.masks)


def test_a_scored_control_at_the_methods_own_counts_is_the_method():
    for method in ("snip", "grasp", "magnitude", "taylor"):
        masks = prune(net(), method, KEPT, batches=few(0))
        assert equal(matched(masks, seeded(), model=net(), method=method, batches=few(0)), masks)


@pytest.mark.parametrize("method", ["synflow", "force", "iterative_snip"])
def test_a_control_of_many_rounds_has_the_counts_and_an_empty_layer_stays_empty(method):
    masks = prune(net(), "random", KEPT)
    masks["linear2.weight"][:] = False
    control = matched(masks, seeded(), model=net(), method=method, batches=few(0), rounds=3)
    assert layer_counts(control) == layer_counts(masks)
    shuffled = matched(masks, seeded())
    assert not equal(control, shuffled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "phew"}, "no count for each"),
        ({"method": "nothing"}, "method='nothing'"),
        ({"method": "snip"}, "pass model="),
        ({"method": "magnitude", "model": nn.Linear(2, 2)}, "belongs to no parameter"),
    ],
)
def test_a_control_that_cannot_be_made_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        matched(prune(net(), "erk", KEPT), seeded(), **options)


# ---- GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("function", [search, optimise])
def test_a_search_on_a_gpu_continues_to_the_bit_and_keeps_exact_counts(tmp_path, function):
    model = net().cuda()
    options = {"population": 20, "every": 5, "device": "cuda", "directory": tmp_path}

    def batches(i):
        if i == 3 and not stopped:
            stopped.append(i)
            raise KeyboardInterrupt
        return [(x.cuda(), y.cuda()) for x, y in few(i)]

    stopped = []
    with pytest.raises(KeyboardInterrupt):
        function(model, "snip", KEPT, batches=batches, generator=seeded(), **options)
    found = function(model, "snip", KEPT, batches=batches, generator=seeded(), **options)
    options["directory"] = None
    same(found, function(model, "snip", KEPT, batches=batches, generator=seeded(), **options))
    assert all(m.is_cuda for m in found.masks.values())
    assert {tuple(layer_counts(masks)) for masks in found.tickets.values()} == {tuple(layer_counts(found.masks))}
