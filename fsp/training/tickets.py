r"""Tickets: the masks that dynamic sparse training passes through, with their weights, to be trained on their own.

Ticket 0 is the first mask; every topology update ends one ticket and starts the next.  A ticket is kept as it starts
(its mask just grown) and as it ends (just before the next update), and the dense initial weights are ticket -1.

Tickets of one training follow each other in time, so anything that grows with training grows along them.  The initial
weights under a ticket's mask tell what the mask alone is worth (D34): see `put_`.

A directory holds, of tensors written with safetensors:

==========================================  ==========================================================================
``init.safetensors``                        the dense initial model
``ticket_NNNN.masks.safetensors``           masks, one bit a weight; read by `fsp.masks.load`
``ticket_NNNN.start.safetensors``, ``.end`` kept weights alone, in the order of the mask, and the rest of the model
                                            (biases, norms, running statistics) in full
==========================================  ==========================================================================

Files of weights are written last and hold the SHA-256 of their masks and of themselves.  No other precision is used
than the model's.

References
----------
.. [1] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon. NeurIPS 2023.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fsp import masks as mask_algebra
from fsp.files import digest, replacing
from fsp.masks import Masks, apply_, check_masks

INIT = -1  # number of the ticket of dense initial weights
KINDS = ("init", "start", "end")


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


# ---- collecting --------------------------------------------------------------------------------------------------


def collect(directory: str | Path, model: nn.Module, masks: Masks, *, start_step: int = 0) -> "Collector":
    """Begin to collect the tickets of a training.

    Writes the initial weights and ticket 0.  Give the methods of the collector to `fsp.training.dynamic.stepper`::

        collector = tickets.collect(directory, model, masks)
        take_step = stepper(
            model, masks, config, total, generator=generator,
            before_update=collector.end, on_update=collector.start,
        )
        fit(model, data, training, masks=masks, take_step=take_step)
        collector.end(total, masks)  # the last ticket as the training leaves it

    Parameters
    ----------
    directory : path
        One for each training; made if missing.
    model : nn.Module
        With its dense initial weights: not yet masked.
    masks : Masks
        The first ones.
    start_step : int, >= 0
        To go on with a training that was interrupted: steps it has taken.  Tickets after that are deleted, for they
        come again; `model` and `masks` are then those restored, and are not written.

    Returns
    -------
    Collector

    Raises
    ------
    ValueError
        If a mask fits no parameter; at the start, if the directory holds tickets or the pruned weights of the model
        are 0 already; later, if the directory holds none to go on from, or others than those that end in `masks`.
    """
    parameters = check_masks(model, masks)
    if isinstance(start_step, bool) or not isinstance(start_step, int) or start_step < 0:
        raise ValueError(f"start_step={start_step!r}: expected a whole number of steps >= 0")
    collector = Collector(Path(directory), model)
    found = contents(directory)
    if start_step:
        if not found or found[0][1] != "init":
            raise ValueError(
                f"{directory} holds no tickets to go on from at step {start_step}: begin with start_step=0"
            )
        for number, kind, step in found:
            if step > start_step:
                _path(collector.directory, number, kind).unlink()
                if kind == "start":
                    _path(collector.directory, number, "masks").unlink()
        collector.number = max(number for number, _, step in found if step <= start_step)
        collector.check(masks)
        return collector
    if found:
        raise ValueError(
            f"{directory} holds {len(found)} tickets already: choose another directory, delete this one, or give "
            "start_step= to go on"
        )
    pruned = [p.detach()[~masks[name].to(p.device)] for name, p in parameters.items()]
    if any(len(p) for p in pruned) and not any(p.any() for p in pruned):
        raise ValueError(
            "the pruned weights of the model are 0 already, so its dense initial weights cannot be kept: collect "
            "before fsp.masks.apply_ and training"
        )
    _write(_path(collector.directory, INIT, "init"), model.state_dict(), number=INIT, kind="init", step=0, masks="")
    collector.start(0, masks)
    return collector


@dataclass
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

    directory: Path
    model: nn.Module
    number: int = INIT

    def start(self, step: int, masks: Masks) -> None:
        """Write the masks and weights of a new ticket; the argument ``on_update`` of `fsp.training.dynamic.stepper`."""
        self.number += 1
        mask_algebra.save(_path(self.directory, self.number, "masks"), masks, number=self.number, step=step)
        self._weights("start", step, masks)

    def end(self, step: int, masks: Masks) -> None:
        """Write the weights of a ticket that ends; the argument ``before_update`` of `fsp.training.dynamic.stepper`.

        Raises
        ------
        ValueError
            If the masks are not those that the ticket started with.
        """
        self.check(masks)
        self._weights("end", step, masks)

    def check(self, masks: Masks) -> None:
        """Raise a ValueError unless the ticket in force has these masks."""
        path = _path(self.directory, self.number, "masks")
        stored = mask_algebra.load(path)
        if stored.keys() != masks.keys() or not all(torch.equal(stored[name], m.cpu()) for name, m in masks.items()):
            raise ValueError(f"the masks are not those of ticket {self.number} in {path}: is it of another training?")

    def _weights(self, kind: str, step: int, masks: Masks) -> None:
        """Write kept weights, and the rest in full."""
        state = self.model.state_dict()
        kept = {name: t[masks[name].to(t.device)] if name in masks else t for name, t in state.items()}
        checksum = mask_algebra.metadata(_path(self.directory, self.number, "masks"))["checksum"]
        path = _path(self.directory, self.number, kind)
        _write(path, kept, number=self.number, kind=kind, step=step, masks=checksum)


# ---- reading -----------------------------------------------------------------------------------------------------


def contents(directory: str | Path) -> list[tuple[int, str, int]]:
    """What a directory of tickets holds; no weight is read.

    Parameters
    ----------
    directory : path

    Returns
    -------
    list of (number, kind, step)
        In order of time, the initial weights first; empty for a directory without tickets.

    Raises
    ------
    ValueError
        If a file is no ticket of this package.
    """
    files = [*Path(directory).glob("init.safetensors")]
    files += [path for kind in KINDS[1:] for path in Path(directory).glob(f"ticket_*.{kind}.safetensors")]
    headers = [_header(path) for path in files]
    return sorted(((h["number"], h["kind"], h["step"]) for h in headers), key=lambda t: (t[0], KINDS.index(t[1])))


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
    kind = "init" if number == INIT else kind
    path, masks_path = _path(directory, number, kind), _path(directory, max(number, 0), "masks")
    if not path.exists():
        held = ", ".join(f"{n} {k}" for n, k, _ in contents(directory)) or "none"
        raise ValueError(f"{directory} holds no ticket {number} {kind}; it holds {held}")
    header, masks = _header(path), mask_algebra.load(masks_path)
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and collect again") from error
    if digest(state) != header["checksum"]:
        raise ValueError(f"{path} is damaged: its weights do not have the SHA-256 in its header; collect again")
    if number == INIT:
        return Ticket({name: torch.ones_like(m) for name, m in masks.items()}, state, header["step"], kind, number)
    if mask_algebra.metadata(masks_path)["checksum"] != header["masks"]:
        raise ValueError(f"{path} was written with other masks than those in {masks_path}; collect again")
    for name, mask in masks.items():
        state[name] = torch.zeros(mask.shape, dtype=state[name].dtype).masked_scatter_(mask, state[name])
    return Ticket(masks, state, header["step"], kind, number)


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


# ---- files -------------------------------------------------------------------------------------------------------


def _path(directory: Path, number: int, part: str) -> Path:
    """File of one part of a ticket."""
    return directory / ("init.safetensors" if number == INIT else f"ticket_{number:04d}.{part}.safetensors")


def _write(path: Path, tensors: Mapping[str, Tensor], **header: object) -> None:
    """Write weights and what they are, atomically."""
    # copies: safetensors refuses tensors that share memory, as tied weights do
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    header |= {"checksum": digest(own)}
    with replacing(path) as temporary:
        temporary.write_bytes(save(own, metadata={"fsp_ticket": json.dumps(header)}))


def _header(path: Path) -> dict:
    """What a file of weights tells of itself."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["fsp_ticket"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no whole ticket ({error}): delete it and collect again") from error
