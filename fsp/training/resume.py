"""A training's state on disk, so that one that is killed goes on from there; see `fsp.training.fit`.

One file of `fsp.files` holds everything: the tensors of model, optimiser, masks, best weights, hooks and random
states, and as JSON the numbers beside them and what the training is known by.
"""

import errno
import json
import math
import os
import re
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
from fsp.files import DamagedFile, differences, digest, load_tensors, save_tensors
from fsp.masks import Masks
from fsp.training.settings import is_number

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
        **{f"config.{name}": value for name, value in asdict(config).items()},
    }


class Checkpoint:
    """The checkpoint file of one training.

    Parameters
    ----------
    path : str or path
        Read now, if it exists.
    every_s : float, at least 0
        Seconds between two checkpoints; 0 for one after every step.
    data, config, start_step
        Those of `fsp.training.fit`: with the model's weights and the masks as they are now and the names of the hooks'
        types, they decide whether a file that exists is of this training.
    model, optimizer, schedule, masks, hooks
        What is saved and restored, in place.  `masks` may be None.

    Raises
    ------
    ValueError
        If the file is the checkpoint of another training (naming what differs), or `every_s` is no such number.
    TypeError
        If ``state_dict()`` of a hook holds what is neither a tensor nor JSON.
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
        data: Data,
        config: object,
        start_step: int,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        masks: Masks | None,
        hooks: Sequence[object],
    ):
        if not (is_number(every_s) and every_s >= 0):
            raise ValueError(f"checkpoint_every_s={every_s!r}: expected a number of seconds of at least 0, such as 300")
        self.path, self.every_s = Path(path), every_s
        self.model, self.optimizer, self.schedule, self.masks = model, optimizer, schedule, masks
        self.hooks = [hook for hook in hooks if hasattr(hook, "state_dict")]
        self.device = next(model.parameters()).device
        self.training = identity(model, data, config) | {
            "format": FORMAT,
            "masks": None if masks is None else digest(masks)[:16],
            "hooks": [type(hook).__qualname__ for hook in hooks] or None,
            "start_step": start_step,
        }
        self._states_of_hooks()
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
        of_hooks, values_of_hooks = self._states_of_hooks()
        groups = {
            "model": self.model.state_dict(),
            "masks": self.masks or {},
            "best": at.best_state or {},
            "optimizer": {f"{i}/{key}": value for i, of in optimizer["state"].items() for key, value in of.items()},
            "hooks": of_hooks,
            "random": {"cpu": torch.get_rng_state()},
            "at": {"order": at.order, "total_loss": at.total_loss},
        }
        if self.device.type == "cuda":
            groups["random"]["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        content = {
            "training": self.training,
            "at": {name: getattr(at, name) for name in NUMBERS},
            "history": asdict(at.history),
            "optimizer": optimizer["param_groups"],
            "schedule": schedule,
            "hooks": values_of_hooks,
        }
        save_tensors(self.path, "checkpoint", tensors, content)
        self.written = time.monotonic()

    def restore(self, at: Position) -> None:
        """Bring everything, `at` and the global random states included, to where the file left it, if there is one."""
        if self.found is None:
            return
        (tensors, content), self.found = self.found, None
        self.model.load_state_dict(_under("model/", tensors))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {}
        for i, parameter in enumerate(parameters):
            saved = _under(f"optimizer/{i}/", tensors)  # copied into the parameter's memory format
            state[i] = {key: torch.empty_like(parameter).copy_(value) for key, value in saved.items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": content["optimizer"]})
        self.schedule.load_state_dict(content["schedule"])
        for name, mask in _under("masks/", tensors).items():
            self.masks[name] = mask.to(self.masks[name].device)
        for i, hook in enumerate(self.hooks):
            hook.load_state_dict(_under(f"hooks/{i}/", tensors) | content["hooks"][i])
        vars(at).update(content["at"])
        vars(at.history).update(content["history"])
        at.order, at.best_state = tensors["at/order"], _under("best/", tensors) or None
        at.total_loss.copy_(tensors["at/total_loss"])
        torch.set_rng_state(tensors["random/cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)

    def remove(self) -> None:
        """Remove the file, and what writers of it that were killed have left."""
        self.path.unlink(missing_ok=True)
        temporary = re.compile(rf"\.{re.escape(self.path.stem)}-[a-z0-9_]{{8}}{re.escape(self.path.suffix)}")
        for path in self.path.parent.glob(".*"):
            if temporary.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _states_of_hooks(self) -> tuple[dict[str, Tensor], list[dict[str, object]]]:
        """Tensors of all hooks, and the JSON values of each."""
        tensors, values = {}, []
        for i, hook in enumerate(self.hooks):
            state = hook.state_dict()
            of_hook = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            tensors |= {f"{i}/{name}": tensor for name, tensor in of_hook.items()}
            values.append({name: value for name, value in state.items() if name not in of_hook})
            try:
                json.dumps(values[i])
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"{type(hook).__qualname__}.state_dict() holds {values[i]} beside tensors: JSON cannot hold it: {error}"
                ) from error
        return tensors, values

    def _read(self) -> tuple[dict[str, Tensor], dict] | None:
        """Tensors and JSON content of the file; None without one. A damaged file is set aside."""
        try:
            tensors, content = load_tensors(self.path, "checkpoint")
        except FileNotFoundError:
            return None
        except DamagedFile as error:
            aside = self.path.with_name(self.path.name + ".corrupt")
            warnings.warn(f"{error}; set aside as {aside.name}, training starts anew", stacklevel=4)  # caller of fit
            os.replace(self.path, aside)
            return None
        if different := differences(content["training"], self.training):
            raise ValueError(
                f"{self.path} is the checkpoint of another training: {different}. Choose another path, delete the "
                "file, or give the same settings, data, masks and model, with the weights it had before the first call"
            )
        return tensors, content


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose name begins with a prefix, under the rest of their name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
