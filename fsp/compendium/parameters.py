"""Checks on what a notebook is given, before any long work starts.

papermill hands a notebook whatever it is told to and only warns about a name the notebook does not know; `check`
turns a wrong name or value into an error that names the valid choices.
"""

import ast
import dataclasses
import math
import sys
from collections.abc import Callable, Collection
from numbers import Real

import torch
import yaml

from fsp.data import DATASETS, is_count
from fsp.models import INITS, MODELS
from fsp.pruning.methods import METHODS
from fsp.runs.cluster import SCHEDULERS, is_scheduler
from fsp.training.dynamic import PRESETS
from fsp.training.train import TrainConfig

CHOICES = {
    "dataset": tuple(DATASETS),
    "model": tuple(MODELS),
    "networks": tuple(MODELS),
    "init": tuple(INITS),
    "methods": tuple(METHODS),
    "searched": tuple(name for name in METHODS if name != "magnitude"),  # all its masks of a network are the same
    "dynamics": tuple(PRESETS),
}


LISTS = {"networks", "methods", "searched", "dynamics", "densities", "published_densities", "seeds"}
STRUCTURED = LISTS | {"model_options", "train_options"}


def check(**given: object) -> dict:
    """Check the parameters of a notebook.

    Parameters
    ----------
    **given
        All parameters of the notebook, by name.  Each name means the same in every notebook and has a rule here.

    Returns
    -------
    dict
        `given`, with ``device`` "auto" replaced by "cuda" or "cpu", and lists and dicts that came as text, as
        ``papermill -p densities "[0.1]"`` hands them over, read as YAML.

    Raises
    ------
    ValueError
        For a value out of range, naming it and what is possible, and for a parameter that papermill injected but
        the notebook does not have.
    """
    unknown = _injected() - given.keys()
    if unknown:
        raise ValueError(f"no parameter is called {', '.join(sorted(unknown))}: this notebook has {', '.join(given)}")
    if missing := given.keys() - _RULES.keys():
        raise ValueError(
            f"fsp.compendium.parameters has no rule for {', '.join(sorted(missing))}: it knows {', '.join(_RULES)}"
        )
    given = {name: _parsed(value) if name in STRUCTURED else value for name, value in given.items()}
    for name, value in given.items():
        expected = _RULES[name](value)
        if expected:
            raise ValueError(f"{name} = {value!r}: expected {expected}")
    if {"model", "model_options"} <= given.keys():
        try:
            with torch.device("meta"):  # no memory, no random numbers
                MODELS[given["model"]]((3, 32, 32), 10, **given["model_options"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"model_options = {given['model_options']!r} do not fit {given['model']}: {error}"
            ) from error
    if given.get("device") == "auto":
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return given


def _parsed(value: object) -> object:
    """What a text says in YAML; anything else, and text that is no YAML, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _injected() -> set[str]:
    """Names that the cell injected by papermill assigns, in a running notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    cells = shell.user_ns.get("In", []) if shell else []
    return {
        target.id
        for cell in cells
        if cell.startswith("# Parameters\n")
        for statement in ast.parse(cell).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _one_of(choices: Collection[str]) -> Callable[[object], str | None]:
    """Rule: one of the choices."""
    return lambda value: None if value in choices else f"one of {', '.join(choices)}"


def _some_of(choices: Collection[str]) -> Callable[[object], str | None]:
    """Rule: a list of different choices."""
    return lambda value: (
        None
        if _distinct(value) and all(v in choices for v in value)
        else f"a list of different ones of {', '.join(choices)}"
    )


def _distinct(value: object) -> bool:
    """Whether a value is a non-empty list without repetitions."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(v not in value[:i] for i, v in enumerate(value))


def _is_density(value: object) -> bool:
    """Whether a value is a fraction of weights that can be kept."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value <= 1


def _densities(value: object) -> str | None:
    """Rule: a list of different densities."""
    fits = _distinct(value) and all(map(_is_density, value))
    return None if fits else "a list of different fractions in (0, 1], such as [0.05]"


def _count(value: object) -> str | None:
    """Rule: a whole number of at least 1."""
    return None if is_count(value, 1) else "a whole number of at least 1"


def _steps(value: object) -> str | None:
    """Rule: a whole number of at least 0."""
    return None if is_count(value, 0) else "a whole number of steps from 0 on"


def _train_options(value: object) -> str | None:
    """Rule: fields of TrainConfig beside those that a notebook has as parameters of their own."""
    fields = {field.name for field in dataclasses.fields(TrainConfig)} - {"epochs", "lr", "seed"}
    if not isinstance(value, dict) or not value.keys() <= fields:
        return f"a dict of fields of TrainConfig, of {', '.join(sorted(fields))}"
    try:
        TrainConfig(**value)
    except ValueError as error:
        return f"valid settings ({error})"
    return None


_RULES: dict[str, Callable[[object], str | None]] = {
    "dataset": _one_of(CHOICES["dataset"]),
    "model": _one_of(CHOICES["model"]),
    "networks": _some_of(CHOICES["networks"]),
    "init": _one_of(CHOICES["init"]),
    "methods": _some_of(CHOICES["methods"]),
    "searched": _some_of(CHOICES["searched"]),
    "dynamics": _some_of(CHOICES["dynamics"]),
    "density": lambda v: None if _is_density(v) else "a fraction in (0, 1], such as 0.05",
    "densities": _densities,
    "published_densities": _densities,
    "seeds": lambda v: (
        None
        if _distinct(v) and all(is_count(s, 0) and s < 2**63 for s in v)
        else "a list of different whole numbers from 0 to 2**63 - 1, such as [0, 1]"
    ),
    "epochs": _count,
    "batch_size": _count,
    "update_every": _count,
    "threads": _count,
    "shuffles": _count,
    "repeats": _count,
    "trainings": _count,
    "empty_runs": _count,
    "ticket_count": _count,
    "ticket_epochs": _count,
    "population": _count,
    "explore": lambda v: None if _is_density(v) else "a fraction in (0, 1], such as 0.25",
    "early_steps": _count,
    "pretrain": _steps,
    "rewind": _steps,
    "imp_rate": lambda v: (
        None if isinstance(v, Real) and not isinstance(v, bool) and 0 <= v < 1 else "a number in [0, 1), such as 0.2"
    ),
    "lr": lambda v: (
        None if isinstance(v, Real) and not isinstance(v, bool) and 0 < v < math.inf else "a number above 0"
    ),
    "device": lambda v: (
        "auto or cpu: no CUDA device is available"
        if str(v).startswith("cuda") and not torch.cuda.is_available()
        else None
        if str(v) in ("auto", "cpu") or str(v).startswith("cuda")
        else "auto, cpu or cuda"
    ),
    "recompute": lambda v: None if isinstance(v, bool) else "True or False",
    "out_dir": lambda v: None if isinstance(v, str) else 'a folder, or "" for the repository',
    "scheduler": lambda v: None if (v is None or isinstance(v, str)) and is_scheduler(v) else SCHEDULERS,
    "model_options": lambda v: None if isinstance(v, dict) else "a dict of options of the model, such as {}",
    "train_options": _train_options,
}
