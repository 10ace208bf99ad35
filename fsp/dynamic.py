r"""Dynamic sparse training: a mask of constant size that moves while its weights are trained (SET, RigL).

Every so many steps each layer drops its smallest weights and grows as many new ones.  Counts are exact, grown weights
start at 0 without momentum, and no weight crosses layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fsp.masks import Masks, apply_, check_masks, keep_counts


@dataclass(frozen=True)
class DynamicSparsity:
    r"""How masks move during training.

    Attributes
    ----------
    update_every : int
        Optimiser steps between topology updates.
    zeta0, zeta_min : float
        First and last fraction of a layer's kept weights that an update drops.
    anneal : {"cosine", "constant"}
        :math:`\zeta_t = \zeta_{min} + \frac12 (\zeta_0 - \zeta_{min})(1 + \cos(\pi t / T_{end}))`, or always zeta0.
    t_end_frac : float
        Fraction of the training after which masks stay as they are (:math:`T_{end}`).
    grow : {"random", "gradient"}
        New weights uniformly at random, or where the dense gradient of the current batch is largest in magnitude.
    replace_step : bool
        Whether an update takes the place of the optimiser step, as in RigL, or follows it.
    """

    update_every: int = 100
    zeta0: float = 0.3
    zeta_min: float = 0.0
    anneal: str = "cosine"
    t_end_frac: float = 0.75
    grow: str = "random"
    replace_step: bool = False

    def __post_init__(self):
        for name, valid, expected in [
            ("update_every", isinstance(self.update_every, int) and self.update_every >= 1, "a whole number >= 1"),
            ("zeta0", 0 <= self.zeta0 < 1, "in [0, 1)"),
            ("zeta_min", 0 <= self.zeta_min <= self.zeta0, "in [0, zeta0]"),
            ("anneal", self.anneal in ("cosine", "constant"), '"cosine" or "constant"'),
            ("t_end_frac", 0 < self.t_end_frac <= 1, "in (0, 1]"),
            ("grow", self.grow in ("random", "gradient"), '"random" or "gradient"'),
        ]:
            if not valid:
                raise ValueError(f"DynamicSparsity: {name} = {getattr(self, name)!r} is not {expected}")


# "static" never moves: the control that is measured as often as the others.
PRESETS = {
    "set": DynamicSparsity(),
    "rigl": DynamicSparsity(grow="gradient", replace_step=True),
    "set_itop": DynamicSparsity(update_every=1500, zeta0=0.5, zeta_min=0.005, t_end_frac=1.0),
    "rigl_itop": DynamicSparsity(update_every=4000, zeta0=0.5, zeta_min=0.005, t_end_frac=1.0, grow="gradient"),
    "static": DynamicSparsity(zeta0=0.0, t_end_frac=1.0),
}


def zeta(config: DynamicSparsity, step: int, total_steps: int) -> float:
    """Fraction of kept weights that an update at `step` drops.

    Parameters
    ----------
    config : DynamicSparsity
    step, total_steps : int

    Returns
    -------
    float

    Examples
    --------
    >>> zeta(PRESETS["set_itop"], 0, 100), round(zeta(PRESETS["set_itop"], 100, 100), 6)
    (0.5, 0.005)
    """
    if config.anneal == "constant":
        return config.zeta0
    phase = min(1.0, step / (config.t_end_frac * total_steps))
    return config.zeta_min + (config.zeta0 - config.zeta_min) * (1 + math.cos(math.pi * phase)) / 2


def drop_and_grow(
    weight: Tensor, mask: Tensor, fraction: float, growth: Tensor, *, generator: torch.Generator
) -> Tensor:
    """New mask of one layer: the smallest kept weights out, as many others in.

    Parameters
    ----------
    weight : Tensor
        Those under the mask are ranked by magnitude.
    mask : Tensor of bool, same shape
    fraction : float, in [0, 1]
        Of the kept weights to drop; rounded up, and no more than there are pruned weights.
    growth : Tensor, same shape
        Higher grows first, among the weights that are pruned after the drop; a weight just dropped may come back.
    generator : torch.Generator on the CPU
        Breaks ties.

    Returns
    -------
    Tensor of bool
        With exactly as many kept weights as `mask`.

    References
    ----------
    Mocanu et al. 2018, algorithm 2 (SET); Evci et al., ICML 2020, algorithm 1 (RigL).
    """
    kept = int(mask.sum())
    n = min(math.ceil(fraction * kept), mask.numel() - kept)
    strength = weight.detach().abs().masked_fill(~mask, -torch.inf)
    survivors = keep_counts({"": strength}, {"": kept - n}, generator)[""]
    grown = keep_counts({"": growth.masked_fill(survivors, -torch.inf)}, {"": n}, generator)[""]
    return survivors | grown


def stepper(
    model: nn.Module,
    masks: Masks,
    config: DynamicSparsity,
    total_steps: int,
    *,
    generator: torch.Generator,
    on_update: Callable[[int, Masks], None] | None = None,
) -> Callable[[int, torch.optim.Optimizer], None]:
    """Make the ``take_step`` argument of `fsp.train.fit`: optimiser steps with topology updates in between.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
        The masks given to `fit`; their entries are replaced at every update.
    config : DynamicSparsity
    total_steps : int
        Steps of the whole training, for the annealing.
    generator : torch.Generator on the CPU
    on_update : callable, optional
        ``on_update(step, masks)`` after each update, with the new masks and the weights already masked.

    Returns
    -------
    callable
        ``take_step(step, optimizer)``, steps counted from 1.
    """
    parameters = check_masks(model, masks)

    def growth(parameter: Tensor) -> Tensor:
        if config.grow == "gradient":
            return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.abs()
        return torch.rand(parameter.shape, generator=generator).to(parameter.device)

    def take_step(step: int, optimizer: torch.optim.Optimizer) -> None:
        due = step % config.update_every == 0 and step < config.t_end_frac * total_steps
        if not (due and config.replace_step):
            optimizer.step()
        if due and all(t.isfinite().all() for p in parameters.values() for t in (p, p.grad) if t is not None):
            # what is not finite has no order; a training that diverges is ended by `fit`
            fraction = zeta(config, step, total_steps)
            for name, parameter in parameters.items():
                masks[name] = drop_and_grow(parameter, masks[name], fraction, growth(parameter), generator=generator)
            apply_(model, masks)
            if on_update is not None:
                on_update(step, masks)

    return take_step
