"""`fsp.spectrum.table` against graphs worked out by hand, identities of the published tables and published numbers."""

from dataclasses import replace
from math import hypot, isnan, nan, sqrt

import graphs
import pandas as pd
import pytest
import torch
from torch import nn

from fsp.pruning.allocate import erk
from fsp.spectrum import RULES, biadjacency, coordinate, coordinates, narc, singular_values
from fsp.spectrum.table import layer_table

COUNTS = ["n_inputs", "n_outputs", "n_left", "n_right", "edges", "degree_groups", "nested_valid"]
TESTS = ["valid", "valid_inputs_left", "valid_outputs_left"]


def near(value, tolerance=1e-8):
    return pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def row(B, *, rules="iclr2023", weight=None):
    """The table's row of a linear layer with this biadjacency matrix; its weights are 1 where not given."""
    weight = torch.ones_like(B) if weight is None else weight
    return layer_table({"layer": B.T.bool()}, {"layer": weight.T}, rules=rules).iloc[0]


def random_network(seed=0):
    """Masks and weights of layers that follow each other, from dense to so thin that nothing is valid."""
    shapes = {
        "stem": (24, 3, 3, 3),
        "conv": (40, 24, 3, 3),
        "thin": (40, 40, 3, 3),
        "pointwise": (30, 40, 1, 1),
        "line": (12, 30, 5),
        "few outputs": (2, 48),
        "dead": (5, 2),
        "last": (7, 5),
    }
    densities = [0.6, 0.25, 0.003, 0.5, 0.3, 0.9, 0.0, 1.0]
    random = generator(seed)
    masks = {
        name: torch.rand(shape, generator=random) < d
        for (name, shape), d in zip(shapes.items(), densities, strict=True)
    }
    return masks, {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


# --- layers worked out by hand ----------------------------------------------------------------------------------------


def test_every_column_of_a_complete_layer_is_the_one_worked_out_by_hand():
    layer = row(graphs.complete(6, 4).B, weight=0.5 * torch.ones(6, 4, dtype=torch.float64))
    bound, bound_s, gap = sqrt(3) + sqrt(5), 2 * sqrt(sqrt(24) - 1), 0.5 * sqrt(24)
    expected = {"n_inputs": 6, "n_outputs": 4, "edges": 24, "n_left": 6, "n_right": 4}
    expected |= {"degree_left": 4.0, "degree_right": 6.0, "sigma1": sqrt(24), "sigma2": 0.0}
    expected |= {"valid": True, "valid_inputs_left": True, "valid_outputs_left": True}
    expected |= dict.fromkeys(["density", "gap_normalised", "degree_groups", "nested_valid", "overlap"], 1)
    expected |= dict.fromkeys(["ism_normalised", "imdb_normalised", "imdb_stable"], 1.0)
    expected |= dict.fromkeys(["delta_s", "delta_s_bound", "ism"], bound_s)
    expected |= dict.fromkeys(["ramanujan_gap", "ramanujan_bound", "imdb"], bound)
    expected |= dict.fromkeys(["expansion", "expansion_max", "expansion_mean"], 4 / 6)
    expected |= dict.fromkeys(["weighted_gap", "imsg"], gap) | {"norm": sqrt(2 * bound**2 + 2 * gap**2)}
    expected |= {"narc_iclr2023": (sqrt(24) - 24) / 24, "narc_iclr2023_undirected": sqrt(24) / 24}
    expected |= {"narc_fsp2023": -(48 - 24 * 6 / 10) / 10, "narc_fsp2023_undirected": -(24 - 24 * 6 / 10) / 10}
    expected |= {"narc_nested": -(48 - 24 * 4 / 10) / 10, "narc_nested_undirected": -(24 - 24 * 4 / 10) / 10}
    expected |= {"compatibility": nan, "copeland": nan}
    assert layer.drop("layer").to_dict() == near(expected)


# of graphs.several_degrees(): inputs, outputs, edges, sigma1, sigma2; the first two are valid in both papers
NESTED = [(7, 7, 21, 3, sqrt(2)), (5, 5, 20, 4, 1), (2, 5, 10, sqrt(10), 0), (4, 14, 28, sqrt(14), sqrt(14))]


@pytest.mark.parametrize(("rules", "number"), [("iclr2023", 2), ("fsp2023", 4)])
def test_means_over_nested_subgraphs_are_the_ones_worked_out_by_hand(rules, number):
    graph = graphs.several_degrees()
    layer = row(graph.B, rules=rules)
    means = ["ism", "ism_normalised", "imdb_normalised", "expansion_mean", "narc_nested", "narc_nested_undirected"]
    expected = {name: [] for name in means}
    for inputs, outputs, edges, first, second in NESTED[:number]:
        bound, bound_s = sqrt(edges / inputs - 1) + sqrt(edges / outputs - 1), 2 * sqrt(first - 1)
        expected["ism"].append(bound_s - second)
        expected["ism_normalised"].append(1 - second / bound_s)
        expected["imdb_normalised"].append(1 - second / bound)
        expected["expansion_mean"].append(outputs / inputs)
        for name, times in (("narc_nested", 2), ("narc_nested_undirected", 1)):  # 24 + 21 vertices have an edge
            difference = times * edges - edges / inputs * inputs * outputs / 45
            expected[name].append((second * sqrt(inputs * outputs) - abs(difference)) / 45)
    for name, values in expected.items():
        assert layer[name] == near(sum(values) / number)
    assert (layer.n_inputs, layer.n_left, layer.n_right, layer.edges) == (26, 24, 21, 107)
    assert (layer.degree_groups, layer.nested_valid) == (7, number)
    assert [layer.density, layer.expansion] == near([107 / (26 * 21), 21 / 24])
    assert layer.expansion_max == near(max(expected["expansion_mean"]))
    assert layer.imdb_stable == layer.imdb_normalised
    assert [layer.imdb, layer.imsg] == near([graph.imdb[rules], graph.imsg[rules]])


def chain():
    """Three layers, their kernels' positions written as the sets of outputs that each position meets."""
    first, second, last = torch.zeros(4, 1, 1, 2), torch.zeros(3, 4, 1, 2), torch.zeros(2, 6)
    for mask, meets in (
        (first, {(0, 0, 0): {0, 1}, (0, 0, 1): {0, 2}}),  # output 3 is dead
        (second, {(0, 0, 0): {0, 1}, (0, 0, 1): {1}, (2, 0, 1): {0}, (3, 0, 0): {0}, (3, 0, 1): {1}}),  # output 2 too
        (last, {(0,): {0, 1}, (4,): {0}, (5,): {0}}),  # two features a channel
    ):
        for position, outputs in meets.items():
            for output in outputs:
                mask[(output, *position)] = 1
    return {"first": first, "second": second, "last": last}


def test_what_a_layer_passes_on_is_what_is_counted_by_hand():
    masks = chain()
    table = layer_table(masks, masks).set_index("layer")
    assert list(table.index) == ["first", "second", "last"]
    # first: outputs 0, 1, 2 live with 2, 1, 1 of 2 inputs; second reads 0 and 2, and meets 2 outputs
    assert table.compatibility["first"] == near(2 / 3)
    assert table.copeland["first"] == near(((1 + 0.5) / 1 + 0 + (0 + 0.5) / 0.5) / 6)
    # second: outputs 0, 1 live with 3 of 5 inputs; last reads one feature of channel 0, and 2 of the dead channel
    assert table.compatibility["second"] == near(1 / 2)
    assert table.copeland["second"] == near((1 / (3 / 5) + 0 + 0 + 0) / 4)
    assert isnan(table.compatibility["last"])
    assert isnan(table.copeland["last"])


def test_overlap_is_taken_over_channels_all_of_whose_positions_have_an_edge():
    masks = chain()
    table = layer_table(masks, masks).set_index("layer")
    assert table.overlap["first"] == near(1 / 2)  # {0, 1} and {0, 2}
    assert table.overlap["second"] == near((1 + 0) / 2)  # channel 0: {0, 1} and {1}; channel 3: {0} and {1}
    assert table.overlap["last"] == 1.0  # one position a channel
    no_channel = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert isnan(layer_table({"conv": no_channel}, {"conv": no_channel}).overlap[0])


DENSE = {
    "channels differ": ((4, 2, 3, 3), (5, 3, 3, 3), False),
    "channels agree": ((4, 2, 3, 3), (5, 4, 1, 1), True),
    "flattened, one position": ((4, 2, 3, 3), (5, 4), True),
    "flattened, nine positions": ((4, 2, 3, 3), (5, 36), True),
    "flattened, no whole number of positions": ((4, 2, 3, 3), (5, 38), False),
    "linear layers agree": ((4, 6), (5, 4), True),
    "linear layers differ by a factor": ((4, 6), (5, 8), False),
    "a convolution after a linear layer": ((4, 6), (5, 4, 3, 3), False),
}


@pytest.mark.parametrize(("one", "two", "fit"), DENSE.values(), ids=DENSE)
def test_only_layers_that_fit_are_taken_for_consecutive(one, two, fit):
    masks = {"one": torch.ones(one), "two": torch.ones(two)}
    table = layer_table(masks, masks)
    expected = 1.0 if fit else nan  # dense layers pass everything on
    assert [table.compatibility[0], table.copeland[0]] == near([expected, expected])
    assert table[["compatibility", "copeland"]].iloc[1].isna().all()


def test_nothing_leads_into_or_out_of_a_dead_layer():
    masks = {"one": torch.ones(4, 6), "dead": torch.zeros(5, 4), "two": torch.ones(3, 5)}
    table = layer_table(masks, masks).set_index("layer")
    assert table.compatibility["one"] == 0.0
    assert isnan(table.copeland["one"])  # 0 edges among 0 outputs
    assert isnan(table.compatibility["dead"])  # no live channel
    dead = table.loc["dead"]
    assert dict(dead[COUNTS]) == dict.fromkeys(COUNTS, 0) | {"n_inputs": 4, "n_outputs": 5}
    assert not dead[TESTS].any()
    assert (dead.density, dead.norm) == (0.0, 0.0)
    assert dead.drop([*COUNTS, *TESTS, "density", "norm"]).isna().all()


def test_grouped_and_transposed_convolutions_are_known_from_the_model():
    model = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2), nn.ConvTranspose2d(6, 5, 2), nn.Conv2d(5, 10, 3, groups=5))
    masks = {name: torch.ones(p.shape) for name, p in model.named_parameters() if name.endswith("weight")}
    table = layer_table(masks, model)
    grouped, transposed = table.iloc[0], table.iloc[1]
    assert (grouped.n_inputs, grouped.n_outputs, grouped.edges, grouped.density) == (4, 6, 12, 1.0)
    assert [grouped.sigma1, grouped.sigma2] == near([sqrt(6), sqrt(6)])  # two K(2, 3)
    assert (transposed.n_inputs, transposed.n_outputs, transposed.edges) == (24, 5, 120)
    assert transposed.sigma1 == near(sqrt(120))
    assert grouped.compatibility == 1.0
    assert grouped.copeland == near((5 / 5) / (2 / 4))  # an output channel sees half of the inputs
    assert transposed.compatibility == transposed.overlap == 1.0
    assert transposed.copeland == near((2 / 10) / (24 / 24))  # depthwise: each channel meets two outputs


# --- identities and agreement -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES)
def test_the_columns_obey_the_identities_of_the_published_tables(rules):
    masks, weights = random_network()
    table = layer_table(masks, weights, rules=rules)
    valid, coefficient = table[table.valid], table[table.narc_iclr2023.notna()]
    assert 3 <= len(valid) < len(table)
    assert (valid.delta_s_bound - 2 * (valid.sigma1 - 1) ** 0.5).abs().max() < 1e-9
    assert (valid.delta_s - (valid.delta_s_bound - valid.sigma2)).abs().max() < 1e-9
    assert (valid.ramanujan_gap - (valid.ramanujan_bound - valid.sigma2)).abs().max() < 1e-9
    assert (valid.gap_normalised - valid.ramanujan_gap / valid.ramanujan_bound).abs().max() < 1e-12
    # NaRC from what the published tables hold: density, both sizes, expansion, bound and sigma2
    edges = coefficient.density * coefficient.n_inputs * coefficient.n_outputs
    d_left = (edges / coefficient.n_left, edges / coefficient.n_right)
    spread = (coefficient.sigma2**2 / 4 + 1) * coefficient.n_left * coefficient.expansion**0.5
    difference = 2 * edges - d_left[0] / coefficient.n_outputs * coefficient.n_left**2 * coefficient.expansion
    expected = (spread - difference.abs()) / (coefficient.n_inputs * coefficient.n_outputs)
    assert len(coefficient) >= 3
    assert (coefficient.narc_iclr2023 - expected).abs().max() < 1e-9
    if rules == "iclr2023":
        bound = (d_left[0] - 1) ** 0.5 + (d_left[1] - 1) ** 0.5
        assert (coefficient.ramanujan_bound - bound).abs().max() < 1e-9


@pytest.mark.parametrize("rules", [*RULES, replace(RULES["fsp2023"], whole_left="inputs", zero_weights="published")])
def test_the_four_coordinates_and_their_norm_are_those_of_the_definitions(rules):
    masks, weights = random_network(1)
    weights["conv"][0] = 0  # zeros under the mask
    table = layer_table(masks, weights, rules=rules).set_index("layer")
    together = coordinates(masks, weights, rules=rules)
    for name, mask in masks.items():
        expected = coordinate(mask, weights[name], rules=rules)
        layer = table.loc[name]
        assert [layer.ramanujan_gap, layer.weighted_gap, layer.imdb, layer.imsg] == near(list(expected))
        assert layer.norm == near(hypot(*[0.0 if isnan(x) else x for x in expected]))
        assert layer.norm == near(together[name].norm, 1e-12)


def test_spectra_counts_and_narc_are_those_of_the_definitions():
    masks, weights = random_network(2)
    table = layer_table(masks, weights).set_index("layer")
    for name, mask in masks.items():
        layer, B = table.loc[name], biadjacency(mask)
        assert (layer.n_inputs, layer.n_outputs) == tuple(B.shape)
        assert (layer.n_left, layer.n_right) == (B.any(1).sum(), B.any(0).sum())
        assert layer.edges == B.sum()
        assert layer.density == near(mask.float().mean().item(), 1e-6)
        assert [layer.sigma1, layer.sigma2] == near(singular_values(B).tolist() if B.any() else [nan, nan])
        assert [layer.degree_left * layer.n_left, layer.degree_right * layer.n_right] == near(
            [B.sum().item()] * 2 if B.any() else [nan, nan]
        )
        for which in RULES:
            assert layer[f"narc_{which}"] == near(narc(B, rules=which))
            assert layer[f"narc_{which}_undirected"] == near(narc(B, rules=which, edge_count="undirected"))


def test_every_channel_is_counted_as_plain_loops_count_it():
    masks, weights = random_network(3)
    table = layer_table(masks, weights).set_index("layer")
    names = list(masks)
    pairs = [("stem", "conv"), ("conv", "thin"), ("thin", "pointwise"), ("pointwise", "line"), ("line", "few outputs")]
    assert [name for name in names if not isnan(table.compatibility[name])] == [a for a, _ in pairs] + ["few outputs"]
    for one, two in pairs:
        B, C = biadjacency(masks[one]), biadjacency(masks[two])
        positions = len(C) // B.shape[1]
        live = [c for c in range(B.shape[1]) if B[:, c].any()]
        passing, scores = 0, []
        for c in live:
            kernel = C[c * positions : (c + 1) * positions]
            passing += bool(kernel.any())
            for position in kernel:
                scores.append((position.sum() / C.any(0).sum()) / (B[:, c].sum() / B.any(1).sum()))
        assert table.compatibility[one] == near(passing / len(live))
        assert table.copeland[one] == near(float(sum(scores) / len(scores)))
        coefficients, channels = [], masks[one].shape[1]
        for kernel in B.reshape(channels, len(B) // channels, -1):
            meets = [set(position.nonzero()[:, 0].tolist()) for position in kernel]
            if all(meets):
                coefficients.append(len(set.intersection(*meets)) / min(map(len, meets)))
        assert table.overlap[one] == near(sum(coefficients) / len(coefficients) if coefficients else nan)


# --- decisions --------------------------------------------------------------------------------------------------------

FEW_OUTPUTS = graphs.copies(graphs.complete(9, 2), 2).B  # every input has 2 edges, every output 9


def test_d1_the_table_shows_where_the_orientation_of_the_whole_layer_decides():
    masks = {"few outputs": FEW_OUTPUTS.T, "few inputs": FEW_OUTPUTS, "both": torch.ones(4, 4)}
    published = layer_table(masks, masks, rules="fsp2023").set_index("layer")
    switched = layer_table(masks, masks, rules=replace(RULES["fsp2023"], whole_left="inputs")).set_index("layer")
    assert list(published.valid) == list(published.valid_outputs_left) == [True, False, True]
    assert list(switched.valid) == list(switched.valid_inputs_left) == [False, True, True]
    assert (published.valid_inputs_left != published.valid_outputs_left).sum() == 2  # how often they differ
    bounded = ["delta_s", "delta_s_bound", "ramanujan_gap", "ramanujan_bound", "gap_normalised", "weighted_gap"]
    for table in (published, switched):
        assert list(table[bounded].notna().all(axis=1)) == list(table.valid)
        assert list(table[bounded].isna().all(axis=1)) == list(~table.valid)
    counted = ["sigma1", "sigma2", "degree_left", "degree_right", "expansion", "narc_fsp2023", "narc_nested", "imdb"]
    pd.testing.assert_frame_equal(published[counted], switched[counted])


def test_d7_one_group_without_weights_empties_the_published_mean_and_is_dropped_from_ours():
    B = torch.cat([graphs.complete(3, 5).B, graphs.complete_minus_matching(5, 5).B])
    weight = B.clone()
    weight[3:] = 0  # weights that have just grown back
    ours = row(B, rules="fsp2023", weight=weight)
    published = row(B, rules=replace(RULES["fsp2023"], zero_weights="published"), weight=weight)
    assert ours.imsg == near(5 / 7 * sqrt(15))
    assert isnan(published.imsg)
    assert published.norm == near(sqrt(ours.norm**2 - ours.imsg**2))  # infinite as published, then counted as 0
    assert ours.nested_valid == published.nested_valid == 2


def test_d23_no_graph_has_a_first_singular_value_below_one():
    """Published: a bare -1 in place of value and bound where sigma1 < 1."""
    anything = replace(RULES["iclr2023"], left_degree=0, right_degree=0)
    for n in (1, 2, 3, 7, 50):
        layer = row(graphs.matching(n).B if n > 1 else graphs.one_edge().B, rules=anything)
        assert [layer.sigma1, layer.delta_s_bound] == pytest.approx([1.0, 0.0], abs=1e-6)
        assert layer.delta_s == pytest.approx(-1.0 if n > 1 else 0.0, abs=1e-6)
    assert row(graphs.empty(3, 4).B, rules=anything)[["sigma1", "delta_s", "delta_s_bound"]].isna().all()


def test_d25_the_factor_is_in_imdb_alone_and_the_normalised_means_have_none():
    layer = row(graphs.complete(3, 5).B, rules="fsp2023")
    assert layer.imdb == near(5 / 7 * layer.ramanujan_gap)
    assert (layer.imdb_normalised, layer.ism) == (1.0, layer.delta_s)


def test_d26_topology_comes_from_the_mask_and_not_from_weights_that_happen_to_be_zero():
    B = graphs.complete(6, 4).B
    zeros, ones = row(B, weight=torch.zeros_like(B)), row(B)
    weighted = ["weighted_gap", "imsg", "norm"]
    pd.testing.assert_series_equal(zeros.drop(weighted), ones.drop(weighted))
    assert zeros[["weighted_gap", "imsg"]].isna().all()


def test_d27_the_stable_mean_falls_back_on_the_gap_where_no_subgraph_is_valid():
    """Published means drop such a layer; a mean of the stable column keeps it."""
    alone = torch.tensor([[i != j for j in range(8)] for i in range(6)], dtype=torch.float64)
    alone[1, 0] = alone[2, :2] = 0  # groups of four, one and one inputs
    distinct = torch.ones(3, 8, dtype=torch.float64)
    distinct[1, 0] = distinct[2, :2] = 0  # degrees 8, 7, 6: groups of one, and outputs of degree below 3
    distinct = torch.cat([distinct, distinct.flip(1)])  # groups of two
    masks = {"nested": alone.T, "not nested": distinct.T}
    table = layer_table(masks, masks).set_index("layer")
    assert list(table.valid) == [True, True]
    assert list(table.nested_valid) == [1, 0]
    assert isnan(table.imdb_normalised["not nested"])
    assert table.imdb_stable["not nested"] == table.gap_normalised["not nested"]
    assert table.imdb_stable["nested"] == table.imdb_normalised["nested"] != table.gap_normalised["nested"]
    assert table.imdb_normalised.mean() == table.imdb_normalised["nested"] != table.imdb_stable.mean()
    assert isnan(row(graphs.matching(5).B).imdb_stable)


# --- published numbers ------------------------------------------------------------------------------------------------

PUBLISHED = ["ramanujan_gap", "sigma1", "sigma2", "narc_iclr2023", "imdb"]  # rm, t1m, t2m, random_factor, irm


def resnet34_shapes():
    """Prunable tensors of torchvision's ResNet-34 with ten classes."""
    shapes, channels = {"conv1": (64, 3, 7, 7)}, 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=1):
        for block in range(blocks):
            shapes[f"layer{stage}.{block}.conv1"] = (width, channels, 3, 3)
            shapes[f"layer{stage}.{block}.conv2"] = (width, width, 3, 3)
            if channels != width:
                shapes[f"layer{stage}.{block}.downsample.0"] = (width, channels, 1, 1)
            channels = width
    return shapes | {"fc": (10, 512)}


@pytest.mark.parametrize(
    ("method", "layer", "published"),
    [
        ("random", "layer3.1.conv1", [0.98, 78.22, 19.12, 0.020, 0.35]),
        ("erk", "layer2.1.conv1", [2.91, 91.7, 18.92, 0.000, 1.21]),
    ],
)
def test_published_layers_lie_among_random_masks_of_their_density(method, layer, published):
    """ResNet-34 at density 0.1, one trained network each; ten Bernoulli masks, mean +- 3 standard deviations."""
    shapes = resnet34_shapes()
    assert len(shapes) == 37
    density = 0.1 if method == "random" else erk(shapes, 0.1)[layer]
    random = generator(0)
    masks = {f"draw {i}": torch.rand(shapes[layer], generator=random) < density for i in range(10)}
    draws = layer_table(masks, dict.fromkeys(masks, torch.ones(shapes[layer])))[PUBLISHED]
    margin = 3 * draws.std() + [0.005, 0.05 if method == "erk" else 0.005, 0.005, 0.0005, 0.005]  # and their rounding
    assert ((draws.mean() - published).abs() <= margin).all()
    # narrow enough to tell: sigma1 to 2 %, the gap from 0, sigma2 to 2 %
    assert margin["sigma1"] < 0.02 * published[1]
    assert margin["sigma2"] < 0.02 * published[2]
    assert margin["ramanujan_gap"] < 0.4 * published[0]


def test_the_dense_classifier_under_erk_is_the_published_one_to_every_digit():
    shapes = resnet34_shapes()
    assert erk(shapes, 0.1)["fc"] == 1.0
    dense = torch.ones(shapes["fc"])
    found = layer_table({"fc": dense}, {"fc": dense})[PUBLISHED].iloc[0].round(3)
    assert found.tolist() == [25.605, 71.554, 0.0, -0.986, 25.605]


# --- the table itself -------------------------------------------------------------------------------------------------


def test_a_table_has_a_row_a_layer_says_what_its_docstring_says_and_leaves_masks_and_weights_alone():
    masks, weights = random_network()
    copies = {name: (masks[name].clone(), weights[name].clone()) for name in masks}
    for rules in RULES:
        table = layer_table(masks, weights, rules=rules)
        assert list(table["layer"]) == list(masks)
        assert set(table.select_dtypes("integer")) == set(COUNTS)
        assert set(table.select_dtypes("bool")) == set(TESTS)
        assert set(table.select_dtypes("float")) == set(table) - {"layer", *COUNTS, *TESTS}
        assert table[["density", "norm"]].notna().all().all()
        assert not table.drop(columns="layer").astype(float).isin([float("inf"), -float("inf")]).any().any()
    described = " ".join(layer_table.__doc__.replace(",", " ").split())
    assert [name for name in table if f"{name} " not in described] == []
    pd.testing.assert_frame_equal(layer_table(masks, weights), layer_table(masks, weights, rules="iclr2023"))
    for name, (mask, weight) in copies.items():
        assert torch.equal(masks[name], mask)
        assert torch.equal(weights[name], weight)


def test_bad_input_is_refused_as_by_coordinates():
    good = torch.ones(4, 5)
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        layer_table({"classifier.weight": good}, {"classifier.weight": good.T})
    with pytest.raises(ValueError, match="no masks"):
        layer_table({}, {})
    with pytest.raises(ValueError, match="neurips2023"):
        layer_table({"good": good}, {"good": good}, rules="neurips2023")
