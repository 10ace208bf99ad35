"""Masks of children: exact shares, complements, overlaps and distances, against counts made one by one."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from fsp.masks import children, density, farthest, layer_densities, mask_distances, overlapping, prunable


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def parent():
    """Odd and even sizes: 45, 125, 21 and 10 weights, the last of them the classifier's."""
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 5, (1, 5), bias=False), nn.Linear(7, 3), nn.Linear(5, 2)
    )


SIZES = {"0.weight": 45, "2.weight": 125, "3.weight": 21}


def owners(family):
    """For each weight, how many children keep it."""
    return {name: sum(masks[name].int() for masks in family) for name in family[0]}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_antirandom_children_are_complements_in_pairs_with_counts_that_differ_by_at_most_one(scope):
    family = children(parent(), "antirandom", 6, scope=scope, generator=seeded())
    for one, other in zip(family[::2], family[1::2], strict=True):
        assert list(one) == list(SIZES)
        for name, size in SIZES.items():
            assert torch.equal(one[name], ~other[name])
            if scope == "layer":
                assert abs(2 * int(one[name].sum()) - size) == 1
        assert abs(sum(int(m.sum()) for m in one.values()) - sum(int(m.sum()) for m in other.values())) <= 1
    assert len({str(masks["2.weight"].tolist()) for masks in family}) == 6, "pairs are drawn independently"


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_partition_deals_every_weight_to_one_child_in_equal_shares(count, scope):
    family = children(parent(), "partition", count, scope=scope, generator=seeded())
    assert len(family) == count
    assert all((kept == 1).all() for kept in owners(family).values())
    totals = [sum(int(mask.sum()) for mask in masks.values()) for masks in family]
    assert max(totals) - min(totals) <= 1
    if scope == "layer":
        for name in SIZES:
            shares = [int(masks[name].sum()) for masks in family]
            assert max(shares) - min(shares) <= 1


def test_a_partition_of_two_is_an_antirandom_pair():
    pair, halves = (children(parent(), kind, 2, generator=seeded(4)) for kind in ("antirandom", "partition"))
    for one, other in zip(pair, halves, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in SIZES)


def test_every_split_of_a_layer_is_equally_likely():
    net, generator, seen = nn.Linear(4, 1), seeded(), []
    for _ in range(1200):
        masks = children(net, "antirandom", 2, prune_classifier=True, generator=generator)[0]
        seen.append(tuple(masks["weight"].flatten().tolist()))
    counts = [seen.count(found) for found in set(seen)]
    assert len(counts) == math.comb(4, 2)
    assert chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("kept", [0.1, 0.5, 1.0])
def test_random_children_are_independent_and_keep_exact_counts(kept):
    family = children(parent(), "random", 3, kept, generator=seeded())
    for masks in family:
        assert {name: int(m.sum()) for name, m in masks.items()} == {
            name: size - math.floor(round((1 - kept) * size, 9)) for name, size in SIZES.items()
        }
    apart = [(a["2.weight"] != b["2.weight"]).any() for a, b in itertools.combinations(family, 2)]
    assert all(apart) == (kept < 1)
    together = children(parent(), "random", 2, kept, scope="global", generator=seeded())
    assert [sum(int(m.sum()) for m in masks.values()) for masks in together] == [191 - math.floor((1 - kept) * 191)] * 2


@pytest.mark.parametrize("kind", ["antirandom", "partition", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_neurons_are_kept_or_pruned_with_all_their_weights(kind, scope):
    options = {"density": 0.4} if kind == "random" else {}
    family = children(parent(), kind, 2, structure="neurons", scope=scope, generator=seeded(), **options)
    kept = []
    for masks in family:
        rows = {name: mask.flatten(1) for name, mask in masks.items()}
        assert all(torch.equal(row.any(1), row.all(1)) for row in rows.values())
        kept.append({name: int(row.any(1).sum()) for name, row in rows.items()})
    if scope == "global":
        assert {sum(of.values()) for of in kept} <= ({6} if kind == "random" else {6, 7})
    elif kind == "random":
        assert kept == [{"0.weight": 2, "2.weight": 2, "3.weight": 2}] * 2
    else:
        assert [sorted(of[name] for of in kept) for name in SIZES] == [[2, 3], [2, 3], [1, 2]]


def test_the_classifier_is_dense_unless_asked_for_and_so_is_what_is_excluded():
    net = parent()
    family = children(net, "antirandom", 2, prune_classifier=True, exclude=["0"], generator=seeded())
    assert list(family[0]) == ["2.weight", "3.weight", "4.weight"]
    assert list(children(net, "antirandom", 2, exclude=["4"], generator=seeded())[0]) == list(SIZES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "count=1: expected an integer of at least 2"),
        ({"count": 3}, "count=3: antirandom children come in pairs, so expected an even number"),
        ({"density": 0.4}, r"density=0\.4: antirandom children, 2 of them, have a density of 0\.5 each"),
        ({"kind": "partition", "count": 3, "density": 0.5}, r"density=0\.5: partition .* density of 0\.333333 each"),
        ({"kind": "random"}, "density=None: random children need"),
        ({"kind": "random", "density": 0}, r"density 0 is not in \(0, 1\]"),
        ({"kind": "random", "density": 1.5}, r"density 1\.5 is not in \(0, 1\]"),
        ({"kind": "anti"}, "kind='anti': expected one of 'random', 'antirandom', 'partition'"),
        ({"structure": "rows"}, "structure='rows'"),
        ({"scope": "all"}, "scope is"),
        ({"parent": nn.Linear(2, 2)}, "the parent has 1 prunable layers, .* prune_classifier=True"),
        (
            {"parent": nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.Linear(2, 2)), "structure": "neurons"},
            "'0.weight' is of a transposed convolution",
        ),
    ],
)
def test_a_family_that_cannot_be_is_refused_by_name(options, message):
    defaults = {"parent": parent(), "kind": "antirandom", "count": 2, "generator": seeded()}
    with pytest.raises(ValueError, match=message):
        children(**defaults | options)


# ---- overlaps and distances --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.9, 1])
def test_overlapping_masks_have_the_counts_and_the_overlap_that_are_asked_for(share):
    masks = children(parent(), "random", 2, 0.5, generator=seeded())[0]
    other = overlapping(masks, share, generator=seeded(1))
    for name, mask in masks.items():
        kept = int(mask.sum())
        assert int((mask & other[name]).sum()) == round(share * kept)
        assert int(other[name].sum()) == kept - (share == 0)  # sizes are odd, so a complement has one fewer
    sparse = {"w": torch.arange(1000) < 100}
    places = overlapping(sparse, 0, generator=seeded())["w"].nonzero()[:, 0]
    assert len(places) == 100
    assert 450 < places.float().mean() < 650


def test_an_overlap_for_which_there_is_no_room_is_refused_with_the_smallest_possible():
    masks = {"w": torch.arange(10) < 6}
    with pytest.raises(ValueError, match=r"share=0\.1: 'w' keeps 6 of 10 .* by at least 0\.333"):
        overlapping(masks, 0.1, generator=seeded())
    assert density(overlapping(masks, 0.34, generator=seeded())) == 0.6
    for share in (-0.1, 1.1, math.nan, True, "0"):
        with pytest.raises(ValueError, match="expected a number in"):
            overlapping(masks, share, generator=seeded())


def test_mask_distances_are_the_root_of_the_weights_that_differ_and_largest_for_complements():
    family = children(parent(), "antirandom", 4, generator=seeded())
    found = mask_distances(family)
    for i, j in itertools.product(range(4), range(4)):
        pairs = zip(family[i].values(), family[j].values(), strict=True)
        differ = sum(a != b for one, other in pairs for a, b in zip(one.flatten(), other.flatten(), strict=True))
        assert found[i, j].item() == pytest.approx(math.sqrt(differ))
    assert found[0, 1].item() ** 2 == pytest.approx(sum(SIZES.values()))


def test_members_of_two_networks_have_no_distance():
    one = {"a": torch.ones(3, dtype=torch.bool)}
    for other, message in [
        ({"b": one["a"]}, "mask 'b' of member 1 has shape .*None"),
        ({"a": torch.ones(2, dtype=torch.bool)}, r"mask 'a' of member 1 has shape \(2,\), and of member 0 \(3,\)"),
        ({"a": torch.ones(3)}, "mask 'a' is torch.float32: expected bool"),
    ]:
        with pytest.raises(ValueError, match=message.replace("shape .*None", "shape")):
            mask_distances([one, other])
    with pytest.raises(ValueError, match="members is empty"):
        mask_distances([])


def spread(distances, chosen):
    return min(distances[i, j] for i, j in itertools.combinations(chosen, 2))


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_the_farthest_are_at_least_half_as_far_apart_as_the_best_choice(count):
    for seed in range(10):
        places = torch.randn(8, 2, generator=seeded(seed), dtype=torch.float64)
        distances = torch.cdist(places, places)
        chosen = farthest(distances, count)
        assert len(set(chosen)) == count
        best = max(spread(distances, of) for of in itertools.combinations(range(8), count))
        assert spread(distances, chosen) >= best / 2 * (1 + 1e-12 * (count > 2) - 1e-12)
        if count == 2:
            assert spread(distances, chosen) == best
        typical = np.median([spread(distances, of).item() for of in itertools.combinations(range(8), count)])
        assert spread(distances, chosen) >= typical


def test_equal_candidates_are_chosen_once_each_and_a_wrong_matrix_is_refused():
    assert sorted(farthest(torch.zeros(4, 4), 3)) == [0, 1, 2]
    for wrong in (torch.zeros(3), torch.zeros(2, 3), torch.full((3, 3), math.nan), torch.arange(9.0).view(3, 3)):
        with pytest.raises(ValueError, match="distances"):
            farthest(wrong, 2)
    for count in (1, 5, 2.0):
        with pytest.raises(ValueError, match=f"count={count}"):
            farthest(torch.zeros(4, 4), count)


def test_drawing_children_leaves_the_parent_and_the_global_state_alone():
    net, state = parent(), torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for _ in range(2):
        family = children(net, "antirandom", 2, generator=seeded(9))
    again = children(net, "antirandom", 2, generator=seeded(9))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(family, again, strict=True) for name in SIZES)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert set(layer_densities(family[0])) < set(prunable(net))
