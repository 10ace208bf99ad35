"""A training's state on disk, so that one that is killed goes on from there; see `fsp.training.fit`.

One safetensors file holds everything: the tensors of model, optimiser, masks, best weights and random states, and in
its header, as JSON, the numbers beside them, the settings of the training, and a SHA-256 over all of it.
"""

import errno
import json
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fsp.data import Data
from fsp.files import digest, replacing
from fsp.masks import Masks

FORMAT = 1  # of the file


@dataclass
class Position:
    """Where a training stands after an optimiser step, beside what model, optimiser and schedule know.

    Attributes
    ----------
    history : fsp.training.History
    order : Tensor
        State of the data's generator before the order of this epoch was drawn.
    total_loss : Tensor, 0-dimensional
        Sum of the training loss over the `seen` examples of this epoch.
    epoch : int
        From 1.
    step : int
        The last one made; 0 before the first.
    lr : float
        Learning rate of this epoch's first step.
    seen : int
        Examples of this epoch that were trained on.
    best_accuracy : float
    best_state : dict, optional
        Weights of the best epoch.
    """

    history: object
    order: Tensor
    total_loss: Tensor
    epoch: int = 1
    step: int = 0
    lr: float = math.nan
    seen: int = 0
    best_accuracy: float = -math.inf
    best_state: dict[str, Tensor] | None = None


NUMBERS = ("epoch", "step", "lr", "seen", "best_accuracy")  # of a Position


def identity(
    model: nn.Module, data: Data, config: object, masks: Masks | None, take_step: Callable | None, start_step: int
) -> dict[str, object]:
    """What decides the result of a training: a checkpoint with other values is one of another training.

    Parameters
    ----------
    model : nn.Module
        With its initial weights.
    data : fsp.data.Data
    config : fsp.training.TrainConfig
    masks : Masks, optional
    take_step : callable, optional
        Known by its name alone.
    start_step : int

    Returns
    -------
    dict
        JSON values; tensors and examples are represented by the first 16 digits of their SHA-256.
    """
    examples = {
        f"{name}/{part}": tensor
        for name in ("train", "validation", "test")
        for part, tensor in getattr(data, name)._asdict().items()
    }
    found = {
        "format": FORMAT,
        "model": type(model).__qualname__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "initial_weights": digest(model.state_dict())[:16],
        "masks": None if masks is None else digest(masks)[:16],
        "data": data.name,
        "examples": digest(examples)[:16],
        "mean": data.mean,
        "std": data.std,
        "augmented": data.augmented,
        "device": next(model.parameters()).device.type,
        "take_step": None if take_step is None else getattr(take_step, "__qualname__", type(take_step).__qualname__),
        "start_step": start_step,
        **{f"config.{name}": value for name, value in asdict(config).items()},
    }
    return json.loads(json.dumps(found))  # as it is read: tuples are lists


class Checkpoint:
    """The checkpoint file of one training.

    Parameters
    ----------
    path : str or path
        Read now, if it exists.
    every_s : float, at least 0
        Seconds between two checkpoints; 0 for one after every step.
    training : dict
        See `identity`.
    model, optimizer, schedule, masks, take_step
        What is saved and restored, in place.  `masks` and `take_step` may be None.

    Raises
    ------
    ValueError
        If the file is the checkpoint of another training (naming what differs), `every_s` is no such number, or
        `take_step` has only one of ``state_dict`` and ``load_state_dict``.
    TypeError
        If ``take_step.state_dict()`` holds what is neither a tensor nor JSON.
    OSError
        If no file can be written there.

    Warns
    -----
    UserWarning
        If the file is damaged: it is set aside as ``<name>.corrupt`` and the training starts anew.
    """

    def __init__(
        self,
        path: str | Path,
        every_s: float,
        training: dict[str, object],
        *,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        masks: Masks | None,
        take_step: Callable | None,
    ):
        if isinstance(every_s, bool) or not isinstance(every_s, Real) or not 0 <= every_s < math.inf:
            raise ValueError(f"checkpoint_every_s={every_s!r}: expected a number of seconds of at least 0, such as 300")
        if hasattr(take_step, "state_dict") != hasattr(take_step, "load_state_dict"):
            raise ValueError(
                f"take_step {take_step!r} has only one of `state_dict` and `load_state_dict`: give it both, or neither"
            )
        self.path, self.every_s, self.training = Path(path), every_s, training
        self.model, self.optimizer, self.schedule, self.masks = model, optimizer, schedule, masks
        self.take_step = take_step if hasattr(take_step, "state_dict") else None
        self._of_take_step()
        self.device = next(model.parameters()).device
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "checkpoint is a folder: expected the path of a file", str(self.path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.path.parent).close()  # an OSError now, and not after five minutes
        self.found = self._read()
        self.written = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self.written >= self.every_s

    def save(self, at: Position) -> None:
        """Write all that a training needs to go on from `at`; the file before is replaced when this one is whole."""
        optimizer, schedule = self.optimizer.state_dict(), self.schedule.state_dict()
        schedule.pop("milestones", None)  # of "multistep", known from the config; JSON turns its whole numbers to text
        hook, plain = self._of_take_step()
        groups = {
            "model": self.model.state_dict(),
            "masks": self.masks or {},
            "best": at.best_state or {},
            "optimizer": {f"{i}/{key}": value for i, of in optimizer["state"].items() for key, value in of.items()},
            "take_step": hook,
            "random": {"cpu": torch.get_rng_state()}
            | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}),
            "at": {"order": at.order, "total_loss": at.total_loss},
        }
        tensors = {
            f"{group}/{name}": value.detach().to("cpu", copy=True).contiguous()  # a copy: files hold no shared weights
            for group, values in groups.items()
            for name, value in values.items()
        }
        content = {
            "training": self.training,
            "at": {name: getattr(at, name) for name in NUMBERS},
            "history": asdict(at.history),
            "optimizer": optimizer["param_groups"],
            "schedule": schedule,
            "take_step": plain,
        }
        text = json.dumps(content)
        packed = save(tensors, metadata={"fsp_checkpoint": text, "sha256": digest(tensors, text)})
        with replacing(self.path) as temporary:
            temporary.write_bytes(packed)
        self.written = time.monotonic()

    def restore(self, at: Position) -> None:
        """Bring everything, `at` and the global random states included, to where the file left it, if there is one."""
        if self.found is None:
            return
        (tensors, content), self.found = self.found, None
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = value
        self.model.load_state_dict(groups["model"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(parameters))}
        for name, value in groups.get("optimizer", {}).items():
            i, _, key = name.partition("/")
            state[int(i)][key] = torch.empty_like(parameters[int(i)]).copy_(value)  # in the parameter's memory format
        self.optimizer.load_state_dict({"state": state, "param_groups": content["optimizer"]})
        self.schedule.load_state_dict(content["schedule"])
        for name, mask in groups.get("masks", {}).items():
            self.masks[name] = mask.to(self.masks[name].device)
        if self.take_step:
            self.take_step.load_state_dict(groups.get("take_step", {}) | content["take_step"])
        vars(at).update(content["at"])
        vars(at.history).update(content["history"])
        at.order, at.best_state = groups["at"]["order"].clone(), groups.get("best")
        at.total_loss.copy_(groups["at"]["total_loss"])
        torch.set_rng_state(groups["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(groups["random"]["cuda"], self.device)

    def remove(self) -> None:
        """Remove the file, and what writers of it that were killed have left."""
        self.path.unlink(missing_ok=True)
        temporary = re.compile(rf"\.{re.escape(self.path.stem)}-[a-z0-9_]{{8}}{re.escape(self.path.suffix)}")
        for path in self.path.parent.glob(".*"):
            if temporary.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _of_take_step(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors and JSON values that `take_step` wants to have saved."""
        state = self.take_step.state_dict() if self.take_step else {}
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in state.items() if name not in tensors}
        for name, value in plain.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"take_step.state_dict()[{name!r}] is {value!r}: expected a tensor or what JSON can hold ({error})"
                ) from error
        return tensors, plain

    def _read(self) -> tuple[dict[str, Tensor], dict] | None:
        """Tensors and JSON content of the file; None without one. A damaged file is set aside."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                header = file.metadata()
            if header["sha256"] != digest(tensors, header["fsp_checkpoint"]):
                raise ValueError("its content is not what was written")
            content = json.loads(header["fsp_checkpoint"])
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            aside = self.path.with_name(self.path.name + ".corrupt")
            warnings.warn(
                f"{self.path} is no whole checkpoint ({error}); set aside as {aside.name}, training starts anew",
                stacklevel=4,  # the caller of fit
            )
            os.replace(self.path, aside)
            return None
        there, here = content["training"], self.training
        different = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        if different:
            told = "; ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in different)
            raise ValueError(
                f"{self.path} is the checkpoint of another training: {told}. Choose another path, delete the file, or "
                "give the same settings, data, masks and model, with the weights it had before the first call"
            )
        return tensors, content
