"""Where a search stands, and the directory that keeps it.

``state.safetensors`` holds the incumbent, its coordinates and the votes, with all else as its content, in one file of
`fsp.files`; ``ticket_NNNNNN.masks.safetensors`` is the incumbent after candidate NNNNNN, read by `fsp.masks.load`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fsp import masks as mask_algebra
from fsp.files import CannotResume, DamagedFile, differences, digest, load_tensors, save_tensors
from fsp.masks import Masks

KIND = "search"
PLAIN_VALUES = ("candidate", "accepted", "rows", "timing")  # of a State, as JSON holds them


@dataclass(frozen=True)
class State:
    """Everything that a search needs to go on.  Nothing in it is changed in place: a new state takes its place.

    Attributes
    ----------
    candidate : int
        Index of the last candidate that was judged.
    masks : Masks
        The incumbent.
    values : Tensor, shape (L, 4), float64
        Its coordinates.
    votes : dict of name to Tensor of int32
        How many candidates kept each weight.
    accepted : int
        Layers replaced so far.
    rows : list of dict
        Of the trajectory.
    tickets : dict of candidate to Masks
    timing : dict of str to float
        Seconds of sampling and of measuring.
    """

    candidate: int
    masks: Masks
    values: Tensor
    votes: dict[str, Tensor]
    accepted: int = 0
    rows: list[dict] = field(default_factory=list)
    tickets: dict[int, Masks] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=lambda: {"sampling": 0.0, "measuring": 0.0})


def write(folder: Path, state: State, settings: dict[str, object]) -> None:
    """Write tickets that are not there yet, then the state, each file atomically.

    Parameters
    ----------
    folder : path
        Made if missing.
    state : State
    settings : dict
        What JSON can hold.
    """
    for candidate, masks in state.tickets.items():
        path = _ticket_path(folder, candidate)
        if not path.exists():
            mask_algebra.save(path, masks, candidate=candidate)
    tensors = {f"mask.{name}": m for name, m in state.masks.items()}
    tensors |= {f"votes.{name}": v for name, v in state.votes.items()} | {"values": state.values}
    content = {
        "settings": settings,
        "layers": list(state.masks),
        "tickets": list(state.tickets),
        **{name: getattr(state, name) for name in PLAIN_VALUES},
    }
    save_tensors(folder / "state.safetensors", KIND, tensors, content)


def read(folder: Path, settings: dict[str, object], model: nn.Module) -> State | None:
    """The state in a directory; None if nothing has been written yet.

    Parameters
    ----------
    folder : path
    settings : dict
        They have to be those that the state was made with.
    model : nn.Module
        Masks and votes go to the devices of its weights.

    Returns
    -------
    State or None

    Raises
    ------
    CannotResume
        If the settings differ, naming each; if a file is damaged or missing, naming it.
    """
    path = folder / "state.safetensors"
    if not path.exists():
        if left := sorted(folder.glob("ticket_*.masks.safetensors")):
            raise CannotResume(f"{left[0]} is there without {path}, which holds its settings: choose another directory")
        return None
    try:
        tensors, content = load_tensors(path, KIND)
    except DamagedFile as error:
        raise CannotResume(f"{error}: choose another directory, or delete this one") from error
    if different := differences(content["settings"], settings):
        text = f"{folder} holds another search: {different}. Choose another directory, or the same settings"
        raise CannotResume(text)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    device = {name: parameters[name].device for name in content["layers"]}
    return State(
        masks={name: tensors[f"mask.{name}"].to(device[name]) for name in device},
        values=tensors["values"],
        votes={name: tensors[f"votes.{name}"].to(device[name]) for name in device},
        tickets=_read_tickets(folder, content["tickets"], device),
        **{name: content[name] for name in PLAIN_VALUES},
    )


def _read_tickets(folder: Path, candidates: list[int], device: Mapping[str, torch.device]) -> dict[int, Masks]:
    """Tickets as they were held in memory: a layer that did not change is the tensor of the ticket before."""
    tickets: dict[int, Masks] = {}
    last: Masks = {}
    for candidate in candidates:
        path = _ticket_path(folder, candidate)
        if not path.exists():
            raise CannotResume(f"{path} is missing: choose another directory, or delete this one")
        try:
            masks = mask_algebra.load(path)
        except ValueError as error:
            raise CannotResume(f"{error}: choose another directory, or delete this one") from error
        loaded = {name: m.to(device[name]) for name, m in masks.items()}
        last = {n: last[n] if n in last and torch.equal(last[n], m) else m for n, m in loaded.items()}
        tickets[candidate] = last
    return tickets


def _ticket_path(folder: Path, candidate: int) -> Path:
    """File of the incumbent after a candidate."""
    return folder / f"ticket_{candidate:06d}.masks.safetensors"


def as_json(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings as JSON holds them, to tell one from another: tensors as digests, functions by their names."""

    def plain(value: object) -> object:
        if isinstance(value, Tensor):
            return digest({"": value})
        if isinstance(value, set):
            return sorted(value)  # their order is another one in every process
        return getattr(value, "__qualname__", None) or repr(value)

    return json.loads(json.dumps(settings, default=plain))
