"""`fsp.masks`: a rewired mask keeps every degree and nothing else; a share of it moves a share of the edges."""

import itertools
import time

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import nn

from fsp import masks
from fsp.masks import randomise
from fsp.models import build
from fsp.spectrum import Wiring, biadjacency


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_mask(shape, density, seed=0):
    return torch.rand(shape, generator=generator(seed)) < density


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def degrees(mask, wiring=masks.PLAIN):
    """Degrees of inputs and of outputs, from the definition of the graph."""
    B = biadjacency(mask, wiring)
    return B.sum(1).tolist(), B.sum(0).tolist()


def stayed(new, old):
    """The share of the edges of a mask that are where they were."""
    return int((new & old).sum()) / int(old.sum())


def hubs(n_out, n_in, density, seed=0):
    """A mask whose degrees follow a power law on both sides."""
    strength = torch.outer(1 / torch.arange(1.0, n_out + 1), 1 / torch.arange(1.0, n_in + 1))
    p = density * n_out * n_in * strength / strength.sum()
    for _ in range(50):  # what cannot exceed 1 goes to the others
        p = p * (density * n_out * n_in / p.clamp(max=1).sum())
    return torch.rand(n_out, n_in, generator=generator(seed)) < p


LAYERS = {
    "linear": random_mask((40, 60), 0.1),
    "conv": random_mask((16, 8, 3, 3), 0.05),
    "hubs": hubs(64, 64, 0.05),
    "thick": random_mask((20, 30), 0.9),
    "half": random_mask((16, 24), 0.5),
}


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_rewiring_keeps_every_degree_and_moves_edges(share):
    before = {name: mask.clone() for name, mask in LAYERS.items()}
    new = masks.rewire(LAYERS, generator=generator(), share=share)
    for name, mask in LAYERS.items():
        assert degrees(new[name]) == degrees(mask)
        assert new[name].dtype == torch.bool
        assert new[name].shape == mask.shape
        assert not torch.equal(new[name], mask)
    assert same(LAYERS, before)


def graphs_with_the_degrees_of(matrix):
    """Every 0/1 matrix with the same sums of rows and columns, by trying all rows."""
    rows, columns = matrix.sum(1).tolist(), matrix.sum(0).tolist()
    choices = [[set(c) for c in itertools.combinations(range(len(columns)), r)] for r in rows]
    every = itertools.product(*choices)
    return [m for m in every if [sum(j in row for row in m) for j in range(len(columns))] == columns]


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]],
        [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1]],  # thick: its complement is drawn
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],  # each matrix is a permutation, and one side alone has an odd one out
    ],
)
def test_every_graph_with_these_degrees_is_equally_likely(rows, monkeypatch):
    monkeypatch.setattr(randomise, "ROUNDS", 8)  # enough for graphs this small, and quicker
    kept, rng, draws = torch.tensor(rows).bool(), generator(1), 1500
    found = {str(graph): 0 for graph in graphs_with_the_degrees_of(kept)}
    assert len(found) in (18, 6)  # by hand
    for _ in range(draws):
        new = masks.rewire({"w": kept}, generator=rng)["w"]
        found[str(tuple(set(row.nonzero()[:, 0].tolist()) for row in new))] += 1
    expected = draws / len(found)
    assert sum((n - expected) ** 2 / expected for n in found.values()) < chi2.ppf(0.9999, len(found) - 1)


@pytest.mark.parametrize("name", ["linear", "conv", "hubs", "half"])
def test_the_original_is_forgotten_to_the_level_of_independent_draws(name):
    layer = {name: LAYERS[name]}
    # the draws below start from a rewired mask, so that all are from one law
    start = masks.rewire(layer, generator=generator(99))
    drawn = [masks.rewire(start, generator=generator(i))[name] for i in range(20)]
    kept = np.array([stayed(new, start[name]) for new in drawn])
    among = np.array([stayed(a, b) for a, b in itertools.pairwise(drawn)])
    assert abs(kept.mean() - among.mean()) < 4 * np.hypot(kept.std(ddof=1), among.std(ddof=1)) / np.sqrt(19)


@pytest.mark.parametrize("draw", [masks.rewire, masks.shuffle])
@pytest.mark.parametrize("name", ["linear", "conv", "hubs", "thick", "half"])
def test_the_share_that_moves_grows_with_the_share_that_is_put_at_risk(name, draw):
    layer = {name: LAYERS[name]}
    moved = [
        np.mean([1 - stayed(draw(layer, generator=generator(i), share=share)[name], layer[name]) for i in range(20)])
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert moved[0] == 0
    assert all(a < b for a, b in itertools.pairwise(moved))
    whole = np.array(moved) / moved[-1]
    assert np.all(np.abs(whole - np.linspace(0, 1, 5)) < 0.2)  # at most .17 by the formula of `shuffle`


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_partial_shuffle_keeps_counts_and_moves_no_more_than_its_share(scope):
    kept = {name: LAYERS[name] for name in ("linear", "conv")}
    total = sum(int(m.sum()) for m in kept.values())
    new = masks.shuffle(kept, scope=scope, generator=generator(), share=0.3)
    assert sum(int(m.sum()) for m in new.values()) == total
    if scope == "layer":
        assert {n: int(m.sum()) for n, m in new.items()} == {n: int(m.sum()) for n, m in kept.items()}
    moved = sum(int((kept[name] & ~new[name]).sum()) for name in kept)
    assert 0.2 * total < moved <= round(0.3 * total) + 1


def test_a_whole_shuffle_is_the_permutation_it_always_was():
    new = masks.shuffle(LAYERS, generator=generator(5))
    rng = generator(5)
    assert same(new, {n: m.flatten()[torch.randperm(m.numel(), generator=rng)].view_as(m) for n, m in LAYERS.items()})


@pytest.mark.parametrize("draw", [masks.rewire, masks.shuffle])
def test_no_share_at_all_gives_the_same_masks_in_new_tensors(draw):
    new = draw(LAYERS, generator=generator(), share=0)
    assert same(new, LAYERS)
    assert all(new[name].data_ptr() != LAYERS[name].data_ptr() for name in new)


def test_what_has_no_other_graph_stays_as_it_is():
    frozen = {
        "empty": torch.zeros(4, 5, dtype=torch.bool),
        "full": torch.ones(4, 5, dtype=torch.bool),
        "one row": random_mask((1, 9), 0.5),
        "nested": torch.ones(5, 5, dtype=torch.bool).triu(),
    }
    assert same(masks.rewire(frozen, generator=generator()), frozen)


def test_a_seed_and_nothing_else_decides_on_a_rewired_mask():
    torch.manual_seed(1)
    first = masks.rewire(LAYERS, generator=generator(2), share=0.7)
    torch.manual_seed(9)
    assert same(first, masks.rewire(LAYERS, generator=generator(2), share=0.7))
    assert not same(first, masks.rewire(LAYERS, generator=generator(3), share=0.7))


@pytest.mark.parametrize(
    ("layer", "wiring"),
    [
        (nn.Conv2d(8, 12, 3, groups=4), Wiring(4)),
        (nn.ConvTranspose2d(6, 8, 3), Wiring(1, True)),
        (nn.ConvTranspose1d(8, 12, 3, groups=2), Wiring(2, True)),
    ],
)
def test_a_model_tells_how_grouped_and_transposed_layers_are_wired(layer, wiring):
    kept = {"weight": random_mask(layer.weight.shape, 0.3)}
    new = masks.rewire(kept, generator=generator(), model=layer)
    assert degrees(new["weight"], wiring) == degrees(kept["weight"], wiring)
    assert stayed(new["weight"], kept["weight"]) < 0.8
    blind = masks.rewire(kept, generator=generator())  # as documented: the matrix (first dimension, all others)
    assert degrees(blind["weight"]) == degrees(kept["weight"])
    assert degrees(blind["weight"], wiring) != degrees(kept["weight"], wiring)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 1.1}, r"share=1\.1: expected a number in \[0, 1\]"),
        ({"share": True}, "share=True"),
        ({"share": float("nan")}, "share=nan"),
        ({"masks": {"w": torch.ones(3, 3)}}, "mask 'w' is torch.float32: expected bool"),
        ({"masks": {"w": np.ones((3, 3), dtype=bool)}}, "mask 'w' is a numpy.ndarray"),
        ({"masks": {"w": torch.ones(3, dtype=torch.bool)}}, r"shape \(outputs, inputs, ...\).* this has \(3,\)"),
        ({"model": nn.Linear(2, 2)}, "mask 'w' belongs to no parameter"),
    ],
)
def test_what_cannot_be_rewired_is_refused(given, message):
    call = {"masks": {"w": random_mask((4, 4), 0.4)}, "generator": generator()} | given
    with pytest.raises(ValueError, match=message):
        masks.rewire(**call)
    if "share" in given:
        with pytest.raises(ValueError, match=message):
            masks.shuffle(**call)


@pytest.mark.slow
def test_the_masks_of_a_resnet_18_are_rewired_in_seconds():
    model = build("resnet18", (3, 32, 32), 10)
    kept = {name: random_mask(p.shape, 0.05) for name, p in masks.prunable(model).items()}
    start = time.process_time()
    new = masks.rewire(kept, generator=generator())
    assert time.process_time() - start < 20  # 7 measured
    assert all(torch.equal(new[name].sum(0), mask.sum(0)) for name, mask in kept.items())
