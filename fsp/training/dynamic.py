r"""Dynamic sparse training: masks that move while their weights are trained (SET, RigL, ITOP, guided growth).

Every so many steps each layer drops some of its kept weights and grows as many new ones.  No weight crosses layers;
counts are exact, new weights start at 0 and without momentum, unless a setting says otherwise.

What a training explores is the in-time over-parameterisation (ITOP) rate of [1]_: with :math:`F_t` the union of all
masks up to step t, :math:`R_s = \sum_l |F_t^l| / \sum_l N_l`.  Growth at random among the weights that a layer of
density d does not keep after the drop of a fraction :math:`\zeta` takes the fraction u never kept to
:math:`u\,(1 - \zeta d / (1 - d + \zeta d))` in expectation, whatever was dropped.

References
----------
.. [1] Liu, Yin, Mocanu, Pechenizkiy: Do we actually need dense over-parameterization? In-time over-parameterization in
   sparse training. ICML 2021.
.. [2] Mocanu et al.: Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
   network science. Nature Communications 2018 (SET).
.. [3] Evci, Gale, Menick, Castro, Elsen: Rigging the lottery: making all tickets winners. ICML 2020 (RigL).
.. [4] Dettmers, Zettlemoyer: Sparse networks from scratch: faster training without losing performance. 2019 (momentum).
.. [5] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon. NeurIPS 2023
   (guided growth).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fsp.checks import check_count, check_generator, check_tensors
from fsp.data import is_count
from fsp.files import differences
from fsp.masks import Masks, check_masks, density, gradients_are_masked, keep_counts, layer_densities
from fsp.training.settings import check_settings, is_number

GROWTHS = ("random", "gradient", "momentum", "random_unfired")
MOMENTUM = 0.9  # of the dense gradient average that growth by momentum ranks
PLATEAU_UPDATES = 5  # updates over which the growth of the explored part is averaged


@dataclass(frozen=True)
class DynamicConfig:
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
    grow : {"random", "gradient", "momentum", "random_unfired"}
        Among the weights that are pruned after the drop: uniformly at random; the largest in magnitude of the dense
        gradient of the current batch, or of its running average with coefficient .9; or at random among those that no
        mask so far has kept, and at random among the rest when these run out.
    drop : {"magnitude", "set"}
        The smallest in magnitude; or half of them the smallest positive weights and half the negative ones closest
        to 0, one positive more if the number is odd.  A 0 counts as positive; if one sign has too few weights, more
        of the other are dropped.
    replace_step : bool
        Whether an update takes the place of the optimiser step, as in RigL, or follows it.
    exact_counts : bool
        Whether exactly as many weights are grown as dropped.  Otherwise each pruned weight grows independently with
        the probability that makes this the expected number, as in the code of [1]_; random growth only (D32).
    new_weights : {"zero", "initial"}
        Value of a grown weight.  "initial" is what the code of [5]_ means to do and never does (D12).
    candidates : int
        Guided growth: every update draws this many masks of each layer, with one drop and different growths, and the
        layer takes the one with the highest criterion.  Random growths only, for the others give one mask.
    plateau : float, optional
        Masks stay as they are once the last five updates have explored, on average, at most this many percent of the
        weights an update: :math:`100\,|R_s(t) - R_s(t - 5)| / 5 \leq` plateau.  Default: never.
    """

    update_every: int = 100
    zeta0: float = 0.3
    zeta_min: float = 0.0
    anneal: str = "cosine"
    t_end_frac: float = 0.75
    grow: str = "random"
    drop: str = "magnitude"
    replace_step: bool = False
    exact_counts: bool = True
    new_weights: str = "zero"
    candidates: int = 1
    plateau: float | None = None

    def __post_init__(self):
        sound = is_number(self.zeta0) and 0 <= self.zeta0 < 1
        smaller = sound and is_number(self.zeta_min) and 0 <= self.zeta_min <= self.zeta0
        one_mask = self.grow not in ("random", "random_unfired")
        plateau = self.plateau is None or (is_number(self.plateau) and 0 <= self.plateau <= 100)
        rules = [
            ("update_every", is_count(self.update_every, 1), "a whole number >= 1"),
            ("zeta0", sound, "in [0, 1)"),
            ("zeta_min", smaller, "in [0, zeta0]"),
            ("anneal", self.anneal in ("cosine", "constant"), '"cosine" or "constant"'),
            ("t_end_frac", is_number(self.t_end_frac) and 0 < self.t_end_frac <= 1, "in (0, 1]"),
            ("grow", self.grow in GROWTHS, f"one of {', '.join(GROWTHS)}"),
            ("drop", self.drop in ("magnitude", "set"), '"magnitude" or "set"'),
            ("replace_step", isinstance(self.replace_step, bool), "True or False"),
            ("exact_counts", isinstance(self.exact_counts, bool), "True or False"),
            ("exact_counts", self.exact_counts or self.grow == "random", 'True, the only choice unless grow="random"'),
            ("new_weights", self.new_weights in ("zero", "initial"), '"zero" or "initial"'),
            ("candidates", is_count(self.candidates, 1), "a whole number >= 1"),
            ("candidates", self.candidates == 1 or not one_mask, f"1: growth by {self.grow} gives one mask"),
            ("plateau", plateau, "in [0, 100] or None"),
        ]
        check_settings(self, rules)


# "static" never moves: the control that is measured as often as the others.  "set_itop_guided" is [5]'s variant.
PRESETS = {
    "set": DynamicConfig(),
    "rigl": DynamicConfig(grow="gradient", replace_step=True),
    "set_itop": DynamicConfig(update_every=1500, zeta0=0.5, zeta_min=0.005, t_end_frac=1.0),
    "rigl_itop": DynamicConfig(update_every=4000, zeta0=0.5, zeta_min=0.005, t_end_frac=1.0, grow="gradient"),
    "set_itop_guided": DynamicConfig(
        update_every=1500, zeta0=0.5, zeta_min=0.005, t_end_frac=1.0, candidates=3, plateau=0.05
    ),
    "static": DynamicConfig(zeta0=0.0, t_end_frac=1.0),
}


def zeta(config: DynamicConfig, step: int, total_steps: int) -> float:
    """Fraction of kept weights that an update at `step` drops.

    Parameters
    ----------
    config : DynamicConfig
    step : int, >= 0
    total_steps : int, >= 1

    Returns
    -------
    float

    Raises
    ------
    ValueError
        For a number of steps that is none.

    Examples
    --------
    >>> zeta(PRESETS["set_itop"], 0, 100), round(zeta(PRESETS["set_itop"], 100, 100), 6)
    (0.5, 0.005)
    """
    check_count("step", step, 0)
    check_count("total_steps", total_steps, 1)
    if config.anneal == "constant":
        return config.zeta0
    phase = min(1.0, step / (config.t_end_frac * total_steps))
    return config.zeta_min + (config.zeta0 - config.zeta_min) * (1 + math.cos(math.pi * phase)) / 2


# ---- one layer ---------------------------------------------------------------------------------------------------


def drop_and_grow(
    weight: Tensor,
    mask: Tensor,
    fraction: float,
    growths: Sequence[Tensor],
    *,
    generator: torch.Generator,
    drop: str = "magnitude",
    exact_counts: bool = True,
) -> list[Tensor]:
    r"""New masks of one layer: some kept weights out, as many others in.

    Parameters
    ----------
    weight : Tensor
        Those under the mask are ranked.
    mask : Tensor of bool, same shape
    fraction : float, in [0, 1]
        Of the kept weights to drop, :math:`n = \lceil \zeta\,nnz \rceil` and no more than there are pruned weights.
    growths : sequence of Tensor, same shape
        For each new mask, what grows: the highest first, among the weights that are pruned after the drop, those just
        dropped included.  Without `exact_counts`: independent and uniform in [0, 1).
    generator : torch.Generator on the CPU
        Breaks ties.
    drop : {"magnitude", "set"}
    exact_counts : bool
        See `DynamicConfig`.

    Returns
    -------
    list of Tensor of bool
        After one and the same drop, a mask for each growth, with exactly as many kept weights as `mask`, or that many
        in expectation.

    Raises
    ------
    ValueError
        If the mask is not bool, the weight not floating point, a growth of no such shape or complex; for a fraction
        outside [0, 1], what has no order (nan, infinite), or a generator that is not on the CPU.

    References
    ----------
    Mocanu et al. 2018, algorithm 2 (SET); Evci et al., ICML 2020, algorithm 1 (RigL).

    Examples
    --------
    >>> weight, gradient = torch.tensor([0.1, -0.7, 0.4, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0, 9.0])
    >>> drop_and_grow(weight, weight != 0, 1 / 3, [gradient], generator=torch.Generator())
    [tensor([False,  True,  True, False,  True])]
    """
    check_generator(generator)
    check_tensors("argument", {"weight": weight, "mask": mask})
    growths = list(growths)
    check_tensors("growth", {str(number): growth for number, growth in enumerate(growths)})
    if mask.dtype != torch.bool or not weight.is_floating_point() or weight.shape != mask.shape:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)} and weight {weight.dtype} {tuple(weight.shape)}: expected bool "
            "and floating point of one shape"
        )
    for growth in growths:
        if not growth.is_floating_point() or growth.shape != mask.shape:
            raise ValueError(
                f"one of growths is {growth.dtype} {tuple(growth.shape)}: expected floating point {tuple(mask.shape)}"
            )
    if not (is_number(fraction) and 0 <= fraction <= 1):
        raise ValueError(f"fraction={fraction!r}: expected a number in [0, 1], the share of kept weights to drop")
    survivors = _after_drop(weight.detach(), mask, fraction, drop, generator)
    n = int(mask.sum() - survivors.sum())
    if exact_counts:
        return [survivors | _top(growth, ~survivors, n, generator) for growth in growths]
    probability = n / max(1, int((~survivors).sum()))
    return [survivors | (growth < probability) for growth in growths]


def _after_drop(weight: Tensor, mask: Tensor, fraction: float, drop: str, generator: torch.Generator) -> Tensor:
    """The part of a mask that is left after the drop."""
    kept = int(mask.sum())
    n = min(math.ceil(fraction * kept), mask.numel() - kept)
    if drop == "magnitude":
        return _top(weight.abs(), mask, kept - n, generator)
    positive = mask & (weight >= 0)
    negative = mask & ~positive
    n_positive, n_negative = int(positive.sum()), int(negative.sum())
    # half each; where a sign has fewer, the other makes up for it
    dropped = min(max(math.ceil(n / 2), n - n_negative), n_positive)
    left_positive = _top(weight.abs(), positive, n_positive - dropped, generator)
    left_negative = _top(weight.abs(), negative, n_negative - (n - dropped), generator)
    return left_positive | left_negative


def _top(strength: Tensor, among: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The k strongest of some entries."""
    return keep_counts({"": strength.masked_fill(~among, -torch.inf)}, {"": k}, generator)[""]


# ---- a network in training ---------------------------------------------------------------------------------------


class DynamicTraining:
    """Optimiser steps with topology updates in between: a hook of `fsp.training.fit`.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
        The masks given to `fit`; their entries are replaced at every update.
    config : DynamicConfig
    total_steps : int
        Steps of the whole training, for the annealing.
    generator : torch.Generator on the CPU
    criterion : callable, where ``config.candidates > 1``
        ``criterion(mask, weight, name)``: what guided growth maximises, layer by layer, with the weights as they would
        be after the update.  The later of equals is taken, and ``nan`` is less than any number.  It must not draw from
        `generator`.
    initial : dict of name to Tensor, where ``config.new_weights`` is "initial"
        Dense initial weights; may hold more names than `masks`.  They are copied.
    before_update, on_update : callable, optional
        ``before_update(step, masks)`` with the outgoing masks and their weights; ``on_update(step, masks)`` with the
        incoming ones, the weights already masked.

    Attributes
    ----------
    masks : Masks
        Those in force.
    fired : Masks
        Union of all masks in force so far, the first included; ``fsp.masks.density(fired)`` is the ITOP rate.
    explored : Masks
        The same with the rejected candidates.
    stopped : int
        Step of the update after which exploration had come to a plateau; 0 before.

    Raises
    ------
    ValueError
        If a mask fits no parameter, or `criterion` or the initial weights are missing where `config` needs them.

    Examples
    --------
    The guided variant of Hoang et al. with the full-spectrum norm of the layer, on the weights as they are:

    >>> from fsp import pruning, spectrum
    >>> model, generator = nn.Sequential(nn.Linear(64, 10)), torch.Generator().manual_seed(0)
    >>> masks = pruning.prune(model, "erk", 0.3, generator=generator)
    >>> def norm(mask, weight, name):
    ...     return spectrum.coordinate(mask, weight).norm
    >>> moving = DynamicTraining(
    ...     model, masks, PRESETS["set_itop_guided"], 9000, generator=generator, criterion=norm
    ... )
    >>> moving.take_step(1500, torch.optim.SGD(model.parameters(), 0.1))  # as `fit` calls it, with hooks=[moving]
    >>> [(row["step"], row["fired"] < row["explored"]) for row in moving.exploration()]
    [(0, False), (1500, True)]
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        config: DynamicConfig,
        total_steps: int,
        *,
        generator: torch.Generator,
        criterion: Callable[[Tensor, Tensor, str], float] | None = None,
        initial: Mapping[str, Tensor] | None = None,
        before_update: Callable[[int, Masks], None] | None = None,
        on_update: Callable[[int, Masks], None] | None = None,
    ):
        self._parameters = check_masks(model, masks)
        check_generator(generator)
        if config.candidates > 1 and criterion is None:
            raise ValueError(
                f"candidates = {config.candidates} needs criterion=, such as lambda mask, weight, name: "
                "fsp.spectrum.coordinate(mask, weight).norm"
            )
        self.model, self.masks, self.config, self.total_steps = model, masks, config, total_steps
        self.generator, self.criterion = generator, criterion
        self.before_update, self.on_update = before_update, on_update
        self._initial = self._copied(initial or {}) if config.new_weights == "initial" else {}
        self.fired = {name: mask.clone() for name, mask in masks.items()}
        self.explored = {name: mask.clone() for name, mask in masks.items()}
        averaged = self._parameters if config.grow == "momentum" else {}
        self._momentum = {name: torch.zeros_like(parameter.detach()) for name, parameter in averaged.items()}
        self.stopped = 0
        self._history: list[dict] = []  # see `exploration`
        self._note(0)

    def _copied(self, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Initial weights of every layer; a ValueError if there are none."""
        for name, parameter in self._parameters.items():
            if name not in initial or initial[name].shape != parameter.shape:
                raise ValueError(
                    f'new_weights = "initial" needs initial=, a dict with the dense initial weights of {name!r}, '
                    f"shape {tuple(parameter.shape)}"
                )
        return {name: initial[name].detach().to(p.device, p.dtype, copy=True) for name, p in self._parameters.items()}

    def take_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Take one step, counted from 1, with the gradients in place.

        Raises
        ------
        ValueError
            If growth ranks gradients, and `fsp.masks.hold_` masks those of pruned weights.
        """
        config = self.config
        ranked = self._parameters.items() if config.grow in ("gradient", "momentum") else ()
        for name, parameter in ranked:
            if gradients_are_masked(parameter):
                raise ValueError(
                    f"grow = {config.grow!r} ranks the gradients of pruned weights, and those of {name!r} are masked: "
                    "pass dense_gradients=True to fsp.masks.hold_"
                )
        for name, average in self._momentum.items():  # the optimiser's own is 0 at pruned weights
            gradient = self._parameters[name].grad
            if gradient is not None:
                average.mul_(MOMENTUM).add_(gradient)
        due = step % config.update_every == 0 and step < config.t_end_frac * self.total_steps and not self.stopped
        if not (due and config.replace_step):
            optimizer.step()
        if due and self._finite():
            if self.before_update is not None:
                self.before_update(step, self.masks)
            for name in self.masks:
                self._update(name, zeta(config, step, self.total_steps))
            self._note(step)
            if self.on_update is not None:
                self.on_update(step, self.masks)

    def exploration(self) -> list[dict]:
        """How much has been explored, in order of time.

        Returns
        -------
        list of dict
            One for the first masks (step 0) and one for each update: ``step``, ``fired`` (the ITOP rate over all
            layers), ``explored`` (the same with rejected candidates) and ``layers``, the ITOP rate of each by name.
        """
        return copy.deepcopy(self._history)

    def state_dict(self) -> dict[str, object]:
        """Everything that a resumed training needs besides model and optimiser.

        Returns
        -------
        dict
            Tensors, copied to the CPU: masks, what was explored, gradient averages, the state of the generator.  JSON
            values: the rows of `exploration`, and `stopped`.
        """
        groups = {"mask": self.masks, "fired": self.fired, "explored": self.explored, "momentum": self._momentum}
        tensors = {f"{group}.{name}": t for group, found in groups.items() for name, t in found.items()}
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        copies["generator"] = self.generator.get_state()
        return {**copies, "exploration": self.exploration(), "stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another training was when it gave its state.

        Replaces the entries of the masks in place and sets the generator; `fsp.training.fit` calls it for a
        checkpoint.  The training goes on to the last bit as if uninterrupted (CPU, one number of threads) if the
        model and the optimiser, momentum included, are restored too.

        Parameters
        ----------
        state : dict
            From `state_dict`.

        Raises
        ------
        ValueError
            If the state is of other layers or another kind of growth; nothing has been changed then.
        """
        if different := differences(_shapes(state), _shapes(self.state_dict())):
            raise ValueError(f"the state was saved with other masks or another `grow`: {different}")
        for name, parameter in self._parameters.items():
            for group, found in (("mask", self.masks), ("fired", self.fired), ("explored", self.explored)):
                found[name] = state[f"{group}.{name}"].to(found[name].device, copy=True)
            if name in self._momentum:
                self._momentum[name] = state[f"momentum.{name}"].to(parameter.device, copy=True)
        self.generator.set_state(state["generator"].cpu())
        self._history, self.stopped = copy.deepcopy(state["exploration"]), state["stopped"]

    def _finite(self) -> bool:
        """Whether all can be ranked: what is not finite has no order, and `fit` ends a training that diverges."""
        weights = self._parameters.values()
        ranked = [t for p in weights for t in (p, p.grad) if t is not None] + [*self._momentum.values()]
        return all(t.isfinite().all() for t in ranked)

    @torch.no_grad()
    def _update(self, name: str, fraction: float) -> None:
        """Move the mask of one layer."""
        config, parameter = self.config, self._parameters[name]
        growths = [self._growth(name) for _ in range(config.candidates)]
        options: dict[str, Any] = {"drop": config.drop, "exact_counts": config.exact_counts}
        found = drop_and_grow(parameter, self.masks[name], fraction, growths, generator=self.generator, **options)
        best, highest = None, -math.inf
        for mask in found:
            self.explored[name] |= mask
            weight = self._weight_under(name, mask)
            value = float(self.criterion(mask, weight, name)) if config.candidates > 1 else 0.0  # type: ignore[misc]  # `__init__`: more candidates need it
            value = -math.inf if math.isnan(value) else value
            if value >= highest:
                best, highest = (mask, weight), value
        self.masks[name], weight = best  # type: ignore[misc]  # one value at least is no less than -inf
        self.fired[name] |= self.masks[name]
        parameter.copy_(weight)

    def _growth(self, name: str) -> Tensor:
        """What grows first in one layer."""
        parameter = self._parameters[name]
        if self.config.grow == "gradient":
            return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.abs()
        if self.config.grow == "momentum":
            return self._momentum[name].abs()
        # a Bernoulli draw compares with small probabilities, which float32 is too coarse for
        dtype = torch.float32 if self.config.exact_counts else torch.float64
        drawn = torch.rand(parameter.shape, generator=self.generator, dtype=dtype).to(parameter.device)
        return drawn if self.config.grow == "random" else drawn + ~self.fired[name]

    def _weight_under(self, name: str, mask: Tensor) -> Tensor:
        """Weights of one layer under a new mask; what was kept before keeps its value, also if dropped and regrown."""
        weight = self._parameters[name]
        new = self._initial.get(name, torch.zeros((), device=mask.device)).to(weight)
        return torch.where(mask & self.masks[name], weight, torch.where(mask, new, 0))

    def _note(self, step: int) -> None:
        """Add to the history; stop at a plateau."""
        rates = {"fired": density(self.fired), "explored": density(self.explored)}
        self._history.append({"step": step, **rates, "layers": layer_densities(self.fired)})
        if self.config.plateau is not None and len(self._history) > PLATEAU_UPDATES:
            rise = abs(self._history[-1]["fired"] - self._history[-1 - PLATEAU_UPDATES]["fired"])
            if 100 * rise / PLATEAU_UPDATES <= self.config.plateau:
                self.stopped = step


def _shapes(state: Mapping[str, object]) -> dict[str, str]:
    """Type and shape of every tensor of a state."""
    return {name: f"{t.dtype} {list(t.shape)}" for name, t in state.items() if isinstance(t, Tensor)}
