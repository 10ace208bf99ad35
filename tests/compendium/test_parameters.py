"""What a notebook may be given: every rule by table, and names that papermill injects in vain."""

import contextlib
import math
import re
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from papermill.translators import PythonTranslator

from fsp import data
from fsp.compendium import parameters
from fsp.compendium.parameters import check
from fsp.data import DATASETS
from fsp.masks import prunable
from fsp.models import INITS, MODELS
from fsp.paths import PROFILES, ROOT
from fsp.pruning import METHODS
from fsp.training.dynamic import PRESETS

COUNTS = [
    "epochs", "batch_size", "early_steps", "update_every", "population", "repeats", "shuffles",
    "trainings", "empty_runs", "threads",
    "image_epochs", "cnn_epochs", "short_epochs", "long_epochs", "settled_epochs", "crossed", "measure_every", "moment",
    "children", "most_children", "small_children", "small_epochs", "corrupted",
    "pretrained_population", "optimised_population", "wide", "few", "coarse", "deep_epochs", "confirm_epochs",
]  # fmt: skip
BAD_DENSITIES = [0.1, [], [0.1, 0.1], [1, 1.0], [0.1, 0], [0.1, 2], [True], ["0.1"], None, "0.1", "[0.1", ""]
CASES = (
    {  # name: values that are right, values that are not, and a part of what is said then
        "networks": (
            [["resnet18"], ["vgg16", "mlp"]],
            ["resnet18", [], ["resnet9"], ["mlp", "mlp"]],
            ", ".join(MODELS),
        ),
        "init": (
            sorted(INITS.keys() - {"density_scaled"}),
            ["density_scaled", "kaiming", None, ["lecun"]],
            ", ".join(list(INITS)[:7]),
        ),
        "method": (sorted(METHODS), ["sinp", None, ["snip"]], ", ".join(METHODS)),
        "methods": (
            [["snip"], ("erk", "snip"), list(METHODS)],
            ["snip", [], ["snip", "snip"], ["sinp"], ["snip", None], [["snip"]], None, {"snip"}],
            ", ".join(METHODS),
        ),
        "searched": ([["snip"], ["random", "erk", "phew"]], ["snip", [], ["magnitude"], ["sinp"]], "random, uniform"),
        "dynamics": ([["rigl_itop", "static"], list(PRESETS)], ["set", [], ["SET"], ["snip"]], ", ".join(PRESETS)),
        "density": (
            [0.05, 1, 1e-6, np.float64(0.1)],
            [0, -0.1, 1.1, math.nan, "0.05", None, True, [0.05]],
            "a fraction in",
        ),
        "densities": ([[0.1], [0.1, 0.05, 1.0], (0.2, 0.1)], BAD_DENSITIES, "such as [0.05]"),
        "published_densities": ([[0.1], [0.01, 0.4]], BAD_DENSITIES, "such as [0.05]"),
        "seeds": (
            [[0], [0, 1, 2], (7, 3), list(range(100))],
            [0, [], [0, 0], [-1], [0.0], [True], ["0"], [2**63], None, range(3)],
            "such as [0, 1]",
        ),
        "pretrain": ([0, 14, 500], [-1, 0.5, "14", None], "a whole number of steps"),
        "overlaps": ([[0, 0.5, 1.0], [0.25]], [0.5, [], [-0.1], [1.1], [0.5, 0.5], ["0.5"]], "numbers in [0, 1]"),
        "severities": ([[1, 3, 5], [2]], [3, [], [0], [6], [1, 1], [1.0]], "from 1 to 5"),
        "lr": ([0.1, 1, 1e-6], [0, -0.1, math.nan, math.inf, "1e-3", None, True], "a number above 0"),
        "device": (["cpu", torch.device("cpu")], ["gpu", "", None, 0], "auto or cpu"),
        "recompute": ([True, False], [0, 1, "True", None], "True or False"),
        "out_dir": (["", "somewhere/else"], [None, 3, ["a"]], 'a folder, or "" for scratch/'),
        "scheduler": (
            [None, "local", "tcp://10.0.0.1:8786", "tls://host:8786"],
            ["", "none", "10.0.0.1:8786", "http://host:1", "tcp://", 4],
            '"local" or the address of a Dask',
        ),
        "train_options": (
            [{}, {"batch_size": 64}],
            [None, [], 0.1, {"momentun": 0.9}, {"epochs": 1}, {"lr": 1}, {"seed": 1}],
            "a dict of fields of TrainConfig",
        ),
    }
    | dict.fromkeys(
        ["dosed", "confirmed", "settled", "untrained", "pruners"],
        ([["snip"], ["erk", "phew"]], ["snip", [], ["sinp"]], "random, uniform"),
    )
    | dict.fromkeys(["parent_share", "target"], ([0.5, 1], [0, 1.1, None, True, "0.5"], "a fraction in"))
    | dict.fromkeys(["imp_rate", "dropout"], ([0, 0.2, 0.6], [1, -0.1, None, True, "0.2"], "a number in [0, 1)"))
    | dict.fromkeys(
        ["settled_lr", "confirm_lr", "constant_lr", "speed_lr"],
        ([0.1, 1], [0, -0.1, "1e-3", None, True], "a number above 0"),
    )
    | dict.fromkeys(
        [
            "growths",
            "lasting",
            "confirming",
            "more_seeds",
            "erk_seeds",
            "more_parents",
            "small_parents",
            "image_parents",
        ],
        ([0, 6], [-1, 0.5, None, True], "a whole number from 0 on"),
    )
    | dict.fromkeys(
        ["dataset", "confirm_dataset"],
        (list(DATASETS), ["cifar", "", None, 3, ["digits"], {"a": 1}], ", ".join(DATASETS)),
    )
    | dict.fromkeys(["model", "rival", "plain"], (list(MODELS), ["resnet9", None, ["mlp"]], ", ".join(MODELS)))
    | dict.fromkeys(
        ["model_options", "rate_options", "deep_options", "plain_options", "confirm_options"],
        ([{}, {"hidden": [32]}], [None, [], "hidden"], "a dict of options of the model"),
    )
    | {
        "depths": ([[4], [4, 16]], [4, [], [0], [0.5], ["4"], [4, 4]], "such as [4, 8]"),
        "lrs": ([[0.1], [0.1, 1]], [0.1, [], [0], ["1e-3"], [True], [math.inf]], "such as [0.1]"),
    }
    | {
        "searches": (
            [["gap"], ["published", "optimised"]],
            ["gap", [], ["norm"]],
            "published, gap, pretrained, optimised",
        ),
        "candidates": ([[20], [1, 100]], [20, [], [0], [0.5], ["20"]], "such as [20, 100]"),
    }
    | dict.fromkeys(
        ["arms", "arms_beside"],
        (
            [["default"], ["default", "labels", "all"]],
            ["all", [], ["late"], ["all", "all"]],
            "default, activations, skips",
        ),
    )
    | {
        "controls": ([["late"], ["no_skips", "longer"]], ["late", [], ["all"]], "no_activations, no_skips"),
        "controlled": ([["snip"], ["erk", "phew"]], ["snip", [], ["sinp"]], "random, uniform"),
        "e1": ([0, 0.5], [1, -0.1, "0.5", None, True], "a fraction of the training"),
        "rescaling": (
            [{}, {"iterations": 30}],
            [None, [1], "iterations", {"iteration": 3}, {"iterations": 0}],
            "a dict of settings of Rescaling",
        ),
    }
    | dict.fromkeys(
        ["between", "shares", "rates"], ([[0.25], [0.5, 1]], [0.5, [], [0.0], [1.1], ["0.5"]], "such as [0.05]")
    )
    | dict.fromkeys(["confirm_seeds", "settled_seeds"], ([[0], [3, 4]], [0, [], [0, 0], [-1]], "such as [0, 1]"))
    | {name: ([1, 160, np.int64(3)], [0, -1, 1.0, "3", None, True], "a whole number of at least 1") for name in COUNTS}
)
EVERY = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def all_there(monkeypatch):
    """Every data set is downloaded, and every scheduler answers."""
    monkeypatch.setattr(parameters, "check_files", lambda name: None)
    monkeypatch.setattr(parameters, "connect", contextlib.nullcontext)


def test_the_table_above_holds_every_rule():
    assert CASES.keys() == parameters.RULES.keys()


@EVERY
def test_a_good_value_is_given_back_as_it_is(name, all_there):
    for value in CASES[name][0]:
        found = vars(check(**{name: value}))
        assert found.keys() == {name}
        assert found[name] is value


@EVERY
def test_a_bad_value_is_refused_with_its_name_and_what_is_possible(name):
    _, bad, expected = CASES[name]
    for value in bad:
        with pytest.raises(ValueError, match=f"^{name} = .*: expected ") as error:
            check(**{name: value})
        assert expected in str(error.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"methods": ["erk", "sinp", "SynFlow", "phwe"]}, "snip and synflow and phew"),
        ({"dataset": "mnist-1d"}, "mnist1d"),
        ({"train_options": {"momentun": 0.9}}, "momentum"),
        ({"methods": ["quite another"]}, ""),
        ({"methods": ["snip", "snip", None]}, ""),
    ],
)
def test_a_name_that_is_nearly_right_is_refused_with_the_right_one(given, meant):
    with pytest.raises(ValueError, match="expected") as error:
        check(**given)
    assert str(error.value).partition("; did you mean ")[2] == (meant and f"{meant}?")


def test_all_parameters_come_back_together_and_nobody_sets_them_later():
    given = {name: good[0] for name, (good, *_) in CASES.items()}
    found = check(**given)
    assert vars(found) == given
    assert found.density == given["density"]
    with pytest.raises(AttributeError, match="density is read-only"):
        found.density = 0.5
    with pytest.raises(ValueError, match="train_options"):
        check(**given | {"train_options": None})


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="no rule for momentum"):
        check(momentum=0.9)


def test_a_setting_that_training_refuses_is_refused_here():
    with pytest.raises(ValueError, match=r"^train_options = .*expected valid settings \(TrainConfig: momentum = 9 "):
        check(train_options={"momentum": 9})


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_best_device_there_is(monkeypatch, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert vars(check(device="auto", epochs=2)) == {"device": device, "epochs": 2}


def test_cuda_is_accepted_where_there_is_one_and_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [check(device=name).device for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    for wrong in ("cuda:2", "cuda:", "cuda:-1", "cuda0"):
        with pytest.raises(ValueError, match=f"device = '{wrong}': expected auto or cpu"):
            check(device=wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device = 'cuda:0': expected auto or cpu, or cuda where there is"):
        check(device="cuda:0")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("seeds", "[0]", [0]), ("methods", "[random]", ["random"]), ("model_options", "{hidden: [8]}", {"hidden": [8]})],
)
def test_lists_and_dicts_that_papermill_gives_as_text_are_read(name, text, value):
    assert vars(check(**{name: text})) == {name: value}


# ---- what is not there, found before any run ---------------------------------------------------------------------


def test_a_data_set_that_is_not_downloaded_is_named_with_its_folder_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(parameters, "check_files", lambda name: data.check_files(name, root=tmp_path))
    at_hand = {"mnist1d", "mnist5k", "digits", "synthetic"}
    for name in at_hand:
        check(dataset=name)
    for name in DATASETS.keys() - at_hand - {"folder"}:
        remedy = rf'^{name}: .* not found in {tmp_path}.*load\("{name}", download=True'
        with pytest.raises(FileNotFoundError, match=remedy):
            check(dataset=name)
    with pytest.raises(FileNotFoundError, match=rf"^folder: train not found in {tmp_path}\. Pass root="):
        check(dataset="folder")
    (tmp_path / "cifar-10-python.tar.gz").touch()  # an archive is unpacked, and verified, by load
    check(dataset="cifar10")


def test_a_scheduler_that_does_not_answer_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr("fsp.runs.cluster.CONNECT_S", 0.5)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and not listening
        address = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"no Dask scheduler answers at {address}: start one with `dask sch"):
            check(scheduler=address)


@pytest.mark.parametrize("folder", [".", "data"])
def test_an_output_folder_in_which_committed_files_lie_is_refused(folder):
    with pytest.raises(ValueError, match=r"out_dir = .* would overwrite what is committed"):
        check(out_dir=str(ROOT / folder))


@pytest.mark.parametrize(
    ("given", "text", "number"),
    [
        ({"densities": "[1e-1]"}, "1e-1", "1.0e-1"),
        ({"densities": [0.5, "5E-2"]}, "5E-2", "5.0e-2"),
        ({"lr": "1e-3"}, "1e-3", "1.0e-3"),
        ({"epochs": "2e3"}, "2e3", "2000"),
        ({"train_options": "{weight_decay: 5e-4}"}, "5e-4", "5.0e-4"),
        ({"model": "mlp", "model_options": "{hidden: [1.5e2]}"}, "1.5e2", "150"),
    ],
)
def test_a_number_that_yaml_reads_as_text_is_refused_with_how_to_write_it(given, text, number):
    with pytest.raises(ValueError, match=f"^{list(given)[-1]} = .*; YAML reads {re.escape(text)} as text") as error:
        check(**given)
    assert str(error.value).endswith(f" as text: write {number}")
    assert yaml.safe_load(number) == float(text)


@pytest.mark.parametrize("text", ["snipe", "1e", "e5", "inf", "one"])
def test_text_that_is_no_number_gets_no_such_hint(text):
    with pytest.raises(ValueError, match="densities = ") as error:
        check(densities=[text])
    assert "YAML" not in str(error.value)


# ---- names that papermill injects --------------------------------------------------------------------------------


def running(monkeypatch, *cells):
    """Make believe that this is a notebook in which these cells have run."""
    shell = SimpleNamespace(user_ns={"In": ["", *cells]})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_an_injected_name_that_the_notebook_does_not_have_is_refused_before_any_value(monkeypatch):
    wrong = PythonTranslator.codify({"epochs": 0, "learning_rate": math.nan, "modle": "mlp"})  # papermill writes cells
    running(monkeypatch, "epochs = 3\nlr = 0.1", wrong)
    message = r"no parameter is called learning_rate, modle: this notebook has epochs, lr, model; did you mean model\?$"
    with pytest.raises(ValueError, match=message):
        check(epochs=0, lr=0.1, model="mlp")


def test_names_that_papermill_gives_itself_are_welcome(monkeypatch):
    own = dict.fromkeys(["PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH", "PAPERMILL_WORKFLOW"], "a.ipynb")
    running(monkeypatch, PythonTranslator.codify({"epochs": 2} | own), PythonTranslator.codify(own))
    assert vars(check(epochs=2)) == {"epochs": 2}
    running(monkeypatch, PythonTranslator.codify(own | {"papermill_input_path": ""}))
    with pytest.raises(ValueError, match="no parameter is called papermill_input_path:"):
        check(epochs=2)


def test_names_that_the_notebook_has_and_cells_that_nobody_injected_are_fine(monkeypatch):
    given = {"epochs": 2, "densities": [0.1, 0.05], "train_options": {}, "out_dir": "a\n# Parameters\nb = 1"}
    running(monkeypatch, "%matplotlib inline", "?check", PythonTranslator.codify(given), "unknown = 1")
    assert vars(check(**given)) == given


def test_outside_a_notebook_nothing_is_injected(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert check(epochs=2).epochs == 2
    monkeypatch.delitem(sys.modules, "IPython")
    assert check(epochs=2).epochs == 2


# ---- networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options"), [("mlp", {"width": 8}), ("resnet8", {"width": 0}), ("vgg11", {"hidden": [8]})]
)
def test_options_that_the_model_does_not_take_are_refused_before_any_run(model, options):
    with pytest.raises(ValueError, match=rf"^model_options = .* do not fit {model}: "):
        check(model=model, model_options=options)


@pytest.mark.parametrize(
    ("stem", "model", "options", "layers"),
    [
        ("03_ramanujan_gap_evolution", "resnet34", {}, 37),
        ("06_pai_comparison", "vgg16", {"head": "512"}, 16),
        ("07_imdb_and_narc", "resnet34", {"stem": "7x7"}, 37),
        ("07_imdb_and_narc", "vgg16", {"head": "4096"}, 16),
    ],
)
def test_paper_profiles_take_the_other_networks_and_data_that_they_name(stem, model, options, layers, all_there):
    profile = yaml.safe_load((PROFILES / "paper" / f"{stem}.yaml").read_text(encoding="utf-8"))
    for dataset in ("cifar10", "cifar100"):
        given = profile | {"model": model, "model_options": options, "dataset": dataset, "device": "cpu"}
        assert vars(check(**given)) == given
    with torch.device("meta"):
        assert len(prunable(MODELS[model]((3, 32, 32), 100, **options))) == layers
