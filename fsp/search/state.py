"""Where a search stands, and the directory that keeps it.

``state.safetensors`` holds the incumbent, its coordinates and the votes, with a JSON header of all else, in one file
that is replaced as a whole; ``ticket_NNNNNN.masks.safetensors`` is the incumbent after candidate NNNNNN, read by
`fsp.masks.load`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fsp import masks as mask_algebra
from fsp.files import digest, replacing
from fsp.masks import Masks


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
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    header = {
        "settings": settings,
        "candidate": state.candidate,
        "accepted": state.accepted,
        "rows": state.rows,
        "tickets": list(state.tickets),
        "timing": state.timing,
        "layers": list(state.masks),
        "digest": digest(tensors),
    }
    with replacing(folder / "state.safetensors") as temporary:
        temporary.write_bytes(save(tensors, metadata={"fsp_search": json.dumps(header)}))


def read(folder: Path, settings: dict[str, object], device: Mapping[str, torch.device]) -> State | None:
    """The state in a directory; None if nothing has been written yet.

    Parameters
    ----------
    folder : path
    settings : dict
        They have to be those that the state was made with.
    device : dict of layer name to device
        Where masks and votes belong.

    Returns
    -------
    State or None

    Raises
    ------
    ValueError
        If the settings differ, naming each; if a file is damaged or missing, naming it.
    """
    path = folder / "state.safetensors"
    if not path.exists():
        if left := sorted(folder.glob("ticket_*.masks.safetensors")):
            raise ValueError(f"{left[0]} lies there without {path}, which tells its settings: choose another directory")
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["fsp_search"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        if header["digest"] != digest(tensors):
            raise ValueError("its content is not what was written")
        stored, names = header["settings"], header["layers"]
        asked = json.loads(json.dumps(settings))
        different = {n: (stored.get(n), asked.get(n)) for n in {**stored, **asked} if stored.get(n) != asked.get(n)}
        if not different:
            masks, votes = ({n: tensors[f"{kind}.{n}"].to(device[n]) for n in names} for kind in ("mask", "votes"))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): choose another directory, or delete this one") from error
    if different:
        told = "; ".join(f"{name} is {there!r} there and {here!r} here" for name, (there, here) in different.items())
        raise ValueError(f"{folder} holds another search: {told}. Choose another directory, or give the same settings")
    return State(
        header["candidate"],
        masks,
        tensors["values"],
        votes,
        header["accepted"],
        header["rows"],
        _tickets(folder, header["tickets"], device),
        header["timing"],
    )


def _tickets(folder: Path, candidates: list[int], device: Mapping[str, torch.device]) -> dict[int, Masks]:
    """Tickets as they were held in memory: a layer that did not change is the tensor of the ticket before."""
    tickets: dict[int, Masks] = {}
    last: Masks = {}
    for candidate in candidates:
        path = _ticket_path(folder, candidate)
        if not path.exists():
            raise ValueError(f"{path} is missing: choose another directory, or delete this one")
        loaded = {name: m.to(device[name]) for name, m in mask_algebra.load(path).items()}
        last = {n: last[n] if n in last and torch.equal(last[n], m) else m for n, m in loaded.items()}
        tickets[candidate] = last
    return tickets


def _ticket_path(folder: Path, candidate: int) -> Path:
    """File of the incumbent after a candidate."""
    return folder / f"ticket_{candidate:06d}.masks.safetensors"


def described(value: object) -> object:
    """Something JSON can hold that tells one setting from another: tensors as digests, functions by their name."""
    if isinstance(value, Tensor):
        return digest({"": value})
    if isinstance(value, Mapping):
        return {str(name): described(v) for name, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [described(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return getattr(value, "__qualname__", None) or repr(value)
