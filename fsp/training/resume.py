"""A training's state on disk, so that one that is killed goes on from there; see `fsp.training.fit`.

One file of `fsp.files` holds everything: the tensors of model, optimiser, masks, best weights, hooks and random
states, and as JSON the numbers beside them and what the training is known by.
"""

import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fsp.data import Data
from fsp.files import CannotResume, DamagedFile, differences, digest, leftovers, load_tensors, save_tensors
from fsp.masks import Masks
from fsp.training.settings import is_number

FORMAT = 1  # of the file


@dataclass
class State:
    """All that changes in a training, as it is after an optimiser step.

    Attributes
    ----------
    model, optimizer, schedule, masks, hooks
        Those of `fsp.training.fit`; `masks` may be None.
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

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    masks: Masks | None
    hooks: Sequence[object]
    history: object
    order: Tensor
    total_loss: Tensor
    epoch: int = 1
    step: int = 0
    lr: float = math.nan
    seen: int = 0
    best_accuracy: float = -math.inf
    best_state: dict[str, Tensor] | None = None


NUMBERS = ("epoch", "step", "lr", "seen", "best_accuracy")  # of a State


def identity(model: nn.Module, data: Data, config: object) -> dict[str, object]:
    """What decides the result of a training: network, initial weights, examples and settings.

    Parameters
    ----------
    model : nn.Module
        With its initial weights.
    data : fsp.data.Data
    config : fsp.training.TrainConfig

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
    return {
        "model": type(model).__qualname__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "initial_weights": digest(model.state_dict())[:16],
        "data": data.name,
        "examples": digest(examples)[:16],
        "mean": data.mean,
        "std": data.std,
        "augmented": data.augmented,
        "device": next(model.parameters()).device.type,
        **{f"config.{name}": value for name, value in asdict(config).items()},  # type: ignore[call-overload]  # a TrainConfig, whose module imports this one
    }


class Checkpoint:
    """The checkpoint file of one training.

    Parameters
    ----------
    path : str or path
    every_s : float, at least 0
        Seconds between two checkpoints; 0 for one after every step.
    training : dict of JSON values
        What decides the result of the training, `identity` and more: a file with others is of another training.

    Raises
    ------
    ValueError
        If `every_s` is no such number.
    OSError
        If no file can be written there.
    """

    def __init__(self, path: str | Path, every_s: float, training: dict[str, object]):
        if not (is_number(every_s) and every_s >= 0):
            raise ValueError(f"checkpoint_every_s={every_s!r}: expected a number of seconds of at least 0, such as 300")
        self.path, self.every_s, self.training = Path(path), every_s, training | {"format": FORMAT}
        if self.path.is_dir():
            raise IsADirectoryError(f"checkpoint={path!r} is a folder: expected the path of a file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.path.parent).close()  # an OSError now, and not after five minutes
        self.written = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self.written >= self.every_s

    def save(self, at: State) -> None:
        """Write all that a training needs to go on from `at`; the file before is replaced when this one is whole."""
        optimizer, schedule = at.optimizer.state_dict(), at.schedule.state_dict()
        schedule.pop("milestones", None)  # of "multistep", known from the config; JSON turns its whole numbers to text
        of_hooks, values_of_hooks = _states(at.hooks)
        groups = {
            "model": at.model.state_dict(),
            "masks": at.masks or {},
            "best": at.best_state or {},
            "optimizer": {f"{i}/{key}": value for i, of in optimizer["state"].items() for key, value in of.items()},
            "hooks": of_hooks,
            "random": {"cpu": torch.get_rng_state()},
            "at": {"order": at.order, "total_loss": at.total_loss},
        }
        if at.total_loss.is_cuda:  # pragma: no cover - needs CUDA
            groups["random"]["cuda"] = torch.cuda.get_rng_state(at.total_loss.device)
        tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        content = {
            "training": self.training,
            "at": {name: getattr(at, name) for name in NUMBERS},
            "history": asdict(at.history),  # type: ignore[call-overload]  # a History, likewise
            "optimizer": optimizer["param_groups"],
            "schedule": schedule,
            "hooks": values_of_hooks,
        }
        save_tensors(self.path, "checkpoint", tensors, content)
        self.written = time.monotonic()

    def restore(self, at: State) -> None:
        """Bring `at` and the global random states to where the file left them, if there is one.

        Raises
        ------
        CannotResume
            If the file is the checkpoint of another training; the message names what differs.
        TypeError
            If ``state_dict()`` of a hook holds what is neither a tensor nor JSON.

        Warns
        -----
        UserWarning
            If the file is damaged: it is set aside as ``<name>.corrupt``, and the training starts anew.
        """
        _states(at.hooks)
        try:
            tensors, content = load_tensors(self.path, "checkpoint")
        except FileNotFoundError:
            return
        except DamagedFile as error:
            aside = self.path.with_name(self.path.name + ".corrupt")
            warnings.warn(f"{error}; set aside as {aside.name}, training starts anew", stacklevel=4)  # caller of fit
            os.replace(self.path, aside)
            return
        if different := differences(content["training"], self.training):
            raise CannotResume(
                f"{self.path} is the checkpoint of another training: {different}. Choose another path, delete the "
                "file, or give the same settings, data, masks and model, with the weights it had before the first call"
            )
        at.model.load_state_dict(_under("model/", tensors))
        parameters = [p for group in at.optimizer.param_groups for p in group["params"]]
        state = {}
        for i, parameter in enumerate(parameters):
            saved = _under(f"optimizer/{i}/", tensors)
            state[i] = {key: _like(parameter, value) for key, value in saved.items()}
        at.optimizer.load_state_dict({"state": state, "param_groups": content["optimizer"]})
        at.schedule.load_state_dict(content["schedule"])
        masks = {} if at.masks is None else at.masks  # a checkpoint has masks where the training has them
        for name, mask in _under("masks/", tensors).items():
            masks[name] = mask.to(masks[name].device)
        for i, hook in enumerate(at.hooks):
            if hasattr(hook, "load_state_dict"):
                hook.load_state_dict(_under(f"hooks/{i}/", tensors) | content["hooks"][i])
        vars(at).update(content["at"])
        vars(at.history).update(content["history"])
        at.order, at.best_state = tensors["at/order"], _under("best/", tensors) or None
        at.total_loss.copy_(tensors["at/total_loss"])
        torch.set_rng_state(tensors["random/cpu"])
        if at.total_loss.is_cuda:  # pragma: no cover - needs CUDA
            torch.cuda.set_rng_state(tensors["random/cuda"], at.total_loss.device)

    def remove(self) -> None:
        """Remove the file, and what writers of it that were killed have left."""
        self.path.unlink(missing_ok=True)
        for left in leftovers(self.path):
            left.unlink(missing_ok=True)


def _states(hooks: Sequence[object]) -> tuple[dict[str, Tensor], list[dict[str, object]]]:
    """What hooks remember: tensors of all, named by the hook's place, and the JSON values of each."""
    tensors: dict[str, Tensor] = {}
    values: list[dict[str, object]] = []
    for i, hook in enumerate(hooks):
        state = hook.state_dict() if hasattr(hook, "state_dict") else {}
        tensors |= {f"{i}/{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        values.append({name: value for name, value in state.items() if not isinstance(value, Tensor)})
        try:
            json.dumps(values[i])
        except (TypeError, ValueError) as error:
            raise TypeError(f"state_dict() of {hook!r} holds neither tensors nor JSON: {values[i]}: {error}") from error
    return tensors, values


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A state of the parameter's shape in its memory format; any other, such as Adam's count of steps, as it is."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose name begins with a prefix, under the rest of their name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
