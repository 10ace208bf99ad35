"""`fsp.pruning`: masks of equal degrees have exact counts, equal degrees, and the gap that they are made for."""

import re
from itertools import product

import numpy as np
import pytest
import torch
from networks import asked, generator, same, size, total
from torch import nn

from fsp import masks
from fsp.models import build
from fsp.pruning import expanders, prune
from fsp.pruning.allocate import ALLOCATIONS, counts
from fsp.spectrum import biadjacency, ramanujan_gap, singular_values

METHODS = ["regular", "ramanujan"]
NETWORKS = {
    "mlp": build("mlp", (1, 1, 40), 10),
    "convolutions": nn.Sequential(nn.Conv2d(1, 32, (1, 5)), nn.Conv2d(32, 32, (1, 3)), nn.Flatten(), nn.Linear(32, 10)),
    "grouped": nn.Sequential(
        nn.Conv2d(6, 12, 3, groups=3), nn.Conv2d(12, 12, 3, groups=12), nn.ConvTranspose2d(12, 8, 3, groups=2)
    ),
}


def degrees(model, kept):
    """Degrees of inputs and of outputs of each layer, from the definition of its graph."""
    wirings = masks.wiring_of(model)
    found = {name: biadjacency(mask, wirings.get(name, masks.PLAIN)) for name, mask in kept.items()}
    return {(name, axis): B.sum(axis) for name, B in found.items() for axis in (0, 1)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("allocation", ["erk", "uniform"])
def test_degrees_are_equal_to_within_one_on_both_sides_and_counts_are_those_of_the_allocation(name, method, allocation):
    model = NETWORKS[name]
    shapes = {n: tuple(p.shape) for n, p in masks.prunable(model).items()}
    for density in (0.001, 0.02, 0.05, 0.1, 0.37, 0.8, 1):
        kept = prune(model, method, density, generator=generator(1), allocation=allocation)
        exact = counts(ALLOCATIONS[allocation](shapes, density), shapes, density)
        assert {n: int(m.sum()) for n, m in kept.items()} == exact
        spread = {key: float(d.max() - d.min()) for key, d in degrees(model, kept).items()}
        assert {key: s for key, s in spread.items() if s > 1} == {}


SIZES = [(256, 256), (256, 40), (32, 96), (96, 32)]  # outputs, inputs
# not where less than 1.5 weights an input or output make stars of the graph, and in thicker layers random equal degrees
# do not tell any more
SPARSE = [(m, s, d) for m, s, d in product(METHODS, SIZES, [0.05, 0.1]) if d * min(s) > 1.5]
THICK = [("ramanujan", shape, 0.2) for shape in SIZES]


@pytest.mark.parametrize(("method", "shape", "density"), [*SPARSE, *THICK])
def test_the_gap_is_at_least_the_median_of_uniform_masks_of_that_count(method, shape, density):
    layer, rng = nn.Linear(*reversed(shape)), generator(0)
    kept = prune(layer, method, density, generator=rng)
    uniform = [masks.shuffle(kept, generator=rng) for _ in range(100)]
    gap, *others = (ramanujan_gap(biadjacency(m["weight"])) for m in (kept, *uniform))
    assert gap >= np.median(others)


@pytest.mark.parametrize("shape", [(256, 256), (256, 40), (128, 1152)])
def test_the_plane_lies_inside_the_ramanujan_bound_by_more_than_a_random_regular_graph(shape):
    layer, rng = nn.Linear(*reversed(shape)), generator(0)
    gaps = {
        method: [ramanujan_gap(biadjacency(prune(layer, method, 0.1, generator=rng)["weight"])) for _ in range(5)]
        for method in METHODS
    }
    assert min(gaps["ramanujan"]) > max(gaps["regular"]) > 0


@pytest.mark.parametrize(("q", "w"), [(5, 1), (7, 1), (11, 1), (7, 3), (11, 4)])
def test_a_whole_plane_has_the_second_singular_value_of_its_formula(q, w):
    kept = expanders._plane(q * q, q * q, q, w, generator())
    B = torch.from_numpy(kept).double()
    assert torch.equal(B.sum(0), torch.full((q * q,), float(q * w), dtype=torch.float64))
    first, second = singular_values(B).tolist()
    assert first == pytest.approx(q * w)
    # the first slope's bundle, up to a factor: where its first output meets the points of abscissa 0
    peaks = np.abs(np.fft.fft(kept[0, :q].astype(float)))[1:]
    assert second == pytest.approx(np.sqrt(q) * peaks.max())
    if w == 1:
        assert second == pytest.approx(np.sqrt(q))


def test_one_plane_that_fits_is_taken_as_it_is():
    layer = nn.Linear(49, 49)
    kept = prune(layer, "ramanujan", 1 / 7, generator=generator())["weight"]  # 343 of 2401
    assert singular_values(biadjacency(kept)).tolist() == pytest.approx([7, np.sqrt(7)])


def test_all_graphs_of_equal_degrees_are_equally_likely():
    layer, rng, found = nn.Linear(3, 3), generator(2), {}
    draws = 600
    for _ in range(draws):
        key = str(prune(layer, "regular", 4 / 9, generator=rng)["weight"].tolist())
        found[key] = found.get(key, 0) + 1
    # by hand: 4 edges, degrees 2, 1, 1 on both sides.  Choose the two vertices of degree 2 (9 ways); they meet, then
    # each has one more edge (2 * 2 ways) and the last edge is given; or they do not, and the edges are given.
    assert len(found) == 45
    expected = draws / 45
    assert sum((n - expected) ** 2 / expected for n in found.values()) < 95  # chi-square, 44 degrees, 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_layer_counts_may_be_those_of_other_masks(method):
    model = NETWORKS["mlp"]
    like = prune(model, "magnitude", 0.05)
    kept = prune(model, method, 0.05, like=like)
    assert {n: int(m.sum()) for n, m in kept.items()} == {n: int(m.sum()) for n, m in like.items()}
    assert total(kept) == asked(size(model), 0.05)
    assert not same(kept, like)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_made_is_refused(method):
    model = nn.Linear(20, 20)
    with pytest.raises(ValueError, match=r"allocation='ratio_of': expected one of 'uniform', .*'erk'"):
        prune(model, method, 0.1, allocation="ratio_of")
    masks.to_torch_(model, prune(model, "random", 0.5))
    with pytest.raises(ValueError, match=re.escape("torch prunes 'weight_orig' already") + ".*make it plain"):
        prune(model, method, 0.1)
