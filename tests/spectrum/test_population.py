"""Many masks at once: the fast ways against the definitions, on hard graphs, for every kind of layer."""

import math

import graphs
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import nn
from torch.nn.utils import parametrize, prune

from fsp import masks as mask_algebra
from fsp import models, spectrum
from fsp.masks import PLAIN
from fsp.pruning.methods import prune as prune_model
from fsp.spectrum import RULES, Rules, Wiring, biadjacency, coordinates, dense, fast, lanczos, population
from fsp.spectrum import two_values as two
from fsp.spectrum.definitions import without_isolated

PUBLISHED_ZEROS = Rules(2, 3, 1, True, True, "outputs", "published")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(found, expected, rel=1e-9):
    found, expected = (torch.as_tensor(v, dtype=torch.float64).numpy() for v in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=rel, atol=1e-9)


def coordinate_by_definition(mask, weight, rules="fsp2023", wiring=PLAIN):
    B = biadjacency(mask, wiring)
    W = biadjacency(weight, wiring).where(B != 0, 0)
    gaps = spectrum.ramanujan_gap(B, rules=rules), spectrum.weighted_gap(W, rules=rules)
    return [*gaps, spectrum.imdb(B, rules=rules), spectrum.imsg(B, W, rules=rules)]


# ---- the fast ways against the definitions ------------------------------------------------------------------------

TWO_GROUPS = np.concatenate([graphs.complete(3, 5).B.numpy(), graphs.complete_minus_matching(5, 5).B.numpy()])
FEW_WEIGHTS = TWO_GROUPS.copy()
FEW_WEIGHTS[3:, 2:] = 0  # the second group is no valid graph by its weights


@pytest.mark.parametrize("rules", [RULES["iclr2023"], RULES["fsp2023"], PUBLISHED_ZEROS])
@example(layer=(TWO_GROUPS, FEW_WEIGHTS), flips=0)
@settings(max_examples=100, deadline=None)
@given(layer=graphs.layers(), flips=st.integers(0, 3))
def test_the_sparse_and_the_dense_way_give_the_numbers_of_the_definitions(rules, layer, flips):
    mask, weight = torch.from_numpy(layer[0]).T.bool(), torch.from_numpy(layer[1]).T
    several = torch.stack([mask, *(mask ^ (torch.rand(mask.shape, generator=seeded(i)) < 0.1) for i in range(flips))])
    expected = [list(coordinate_by_definition(m, weight, rules)) for m in several]
    same(population([{"w": m} for m in several], {"w": weight}, rules=rules)[:, 0], expected)
    same(dense.dense_coordinates(several, weight, rules, Wiring(), 2**30), expected)


@pytest.mark.parametrize("max_bytes", [1, 3_000_000, 2**30])
@pytest.mark.parametrize(
    "module", [nn.Conv2d(8, 24, 3), nn.Conv2d(6, 8, 3, groups=2), nn.ConvTranspose2d(6, 4, (2, 3), groups=2)], ids=str
)
def test_the_dense_way_knows_every_wiring_and_chunks_change_no_number(module, max_bytes):
    wiring, weight = Wiring(module.groups, module.transposed), module.weight.detach().clone()
    several = torch.rand(5, *weight.shape, generator=seeded()) < 0.4
    weight[~several.any(0)] = torch.nan  # off every mask a weight may be anything
    found = dense.dense_coordinates(several, weight, RULES["fsp2023"], wiring, max_bytes)
    same(found, [list(coordinate_by_definition(m, weight, wiring=wiring)) for m in several], rel=1e-10)


@pytest.mark.parametrize("precision", two.PRECISIONS)
@pytest.mark.parametrize(("density", "formed"), [(0.01, False), (0.03, None), (0.1, True), (0.4, True)])
def test_large_layers_are_iterated_on_by_either_product_and_agree(density, formed, precision, monkeypatch):
    calls = []
    together = two._together

    def told(graphs, dense, chosen):
        calls.append((dense, together(graphs, dense, chosen)))
        return calls[-1][1]

    monkeypatch.setattr(two, "_together", told)
    mask = torch.rand(384, 96, 3, 3, generator=seeded()) < density
    weight = torch.randn(384, 96, 3, 3, generator=seeded(1))
    found = coordinates({"w": mask}, {"w": weight}, precision=precision)["w"]
    same(found, coordinate_by_definition(mask, weight), rel=1e-10 if precision == "float64" else 1e-6)
    assert calls
    assert all(None not in values for _, values in calls)
    assert formed in (None, calls[0][0][0])


def random_graph(m, n, density, seed=0):
    B = (np.random.default_rng(seed).random((m, n)) < density).astype(float)
    return B[B.any(1)][:, B.any(0)]


def as_graph(matrix):
    return fast.touching(sparse.csr_array(matrix))


def coupled(size):
    """Two equal components that hang together by one light edge."""
    twice = np.kron(np.eye(2), random_graph(40, 60, 0.4))
    twice[0, -1] = size
    return twice


TWO_KINDS = sparse.block_diag((random_graph(50, 70, 0.5), random_graph(40, 60, 0.45))).toarray()
HARD = {  # a graph, and whether the iteration certifies its values when alone; None where rounding decides
    "random": (random_graph(300, 400, 0.05), True),
    "first value double": (coupled(0), None),
    "components by a thread of 1e-2": (coupled(1e-2), None),
    "components by a thread of 1e-9": (coupled(1e-9), None),
    "components by a thread of 1e-13": (coupled(1e-13), None),
    "components of two kinds": (TWO_KINDS, True),
    "second value repeated": (np.ones((60, 60)) - np.eye(60), True),
    "even cycle": (np.eye(200) + np.roll(np.eye(200), 1, axis=1), None),
    "close columns": (np.hstack([random_graph(80, 50, 0.3), random_graph(80, 50, 0.3) * (1 + 1e-9)]), None),
    "two rows": (random_graph(2, 300, 0.05), None),
}


@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("precision", two.PRECISIONS)
@pytest.mark.parametrize(("graph", "certified"), HARD.values(), ids=HARD)
def test_hard_graphs_come_out_right_alone_and_in_company(graph, certified, precision, formed):
    expected = pytest.approx(
        tuple(np.linalg.svd(graph, compute_uv=False)[:2]), rel=1e-9 if precision == "float64" else 1e-5
    )
    K, company = as_graph(graph), as_graph(random_graph(170, 300, 0.05))
    assert two.top_two([K], precision) == [expected]
    alone = two._together([K], [formed], lanczos.PRECISIONS[precision])[0]
    beside = two._together(
        [company, K, as_graph(random_graph(300, 170, 0.05))], [not formed, formed, True], lanczos.PRECISIONS[precision]
    )[1]
    assert all(pair is None or pair == expected for pair in (alone, beside))
    assert certified in (None, alone is not None)


@pytest.mark.parametrize("precision", two.PRECISIONS)
def test_what_a_graph_gets_depends_on_no_other_to_the_last_bit(precision):
    several = [as_graph(random_graph(80 + 37 * i, 300 - 31 * i, 0.02 + 0.01 * i, seed=i)) for i in range(7)]
    formed = [i % 3 == 0 for i in range(7)]
    chosen = lanczos.PRECISIONS[precision]
    alone = [two._together([K], [f], chosen)[0] for K, f in zip(several, formed, strict=True)]
    assert two._together(several, formed, chosen) == alone
    assert two._together(several[::-1], formed[::-1], chosen) == alone[::-1]


@pytest.mark.parametrize("precision", two.PRECISIONS)
@settings(max_examples=100, deadline=None)
@given(st.lists(graphs.layers(), min_size=1, max_size=5), st.booleans())
def test_what_the_iteration_certifies_is_right_to_what_it_promises(precision, layers, formed):
    several = [without_isolated(torch.from_numpy(np.abs(B * W))).numpy() for B, W in layers]
    several = [as_graph(K) for K in several if min(K.shape) > 1]
    chosen = lanczos.PRECISIONS[precision]
    for K, found in zip(
        several, two._together(several, [formed] * len(several), chosen) if several else [], strict=True
    ):
        if found is not None:
            expected = np.linalg.svd(two._dense(K, np.float64), compute_uv=False)[:2]
            assert np.abs(np.subtract(found, expected)).max() <= chosen.certified / 2 * expected[1]


@pytest.mark.parametrize("precision", two.PRECISIONS)
@pytest.mark.parametrize("formed", [True, False])
def test_a_graph_of_rank_one_is_left_to_all_eigenvalues_without_a_warning(precision, formed):
    """Nothing is left of the second vector beside the first, sometimes to the last bit."""
    graph = as_graph(np.full((3, 8), np.float32(0.3), dtype=np.float64))
    assert two._together([graph], [formed], lanczos.PRECISIONS[precision]) == [None]
    assert two.top_two([graph], precision)[0] == pytest.approx((0.3 * math.sqrt(24), 0), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("precision", two.PRECISIONS)
def test_an_iteration_that_does_not_converge_falls_back_to_all_eigenvalues(precision, monkeypatch):
    graph = random_graph(300, 400, 0.05, seed=2)
    strict = lanczos.PRECISIONS[precision]._replace(certified=0.0)
    monkeypatch.setitem(two.PRECISIONS, precision, strict)
    monkeypatch.setattr(two, "_saved", lambda K, dtype: (1.0, False))  # always try it first
    assert two._together([as_graph(graph)], [False], strict) == [None]
    expected = np.linalg.svd(graph, compute_uv=False)[:2]
    assert two.top_two([as_graph(graph)], precision)[0] == pytest.approx(tuple(expected), rel=1e-10)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_single_precision_is_certified_from_the_graph_itself_whatever_its_size_and_how_its_weights_differ(scale):
    rng = np.random.default_rng(5)
    graph = random_graph(300, 420, 0.06) * np.exp(4 * rng.standard_normal((1, 1)) + rng.normal(0, 3, (300, 1)))
    graph = scale * graph[graph.any(1)][:, graph.any(0)]
    expected = np.linalg.svd(graph, compute_uv=False)[:2]
    for formed in (False, True):
        found = two._together([as_graph(graph)], [formed], lanczos.PRECISIONS["float32"])[0]
        assert found is None or np.abs(np.subtract(found, expected)).max() <= 1e-5 * expected[1]
    assert np.abs(np.subtract(two.top_two([as_graph(graph)], "float32")[0], expected)).max() <= 1e-5 * expected[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gives_the_numbers_of_the_cpu(network):
    net, several = network
    same(population(several, net, device="cuda"), population(several, net), rel=1e-6)


# ---- many masks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    net = models.build("resnet8", (1, 8, 8), 10, generator=seeded())
    return net, [prune_model(net, "random", 0.2, generator=seeded(i)) for i in range(4)]


def test_a_population_is_its_masks_one_by_one(network):
    net, several = network
    found = population(several, net)
    assert found.shape == (4, 10, 4)
    assert found.dtype == torch.float64
    weights = dict(net.named_parameters())
    for p, one in enumerate(several):
        for ell, name in enumerate(one):
            same(found[p, ell], coordinate_by_definition(one[name], weights[name].detach()), rel=1e-10)


def test_the_number_of_threads_changes_no_bit_and_is_put_back(network):
    net, several = network
    before = torch.get_num_threads()
    alone = torch.cat([population([one], net) for one in several])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = population(several, net)
            assert torch.get_num_threads() == threads
            assert torch.equal(found.nan_to_num(-9), alone.nan_to_num(-9))
    finally:
        torch.set_num_threads(before)


def test_a_population_names_the_mask_and_the_layer_that_is_wrong(network):
    net, several = network
    spoilt = dict(several[1]) | {"stem.conv.weight": several[1]["stem.conv.weight"].float() * 2}
    with pytest.raises(ValueError, match=r"mask 1: layer 'stem.conv.weight': the mask holds values other than 0 and 1"):
        population([several[0], spoilt], net)
    with pytest.raises(ValueError, match="mask 1 has layers"):
        population([several[0], {"stem.conv.weight": several[1]["stem.conv.weight"]}], net)
    with pytest.raises(ValueError, match="the list is empty"):
        population([], net)


# ---- kinds of layers ---------------------------------------------------------------------------------------------


def edges_of(module, mask):
    """Inputs, unrolled over the kernel, and outputs that a kept weight connects, by asking the module itself."""
    weight = module.weight
    spread = np.zeros((module.in_channels * int(np.prod(module.kernel_size)), module.out_channels))
    first, second = weight.shape[:2]
    per_group_out = module.out_channels // module.groups
    per_group_in = module.in_channels // module.groups
    for a in range(first):
        for b in range(second):
            for k, kept in enumerate(mask[a, b].flatten().tolist()):
                if module.transposed:
                    i, o = a, (a // per_group_in) * per_group_out + b
                else:
                    o, i = a, (a // per_group_out) * per_group_in + b
                spread[i * int(np.prod(module.kernel_size)) + k, o] = kept
    return torch.from_numpy(spread)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(6, 8, 3),
        nn.Conv3d(2, 4, 2),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.Conv2d(6, 12, 3, groups=6),
        nn.ConvTranspose2d(6, 4, 3),
        nn.ConvTranspose2d(6, 4, (2, 3), groups=2),
        nn.ConvTranspose1d(4, 8, 3, groups=4),
    ],
    ids=str,
)
def test_every_kind_of_convolution_is_wired_as_it_computes(module):
    mask = torch.rand(module.weight.shape, generator=seeded()) < 0.6
    wiring = Wiring(module.groups, module.transposed)
    assert torch.equal(biadjacency(mask, wiring), edges_of(module, mask))
    weight = module.weight.detach()
    model = nn.Sequential(module)
    found = coordinates({"0.weight": mask}, model)["0.weight"]
    same(found, coordinate_by_definition(mask, weight, wiring=wiring))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_of_any_precision_are_measured_in_double(dtype):
    mask = torch.rand(12, 20, generator=seeded()) < 0.5
    weight = torch.randn(12, 20, generator=seeded(1)).to(dtype)
    found = coordinates({"w": mask}, {"w": weight})["w"]
    same(found, coordinate_by_definition(mask, weight.double()), rel=1e-12)


def test_a_shared_weight_is_measured_once_and_embeddings_and_norms_are_not():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.first = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 6)
            self.second = nn.Linear(6, 6)
            self.second.weight = self.first.weight

    found = mask_algebra.prunable(Tied())
    assert list(found) == ["first.weight"]
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in found.items()}
    assert list(coordinates(masks, Tied())) == ["first.weight"]


class Halved(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return weight / 2


def test_a_parameter_that_torch_has_moved_is_measured_under_its_new_name_as_the_weight_it_is_used_for():
    pruned, parametrised = nn.Conv2d(4, 12, 3, groups=2), nn.Conv2d(4, 12, 3, groups=2)
    mask = torch.rand(12, 2, 3, 3, generator=seeded()) < 0.7
    prune.custom_from_mask(pruned, "weight", mask)
    parametrize.register_parametrization(parametrised, "weight", Halved())
    for layer, name in ((pruned, "0.weight_orig"), (parametrised, "0.parametrizations.weight.original")):
        model = nn.Sequential(layer)
        assert list(mask_algebra.prunable(model)) == [name]
        weight = layer.weight.detach()  # which the forward pass uses
        same(coordinates({name: mask}, model)[name], coordinate_by_definition(mask, weight, wiring=Wiring(groups=2)))


def test_one_dict_of_masks_and_a_device_that_is_not_here_are_refused_before_anything_is_measured():
    model = nn.Linear(6, 5)
    masks = {"weight": torch.eye(5, 6, dtype=torch.bool)}
    with pytest.raises(TypeError, match=r"pass a list, \[masks\]"):
        population(masks, model)
    with pytest.raises(ValueError, match="device='nowhere': expected a device of torch that this machine has"):
        population([masks], model, device="nowhere")
