"""What a profile would cost: the runs that notebooks plan, how often each trains, and the arithmetic of an example."""

import pytest
import yaml

from fsp import data, paths, runs
from fsp.compendium import cost
from fsp.compendium.planning import planned
from fsp.search import RANDOMNESS
from fsp.training import train


def smoke(stem):
    """Parameters of a run of seconds, with one seed."""
    given = yaml.safe_load((paths.PROFILES / "smoke" / f"{stem}.yaml").read_text("utf-8"))
    return given | {"seeds": [0]}


def kind(config):
    """What decides how often a run trains; of each kind one run is done below."""
    method = config.get("method")
    names = ("part", "kind", "way", "trained", "pretrain")
    return (method == "imp", method in RANDOMNESS["batches"], *(str(config.get(name)) for name in names))


@pytest.mark.parametrize("number", ["03", "04", "06", "08", "09", "10", "11"])
def test_every_run_trains_as_often_and_as_long_as_is_counted(number, monkeypatch, tmp_path):
    [notebook] = paths.NOTEBOOKS.glob(f"{number}_*.ipynb")
    of_kind = {
        kind(config): (function, config)
        for function, config in planned(notebook.stem, data.load, **smoke(notebook.stem))
    }
    epochs, schedule_of = [], train.schedule_of

    def counted(optimizer, config, steps):  # every training asks for its schedule once
        epochs.append(config.epochs)
        return schedule_of(optimizer, config, steps)

    monkeypatch.setattr(train, "schedule_of", counted)
    for function, config in of_kind.values():
        epochs.clear()
        [status] = runs.sweep(function, [config], store=tmp_path).status.unique()
        assert status == "finished"
        assert sorted(epochs) == sorted(cost.epochs_of(config)), config


def test_runs_are_planned_without_the_data_set_of_the_papers():
    given = yaml.safe_load((paths.PROFILES / "paper" / "04_weighted_gap_correlation.yaml").read_text("utf-8"))
    found = planned("04_weighted_gap_correlation", cost._data_set, **given)
    configs = [config for _, config in found]
    assert len(configs) == len(given["methods"]) * len(given["densities"]) * len(given["seeds"])
    assert {config["dataset"] for config in configs} == {"cifar10"}
    assert {config["epochs"] for config in configs} == {250}


@pytest.mark.parametrize("name", ["digits", "mnist1d", "mnist5k"])
def test_what_is_known_of_a_data_set_is_what_loading_it_gives(name):
    known, loaded = cost.DATA[name], data.load(name)
    assert (known.shape, known.classes, known.examples) == (loaded.shape, loaded.classes, len(loaded.train.labels))


# Products of a forward pass in 10^9, of networks for CIFAR-10: He et al. 2016 and Zagoruyko, Komodakis 2016; of the
# others as fvcore and ptflops count them.
PUBLISHED = {"resnet18": 0.56, "resnet34": 1.16, "vgg16": 0.31, "wrn28_10": 5.2, "resnet20": 0.041}


@pytest.mark.parametrize("network", PUBLISHED)
def test_training_takes_six_operations_a_product_but_for_the_gradient_of_the_images(network):
    first = {"resnet20": 16, "wrn28_10": 16}.get(network, 64) * 3 * 9 * 32 * 32
    products = (cost.operations("cifar10", network) + 2 * first) / 6
    assert products == pytest.approx(1e9 * PUBLISHED[network], rel=0.02)


def test_the_operations_of_a_small_network_are_those_counted_by_hand():
    layers = [64 * 20, 20 * 10, 10 * 10]  # products of an 8x8 image, two hidden layers, ten classes
    by_hand = 6 * sum(layers) - 2 * layers[0]
    assert cost.operations("digits", "mlp", '{"hidden": [20, 10]}') == by_hand


def test_the_table_that_is_printed_in_reproducing_is_that_of_the_command(capsys):
    cost.main(["--only", "03"])
    head, rule, row, total = capsys.readouterr().out.splitlines()
    assert total.startswith("| all |")
    text = (paths.ROOT / "REPRODUCING.md").read_text("utf-8")
    assert "\n".join((head, rule)) in text
    assert row in text
    hours = 33 * 250 * 45_000 * cost.operations("cifar10", "resnet18") / cost.PEAK / 3600
    assert f"| {hours / 0.25:.3g} | {hours / 0.05:.3g} |" in row


def test_an_unknown_notebook_or_data_set_is_named():
    with pytest.raises(ValueError, match=r"profile 'paper' has no file 99\*.yaml"):
        cost.cost("paper", "99")
    with pytest.raises(ValueError, match="dataset='imagenet'"):
        cost.operations("imagenet", "mlp")
