"""The population of masks: what a row says of a mask, and which draws the variants of a mask share."""

import math
from types import SimpleNamespace

import pytest
import torch

from fsp import masks, models, pruning, spectrum
from fsp.compendium import population, study
from fsp.data import load, scoring_batches
from fsp.training import Snapshots, TrainConfig, fit

GIVEN = SimpleNamespace(
    dataset="digits",
    model="mlp",
    model_options={"hidden": [24, 24], "norm": True},
    epochs=1,
    lr=0.1,
    train_options={"batch_size": 256},
    device="cpu",
    early_steps=2,
)


def config(method="snip", way=population.ITSELF, **changed):
    return population.members(GIVEN, [method], [0.2], [3], [way], **changed)[0]


def by_hand(config):
    """Data, network at its initial weights, and mask of a config, without the code under test."""
    data = load("digits", seed=3)
    generator = torch.Generator().manual_seed(3)
    network = models.build("mlp", data.shape, data.classes, generator=generator, hidden=[24, 24], norm=True)
    examples = scoring_batches(data, generator=generator)
    found = pruning.prune(network, config["method"], 0.2, batches=examples, generator=generator)
    return data, network, found


def test_a_row_says_what_the_mask_is_at_initialisation_and_what_it_trains_to():
    data, network, found = by_hand(config())
    at = spectrum.coordinates(found, network)
    layers = spectrum.layer_table(found, network)
    moment = Snapshots(network, [2])
    history = fit(network, data, TrainConfig(1, lr=0.1, seed=3, batch_size=256), masks=found, hooks=[moment])
    row = population.member(config())
    assert row["accuracy"] == history.test_accuracy
    assert row["spectrum_norm"] == spectrum.spectrum_norm(at)
    assert row["imdb"] == spectrum.layer_mean(at).imdb
    assert row["layers_imdb"] == spectrum.coverage(at).imdb
    assert row["distance_init"] == spectrum.distance(spectrum.coordinates(found, moment.states[2]), at)
    assert row["narc_iclr2023"] == layers.narc_iclr2023.mean()
    assert row["moved"] == 0
    assert row["live_units"] == pytest.approx(sum(m.any(1).sum().item() for m in found.values()) / 58)


def test_variants_are_controls_of_the_same_mask_from_the_same_weights(monkeypatch):
    """What is trained has the mask's counts, or degrees; half a share moves less; weights are the initial ones."""
    trained = []

    def watched(config, data, network, kept, hooks=()):
        trained.append((kept, {n: t.clone() for n, t in network.state_dict().items()}))
        return study.train(config, data, network, kept, hooks)

    monkeypatch.setattr(population, "train", watched)
    _, network, found = by_hand(config())
    half = population.REWIRED | {"share": 0.5}
    ways = [population.ITSELF, population.SHUFFLED, population.REWIRED, half]
    moved = [population.member(config(way=way))["moved"] for way in ways]
    for _, weights in trained:
        assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())
    itself, shuffled, rewired, partly = (kept for kept, _ in trained)
    for name, mask in found.items():
        assert torch.equal(itself[name], mask)
        assert shuffled[name].sum() == mask.sum()
        for kept in (rewired[name], partly[name]):
            assert torch.equal(kept.sum(0), mask.sum(0))
            assert torch.equal(kept.sum(1), mask.sum(1))
    assert moved[0] == 0 < moved[3] < moved[2] < moved[1] < 1


def test_a_mask_of_another_seed_is_put_on_the_network_of_this_one():
    one, other = (population.member(config(mask_seed=seed)) for seed in (3, 4))
    assert one["accuracy"] == population.member(config())["accuracy"]
    assert other["weight_norm"] != one["weight_norm"]


def test_scaled_weights_have_the_variance_of_their_layers_density():
    """N(0, 2 / (d fan_in)) under the mask: so the kept weights of every layer have the sum of squares 2 n_outputs."""
    plain, scaled = (population.member(config("uniform", **way)) for way in ({}, {"init": population.DENSITY_SCALED}))
    assert scaled["weight_norm"] == pytest.approx(plain["weight_norm"] / math.sqrt(0.2), rel=0.15)
    assert scaled["imdb"] == plain["imdb"]


def test_any_other_initialiser_is_that_of_the_network_the_mask_is_made_on(monkeypatch):
    """With a mask of another seed as well: both networks begin as the config says."""
    begun = []

    def watched(config):
        begun.append(config.get("init"))
        return study.begin(config)

    monkeypatch.setattr(population, "begin", watched)
    plain, lecun = (population.member(config("snip", mask_seed=4, **way)) for way in ({}, {"init": "lecun"}))
    assert begun == [None, None, "lecun", "lecun"]
    assert lecun["weight_norm"] != plain["weight_norm"]
    population.member(config("snip", mask_seed=4, init=population.DENSITY_SCALED))
    assert begun[4:] == [None, None]


def test_a_rewiring_keeps_the_degrees_of_the_graph_of_a_grouped_convolution(monkeypatch):
    """A depthwise kernel has no two edges to trade: as a matrix it would have been rewired."""
    network = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8))
    own = pruning.prune(network, "random", 0.5, generator=torch.Generator().manual_seed(0))
    kept = population._varied(config(way=population.REWIRED), own, network)
    assert torch.equal(kept["0.weight"], own["0.weight"])
    assert not torch.equal(masks.rewire(own, generator=torch.Generator().manual_seed(0))["0.weight"], own["0.weight"])


def test_the_same_config_makes_the_same_run_whoever_asks():
    """The run is known by its config alone: no name of a notebook is in it."""
    configs = population.members(GIVEN, ["erk", "snip"], [0.2, 0.1], [0, 1], [population.ITSELF, population.REWIRED])
    assert len(configs) == 16
    assert {entry["experiment"] for entry in configs} == {"population"}
    assert masks.density(by_hand(configs[0])[2]) == pytest.approx(0.2, abs=0.01)
