"""``python -m fsp.compendium.cost``: what the runs of a profile cost, before any of them is begun.

The runs are those that the notebooks themselves ask for, see `fsp.compendium.planning`. How often a run trains, and
for how many epochs, is said here, in `epochs_of`; the arithmetic of an example is counted by PyTorch.
"""

import argparse
import functools
import json
import math
from typing import NamedTuple

import pandas as pd
import torch
import yaml
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from fsp import models, paths, runs
from fsp.checks import check_choice
from fsp.compendium.planning import planned
from fsp.masks import prunable
from fsp.progress import command_line
from fsp.pruning.lottery import kept_by_level
from fsp.search import RANDOMNESS

PEAK = 989e12  # operations a second of an H100 or H200 SXM: bfloat16, dense matrices
SHARES = (0.25, 0.05)  # of the peak: a well-fed card, and one that waits between the steps of small batches


class DataSet(NamedTuple):
    """What of a data set decides a cost; its files need not be here.

    Attributes
    ----------
    shape : tuple of int
        Channels, height and width.
    classes : int
    pool : int
        Examples that are not for testing, of which a tenth is for validation.
    """

    shape: tuple[int, int, int]
    classes: int
    pool: int

    @property
    def examples(self) -> int:
        """Examples of the training split."""
        return self.pool - round(0.1 * self.pool)


DATA = {
    "digits": DataSet((1, 8, 8), 10, 1437),
    "mnist1d": DataSet((1, 1, 40), 10, 4000),
    "mnist5k": DataSet((1, 28, 28), 10, 4000),
    "mnist": DataSet((1, 28, 28), 10, 60_000),
    "cifar10": DataSet((3, 32, 32), 10, 50_000),
    "cifar100": DataSet((3, 32, 32), 100, 50_000),
    "tinyimagenet": DataSet((3, 64, 64), 200, 100_000),
}


def _data_set(name: str, **_: object) -> DataSet:
    """What is known of a data set; takes what `fsp.data.load` takes, whose place it has in notebooks."""
    check_choice("dataset", name, DATA)
    return DATA[name]


# ---- what a run costs --------------------------------------------------------------------------------------------


def epochs_of(config: dict) -> list[int]:
    """Epochs of each training of a run.

    Parameters
    ----------
    config : dict
        Of a run of one of the notebooks.

    Returns
    -------
    list of int
        Empty for a run that only looks at masks or measures times. Where a training may end early, because it
        diverges or no path is left, it is counted in full. A run of a notebook that is not named here trains once.
    """
    if not {"model", "epochs"} <= config.keys() or not config.get("trained", True):
        return []
    epochs = config["epochs"]
    match config["experiment"]:
        case "03_ramanujan_gap_evolution":
            return [epochs] * (1 + config.get("growths", 0))
        case "06_pai_comparison" if config["way"] != "imp":
            first = [_pretraining(config)] if config["pretrain"] else []
            redraws = 3 if config["method"] in RANDOMNESS["batches"] else 2
            return first + [epochs] * (1 + len(config["candidates"]) + redraws)
        case "09_any_mask_training" if config["method"] == "imp":
            densities = {
                density for density, _ in config["trained"]
            }  # a density goes on from the level before the last
            shared = _levels(config, min(densities), spared=nn.Linear) + len(densities) - 1
            return [epochs] * (shared + len(config["trained"]))
        case "10_prune_and_tune_ensembles":
            return _of_ensembles(config)
        case "11_evenly_cascaded_networks" if config["kind"] == "gradient":
            return []
    if "imp" in (config.get("way"), config.get("method")):
        return [epochs] * _levels(config, config["density"])
    return [epochs]


def _pretraining(config: dict) -> int:
    """Epochs of the dense steps before a search, the last one whole."""
    size = config["train_options"].get("batch_size", 128)
    return math.ceil(config["pretrain"] / math.ceil(_data_set(config["dataset"]).examples / size))


def _levels(config: dict, density: float, spared: type | tuple = ()) -> int:
    """Trainings of iterative magnitude pruning."""
    network = _network(config["dataset"], config["model"], json.dumps(config["model_options"]))
    exclude = [name for name, module in network.named_modules() if spared and isinstance(module, spared)]
    weights = sum(p.numel() for p in prunable(network, exclude=exclude).values())
    return len(kept_by_level(weights, config["imp_rate"], density=density))


def _of_ensembles(config: dict) -> list[int]:
    """Epochs of each training of a parent and its children, and of what they are compared with."""
    if config["part"] == "small":
        epochs, count = config["small_epochs"], config["small_children"]
        whole = [epochs] * (2 if config["model"] in ("cnn", "lenet_s", "lenet_m", "lenet_l") else 1)  # with dropout
        return [*whole, epochs // 2] + [epochs // count] * count + [epochs // 2 // count] * 2 * count
    epochs, count = config["epochs"], config["children"]
    of_parent = round(config["parent_share"] * epochs)
    of_child, share = (epochs - of_parent) // count, epochs // count
    if config["part"] == "more":
        children = [of_child] * (count * (4 + len(config["densities"])) + 1 + len(config["overlaps"]))
        return [of_parent, *children] + [config["long_epochs"]] * 4 + [share] * (count + 2) + [epochs] * count
    children = config["most_children"] + count * (5 if config["part"] == "core" else 2)
    return [of_parent, epochs] + [of_child] * children + [share] * count


@functools.cache
def _network(dataset: str, model: str, options: str) -> nn.Module:
    """A network of a run, its shapes alone."""
    data = _data_set(dataset)
    with torch.device("meta"):
        return models.MODELS[model](data.shape, data.classes, **json.loads(options))


@functools.cache
def operations(dataset: str, model: str, options: str = "{}") -> float:
    """Floating-point operations of training on one example, forward and backward, as PyTorch counts them.

    Parameters
    ----------
    dataset : str
        A key of `DATA`: the size of the images and the number of classes.
    model : str
        A key of `fsp.models.MODELS`.
    options : str
        Its options, as JSON.

    Returns
    -------
    float
        Products and sums of convolutions and matrix products, each one operation, of the dense network: the masks of a
        sparse one make it no cheaper on a GPU.

    Examples
    --------
    >>> operations("digits", "mlp", '{"hidden": [10]}')  # 64 x 10 and 10 x 10: 2 forward, and 2 and 4 backward
    3160.0
    """
    network, data = _network(dataset, model, options), _data_set(dataset)
    images = torch.empty(2, *data.shape, dtype=torch.float32, device="meta")  # batch norm needs two examples
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        cross_entropy(network(images), labels).backward()
    network.zero_grad()
    return counter.get_total_flops() / 2


# ---- the table ---------------------------------------------------------------------------------------------------


def cost(profile: str, only: str = "") -> pd.DataFrame:
    """What the notebooks of a profile cost.

    Parameters
    ----------
    profile : str
        A folder of `fsp.paths.PROFILES`.
    only : str
        Beginning of the names of the notebooks.

    Returns
    -------
    pandas.DataFrame
        A row for each notebook, data set and network, where it costs something: ``trainings``, ``least_epochs``,
        ``most_epochs``, ``least_operations`` and ``most_operations`` of an example (options of a network differ),
        ``operations`` of all trainings, ``masks`` that are drawn to be measured or searched. A run that several
        notebooks ask for counts in the first.

    Raises
    ------
    ValueError
        If the profile has no notebook of that name.
    """
    files = sorted((paths.PROFILES / profile).glob(f"{only}*.yaml"))
    if not files:
        raise ValueError(f"profile {profile!r} has no file {only}*.yaml: look into {paths.PROFILES}")
    seen: set[str] = set()
    rows = []
    for file in files:
        for _, config in planned(file.stem, _data_set, **yaml.safe_load(file.read_text("utf-8"))):
            name = runs.key(config)
            if name in seen:
                continue
            seen.add(name)
            rows.append({"notebook": file.stem} | _row(config))
    table = pd.DataFrame(rows).groupby(["notebook", "dataset", "model"], sort=False)
    table = table.agg(
        trainings=("trainings", "sum"),
        least_epochs=("least_epochs", "min"),
        most_epochs=("most_epochs", "max"),
        least_operations=("each", "min"),
        most_operations=("each", "max"),
        operations=("operations", "sum"),
        masks=("masks", "sum"),
    ).reset_index()
    return table[(table.trainings > 0) | (table.masks > 0)]


def _row(config: dict) -> dict:
    """What a run costs."""
    epochs = epochs_of(config)
    row = {"dataset": "", "model": "", "trainings": len(epochs), "masks": config.get("population", 0)}
    each = math.nan
    if epochs:
        row |= {"dataset": config["dataset"], "model": config["model"]}
        each = operations(config["dataset"], config["model"], json.dumps(config["model_options"]))
    passes = sum(epochs) * _data_set(config["dataset"]).examples if epochs else 0
    row |= {"least_epochs": min(epochs, default=math.nan), "most_epochs": max(epochs, default=math.nan)}
    return row | {"each": each, "operations": passes * each if epochs else 0.0}


def as_markdown(table: pd.DataFrame, peak: float, shares: tuple[float, ...]) -> str:
    """The table for reading, with hours of a card at some shares of its peak.

    Parameters
    ----------
    table : pandas.DataFrame
        By `cost`.
    peak : float
        Operations a second.
    shares : tuple of float
        Of the peak, in (0, 1].

    Returns
    -------
    str
    """
    hours = [f"GPU hours at {100 * share:g} %" for share in shares]
    head = ["notebook", "network, data", "trainings", "epochs", "GFLOP an example", "EFLOP", *hours, "candidates"]
    lines = [head, ["---"] * len(head)]
    total = table[["trainings", "operations", "masks"]].sum()
    for row in [*table.itertuples(), total.to_frame().T.assign(notebook="all").iloc[0]]:
        trained = getattr(row, "model", "") != ""
        cells = [row.notebook, f"{row.model}, {row.dataset}" if trained else "", f"{row.trainings:,.0f}"]
        cells.append(_span(row.least_epochs, row.most_epochs, "{:.0f}") if trained else "")
        cells.append(_span(row.least_operations / 1e9, row.most_operations / 1e9, "{:.3g}") if trained else "")
        cells.append(f"{row.operations / 1e18:.3g}")
        cells += [f"{row.operations / (peak * share) / 3600:,.3g}" for share in shares]
        lines.append([*cells, f"{row.masks:,.0f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _span(least: float, most: float, form: str) -> str:
    """One number, or the two that others are between."""
    return " to ".join(dict.fromkeys([form.format(least), form.format(most)]))


def main(argv: list[str] | None = None) -> None:
    """Print the table of a profile."""
    parser = argparse.ArgumentParser(prog="python -m fsp.compendium.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="paper", choices=sorted(p.name for p in paths.PROFILES.iterdir()))
    parser.add_argument("--only", default="", help="beginning of the names of the notebooks")
    parser.add_argument(
        "--peak", type=float, default=PEAK, help="operations a second of the card (default %(default)g)"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the peak (default 0.25 0.05)")
    given = parser.parse_args(argv)
    print(as_markdown(cost(given.profile, given.only), given.peak, given.shares))


if __name__ == "__main__":
    command_line(main)
