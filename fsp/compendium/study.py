"""What the experiments of several notebooks have in common."""

from typing import NamedTuple

import torch
from torch import nn

from fsp import models
from fsp.data import Data, load
from fsp.training import TrainConfig


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
    options = config["model_options"] | {name: config[name] for name in ("init",) if name in config}
    network = models.build(config["model"], data.shape, data.classes, generator=generator, **options)
    return Beginning(data, network.to(config["device"]), generator)


def train_config(config: dict) -> TrainConfig:
    """Settings of a run's training: its ``epochs``, ``lr``, ``seed`` and ``train_options``."""
    return TrainConfig(config["epochs"], lr=config["lr"], seed=config["seed"], **config["train_options"])
