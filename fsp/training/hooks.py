"""Hooks: what `fsp.training.fit` calls while it trains.

A hook is an object with any of these methods.  Steps and epochs count from 1; a step that ``start_step`` skips calls
no hook.

====================================  ================================================================================
``before_step(step, optimizer)``      the gradients are in place
``take_step(step, optimizer)``        instead of ``optimizer.step()``; at most one hook of a training has it
``after_step(step, optimizer)``       the weights are those after this step; pruned ones are 0
``selects(epoch)``                    after validation: whether this epoch may be the best one; all must agree
``epoch_end(epoch)``                  after validation, with the model in eval mode; not if the training has diverged
``state_dict()``                      a dict of tensors and JSON values, for the checkpoint
``load_state_dict(state)``            takes such a dict back, with tensors on the CPU and tuples as lists
====================================  ================================================================================

A hook has both of the last two methods or neither.  Hooks are called in the order in which they are given.

Gradients of pruned weights are 0 for hooks with ``before_step``, so that one may clip gradients by norm.  They are
dense as soon as a hook has ``take_step``, as dynamic sparse training has; an attribute ``dense_gradients`` of a hook,
True or False, says otherwise.

A checkpoint knows a hook by the name of its class.  An attribute ``identity`` of a hook, a JSON value, says more: the
settings with which alone the training can go on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

CALLED = ("before_step", "take_step", "after_step", "epoch_end")


def check_hooks(hooks: Sequence[object]) -> None:
    """Raise a ValueError unless these can be the hooks of one training."""
    for hook in hooks:
        if not any(hasattr(hook, name) for name in CALLED):
            raise ValueError(f"the hook {hook!r} has none of the methods {', '.join(CALLED)}: it would do nothing")
        if hasattr(hook, "state_dict") != hasattr(hook, "load_state_dict"):
            raise ValueError(
                f"the hook {hook!r} has only one of `state_dict` and `load_state_dict`: give it both, or neither"
            )
    if len(methods(hooks, "take_step")) > 1:
        raise ValueError("more than one hook has `take_step`: only one can take the place of optimizer.step()")


def methods(hooks: Sequence[object], name: str) -> list[Callable]:
    """The methods of this name, of the hooks that have one."""
    return [getattr(hook, name) for hook in hooks if hasattr(hook, name)]


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy of a model's ``state_dict``."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Snapshots:
    """A hook that keeps copies of a model's ``state_dict`` after given steps.

    Parameters
    ----------
    model : nn.Module
    steps : iterable of int, at least 0
        Step 0 is the model as it is now, before `fit` applies masks.

    Attributes
    ----------
    states : dict of step to (dict of name to Tensor)
        On the model's device.  A step that the training does not reach is missing.

    Examples
    --------
    >>> from fsp import data, training
    >>> net, digits = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data.load("digits")
    >>> kept = training.Snapshots(net, [0, 5])
    >>> _ = training.fit(net, digits, training.TrainConfig(epochs=1), hooks=[kept])
    >>> sorted(kept.states), kept.states[5]["1.weight"].shape
    ([0, 5], torch.Size([10, 64]))
    """

    def __init__(self, model: nn.Module, steps: Iterable[int]):
        self.model, self.steps = model, frozenset(steps)
        self.states: dict[int, dict[str, Tensor]] = {}
        self._keep(0)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Copy the model if this is one of the steps."""
        self._keep(step)

    def _keep(self, step: int) -> None:
        if step in self.steps:
            self.states[step] = copied_state(self.model)

    def state_dict(self) -> dict[str, Tensor]:
        """The copies so far, under ``"step/name"``."""
        return {f"{step}/{name}": t for step, state in self.states.items() for name, t in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the copies by those of another `state_dict`."""
        own = self.model.state_dict()
        reached = sorted({int(key.split("/")[0]) for key in state})
        self.states = {
            step: {name: state[f"{step}/{name}"].to(t.device) for name, t in own.items()} for step in reached
        }
