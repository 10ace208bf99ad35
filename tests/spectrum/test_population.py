"""Many masks at once: the fast engine against the definitions, chunk by chunk, layer kind by layer kind."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import nn
from torch.nn.utils import parametrize, prune

from fsp import masks as mask_algebra
from fsp import models
from fsp.pruning.methods import prune as prune_model
from fsp.spectrum import (
    RULES,
    Rules,
    Wiring,
    batched,
    biadjacency,
    coordinate,
    coordinates,
    engine,
    lanczos,
    population,
)
from fsp.spectrum.definitions import without_isolated

PUBLISHED_ZEROS = Rules(2, 3, 1, True, True, "outputs", "published")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(found, expected, rel=1e-9):
    found, expected = (torch.as_tensor(v, dtype=torch.float64).numpy() for v in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=rel, atol=1e-9)


# ---- the engine against the definitions --------------------------------------------------------------------------


@st.composite
def layers(draw):
    """Masks and weights with dead vertices, equal rows, equal weights, zeros under the mask."""
    outputs, inputs = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = rng.random((outputs, inputs)) < draw(st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]))
    kind = draw(st.sampled_from(["random", "dead", "copies", "rank one"]))
    if kind == "dead":
        mask[rng.random(outputs) < 0.3] = False
        mask[:, rng.random(inputs) < 0.3] = False
    if kind == "copies":
        mask[:, inputs // 2 :] = mask[:, : inputs - inputs // 2]
    if kind == "rank one":
        mask = np.outer(rng.random(outputs) < 0.6, rng.random(inputs) < 0.6)
    weight = rng.standard_normal((outputs, inputs))
    if draw(st.booleans()):
        weight[:] = 0.5
    if draw(st.booleans()):
        weight[rng.random((outputs, inputs)) < 0.2] = 0
    return torch.from_numpy(mask), torch.from_numpy(weight)


@settings(max_examples=150, deadline=None)
@given(layers(), st.sampled_from([RULES["iclr2023"], RULES["fsp2023"], PUBLISHED_ZEROS]))
def test_the_engine_gives_the_numbers_of_the_definitions(layer, rules):
    mask, weight = layer
    same(coordinates({"w": mask}, {"w": weight}, rules=rules)["w"], coordinate(mask, weight, rules=rules))


@pytest.mark.parametrize("density", [0.01, 0.03, 0.4])
def test_large_layers_agree_where_the_iteration_is_used(density, monkeypatch):
    iterated = []
    together = engine._together
    monkeypatch.setattr(engine, "_together", lambda graphs: iterated.append(together(graphs)) or iterated[-1])
    mask = torch.rand(256, 96, 3, 3, generator=seeded()) < density
    weight = torch.randn(256, 96, 3, 3, generator=seeded(1))
    same(coordinates({"w": mask}, {"w": weight})["w"], coordinate(mask, weight), rel=1e-10)
    assert (density == 0.4) or all(pair is not None for found in iterated for pair in found)
    assert (density == 0.4) == (iterated == [])


@settings(max_examples=100, deadline=None)
@given(st.lists(layers(), min_size=1, max_size=5))
def test_what_the_iteration_certifies_is_right_to_1e_8(several):
    graphs = [without_isolated(biadjacency(weight * mask).abs()).numpy() for mask, weight in several]
    graphs = [sparse.csr_array(K) for K in graphs if min(K.shape) > 1]
    for K, found in zip(graphs, engine._together(graphs) if graphs else [], strict=True):
        if found is not None:
            assert found == pytest.approx(tuple(np.linalg.svd(K.toarray(), compute_uv=False)[:2]), rel=1e-8)


def test_the_iteration_certifies_random_graphs():
    K = sparse.csr_array(random_graph(300, 400, 0.05))
    assert engine._together([K]) != [None]


def together(*graphs):
    return engine._together([sparse.csr_array(np.asarray(K, float)) for K in graphs])


def random_graph(m, n, density, seed=0):
    B = (np.random.default_rng(seed).random((m, n)) < density).astype(float)
    return B[B.any(1)][:, B.any(0)]


def test_a_largest_value_that_is_double_is_never_certified_as_simple():
    block = random_graph(40, 60, 0.4)
    twice = np.kron(np.eye(2), block)
    sigma = np.linalg.svd(block, compute_uv=False)
    assert together(twice) == [None]  # two components of one kind: the second value is the first
    assert engine.top_two([sparse.csr_array(twice)])[0] == pytest.approx((sigma[0], sigma[0]), rel=1e-12)


def test_two_components_of_different_kinds_have_the_larger_ones_of_both():
    apart = np.block(
        [[random_graph(50, 70, 0.5), np.zeros((50, 60))], [np.zeros((40, 70)), random_graph(40, 60, 0.45)]]
    )
    assert together(apart) == [pytest.approx(tuple(np.linalg.svd(apart, compute_uv=False)[:2]), rel=1e-9)]


@pytest.mark.parametrize("coupling", [1e-2, 1e-5, 1e-9, 1e-13])
def test_two_components_that_hang_together_by_a_thread_come_out_right(coupling):
    block = random_graph(40, 60, 0.4)
    twice = np.kron(np.eye(2), block)
    twice[0, -1] = coupling
    sigma = np.linalg.svd(twice, compute_uv=False)[:2]
    assert engine.top_two([sparse.csr_array(twice)])[0] == pytest.approx(tuple(sigma), rel=1e-9)
    for found in together(twice):
        assert found is None or found == pytest.approx(tuple(sigma), rel=1e-8)


def test_clustered_and_repeated_second_values_come_out_right():
    # the complete graph minus a perfect matching: sigma_1 = n - 1, all others 1
    n = 60
    assert together(np.ones((n, n)) - np.eye(n)) == [pytest.approx((n - 1, 1.0), rel=1e-9)]
    ring = np.eye(200) + np.roll(np.eye(200), 1, axis=1)  # an even cycle: 2 |cos(pi k / 200)|, each but one double
    found = engine.top_two([sparse.csr_array(ring)])[0]
    assert found == pytest.approx((2.0, 2 * np.cos(np.pi / 200)), rel=1e-9)
    close = random_graph(80, 50, 0.3, seed=1)
    close = np.hstack([close, close * (1 + 1e-9)])
    sigma = np.linalg.svd(close, compute_uv=False)
    assert engine.top_two([sparse.csr_array(close)])[0] == pytest.approx(tuple(sigma[:2]), rel=1e-9)


def test_a_graph_has_the_same_values_alone_and_in_company():
    graphs = [random_graph(m, 300, 0.05, seed=m) for m in (2, 40, 170, 290)]
    for K, found in zip(graphs, together(*graphs), strict=True):
        alone = tuple(np.linalg.svd(K, compute_uv=False)[:2])
        assert found is None or found == pytest.approx(alone, rel=1e-9)
        assert engine.top_two([sparse.csr_array(K)])[0] == pytest.approx(alone, rel=1e-9)


def test_an_iteration_that_does_not_converge_falls_back_to_all_eigenvalues(monkeypatch):
    K = sparse.csr_array(random_graph(300, 400, 0.05, seed=2))
    expected = np.linalg.svd(K.toarray(), compute_uv=False)[:2]
    monkeypatch.setattr(lanczos, "CERTIFIED", 0.0)
    assert engine._together([K]) == [None]
    monkeypatch.setattr(engine, "_saved", lambda K: 1.0)  # always try it first
    assert engine.top_two([K])[0] == pytest.approx(tuple(expected), rel=1e-10)


@settings(max_examples=100, deadline=None)
@given(layers(), st.sampled_from([RULES["iclr2023"], RULES["fsp2023"], PUBLISHED_ZEROS]), st.integers(0, 3))
def test_the_batched_path_gives_the_numbers_of_the_definitions(layer, rules, flips):
    mask, weight = layer
    several = torch.stack([mask, *(mask ^ (torch.rand(mask.shape, generator=seeded(i)) < 0.1) for i in range(flips))])
    found = batched.layer_coordinates(several, weight, rules, Wiring(), 2**30)
    same(found, [list(coordinate(m, weight, rules=rules)) for m in several])


@pytest.mark.parametrize("max_bytes", [1, 3_000_000, 2**30])
def test_the_size_of_a_chunk_changes_no_number_of_the_batched_path(max_bytes):
    several = torch.rand(5, 24, 8, 3, 3, generator=seeded()) < 0.2
    weight = torch.randn(24, 8, 3, 3, generator=seeded(1))
    found = batched.layer_coordinates(several, weight, RULES["fsp2023"], Wiring(), max_bytes)
    same(found, [list(coordinate(m, weight)) for m in several], rel=1e-10)


def test_the_batched_path_knows_grouped_and_transposed_convolutions():
    for module in (nn.Conv2d(6, 8, 3, groups=2), nn.ConvTranspose2d(6, 4, (2, 3), groups=2)):
        wiring, weight = Wiring(module.groups, module.transposed), module.weight.detach()
        several = torch.rand(2, *weight.shape, generator=seeded()) < 0.6
        found = batched.layer_coordinates(several, weight, RULES["fsp2023"], wiring, 2**30)
        same(found, [list(coordinate(m, weight, wiring=wiring)) for m in several])


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
            same(found[p, ell], coordinate(one[name], weights[name].detach()), rel=1e-10)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit_and_is_put_back(network, threads):
    net, several = network
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = population(several, net)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([population([one], net) for one in several])
    assert torch.equal(found.nan_to_num(-9), alone.nan_to_num(-9))


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
    same(found, coordinate(mask, weight, wiring=wiring))


def test_a_grouped_convolution_computes_what_its_graph_says():
    """Zero one input channel: only the outputs that the graph connects to it may change."""
    module = nn.Conv2d(4, 6, 1, groups=2, bias=False)
    B = biadjacency(torch.ones_like(module.weight), Wiring(groups=2))  # (4, 6)
    x = torch.randn(1, 4, 3, 3, generator=seeded())
    for i in range(4):
        y = x.clone()
        y[:, i] = 0
        changed = (module(x) != module(y)).any(-1).any(-1)[0]
        assert torch.equal(changed, B[i] != 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_of_any_precision_are_measured_in_double(dtype):
    mask = torch.rand(12, 20, generator=seeded()) < 0.5
    weight = torch.randn(12, 20, generator=seeded(1)).to(dtype)
    found = coordinates({"w": mask}, {"w": weight})["w"]
    same(found, coordinate(mask, weight.double()), rel=1e-12)


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


def test_a_module_pruned_by_torch_is_measured_under_the_name_of_its_parameter():
    layer = nn.Conv2d(4, 12, 3)
    weight, mask = layer.weight.detach().clone(), torch.rand(12, 4, 3, 3, generator=seeded()) < 0.5
    prune.custom_from_mask(layer, "weight", mask)
    model = nn.Sequential(layer)
    assert list(mask_algebra.prunable(model)) == ["0.weight_orig"]
    same(coordinates({"0.weight_orig": mask}, model)["0.weight_orig"], coordinate(mask, weight))


def test_a_parametrised_module_is_measured_under_the_name_of_its_parameter():
    class Halved(nn.Module):
        def forward(self, w):
            return w / 2

    layer = nn.Conv2d(4, 12, 3, groups=2)
    parametrize.register_parametrization(layer, "weight", Halved())
    name = "0.parametrizations.weight.original"
    model = nn.Sequential(layer)
    assert list(mask_algebra.prunable(model)) == [name]
    mask = torch.rand(12, 2, 3, 3, generator=seeded()) < 0.7
    weight = dict(model.named_parameters())[name].detach()
    same(coordinates({name: mask}, model)[name], coordinate(mask, weight, wiring=Wiring(groups=2)))
