"""What the experiments of several notebooks have in common, from the first random number to the table of claims.

A run is ``begin`` (data, network, generator), ``prune`` and ``train``; every step takes the run's config, a plain dict.
All draws but those of the training come from one generator, in this order: initial weights, scoring examples, masks.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from fsp import models, pruning, runs
from fsp.compendium import claims
from fsp.data import Data, load, scoring_batches
from fsp.masks import Masks
from fsp.paths import COMMITTED, ROOT, outputs, renewing
from fsp.runs import tables
from fsp.runs.code import run_code
from fsp.runs.provenance import provenance
from fsp.runs.records import CODE_DIGITS, code_of, read_record, whole_record
from fsp.training import History, TrainConfig, fit

# What a config needs for `begin` and `train`, beside its seed.
TRAINING = ("dataset", "model", "model_options", "epochs", "lr", "train_options", "device")

# ---- one run -----------------------------------------------------------------------------------------------------


class Beginning(NamedTuple):
    """A data set, a network at its initial weights, and the generator of all further draws.

    Attributes
    ----------
    data : Data
    network : nn.Module
        On the device of the data.
    generator : torch.Generator
        On the CPU; the initial weights have been drawn from it.
    """

    data: Data
    network: nn.Module
    generator: torch.Generator


def begin(config: dict) -> Beginning:
    """Load the data and build the network of a run, everything from its seed.

    Parameters
    ----------
    config : dict
        ``dataset``, ``model``, ``model_options``, ``device`` and ``seed``; ``init`` where the initialiser is a choice.

    Returns
    -------
    Beginning
    """
    data = load(config["dataset"], device=config["device"], seed=config["seed"])
    generator = torch.Generator().manual_seed(config["seed"])
    return Beginning(data, build(config, data, generator), generator)


def build(config: dict, data: Data, generator: torch.Generator) -> nn.Module:
    """Build the network of a run with initial weights drawn from the generator; its config as for `begin`."""
    options = dict(config["model_options"])
    if "init" in config:
        options["init"] = config["init"]
    network = models.build(config["model"], data.shape, data.classes, generator=generator, **options)
    return network.to(config["device"])


def prune(config: dict, data: Data, network: nn.Module, generator: torch.Generator, **options) -> Masks:
    """Masks by the ``method`` of a run at its ``density``, scored on ten examples of each class.

    Parameters
    ----------
    config : dict
        ``method`` and ``density``.
    data, network, generator
        As `begin` gives them; the examples are drawn from the generator, then what the method itself draws.
    **options
        Of the method; see `fsp.pruning.options_of`.

    Returns
    -------
    Masks
    """
    examples = scoring_batches(data, generator=generator)
    return pruning.prune(network, config["method"], config["density"], batches=examples, generator=generator, **options)


def train_config(config: dict) -> TrainConfig:
    """Settings of a run's training: its ``epochs``, ``lr``, ``seed`` and ``train_options``."""
    return TrainConfig(config["epochs"], lr=config["lr"], seed=config["seed"], **config["train_options"])


def train(
    config: dict, data: Data, network: nn.Module, masks: Masks | None = None, hooks: Sequence[object] = ()
) -> History:
    """Train a network under its masks, in place; a run that is interrupted goes on from its checkpoint.

    Parameters
    ----------
    config : dict
        As for `train_config`.
    data : Data
    network : nn.Module
    masks : Masks, optional
        Default: all weights are trained.
    hooks : sequence of objects
        See `fsp.training.hooks`.

    Returns
    -------
    History
    """
    checkpoint = runs.scratch("training.safetensors")
    return fit(network, data, train_config(config), masks=masks, hooks=hooks, checkpoint=checkpoint)


# ---- all runs of a notebook --------------------------------------------------------------------------------------


_begun: set[Path] = set()  # tables that a sweep of this process has put rows into; a second one goes on from there


def chosen(given: SimpleNamespace, *names: str) -> dict:
    """Some parameters of a notebook as a dict, for the configs of its runs.

    Examples
    --------
    >>> chosen(SimpleNamespace(lr=0.1, epochs=3, seeds=[0]), "epochs", "lr")
    {'epochs': 3, 'lr': 0.1}
    """
    return {name: getattr(given, name) for name in names}


def sweep(
    function: Callable,
    configs: list[dict],
    given: SimpleNamespace,
    stem: str,
    *,
    here: bool = False,
    whole: bool = False,
) -> pd.DataFrame:
    """Do the missing runs of a notebook, and put the rows of all into its table ``<stem>.csv``.

    Rows of the committed table, or of the one below ``out_dir``, are taken as they are. A committed file is never
    written, except for ``make refresh``: see `fsp.paths.outputs`. One printed line says where the results go, and
    whether these are the runs that the text of the notebook describes; another one how many rows other code made.

    Parameters
    ----------
    function, configs
        As for `fsp.runs.sweep`.
    given : namespace
        Parameters of the notebook: ``out_dir``, ``recompute`` and ``scheduler``.
    stem : str
        Name of the notebook.
    here : bool
        Do the runs in this process, whatever the scheduler: for what measures workers itself.
    whole : bool
        Give the whole table, with the runs of other parameters that it holds.

    Returns
    -------
    pandas.DataFrame
        The rows of these configs; the file may hold more.

    Raises
    ------
    RuntimeError
        If a run failed, with the first error and the number of failed runs. The table stays as it is; finished runs
        are kept as records.
    """
    place = outputs(given.out_dir, stem)
    path, committed = (folder / f"{stem}.csv" for folder in (place.results, COMMITTED.results))
    known = path if given.out_dir else committed
    scheduler = None if here else given.scheduler
    if renewing():
        _drop_records_of_other_code(function, configs, place.runs)
    options = {"store": place.runs, "table": known, "recompute": given.recompute, "scheduler": scheduler}
    try:
        with warnings.catch_warnings():
            # told below: Python shows a warning with the folder of this file, which no committed notebook may name
            warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ runs were reused that other code made")
            table = runs.sweep(function, configs, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped: finished runs are kept; run again to go on") from None
    _check_finished(table, place.runs)
    if known != path and known.exists() and not (path in _begun and path.exists()):
        tables.save(tables.read_cells(known), path)  # the table as a refresh would make it
    _begun.add(path)
    tables.update(table, path)
    if stale := table.attrs["stale"]:
        print(f"{stale} of {len(configs)} runs were made by code that has been edited since; recompute=True redoes all")
    if not renewing():
        print(_where(place.results.parent, table, committed, whole))
    return tables.read(path) if whole else table


def _drop_records_of_other_code(function: Callable, configs: list[dict], store: Path) -> None:
    """Delete the records of these runs that a refresh has left which failed, if their code has been edited since."""
    code = run_code(function)[:CODE_DIGITS]
    for path in (store / f"{runs.key(config)}.json" for config in configs):
        record = whole_record(path)
        if record is not None and code_of(record) != code:
            path.unlink()


def _check_finished(table: pd.DataFrame, store: Path) -> None:
    """Raise the first error of the runs that failed, if any did."""
    failed = table.key[table.status == "failed"]
    if failed.empty:
        return
    first = read_record(store / f"{failed.iloc[0]}.json")["error"].strip().splitlines()[-1]
    total = table.key.nunique()
    kept = "" if len(failed) == total else "; finished ones are kept and not done again"
    raise RuntimeError(f"{len(failed)} of {total} runs failed, the first with {first}{kept}")


def _where(folder: Path, table: pd.DataFrame, committed: Path, whole: bool) -> str:
    """Where the results of this run go, and whether it is the committed run."""
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    text = f"table, claims and figures of this run: {folder}"
    described = set(tables.read_cells(committed).key) if committed.exists() else set()
    done = set(table.key)
    if done == described or (whole and done <= described):
        return text
    return f"{text} (the text describes the committed run, and this is another: {len(done - described)} runs are new)"


def save_claims(rows: list[dict], given: SimpleNamespace, stem: str) -> pd.DataFrame:
    """Write the claims of a notebook, rows by `fsp.compendium.claims.claim`, to ``<stem>.claims.csv``; the table."""
    made = pd.DataFrame(rows, columns=list(claims.CLAIM_COLUMNS))
    tables.save(made, outputs(given.out_dir, stem).results / f"{stem}.claims.csv")
    return made


def made_with(**more: object) -> pd.DataFrame:
    """What this notebook was made with: versions, commit, hardware, and what else is to be told."""
    return pd.Series(provenance() | more).drop("code").to_frame("made with")
