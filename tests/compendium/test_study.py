"""What the experiments of several notebooks share: the order of all draws, and where results go."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from fsp import models, pruning
from fsp.compendium import stats, study
from fsp.data import load, scoring_batches
from fsp.runs import tables
from fsp.training import TrainConfig, fit

CONFIG = {
    "dataset": "digits",
    "model": "mlp",
    "model_options": {"hidden": [16]},
    "device": "cpu",
    "seed": 3,
    "method": "snip",
    "density": 0.2,
    "epochs": 1,
    "lr": 0.05,
    "train_options": {"batch_size": 256},
}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_draws_weights_then_examples_then_masks_from_one_generator_of_its_seed():
    data = load("digits", seed=3)
    generator = torch.Generator().manual_seed(3)
    network = models.build("mlp", data.shape, data.classes, generator=generator, hidden=[16])
    examples = scoring_batches(data, generator=generator)
    masks = pruning.prune(network, "snip", 0.2, batches=examples, generator=generator)

    begun = study.begin(CONFIG)
    assert equal(begun.network.state_dict(), network.state_dict())
    assert torch.equal(begun.data.validation.labels, data.validation.labels)
    assert equal(study.prune(CONFIG, *begun), masks)
    assert torch.equal(begun.generator.get_state(), generator.get_state())
    again = study.build(CONFIG, data, begun.generator)
    assert not equal(again.state_dict(), network.state_dict())  # new weights, by the next draws


def test_the_initialiser_is_a_choice_of_the_config():
    default = study.begin(CONFIG).network.get_parameter("linear1.weight")
    lecun = study.begin(CONFIG | {"init": "lecun"}).network.get_parameter("linear1.weight")
    assert default.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert lecun.std().item() == pytest.approx((1 / 64) ** 0.5, rel=0.1)


def test_options_reach_the_method():
    once, often = (study.prune(CONFIG | {"method": "synflow"}, *study.begin(CONFIG), rounds=n) for n in (1, 100))
    assert not equal(once, often)


def test_training_has_the_settings_of_the_config_and_keeps_the_masks():
    assert study.train_config(CONFIG) == TrainConfig(1, lr=0.05, seed=3, batch_size=256)
    data, network, generator = study.begin(CONFIG)
    masks = study.prune(CONFIG, data, network, generator)
    history = study.train(CONFIG, data, network, masks)
    plain = study.begin(CONFIG).network
    assert fit(plain, data, TrainConfig(1, lr=0.05, seed=3, batch_size=256), masks=masks).epochs == history.epochs
    assert equal(plain.state_dict(), network.state_dict())
    assert not network.get_parameter("linear1.weight")[~masks["linear1.weight"]].any()


def test_a_sweep_puts_its_rows_into_the_table_of_the_notebook_and_keeps_others(tmp_path):
    given = SimpleNamespace(out_dir=str(tmp_path), recompute=False, scheduler=None, lr=0.1, seeds=[0, 1])
    assert study.chosen(given, "seeds", "lr") == {"seeds": [0, 1], "lr": 0.1}
    calls = []

    def square(config):
        calls.append(config["x"])
        return {"square": config["x"] ** 2}

    made = study.sweep(square, [{"x": 1}, {"x": 2}], given, "99_test")
    assert made.square.tolist() == [1, 4]
    study.sweep(square, [{"x": 2}, {"x": 3}], given, "99_test")
    assert calls == [1, 2, 3]
    assert tables.read(tmp_path / "results" / "99_test.csv").square.tolist() == [4, 9, 1]
    assert len(list((tmp_path / "runs").glob("*.json"))) == 3
    study.sweep(square, [{"x": 2}], SimpleNamespace(**vars(given) | {"recompute": True}), "99_test")
    assert calls == [1, 2, 3, 2]


def test_claims_are_written_beside_the_table_in_their_columns(tmp_path):
    row = stats.claim("It holds.", stats.Estimate(1.0, 0.5, 1.5, 5), "yes", paper="None")
    shown = study.save_claims([row], SimpleNamespace(out_dir=str(tmp_path)), "99_test")
    assert tuple(shown) == stats.CLAIM_COLUMNS
    written = tables.read(tmp_path / "results" / "99_test.claims.csv")
    assert written.claim.tolist() == ["It holds."]
    assert written.measured.tolist() == [1.0]


def test_what_a_notebook_was_made_with_names_versions_and_what_is_added_but_no_hash_of_code():
    made = study.made_with(device="cpu")["made with"]
    assert made["torch"] == str(torch.__version__)
    assert made["device"] == "cpu"
    assert "code" not in made


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [(0.96, 1.04, "yes"), (0.8, 0.9, "no"), (1.1, 1.2, "no"), (0.9, 1.0, "not decided"), (1.0, 1.1, "not decided")],
)
def test_a_claim_with_two_bounds_holds_between_them(low, high, holds):
    assert study.verdict(stats.Estimate((low + high) / 2, low, high, 5), above=0.95, below=1.05) == holds


def test_what_is_explained_is_judged_on_seeds_that_the_fit_has_not_seen():
    x = np.tile(np.arange(5.0), 3)
    rows = pd.DataFrame({"seed": np.repeat([0, 1, 2], 5), "x": x, "y": 2 * x + 1})
    assert np.allclose(study.explained(rows, "x", "y"), 1)
    rows.loc[rows.seed == 2, "y"] += 100  # one seed lies elsewhere
    found = study.explained(rows, "x", "y")
    # fitted to the line and to the line 100 higher, seed 0 is predicted 50 too high; its variance is 8
    assert found.line[0] == pytest.approx(1 - 50**2 / 8)
    assert found.line[2] == pytest.approx(1 - 100**2 / 8)
    steps = rows.assign(y=np.where(rows.x > 1, 1.0, 0.0))
    assert np.allclose(study.explained(steps, "x", "y").curve, 1)
    assert (study.explained(steps, "x", "y").line < 0.9).all()


def test_nothing_is_explained_where_nothing_varies():
    rows = pd.DataFrame({"seed": [0, 0, 1, 1], "x": [0.0, 1.0, 0.0, 1.0], "y": 1.0})
    assert study.explained(rows, "x", "y").isna().all(axis=None)
