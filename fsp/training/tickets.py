r"""Tickets: the masks that dynamic sparse training passes through, with their weights, to be trained on their own.

Ticket 0 is the first mask; every topology update ends one ticket and starts the next.  A ticket is kept as it starts
(its mask just grown) and as it ends (just before the next update), and the dense initial weights are ticket -1.

Tickets of one training follow each other in time, so anything that grows with training grows along them.  The initial
weights under a ticket's mask tell what the mask alone is worth (D34): see `put_`.

A directory holds, in files of `fsp.files`, each with a SHA-256 of its content:

===================================  =================================================================================
``init.safetensors``                 the dense initial model
``ticket_NNNN.masks.safetensors``    masks, one bit a weight; read by `fsp.masks.load`
``ticket_NNNN.start.safetensors``    kept weights alone, in the order of the mask, and the rest of the model (biases,
                                     norms, running statistics) in full, as the ticket starts
``ticket_NNNN.end.safetensors``      the same as it ends
===================================  =================================================================================

Weights are written after their masks, in the model's own precision.

References
----------
.. [1] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon. NeurIPS 2023.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fsp import masks as mask_algebra
from fsp.files import digest, load_tensors, save_tensors
from fsp.masks import Masks, apply_, check_masks

INIT = -1  # number of the ticket of dense initial weights


class Ticket(NamedTuple):
    """A mask that was in force, and the model at one time.

    Attributes
    ----------
    masks : Masks
        On the CPU; all True in the ticket of initial weights.
    weights : dict of name to Tensor
        The whole ``state_dict``, on the CPU; pruned weights are 0.
    step : int
        Optimiser steps before this moment.
    kind : {"init", "start", "end"}
    number : int
        Topology updates before this ticket; -1 for the initial weights.
    """

    masks: Masks
    weights: dict[str, Tensor]
    step: int
    kind: str
    number: int


def collect(directory: str | Path, model: nn.Module, masks: Masks) -> "Collector":
    """Begin to collect the tickets of a training.

    Writes the initial weights and ticket 0.  Give the methods of the collector to
    `fsp.training.dynamic.DynamicTraining`::

        found = tickets.collect(directory, model, masks)
        moving = DynamicTraining(
            model, masks, config, total, generator=generator, before_update=found.end, on_update=found.start
        )
        fit(model, data, training, masks=masks, hooks=[moving])
        found.end(total, masks)  # the last ticket as the training leaves it

    Parameters
    ----------
    directory : path
        One for each training; made if missing.
    model : nn.Module
        With its dense initial weights: not yet masked.
    masks : Masks
        The first ones.

    Returns
    -------
    Collector

    Raises
    ------
    ValueError
        If a mask fits no parameter, the directory holds tickets already, or the pruned weights of the model are 0
        already.
    """
    parameters = check_masks(model, masks)
    directory = Path(directory)
    if any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} holds tickets already: choose another directory, or delete this one")
    pruned = [p.detach()[~masks[name].to(p.device)] for name, p in parameters.items()]
    if any(len(p) for p in pruned) and not any(p.any() for p in pruned):
        raise ValueError(
            "the pruned weights of the model are 0 already, so its dense initial weights cannot be kept: collect "
            "before fsp.masks.apply_ and training"
        )
    about = {"number": INIT, "kind": "init", "step": 0}
    save_tensors(_path(directory, INIT, "init"), "ticket", model.state_dict(), about)
    collector = Collector(directory, model)
    collector.start(0, masks)
    return collector


class Collector:
    """Writes the tickets of one training; made by `collect`.

    Attributes
    ----------
    directory : path
    model : nn.Module
        Gives the weights.
    number : int
        The ticket in force.
    """

    def __init__(self, directory: Path, model: nn.Module):
        self.directory, self.model, self.number = directory, model, INIT
        self._masks = ""  # SHA-256 of those of the ticket in force

    def start(self, step: int, masks: Masks) -> None:
        """Write the masks and weights of a new ticket; the argument ``on_update`` of `DynamicTraining`."""
        self.number += 1
        self._masks = digest(masks)
        mask_algebra.save(_path(self.directory, self.number, "masks"), masks, number=self.number, step=step)
        self._weights("start", step, masks)

    def end(self, step: int, masks: Masks) -> None:
        """Write the weights of a ticket that ends; the argument ``before_update`` of `DynamicTraining`.

        Raises
        ------
        ValueError
            If the masks are not those that the ticket started with.
        """
        if digest(masks) != self._masks:
            raise ValueError(f"the masks are not those that ticket {self.number} in {self.directory} started with")
        self._weights("end", step, masks)

    def _weights(self, kind: str, step: int, masks: Masks) -> None:
        """Write kept weights, and the rest in full."""
        state = self.model.state_dict()
        kept = {name: t[masks[name].to(t.device)] if name in masks else t for name, t in state.items()}
        about = {"number": self.number, "kind": kind, "step": step, "masks": self._masks}
        save_tensors(_path(self.directory, self.number, kind), "ticket", kept, about)


def load(directory: str | Path, number: int, kind: str = "start") -> Ticket:
    """Read one ticket.

    Parameters
    ----------
    directory : path
    number : int
        -1 for the dense initial weights, whatever `kind` is.
    kind : {"start", "end"}
        As the ticket was grown, or as it was just before the next update.

    Returns
    -------
    Ticket

    Raises
    ------
    ValueError
        If there is no such ticket, or its files are damaged or do not belong together.
    """
    directory = Path(directory)
    path, masks_path = _path(directory, number, kind), _path(directory, max(number, 0), "masks")
    if not path.exists():
        held = ", ".join(sorted(found.name for found in directory.glob("*.safetensors"))) or "no file"
        raise ValueError(f"{directory} holds no ticket {number} {kind}; it holds {held}")
    weights, about = load_tensors(path, "ticket")
    masks = mask_algebra.load(masks_path)
    if number == INIT:
        masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
    elif digest(masks) != about["masks"]:
        raise ValueError(f"{path} was written with other masks than those in {masks_path}; collect again")
    else:
        for name, mask in masks.items():
            weights[name] = torch.zeros(mask.shape, dtype=weights[name].dtype).masked_scatter_(mask, weights[name])
    return Ticket(masks, weights, about["step"], about["kind"], number)


def put_(model: nn.Module, ticket: Ticket, *, initial: Ticket | None = None) -> None:
    """Give a model the weights of a ticket, or the initial weights under the ticket's mask, in place.

    Parameters
    ----------
    model : nn.Module
    ticket : Ticket
        ``ticket.masks`` are the masks to train the model with; move them to its device.
    initial : Ticket, optional
        Ticket -1: take the weights, norms and running statistics from it, and from `ticket` the mask alone.

    Raises
    ------
    ValueError
        If `initial` is not the ticket of initial weights, or a mask fits no parameter.
    RuntimeError
        If the weights are not those of such a model.
    """
    if initial is not None and initial.kind != "init":
        raise ValueError(
            f"initial is ticket {initial.number} {initial.kind}: the initial weights are load(directory, {INIT})"
        )
    check_masks(model, ticket.masks)
    model.load_state_dict((ticket if initial is None else initial).weights)
    apply_(model, ticket.masks)


def _path(directory: Path, number: int, part: str) -> Path:
    """File of one part of a ticket."""
    return directory / ("init.safetensors" if number == INIT else f"ticket_{number:04d}.{part}.safetensors")
