"""What a notebook may be given: every rule by table, and names that papermill injects in vain."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from fsp.compendium import parameters
from fsp.compendium.parameters import check
from fsp.data import DATASETS
from fsp.masks import prunable
from fsp.models import INITS, MODELS
from fsp.paths import PROFILES
from fsp.pruning.methods import METHODS
from fsp.training.dynamic import PRESETS

GOOD = {
    "dataset": list(DATASETS),
    "model": list(MODELS),
    "networks": [["resnet18"], ["vgg16", "mlp"]],
    "init": list(INITS),
    "methods": [["snip"], ["synflow", "random"], ("erk", "snip"), list(METHODS)],
    "searched": [["snip"], ["random", "erk", "phew"]],
    "dynamics": [["set"], ["rigl_itop", "static"], list(PRESETS)],
    "density": [0.05, 1, 1.0, 1e-6, np.float64(0.1)],
    "densities": [[0.1], [0.1, 0.05, 1.0], (0.2, 0.1)],
    "published_densities": [[0.1], [0.01, 0.4]],
    "seeds": [[0], [0, 1, 2], (7, 3), list(range(100))],
    "epochs": [1, 160, np.int64(3)],
    "batch_size": [1, 128],
    "update_every": [1, 1500],
    "threads": [1, 8],
    "shuffles": [1, 20],
    "repeats": [1, 5],
    "trainings": [1, 40],
    "empty_runs": [1, 200],
    "ticket_count": [1, 5],
    "ticket_epochs": [1, 250],
    "population": [1, 3000],
    "explore": [0.25, 1, 1.0],
    "early_steps": [1, 500],
    "pretrain": [0, 14, 500],
    "rewind": [0, 500],
    "imp_rate": [0, 0.2, 0.6],
    "lr": [0.1, 1, 1e-6],
    "device": ["cpu", torch.device("cpu")],
    "recompute": [True, False],
    "out_dir": ["", "somewhere/else"],
    "scheduler": [None, "local", "tcp://10.0.0.1:8786", "tls://host:8786"],
    "model_options": [{}, {"hidden": [32]}],
    "train_options": [{}, {"batch_size": 64}],
}

WHOLE = "a whole number of at least 1"
BAD = {
    "dataset": (["cifar", "", None, 3, ["digits"], {"a": 1}], ", ".join(DATASETS)),
    "model": (["resnet9", None, ["mlp"]], ", ".join(MODELS)),
    "networks": (["resnet18", [], ["resnet9"], ["mlp", "mlp"], None], ", ".join(MODELS)),
    "init": (["kaiming", None, ["lecun"]], ", ".join(INITS)),
    "methods": (["snip", [], ["snip", "snip"], ["sinp"], ["snip", None], None, {"snip"}], ", ".join(METHODS)),
    "searched": (["snip", [], ["magnitude"], ["snip", "snip"], ["sinp"], None], "random, uniform"),
    "dynamics": (["set", [], ["SET"], ["set", "set"], ["snip"]], ", ".join(PRESETS)),
    "density": ([0, -0.1, 1.1, math.nan, math.inf, "0.05", None, True, [0.05]], "a fraction in (0, 1], such as 0.05"),
    "densities": ([0.1, [], [0.1, 0.1], [0.1, 0], [0.1, 2], [True], ["0.1"], None], "such as [0.05]"),
    "published_densities": ([0.1, [], [0.1, 0.1], [1, 40], None], "such as [0.05]"),
    "seeds": ([0, [], [0, 0], [-1], [0.0], [True], ["0"], None, range(3)], "such as [0, 1]"),
    "epochs": ([0, -1, 1.0, "3", None, True, math.nan], WHOLE),
    "batch_size": ([0, 64.0, None], WHOLE),
    "update_every": ([0, 0.5, None], WHOLE),
    "threads": ([0, "1", None], WHOLE),
    "shuffles": ([0, 2.5, None], WHOLE),
    "repeats": ([0, 1.5, None], WHOLE),
    "trainings": ([0, "40"], WHOLE),
    "empty_runs": ([0, 2.0], WHOLE),
    "ticket_count": ([0, 2.5, None], WHOLE),
    "ticket_epochs": ([0, "3", None], WHOLE),
    "population": ([0, "8", None], WHOLE),
    "explore": ([0, 1.5, None, True], "a fraction in (0, 1], such as 0.25"),
    "early_steps": ([0, 1.5, None], WHOLE),
    "pretrain": ([-1, 0.5, "14", None], "a whole number of steps"),
    "rewind": ([-1, 0.5, None], "a whole number of steps"),
    "imp_rate": ([1, -0.1, None, True, "0.2"], "a number in [0, 1)"),
    "lr": ([0, -0.1, math.nan, math.inf, "0.1", None], "a number above 0"),
    "device": (["gpu", "", None, 0], "auto, cpu or cuda"),
    "recompute": ([0, 1, "True", None], "True or False"),
    "out_dir": ([None, 3, ["a"]], 'a folder, or "" for the repository'),
    "scheduler": (["", "none", "10.0.0.1:8786", "http://host:1", "tcp://", 4], '"local" or the address of a Dask'),
    "model_options": ([None, [], "hidden"], "a dict of options of the model"),
    "train_options": ([None, [], 0.1], "a dict of fields of TrainConfig"),
}


def pairs(table):
    return [pytest.param(name, value, id=f"{name}-{i}") for name, values in table for i, value in enumerate(values)]


def test_the_tables_above_hold_every_rule():
    assert GOOD.keys() == BAD.keys() == parameters._RULES.keys()


@pytest.mark.parametrize(("name", "value"), pairs(GOOD.items()))
def test_a_good_value_is_given_back_as_it_is(name, value):
    found = check(**{name: value})
    assert found.keys() == {name}
    assert found[name] is value


@pytest.mark.parametrize(("name", "value"), pairs((name, values) for name, (values, _) in BAD.items()))
def test_a_bad_value_is_refused_with_its_name_and_what_is_possible(name, value):
    with pytest.raises(ValueError, match=f"^{name} = ") as error:
        check(**{name: value})
    assert f"{name} = {value!r}: expected " in str(error.value)
    assert BAD[name][1] in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("densities", [1, 1.0]),
        ("methods", [["snip"]]),
        ("lr", True),
        ("seeds", [2**63]),
        ("train_options", {"momentun": 0.9}),
        ("train_options", {"momentum": 9}),
    ],
)
def test_a_subtly_bad_value_is_refused_too(name, value):
    with pytest.raises(ValueError, match=name):
        check(**{name: value})


def test_all_parameters_are_checked_and_come_back_together():
    given = {name: values[0] for name, values in GOOD.items()}
    assert check(**given) == given
    with pytest.raises(ValueError, match="train_options"):
        check(**given | {"train_options": None})


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="momentum"):
        check(momentum=0.9)


# ---- device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_best_device_there_is(monkeypatch, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert check(device="auto", epochs=2) == {"device": device, "epochs": 2}


def test_cuda_is_accepted_where_there_is_one_and_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check(device="cuda:0") == {"device": "cuda:0"}
    assert check(device="cpu") == {"device": "cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"device = '{device}': expected auto or cpu: no CUDA device is available"):
            check(device=device)


# ---- names that papermill injects --------------------------------------------------------------------------------


def running(monkeypatch, *cells):
    """Make believe that this is a notebook in which these cells have run."""
    shell = SimpleNamespace(user_ns={"In": ["", *cells]})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_an_injected_name_that_the_notebook_does_not_have_is_refused_with_those_it_has(monkeypatch):
    running(monkeypatch, "epochs = 3\nlr = 0.1", '# Parameters\nepochs = 2\nlearning_rate = 0.5\nmodle = "mlp"\n')
    with pytest.raises(
        ValueError, match=r"no parameter is called learning_rate, modle: this notebook has epochs, lr, model$"
    ):
        check(epochs=2, lr=0.1, model="mlp")


def test_injected_names_that_the_notebook_has_are_fine(monkeypatch):
    running(monkeypatch, "epochs = 3", "# Parameters\nepochs = 2\n", "import torch\nunknown = 1", "a = b = 2")
    assert check(epochs=2) == {"epochs": 2}


def test_an_unknown_name_is_reported_before_a_bad_value(monkeypatch):
    running(monkeypatch, "# Parameters\nepochs = 0\nepoch = 2\n")
    with pytest.raises(ValueError, match="no parameter is called epoch:"):
        check(epochs=0)


def test_cells_that_python_cannot_parse_do_not_matter_unless_they_are_injected(monkeypatch):
    running(monkeypatch, "%matplotlib inline", "!ls", "?check", "# Parameters\nepochs = 1\n")
    assert check(epochs=1) == {"epochs": 1}


def test_the_cell_that_papermill_writes_is_recognised(monkeypatch):
    from papermill.translators import PythonTranslator

    given = {"epochs": 2, "densities": [0.1, 0.05], "train_options": {"lr": None}, "out_dir": "a\n# Parameters\nb = 1"}
    cell = PythonTranslator.codify(given)
    running(monkeypatch, cell)
    assert parameters._injected() == given.keys()
    running(monkeypatch, PythonTranslator.codify({"epohcs": 2}))
    with pytest.raises(ValueError, match="epohcs"):
        check(epochs=3)


def test_outside_a_notebook_nothing_is_injected(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert check(epochs=2) == {"epochs": 2}
    monkeypatch.delitem(sys.modules, "IPython")
    assert check(epochs=2) == {"epochs": 2}


@pytest.mark.parametrize(
    ("model", "options"), [("mlp", {"width": 8}), ("resnet8", {"width": 0}), ("vgg11", {"hidden": [8]})]
)
def test_options_that_the_model_does_not_take_are_refused_before_any_run(model, options):
    with pytest.raises(ValueError, match=rf"^model_options = .* do not fit {model}: "):
        check(model=model, model_options=options)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize(
    ("stem", "model", "options", "layers"),
    [
        ("03_ramanujan_gap_evolution", "resnet18", {}, 21),
        ("03_ramanujan_gap_evolution", "resnet34", {}, 37),
        ("03_ramanujan_gap_evolution", "vgg16", {"head": "512"}, 16),
        ("05_full_spectrum_distance", "vgg16", {"head": "512"}, 16),
        ("06_pai_comparison", "vgg16", {"head": "512"}, 16),
        ("07_imdb_and_narc", "resnet34", {"stem": "7x7"}, 37),
        ("07_imdb_and_narc", "vgg16", {"head": "4096"}, 16),
    ],
)
def test_paper_profiles_take_the_other_networks_and_data_that_they_name(stem, model, options, layers, dataset):
    profile = yaml.safe_load((PROFILES / "paper" / f"{stem}.yaml").read_text(encoding="utf-8"))
    given = profile | {"model": model, "model_options": options, "dataset": dataset, "device": "cpu"}
    assert check(**given) == given
    with torch.device("meta"):
        assert len(prunable(MODELS[model]((3, 32, 32), 100, **options))) == layers


@pytest.mark.parametrize("name", ["epochs", "lr", "seed"])
def test_train_options_do_not_repeat_what_is_a_parameter_of_its_own(name):
    with pytest.raises(ValueError, match=r"^train_options = "):
        check(train_options={name: 1})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("densities", "[0.1, 0.05]", [0.1, 0.05]),
        ("seeds", "[0]", [0]),
        ("methods", "[random, snip]", ["random", "snip"]),
        ("model_options", "{hidden: [8]}", {"hidden": [8]}),
    ],
)
def test_lists_and_dicts_that_papermill_gives_as_text_are_read(name, text, value):
    assert check(**{name: text}) == {name: value}


@pytest.mark.parametrize("text", ["0.1", "[0.1", "snip", ""])
def test_text_that_is_no_list_is_refused(text):
    with pytest.raises(ValueError, match=r"^densities = .*expected a list"):
        check(densities=text)
