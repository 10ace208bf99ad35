"""`fsp.spectrum` against exact spectra, dense adjacency matrices and a slow reading of the papers' definitions."""

from dataclasses import replace
from functools import partial
from itertools import product
from math import isnan, nan, sqrt

import graphs
import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsp import spectrum
from fsp.spectrum import (
    RULES,
    Coordinate,
    Rules,
    Wiring,
    biadjacency,
    coordinate,
    coordinates,
    coverage,
    distance,
    imdb,
    imsg,
    narc,
    ramanujan_gap,
    singular_values,
    spectrum_norm,
    weighted_gap,
)

ICLR, FSP = RULES["iclr2023"], RULES["fsp2023"]
examples = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def near(value, tolerance=1e-8):
    return pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True)


def generator(seed):
    return torch.Generator().manual_seed(seed)


# --- graphs with known spectra ----------------------------------------------------------------------------------------

GRAPHS = {
    "K(4, 6)": graphs.complete(4, 6),
    "K(9, 2)": graphs.complete(9, 2),
    "K(70, 50)": graphs.complete(70, 50),
    "C(4)": graphs.even_cycle(2),
    "C(10)": graphs.even_cycle(5),
    "C(16)": graphs.even_cycle(8),
    "Heawood": graphs.heawood(),
    "matching": graphs.matching(6),
    "star": graphs.star(7),
    "one edge": graphs.one_edge(),
    "empty": graphs.empty(3, 5),
    "K(5, 5) - matching": graphs.complete_minus_matching(5, 5),
    "K(4, 7) - matching": graphs.complete_minus_matching(4, 7),
    "three K(3, 5)": graphs.copies(graphs.complete(3, 5), 3),
    "two Heawood": graphs.copies(graphs.heawood(), 2),
    "two stars": graphs.copies(graphs.star(3), 2),
    "Heawood among isolated vertices": graphs.with_isolated(graphs.heawood(), 4, 3),
    "one edge among isolated vertices": graphs.with_isolated(graphs.one_edge(), 2, 6),
}
every_graph = pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)


def test_the_heawood_graph_is_the_one_of_networkx():
    left, right = nx.bipartite.sets(nx.heawood_graph())
    B = nx.bipartite.biadjacency_matrix(nx.heawood_graph(), sorted(left), sorted(right)).toarray()
    assert singular_values(torch.tensor(B, dtype=torch.float64), 7).tolist() == near([3.0] + [sqrt(2)] * 6)


@every_graph
def test_singular_values_are_the_exact_ones_descending_and_padded_with_zeros(graph):
    values = singular_values(graph.B, min(graph.B.shape) + 2)
    assert values.dtype == torch.float64
    assert values.tolist() == near([*graph.singular_values.tolist(), 0.0, 0.0])
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    assert singular_values(graph.B, 1).tolist() == near(graph.singular_values[:1].tolist())
    assert singular_values(graph.B).tolist() == near(values[:2].tolist())


@every_graph
def test_the_two_gaps_are_the_exact_ones_and_undefined_only_without_edges(graph):
    first, second = [*graph.singular_values.tolist(), 0.0][:2]
    edges = bool(graph.B.any())
    gaps = ramanujan_gap(graph.B), weighted_gap(-2.5 * graph.B)
    assert gaps == near((graph.gap, 2.5 * (first - second) if edges else nan))
    assert [type(gap) for gap in gaps] == [float, float]
    assert [isnan(gap) for gap in gaps] == [not edges] * 2


@pytest.mark.parametrize("rules", RULES)
def test_nested_means_of_a_graph_with_several_degrees_are_the_ones_worked_out_by_hand(rules):
    nested = graphs.several_degrees()
    assert imdb(nested.B, rules=rules) == near(nested.imdb[rules])
    assert imsg(nested.B, nested.B, rules=rules) == near(nested.imsg[rules])


# --- biadjacency ------------------------------------------------------------------------------------------------------


def test_a_convolution_has_one_left_vertex_for_each_input_channel_and_kernel_position():
    weight = torch.randn(2, 3, 2, 4, generator=generator(0))
    B = biadjacency(weight)
    assert B.dtype == torch.float64
    assert B.shape == (24, 2)
    for out, channel, row, column in product(range(2), range(3), range(2), range(4)):
        assert B[channel * 8 + row * 4 + column, out] == weight[out, channel, row, column]


def test_a_linear_layer_is_transposed_and_keeps_its_isolated_vertices():
    mask = torch.tensor([[True, False, False], [False, False, False]])  # 2 outputs, 3 inputs
    assert biadjacency(mask).tolist() == [[1, 0], [0, 0], [0, 0]]


# --- oracle one: the adjacency matrix, as the authors' code has it ----------------------------------------------------

RESNET18 = {  # layer shape -> density; the wide ones so thin that cleaning leaves at most some 1,500 vertices
    (64, 3, 3, 3): 0.3,
    (64, 64, 3, 3): 0.05,
    (128, 64, 3, 3): 0.02,
    (128, 128, 3, 3): 0.01,
    (128, 64, 1, 1): 0.1,
    (256, 128, 3, 3): 0.01,
    (256, 256, 3, 3): 0.002,
    (256, 128, 1, 1): 0.05,
    (512, 256, 3, 3): 0.001,
    (512, 512, 3, 3): 0.0005,
    (512, 256, 1, 1): 0.02,
    (10, 512): 0.2,
}


def adjacency_sigmas(B):
    """Largest and third largest modulus among the eigenvalues of [[0, B], [B^T, 0]] without isolated vertices."""
    B = B[B.any(dim=1)][:, B.any(dim=0)].numpy()
    A = np.block([[np.zeros((len(B), len(B))), B], [B.T, np.zeros((B.shape[1], B.shape[1]))]])
    modulus = sorted(np.abs(np.linalg.eigvalsh(A)), reverse=True)
    return modulus[0], modulus[2]


def assert_agrees_with_the_adjacency_matrix(shape, density):
    mask = torch.rand(shape, generator=generator(3)) < density
    weight = mask * torch.randn(shape, generator=generator(4))
    B, W = biadjacency(mask), biadjacency(weight)
    first, second = adjacency_sigmas(B)
    degree_left, degree_right = B.sum() / B.any(dim=1).sum(), B.sum() / B.any(dim=0).sum()
    assert singular_values(B).tolist() == near([first, second], 1e-9)
    bound = sqrt(degree_left - 1) + sqrt(degree_right - 1)
    assert ramanujan_gap(B) == near(bound - second, 1e-9)
    heavy, light = adjacency_sigmas(W.abs())
    assert weighted_gap(W) == near(heavy - light, 1e-9)


@pytest.mark.parametrize("shape", RESNET18, ids=str)
def test_every_layer_shape_of_resnet18_agrees_with_the_spectrum_of_the_adjacency_matrix(shape):
    assert_agrees_with_the_adjacency_matrix(shape, RESNET18[shape])


@pytest.mark.slow
def test_the_largest_layer_of_resnet18_with_all_its_5120_vertices_agrees_too():
    assert_agrees_with_the_adjacency_matrix((512, 512, 3, 3), 0.05)


# --- oracle two: plain loops over the definitions ---------------------------------------------------------------------


def touched(M):
    """Indices of the rows and of the columns of M that hold a non-zero entry."""
    rows = [i for i in range(M.shape[0]) if any(M[i, j] != 0 for j in range(M.shape[1]))]
    columns = [j for j in range(M.shape[1]) if any(M[i, j] != 0 for i in range(M.shape[0]))]
    return rows, columns


def slow_sigmas(M):
    rows, columns = touched(M)
    values = np.linalg.svd(np.abs(M[rows][:, columns]), compute_uv=False)
    return values[0], values[1] if len(values) > 1 else 0.0


def slow_is_valid(M, rules, left):
    """Mean degrees against the thresholds, in whole numbers so that a mean of exactly 3 is no matter of rounding."""
    rows, columns = touched(M)
    n_left, n_right = (len(rows), len(columns)) if left == "inputs" else (len(columns), len(rows))
    edges = np.count_nonzero(M)
    right_ok = edges > rules.right_degree * n_right if rules.right_strict else edges >= rules.right_degree * n_right
    return edges > 0 and edges >= rules.left_degree * n_left and right_ok


def slow_gap(B):
    rows, columns = touched(B)
    return sqrt(B.sum() / len(rows) - 1) + sqrt(B.sum() / len(columns) - 1) - slow_sigmas(B)[1]


def slow_nested(B, rules):
    """Row indices and factor of every nested subgraph that counts: inputs of one degree, left = inputs."""
    degrees = [int(row.sum()) for row in B]
    for degree in sorted(set(degrees) - {0}):
        group = [i for i, d in enumerate(degrees) if d == degree]
        if len(group) >= rules.group_size and slow_is_valid(B[group], rules, "inputs"):
            n_right = len(touched(B[group])[1])
            yield group, max(len(group), n_right) / (len(group) + n_right - 1) if rules.cheeger else 1.0


def slow_coordinate(B, W, rules):
    """(gap, weighted gap, IMDB, IMSG) of a layer; entries of W outside B do not exist."""
    W = np.abs(W * B)
    gap = slow_gap(B) if slow_is_valid(B, rules, rules.whole_left) else nan
    first, second = slow_sigmas(W) if slow_is_valid(W, rules, rules.whole_left) else (nan, nan)
    structural, weighted = [], []
    for group, factor in slow_nested(B, rules):
        structural.append(factor * slow_gap(B[group]))
        if slow_is_valid(W[group], rules, "inputs"):
            heavy, light = slow_sigmas(W[group])
            weighted.append(factor * (heavy - light))
        elif rules.zero_weights == "published":
            weighted.append(nan)
    mean = [sum(values) / len(values) if values else nan for values in (structural, weighted)]
    return [gap, first - second, *mean]


def slow_narc(B, which, times):
    """N1 or N2, edges counted `times`; "left" as whole_left says: the outputs under N2, so its last n_R are inputs."""
    if not slow_is_valid(B, RULES[which], RULES[which].whole_left):
        return nan
    inputs, outputs = map(len, touched(B))
    edges, second = B.sum(), slow_sigmas(B)[1]
    if which == "iclr2023":
        n_left, n_right = inputs, outputs
        difference = times * edges - edges / n_left / B.shape[1] * n_left * n_right
        return ((second**2 / 4 + 1) * sqrt(n_left * n_right) - abs(difference)) / (B.shape[0] * B.shape[1])
    n_left, n_right = outputs, inputs
    vertices = n_left + n_right
    difference = times * edges - edges / n_left * n_left * n_right / vertices
    return (second * sqrt(n_left * n_right) - abs(difference)) / vertices


@pytest.mark.parametrize("zero_weights", ["drop", "published"])
@pytest.mark.parametrize("rules", RULES)
@examples
@given(layer=graphs.layers())
def test_the_coordinate_is_what_plain_loops_over_the_definitions_give(rules, zero_weights, layer):
    B, W = layer
    rules = replace(RULES[rules], zero_weights=zero_weights)
    b, w = torch.from_numpy(B), torch.from_numpy(W)
    separately = [
        ramanujan_gap(b, rules=rules),
        weighted_gap(b * w, rules=rules),
        imdb(b, rules=rules),
        imsg(b, w, rules=rules),
    ]
    expected = slow_coordinate(B, W, rules)
    assert separately == near(expected)
    assert list(coordinate(b.T.bool(), w.T, rules=rules)) == near(expected)


@examples
@given(layer=graphs.layers())
def test_the_bare_gaps_need_no_degree_at_all(layer):
    B, W = layer
    first, second = slow_sigmas(B * W) if (B * W).any() else (nan, nan)
    assert ramanujan_gap(torch.from_numpy(B)) == near(slow_gap(B) if B.any() else nan)
    assert weighted_gap(torch.from_numpy(B * W)) == near(first - second)


@pytest.mark.parametrize(("edge_count", "times"), [("directed", 2), ("undirected", 1)])
@pytest.mark.parametrize("rules", RULES)
@examples
@given(layer=graphs.layers())
def test_narc_is_what_its_definition_gives(rules, edge_count, times, layer):
    B, _ = layer
    assert narc(torch.from_numpy(B), rules=rules, edge_count=edge_count) == near(slow_narc(B, rules, times))


# --- properties -------------------------------------------------------------------------------------------------------


def measures(B, W, rules):
    return [*coordinate(B.T.bool(), W.T, rules=rules), narc(B, rules=rules), ramanujan_gap(B), weighted_gap(B * W)]


@pytest.mark.parametrize("rules", RULES)
@examples
@given(layer=graphs.layers(), left=st.integers(0, 4), right=st.integers(0, 4), seed=st.integers(0, 999))
def test_order_and_isolated_vertices_change_nothing_but_the_narc_of_iclr(rules, layer, left, right, seed):
    B, W = map(torch.from_numpy, layer)
    padded = [torch.nn.functional.pad(matrix, (right, 0, 0, left)) for matrix in (B, W)]
    rows, columns = (torch.randperm(n, generator=generator(seed)) for n in padded[0].shape)
    before, after = measures(B, W, rules), measures(*(M[rows][:, columns] for M in padded), rules)
    if rules == "iclr2023":  # N1 divides by the layer's full size
        before[4] = after[4] = 0.0
    assert after == near(before)


@examples
@given(layer=graphs.layers(), factor=st.sampled_from([-7.0, -1.0, 1e-3, 0.5, 1e3]))
def test_gaps_do_not_know_left_from_right_and_scale_with_the_weights(layer, factor):
    B, W = map(torch.from_numpy, layer)
    assert ramanujan_gap(B.T) == near(ramanujan_gap(B))
    assert weighted_gap(factor * (B * W).T) == near(abs(factor) * weighted_gap(B * W))
    assert imsg(B, factor * W) == near(abs(factor) * imsg(B, W))


# --- decisions of the specification -----------------------------------------------------------------------------------


def test_d1_the_rules_say_which_side_of_the_whole_layer_is_left():
    B = graphs.copies(graphs.complete(9, 2), 2).B  # every input has 2 edges, every output 9
    inputs_left = replace(FSP, whole_left="inputs")
    for rules, valid, wrong in ((FSP, B, B.T), (inputs_left, B.T, B)):
        assert ramanujan_gap(valid, rules=rules) == near(sqrt(8) + 1 - sqrt(18))
        assert weighted_gap(valid, rules=rules) == near(0.0)
        assert isnan(ramanujan_gap(wrong, rules=rules))
        assert isnan(weighted_gap(wrong, rules=rules))


def test_d1_nested_subgraphs_keep_the_inputs_on_the_left():
    B = graphs.complete(2, 9).B
    assert imdb(B, rules=FSP) == imdb(B, rules=replace(FSP, whole_left="inputs")) == near(0.9 * (sqrt(8) + 1))
    assert isnan(imdb(graphs.complete(9, 2).B, rules=FSP))


def test_left_degree_three_suffices_and_a_strict_right_degree_has_to_be_exceeded():
    reach = Rules(2, 3, 1, False, True, "inputs", "drop")
    strict = replace(reach, right_strict=True)
    less = graphs.complete(3, 3).B
    less[0, 0] = 0
    cases = [(graphs.complete(1, 3).B, True, False), (graphs.complete(3, 3).B, True, True), (less, False, False)]
    for B, by_reach, by_strict in cases:
        assert isnan(ramanujan_gap(B, rules=reach)) != by_reach
        assert isnan(ramanujan_gap(B, rules=strict)) != by_strict


def test_d2_the_sign_of_narc_hangs_on_counting_every_edge_twice():
    B = graphs.complete(6, 6).B  # 36 edges, sigma2 = 0, no dead output
    assert narc(B) == near((6 - 36) / 36)
    assert narc(B, edge_count="undirected") == near(6 / 36)
    assert narc(B, rules="fsp2023") == near((0 - abs(72 - 6 * 36 / 12)) / 12)
    assert narc(B, rules="fsp2023", edge_count="undirected") == near((0 - abs(36 - 6 * 36 / 12)) / 12)


def test_d2_a_dead_output_enters_the_narc_of_iclr():
    B = graphs.with_isolated(graphs.complete(4, 4), 0, 1).B
    assert narc(B) == near((4 - abs(32 - 4 / 5 * 16)) / 20)


def test_narc_of_fsp_has_the_outputs_on_the_left():
    B = graphs.complete(5, 3).B  # left = 3 outputs of degree 5, right = 5 inputs, 8 vertices
    assert narc(B, rules="fsp2023") == near((0 - abs(30 - 5 * 3 * 5 / 8)) / 8)
    assert narc(B.T, rules=replace(FSP, whole_left="inputs")) == narc(B, rules="fsp2023")


DENSE_5, REGULAR_4 = graphs.complete(3, 5).B, graphs.complete_minus_matching(5, 5).B
TWO_GROUPS = torch.cat([DENSE_5, REGULAR_4])  # degrees 5 and 4; weights are all 1 where not said otherwise


@pytest.mark.parametrize(
    ("rules", "factors"), [("fsp2023", (5 / 7, 5 / 9)), ("iclr2023", (1.0, 1.0))], ids=["fsp2023", "iclr2023"]
)
def test_d7_a_group_whose_weights_are_no_valid_graph_is_dropped_or_makes_the_mean_undefined(rules, factors):
    W = TWO_GROUPS.clone()
    W[3:, 2:] = 0  # the second group keeps 8 weights on 5 inputs: mean degree below 3
    both = (factors[0] * sqrt(15) + factors[1] * 3) / 2
    published = replace(RULES[rules], zero_weights="published")
    assert imsg(TWO_GROUPS, TWO_GROUPS, rules=rules) == near(both)
    assert imsg(TWO_GROUPS, W, rules=rules) == near(factors[0] * sqrt(15))
    assert isnan(imsg(TWO_GROUPS, W, rules=published))
    assert imsg(TWO_GROUPS, TWO_GROUPS, rules=published) == near(both)
    assert imdb(TWO_GROUPS, rules=published) == imdb(TWO_GROUPS, rules=rules)


def test_d7_groups_and_factor_come_from_the_mask_where_weights_are_zero():
    B = graphs.complete(6, 4).B
    W = B.clone()
    W[0] = 0  # 5 inputs with weights are left, a valid K(5, 4); the group has 6
    assert imsg(B, W) == near(6 / 9 * sqrt(20))
    assert isnan(imsg(B, torch.zeros_like(B)))


def test_weights_of_another_shape_than_the_mask_are_refused():
    with pytest.raises(ValueError, match=r"B has shape \(6, 4\), W \(1, 4\)"):
        imsg(torch.ones(6, 4), torch.ones(1, 4))


def test_d7_the_whole_weighted_gap_is_judged_by_the_weights_that_are_not_zero():
    B = graphs.complete(4, 3).B
    W = B.clone()
    W[:2, 0] = 0  # 10 weights on 3 outputs and on 4 inputs
    assert not isnan(weighted_gap(W, rules="fsp2023"))
    assert isnan(weighted_gap(W, rules="iclr2023"))
    result = coordinate(B.T.bool(), W.T, rules="iclr2023")
    assert result.ramanujan_gap == near(sqrt(2) + sqrt(3))
    assert isnan(result.weighted_gap)


def test_d8_what_is_undefined_is_nan_and_counts_as_zero_only_in_the_norm():
    mask = torch.eye(6, dtype=torch.bool)
    result = coordinate(mask, torch.ones(6, 6))
    assert all(isnan(value) for value in result)
    assert result.norm == 0.0
    defined = coordinate(torch.ones(6, 6), torch.ones(6, 6))
    network = {"matching": result, "dense": defined}
    assert coverage(network) == (1, 1, 1, 1)
    assert spectrum_norm(network) == near(defined.norm / 2)


@pytest.mark.parametrize("graph", [graphs.one_edge(), graphs.star(2), graphs.star(40)], ids=["1-1", "1-2", "1-40"])
def test_d20_the_second_singular_value_is_zero_with_a_single_vertex_on_a_side(graph):
    assert singular_values(graph.B)[1] == 0
    assert singular_values(graph.B.T)[1] == 0
    assert singular_values(graph.B[:0]).tolist() == [0, 0]
    assert weighted_gap(graph.B) == near(graph.singular_values[0].item(), 1e-12)


@pytest.mark.parametrize(("m", "n"), [(3, 3), (512, 10), (576, 64)])
def test_d20_rank_one_leaves_no_noise(m, n):
    B = graphs.complete(m, n).B
    assert singular_values(B).tolist() == near([sqrt(m * n), 0.0], 1e-9)
    slope = torch.linspace(0.1, 2, m, dtype=torch.float64)[:, None] * torch.linspace(1, 3, n, dtype=torch.float64)
    assert weighted_gap(slope) == near(torch.linalg.matrix_norm(slope).item(), 1e-9)


def test_d25_the_presets_are_those_of_the_two_papers():
    names = ["group_size", "left_degree", "right_degree", "right_strict", "cheeger", "whole_left", "zero_weights"]
    presets = {which: [getattr(rules, name) for name in names] for which, rules in RULES.items()}
    assert presets == {
        "iclr2023": [3, 3, 3, False, False, "inputs", "drop"],
        "fsp2023": [2, 3, 1, True, True, "outputs", "drop"],
    }
    with pytest.raises(AttributeError):
        FSP.group_size = 3


def test_d25_two_inputs_make_a_group_in_one_paper_and_none_in_the_other():
    pair = graphs.complete(2, 5).B
    assert imdb(pair, rules="fsp2023") == near(5 / 6 * 3)
    assert isnan(imdb(pair, rules="iclr2023"))
    assert isnan(imdb(pair, rules=replace(FSP, group_size=3)))
    assert isnan(imsg(pair, pair, rules="iclr2023"))


def test_d25_only_one_paper_has_the_cheeger_factor_and_a_weak_right_degree():
    triple = graphs.complete(3, 5).B
    assert imdb(triple, rules="iclr2023") == near(2 + sqrt(2))
    assert imdb(triple, rules="fsp2023") == near(5 / 7 * (2 + sqrt(2)))
    sparse = graphs.copies(graphs.complete(2, 5), 2).B  # 4 inputs of degree 5, 10 outputs of degree 2
    assert imdb(sparse, rules="fsp2023") == near(10 / 13 * (3 - sqrt(10)))
    assert isnan(imdb(sparse, rules="iclr2023"))


@pytest.mark.parametrize("name", RULES)
def test_rules_go_by_name_or_by_value(name):
    B, W = TWO_GROUPS, 0.5 * TWO_GROUPS
    assert measures(B, W, name) == measures(B, W, RULES[name])


def test_the_defaults_are_fsp_for_the_coordinate_and_iclr_with_doubled_edges_for_narc():
    B, W = TWO_GROUPS, 0.5 * TWO_GROUPS
    assert imdb(B) == imdb(B, rules=FSP) != imdb(B, rules=ICLR)
    assert imsg(B, W) == imsg(B, W, rules=FSP) != imsg(B, W, rules=ICLR)
    assert coordinate(B.T, W.T) == coordinate(B.T, W.T, rules=FSP) != coordinate(B.T, W.T, rules=ICLR)
    assert narc(B) == narc(B, rules=ICLR, edge_count="directed") != narc(B, rules=FSP)


# --- networks ---------------------------------------------------------------------------------------------------------


def network():
    """A small model with a convolution, a linear layer and a normalisation, and masks for the first two."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(30, 7))
    masks = {
        name: torch.rand(parameter.shape, generator=generator(5)) < 0.5
        for name, parameter in model.named_parameters()
        if name in ("0.weight", "2.weight")
    }
    return model, masks


def test_every_layer_of_a_network_gets_its_own_coordinate_under_its_own_name():
    model, masks = network()
    result = coordinates(masks, model)
    assert list(result) == ["0.weight", "2.weight"]
    for name, mask in masks.items():
        weight = dict(model.named_parameters())[name].detach()
        assert list(result[name]) == pytest.approx(list(coordinate(mask, weight)), rel=1e-10)
        flat_mask, flat_weight = biadjacency(mask).numpy(), biadjacency(weight).numpy()
        assert list(result[name]) == near(slow_coordinate(flat_mask, flat_weight, FSP))
        assert all(type(value) is float and not isnan(value) for value in result[name])
    assert coordinates(masks, model, rules="iclr2023") != result


def test_a_model_and_a_dict_of_its_parameters_give_the_same():
    model, masks = network()
    assert coordinates(masks, dict(model.named_parameters())) == coordinates(masks, model)
    assert coordinates(masks, {name: p.detach() for name, p in model.named_parameters()}) == coordinates(masks, model)


def test_measuring_a_model_leaves_it_and_its_masks_as_they_were():
    model, masks = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copies = {name: mask.clone() for name, mask in masks.items()}
    random_state = torch.get_rng_state()
    coordinates(masks, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(mask, copies[name]) and mask.dtype == torch.bool for name, mask in masks.items())
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_a_mask_of_zeros_and_ones_may_have_any_type(dtype):
    _, masks = network()
    weight = torch.randn(masks["2.weight"].shape, generator=generator(6))
    expected = coordinate(masks["2.weight"], weight.double())
    assert coordinate(masks["2.weight"].to(dtype), weight) == expected


def test_the_norm_is_euclidean_and_takes_nan_for_zero():
    assert Coordinate(1.0, -2.0, 4.0, 2.0).norm == near(5.0)
    assert Coordinate(-3.0, nan, 4.0, nan).norm == near(5.0)
    assert Coordinate(nan, nan, nan, nan).norm == 0.0
    assert type(Coordinate(3.0, nan, 4.0, 0.0).norm) is float


HERE = {"a": Coordinate(3.0, 4.0, 0.0, 0.0), "b": Coordinate(nan, 0.0, nan, -12.0), "c": Coordinate(nan, nan, nan, nan)}
THERE = {"a": Coordinate(3.0, 4.0, nan, 0.0), "b": Coordinate(5.0, 0.0, 0.0, 0.0), "c": Coordinate(nan, 2.0, nan, nan)}
ORIGIN = {name: Coordinate(0.0, 0.0, 0.0, 0.0) for name in HERE}


def test_the_spectrum_norm_is_the_mean_over_all_layers_the_undefined_included():
    assert spectrum_norm(HERE) == near((5 + 12 + 0) / 3)
    assert type(spectrum_norm(HERE)) is float


def test_the_distance_is_the_mean_over_layers_of_the_euclidean_one_with_nan_at_zero():
    assert distance(HERE, THERE) == near((0 + 13 + 2) / 3)
    assert distance(THERE, HERE) == distance(HERE, THERE)
    assert distance(HERE, HERE) == 0.0
    assert distance(HERE, ORIGIN) == near(spectrum_norm(HERE))
    assert distance(dict(reversed(HERE.items())), THERE) == near(5.0)
    assert type(distance(HERE, THERE)) is float


def test_coverage_counts_for_each_quantity_the_layers_where_it_is_defined():
    result = coverage(HERE)
    assert isinstance(result, Coordinate)
    assert result == (1, 2, 1, 2)
    assert all(type(count) is int for count in result)


# --- bad input --------------------------------------------------------------------------------------------------------

ONES = torch.ones(4, 5)


@pytest.mark.parametrize(
    ("mask", "weight", "reason"),
    [
        (ONES, ONES.T, "differ in shape"),
        (ONES, ONES.index_fill(0, torch.tensor(1), nan), "nan or infinite"),
        (ONES, ONES.index_fill(0, torch.tensor(1), float("inf")), "nan or infinite"),
        (ONES / 2, ONES, "other than 0 and 1"),
        (nan * ONES, ONES, "other than 0 and 1"),
        (ONES[0], ONES[0], "outputs, inputs"),
    ],
)
def test_a_layer_that_cannot_be_measured_is_refused_by_name_and_reason(mask, weight, reason):
    with pytest.raises(ValueError, match=rf"'classifier\.weight'.*{reason}"):
        coordinates({"good": ONES, "classifier.weight": mask}, {"good": ONES, "classifier.weight": weight})
    with pytest.raises(ValueError, match=reason):
        coordinate(mask, weight)


def test_what_does_not_belong_together_is_refused_by_name():
    with pytest.raises(ValueError, match="'absent' has a mask but no weights"):
        coordinates({"absent": ONES}, {"other": ONES})
    more = {**THERE, "extra": Coordinate(1.0, 1.0, 1.0, 1.0)}
    for a, b in ((HERE, more), (more, HERE)):
        with pytest.raises(ValueError, match="extra"):
            distance(a, b)
    for tensor, wiring, reason in ((ONES[0], Wiring(), "entries"), (ONES, Wiring(groups=3), "3 groups")):
        with pytest.raises(ValueError, match=reason):
            biadjacency(tensor, wiring)


def test_an_unknown_option_is_refused_with_the_names_there_are():
    B = torch.zeros(4, 5)  # not even a graph without edges is passed over
    for measure in (ramanujan_gap, weighted_gap, imdb, narc, partial(imsg, B), partial(coordinate, B)):
        with pytest.raises(ValueError, match=r"neurips2023.*iclr2023, fsp2023"):
            measure(B, rules="neurips2023")
    for measure in (coordinate, lambda B, W, **options: coordinates({"w": B}, {"w": W}, **options)):
        with pytest.raises(ValueError, match=r"precision='double'.*'float64', 'float32'"):
            measure(ONES, ONES, precision="double")
    with pytest.raises(ValueError, match="twice"):
        narc(ONES, edge_count="twice")
    with pytest.raises(ValueError, match="whole_left"):
        replace(FSP, whole_left="left")
    with pytest.raises(ValueError, match="zero_weights"):
        replace(FSP, zero_weights="keep")


@pytest.mark.parametrize("name", ["singular_values", "ramanujan_gap", "weighted_gap", "imdb", "narc"])
def test_a_layers_tensor_in_place_of_its_graph_is_refused_with_the_remedy(name):
    with pytest.raises(
        ValueError, match=r"^expected a matrix .* found shape \(4, 3, 2, 2\): fsp\.spectrum\.biadjacency"
    ):
        getattr(spectrum, name)(torch.ones(4, 3, 2, 2))
