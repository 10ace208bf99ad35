"""Checks on what a notebook is given, before any long work starts.

papermill hands a notebook whatever it is told to and only warns about a name the notebook does not know; `check`
turns a wrong name or value into an error that names the valid choices.
"""

import ast
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Collection
from numbers import Real
from types import SimpleNamespace
from typing import NamedTuple

import torch
import yaml

from fsp.checks import nearest
from fsp.data import DATASETS, check_files, is_count
from fsp.models import INITS, MODELS, WITH_MASKS
from fsp.paths import outputs
from fsp.pruning import METHODS
from fsp.runs.cluster import SCHEDULERS, connect, is_scheduler
from fsp.training import TrainConfig
from fsp.training.dynamic import PRESETS
from fsp.training.rescaling import Rescaling

SEARCHED = [name for name in METHODS if name != "magnitude"]  # all its masks of a network are the same
TRAIN_OPTIONS = {field.name for field in dataclasses.fields(TrainConfig)} - {"epochs", "lr", "seed"}
LISTS = {"networks", "methods", "searched", "dynamics", "densities", "published_densities", "seeds", "settled_seeds"}
LISTS |= {"dosed", "shares", "confirmed", "confirm_seeds", "settled", "untrained", "between", "searches", "candidates"}
LISTS |= {
    "arms",
    "arms_beside",
    "controls",
    "controlled",
    "overlaps",
    "severities",
    "rates",
    "depths",
    "lrs",
    "pruners",
}
OPTIONS = {"model_options", "rate_options", "deep_options", "plain_options", "confirm_options"}
STRUCTURED = LISTS | OPTIONS | {"train_options", "rescaling"}  # papermill's -p gives them as text
ARMS = ("default", "activations", "skips", "rescaling", "labels", "all")  # which parts of ToST a training has
CONTROLS = ("no_activations", "no_skips", "no_rescaling", "no_labels")  # all parts but one, and rivals
CONTROLS += ("longer", "all_longer", "density_scaled", "late", "kept")


class Rule(NamedTuple):
    """Whether a value is right, what is expected, and the names to choose from, if there are any."""

    fits: Callable[[object], bool]
    expected: str
    names: Collection[str] = ()


class Given(SimpleNamespace):
    """Checked parameters as attributes; read-only. ``vars(given)`` is the dict of them."""

    def __setattr__(self, name, value):
        raise AttributeError(f"{name} is read-only: set the parameter in the parameters cell")


def check(**given: object) -> Given:
    """Check the parameters of a notebook.

    Parameters
    ----------
    **given
        All parameters of the notebook, by name.  Each name means the same in every notebook and has a rule here.

    Returns
    -------
    Given
        A read-only namespace of `given`, with ``device`` "auto" replaced by "cuda" or "cpu", and lists and dicts that
        came as text, as ``papermill -p densities "[0.1]"`` hands them over, read as YAML.

    Raises
    ------
    ValueError
        For a value out of range, naming it and what is possible, and for a parameter that papermill injected but
        the notebook does not have.
    FileNotFoundError
        If the files of ``dataset`` are not there; see `fsp.data.check_files`.
    ConnectionError
        If no scheduler answers at the address ``scheduler``.

    Examples
    --------
    >>> given = check(density=0.05, seeds="[0, 1]")
    >>> given.seeds
    [0, 1]
    >>> vars(given)
    {'density': 0.05, 'seeds': [0, 1]}
    """
    unknown = _injected() - given.keys()
    if unknown:
        names = f"{', '.join(sorted(unknown))}: this notebook has {', '.join(given)}"
        raise ValueError(f"no parameter is called {names}{nearest(unknown, given)}")
    missing = given.keys() - RULES.keys()
    if missing:
        known = ", ".join(RULES)
        raise ValueError(f"fsp.compendium.parameters has no rule for {', '.join(sorted(missing))}: it knows {known}")
    for name, value in given.items():
        if name in STRUCTURED and isinstance(value, str):
            given[name] = value = _parsed(value)
        rule = RULES[name]
        if not rule.fits(value):
            raise ValueError(f"{name} = {value!r}: expected {rule.expected}{_hint(value)}{nearest(value, rule.names)}")
    try:
        TrainConfig(1, **given.get("train_options", {}))
    except ValueError as error:
        options = given["train_options"]
        message = f"train_options = {options!r}: expected valid settings ({error}){_hint(options)}"
        raise ValueError(message) from error
    if {"model", "model_options"} <= given.keys():
        model, options = given["model"], given["model_options"]
        try:
            with torch.device("meta"):  # no memory, no random numbers
                MODELS[model]((3, 32, 32), 10, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model_options = {options!r} do not fit {model}: {error}{_hint(options)}") from error
    if given.get("device") == "auto":
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    outputs(given.get("out_dir", ""), "")
    if "dataset" in given:
        check_files(given["dataset"])
    if given.get("scheduler") not in (None, "local"):
        with connect(given["scheduler"]):
            pass
    return Given(**given)


def _parsed(text: str) -> object:
    """What a text says in YAML; text that is no YAML, as it is."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _hint(value: object) -> str:
    """What to write instead of a number that YAML reads as text, such as 1e-1, anywhere in a value; "" without one."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next(filter(None, map(_hint, value)), "")
    if not isinstance(value, str) or not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return ""
    number = float(value)
    mantissa, exponent = value.lower().split("e")
    mantissa += "" if "." in mantissa else ".0"
    right = str(int(number)) if number.is_integer() else f"{mantissa}e{int(exponent):+d}"
    return f"; YAML reads {value} as text: write {right}"


def _injected() -> set[str]:
    """Names that the cell injected by papermill assigns, in a running notebook; without papermill's own."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    cells = shell.user_ns.get("In", []) if shell else []
    names = set()
    for cell in cells:
        if cell.startswith("# Parameters\n"):
            variables = [node for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name)]
            names |= {variable.id for variable in variables if isinstance(variable.ctx, ast.Store)}
    return {name for name in names if not name.startswith("PAPERMILL_")}  # of --inject-paths


def _one_of(choices: Collection[str]) -> Rule:
    """Rule: one of the choices."""
    return Rule(lambda value: value in list(choices), f"one of {', '.join(choices)}", choices)


def _list_of(fits: Callable[[object], bool], expected: str) -> Rule:
    """Rule: a list, not empty and without repetitions, whose elements all fit."""

    def is_list(value):
        if not isinstance(value, list | tuple) or len(value) == 0:
            return False
        return all(fits(element) and element not in value[:i] for i, element in enumerate(value))

    return Rule(is_list, f"a list of different {expected}")


def _some_of(choices: Collection[str]) -> Rule:
    """Rule: a list of different choices."""
    rule = _list_of(lambda value: value in list(choices), f"ones of {', '.join(choices)}")
    return rule._replace(names=choices)


def _is_number(value: object) -> bool:
    """Whether a value is a real number, and not True or False."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_fraction(value: object) -> bool:
    """Whether a value is a number above 0 and not above 1."""
    return _is_number(value) and 0 < value <= 1


def _is_device(value: object) -> bool:
    """Whether a value names a device that this machine has."""
    if str(value) in ("auto", "cpu"):
        return True
    found = re.fullmatch(r"cuda(?::(\d+))?", str(value))
    return bool(found) and torch.cuda.is_available() and int(found[1] or 0) < torch.cuda.device_count()


def _is_rescaling(value: object) -> bool:
    """Whether a value is a dict of settings of `fsp.training.rescaling.Rescaling`."""
    try:
        Rescaling(**value)
    except (TypeError, ValueError):
        return False
    return True


COUNT = Rule(lambda value: is_count(value, 1), "a whole number of at least 1")
STEPS = Rule(lambda value: is_count(value, 0), "a whole number of steps from 0 on")
WHOLE = Rule(lambda value: is_count(value, 0), "a whole number from 0 on")
FRACTION = Rule(_is_fraction, "a fraction in (0, 1], such as 0.05")
FRACTIONS = _list_of(_is_fraction, "fractions in (0, 1], such as [0.05]")
SEEDS = _list_of(
    lambda value: is_count(value, 0) and value < 2**63, "whole numbers from 0 to 2**63 - 1, such as [0, 1]"
)
RATE = Rule(lambda value: _is_number(value) and 0 < value < math.inf, "a number above 0, such as 0.001")
RULES: dict[str, Rule] = {
    "dataset": _one_of(DATASETS),
    "model": _one_of(MODELS),
    **dict.fromkeys(OPTIONS, Rule(lambda value: isinstance(value, dict), "a dict of options of the model, such as {}")),
    **dict.fromkeys(["rival", "plain"], _one_of(MODELS)),
    "confirm_dataset": _one_of(DATASETS),
    "networks": _some_of(MODELS),
    "init": _one_of([name for name in INITS if name not in WITH_MASKS]),
    "method": _one_of(METHODS),
    "methods": _some_of(METHODS),
    **dict.fromkeys(["untrained", "pruners"], _some_of(METHODS)),
    "searched": _some_of(SEARCHED),
    "dynamics": _some_of(PRESETS),
    "density": FRACTION,
    **dict.fromkeys(["densities", "rates"], FRACTIONS),
    "published_densities": FRACTIONS,
    "between": FRACTIONS,
    **dict.fromkeys(["seeds", "settled_seeds", "confirm_seeds"], SEEDS),
    **dict.fromkeys(["epochs", "batch_size", "early_steps", "update_every"], COUNT),
    **dict.fromkeys(["population", "repeats", "shuffles", "trainings", "empty_runs"], COUNT),
    **dict.fromkeys(["threads", "wide", "few", "coarse", "deep_epochs", "confirm_epochs"], COUNT),
    "depths": _list_of(lambda value: is_count(value, 1), "whole numbers of at least 1, such as [4, 8]"),
    "lrs": _list_of(lambda value: _is_number(value) and 0 < value < math.inf, "numbers above 0, such as [0.1]"),
    **dict.fromkeys(["image_epochs", "cnn_epochs", "short_epochs", "long_epochs", "settled_epochs", "crossed"], COUNT),
    **dict.fromkeys(["dosed", "confirmed", "settled"], _some_of(METHODS)),
    "shares": FRACTIONS,
    **dict.fromkeys(["measure_every", "moment", "pretrained_population", "optimised_population"], COUNT),
    **dict.fromkeys(["children", "most_children", "small_children", "small_epochs", "corrupted"], COUNT),
    **dict.fromkeys(["growths", "lasting", "confirming", "more_seeds", "erk_seeds"], WHOLE),
    **dict.fromkeys(["more_parents", "small_parents", "image_parents"], WHOLE),
    "overlaps": _list_of(lambda value: _is_number(value) and 0 <= value <= 1, "numbers in [0, 1], such as [0, 0.5]"),
    "severities": _list_of(lambda value: is_count(value, 1) and value <= 5, "whole numbers from 1 to 5, such as [3]"),
    **dict.fromkeys(["parent_share", "target"], FRACTION),
    "searches": _some_of(["published", "gap", "pretrained", "optimised"]),
    "candidates": _list_of(lambda value: is_count(value, 1), "whole numbers of at least 1, such as [20, 100]"),
    "pretrain": STEPS,
    **dict.fromkeys(
        ["imp_rate", "dropout"],
        Rule(lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1), such as 0.2"),
    ),
    **dict.fromkeys(["lr", "settled_lr", "confirm_lr", "constant_lr", "speed_lr"], RATE),
    **dict.fromkeys(["arms", "arms_beside"], _some_of(ARMS)),
    "controls": _some_of(CONTROLS),
    "controlled": _some_of(METHODS),
    "e1": Rule(lambda value: _is_number(value) and 0 <= value < 1, "a fraction of the training, in [0, 1)"),
    "rescaling": Rule(_is_rescaling, 'a dict of settings of Rescaling, such as {"iterations": 30}'),
    "train_options": Rule(
        lambda value: isinstance(value, dict) and value.keys() <= TRAIN_OPTIONS,
        f"a dict of fields of TrainConfig, of {', '.join(sorted(TRAIN_OPTIONS))}",
        TRAIN_OPTIONS,
    ),
    "device": Rule(_is_device, "auto or cpu, or cuda where there is a CUDA device"),
    "recompute": Rule(lambda value: isinstance(value, bool), "True or False"),
    "out_dir": Rule(lambda value: isinstance(value, str), 'a folder, or "" for scratch/ in the repository'),
    "scheduler": Rule(lambda value: value is None or (isinstance(value, str) and is_scheduler(value)), SCHEDULERS),
}
