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

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor, nn

from fsp.masks import Masks, check_masks, density, keep_counts, layer_densities

GROWTHS = ("random", "gradient", "momentum", "random_unfired")
MOMENTUM = 0.9  # of the dense gradient average that growth by momentum ranks
PLATEAU_UPDATES = 5  # updates over which the growth of the explored part is averaged


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
    grow : {"random", "gradient", "momentum", "random_unfired"}
        Among the weights that are pruned after the drop: uniformly at random; the largest in magnitude of the dense
        gradient of the current batch, or of its running average with coefficient .9; or at random among those that no
        mask so far has kept, and at random among the rest when these run out.
    drop : {"magnitude", "set"}
        The smallest in magnitude; or half of them the smallest positive weights and half the negative ones closest
        to 0, one positive more if the number is odd.  A 0 counts as positive; a sign that has too few leaves the rest
        to the other.
    replace_step : bool
        Whether an update takes the place of the optimiser step, as in RigL, or follows it.
    exact_counts : bool
        Whether exactly as many weights are grown as dropped.  Otherwise each pruned weight grows independently with
        the probability that makes this the expected number, as in the code of [1]_; random growth only (D32).
    new_weights : {"zero", "initial"}
        Value of a grown weight.  "initial" is what the code of [5]_ means to do and never does (D12).
    candidates : int
        Guided growth: this many masks, with one drop and different growths, are drawn at every update, and each layer
        takes the one with the highest criterion.  Random growths only, for the others give one mask.
    plateau : float, optional
        Masks stay as they are once the last five updates explored, on average, no more than this many percent of the
        weights each: :math:`100\,|R_s(t) - R_s(t - 5)| / 5 \leq` plateau.  Default: never.
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
        def number(name: str, valid: Callable[[float], bool]) -> bool:
            value = getattr(self, name)
            return isinstance(value, Real) and not isinstance(value, bool) and valid(value)

        def count(name: str) -> bool:
            return number(name, lambda v: isinstance(v, int) and v >= 1)

        sound = number("zeta0", lambda v: 0 <= v < 1)
        random = self.grow in ("random", "random_unfired")
        switches = ("replace_step", "exact_counts")
        for name, valid, expected in [
            ("update_every", count("update_every"), "a whole number >= 1"),
            ("zeta0", sound, "in [0, 1)"),
            ("zeta_min", sound and number("zeta_min", lambda v: 0 <= v <= self.zeta0), "in [0, zeta0]"),
            ("anneal", self.anneal in ("cosine", "constant"), '"cosine" or "constant"'),
            ("t_end_frac", number("t_end_frac", lambda v: 0 < v <= 1), "in (0, 1]"),
            ("grow", self.grow in GROWTHS, f"one of {', '.join(GROWTHS)}"),
            ("drop", self.drop in ("magnitude", "set"), '"magnitude" or "set"'),
            *((name, isinstance(getattr(self, name), bool), "True or False") for name in switches),
            ("exact_counts", self.exact_counts or self.grow == "random", 'True, the only choice unless grow="random"'),
            ("new_weights", self.new_weights in ("zero", "initial"), '"zero" or "initial"'),
            ("candidates", count("candidates"), "a whole number >= 1"),
            ("candidates", random or self.candidates == 1, f"1: growth by {self.grow} gives one mask"),
            ("plateau", self.plateau is None or number("plateau", lambda v: 0 <= v <= 100), "in [0, 100] or None"),
        ]:
            if not valid:
                raise ValueError(f"DynamicSparsity: {name} = {getattr(self, name)!r} is not {expected}")


# "static" never moves: the control that is measured as often as the others.  "set_itop_guided" is [5]'s variant.
PRESETS = {
    "set": DynamicSparsity(),
    "rigl": DynamicSparsity(grow="gradient", replace_step=True),
    "set_itop": DynamicSparsity(update_every=1500, zeta0=0.5, zeta_min=0.005, t_end_frac=1.0),
    "rigl_itop": DynamicSparsity(update_every=4000, zeta0=0.5, zeta_min=0.005, t_end_frac=1.0, grow="gradient"),
    "set_itop_guided": DynamicSparsity(
        update_every=1500, zeta0=0.5, zeta_min=0.005, t_end_frac=1.0, candidates=3, plateau=0.05
    ),
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


# ---- one layer ---------------------------------------------------------------------------------------------------


def drop_and_grow(
    weight: Tensor,
    mask: Tensor,
    fraction: float,
    growth: Tensor,
    *,
    generator: torch.Generator,
    drop: str = "magnitude",
    exact_counts: bool = True,
) -> Tensor:
    r"""New mask of one layer: some kept weights out, as many others in.

    Parameters
    ----------
    weight : Tensor
        Those under the mask are ranked.
    mask : Tensor of bool, same shape
    fraction : float, in [0, 1]
        Of the kept weights to drop, :math:`n = \lceil \zeta\,nnz \rceil` and no more than there are pruned weights.
    growth : Tensor, same shape
        Higher grows first, among the weights that are pruned after the drop; a weight just dropped may come back.
        Without `exact_counts`: independent and uniform in [0, 1).
    generator : torch.Generator on the CPU
        Breaks ties.
    drop : {"magnitude", "set"}
    exact_counts : bool
        See `DynamicSparsity`.

    Returns
    -------
    Tensor of bool
        With exactly as many kept weights as `mask`, or that many in expectation.

    References
    ----------
    Mocanu et al. 2018, algorithm 2 (SET); Evci et al., ICML 2020, algorithm 1 (RigL).

    Examples
    --------
    >>> weight, gradient = torch.tensor([0.1, -0.7, 0.4, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0, 9.0])
    >>> drop_and_grow(weight, weight != 0, 1 / 3, gradient, generator=torch.Generator())
    tensor([False,  True,  True, False,  True])
    """
    survivors = _after_drop(weight, mask, fraction, drop, generator)
    return survivors | _grown(survivors, int(mask.sum() - survivors.sum()), growth, exact_counts, generator)


def _after_drop(weight: Tensor, mask: Tensor, fraction: float, drop: str, generator: torch.Generator) -> Tensor:
    """What a mask keeps of itself."""
    kept = int(mask.sum())
    n = min(math.ceil(fraction * kept), mask.numel() - kept)
    strength = weight.detach().abs()
    if drop == "magnitude":
        return _top(strength, mask, kept - n, generator)
    positive = mask & (weight.detach() >= 0)
    negative = mask & ~positive
    sizes = int(positive.sum()), int(negative.sum())
    # half each; where a sign has fewer, the other makes up for it
    n_positive = min(max(math.ceil(n / 2), n - sizes[1]), sizes[0])
    return _top(strength, positive, sizes[0] - n_positive, generator) | _top(
        strength, negative, sizes[1] - (n - n_positive), generator
    )


def _grown(survivors: Tensor, n: int, growth: Tensor, exact_counts: bool, generator: torch.Generator) -> Tensor:
    """What grows beside the survivors: n weights, or each with probability n / (number of pruned ones)."""
    if exact_counts:
        return _top(growth, ~survivors, n, generator)
    return ~survivors & (growth < n / max(1, int((~survivors).sum())))


def _top(strength: Tensor, among: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The k strongest of some entries."""
    return keep_counts({"": strength.masked_fill(~among, -torch.inf)}, {"": k}, generator)[""]


# ---- a network in training ---------------------------------------------------------------------------------------


def stepper(
    model: nn.Module,
    masks: Masks,
    config: DynamicSparsity,
    total_steps: int,
    *,
    generator: torch.Generator,
    criterion: Callable[[Tensor, Tensor, str], float] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    before_update: Callable[[int, Masks], None] | None = None,
    on_update: Callable[[int, Masks], None] | None = None,
) -> "Stepper":
    """Make the ``take_step`` argument of `fsp.training.fit`: optimiser steps with topology updates in between.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
        The masks given to `fit`; their entries are replaced at every update.
    config : DynamicSparsity
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

    Returns
    -------
    Stepper
        ``take_step(step, optimizer)``, steps counted from 1.

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
    >>> take_step = stepper(
    ...     model, masks, PRESETS["set_itop_guided"], 9000, generator=generator, criterion=norm
    ... )
    >>> take_step(1500, torch.optim.SGD(model.parameters(), 0.1))
    >>> [(row["step"], row["fired"] < row["explored"]) for row in take_step.exploration()]
    [(0, False), (1500, True)]
    """
    parameters = check_masks(model, masks)
    if config.candidates > 1 and criterion is None:
        raise ValueError(
            f"candidates = {config.candidates} needs criterion=, such as lambda mask, weight, name: "
            "fsp.spectrum.coordinate(mask, weight).norm"
        )
    start = {}
    if config.new_weights == "initial":
        for name, parameter in parameters.items():
            if initial is None or name not in initial or initial[name].shape != parameter.shape:
                raise ValueError(
                    f'new_weights = "initial" needs initial=, a dict with the dense initial weights of {name!r}, '
                    f"shape {tuple(parameter.shape)}"
                )
            start[name] = initial[name].detach().to(parameter.device, parameter.dtype, copy=True)
    return Stepper(model, masks, config, total_steps, generator, criterion, start, before_update, on_update)


@dataclass(eq=False, repr=False)
class Stepper:
    """Optimiser steps with topology updates in between; made by `stepper`.

    Attributes
    ----------
    masks : Masks
        Those in force.
    fired : Masks
        Union of all masks in force so far, the first included; ``fsp.masks.density(fired)`` is the ITOP rate.
    explored : Masks
        The same with the rejected candidates.
    step : int
        The last one taken.
    stopped : int
        Step of the update after which exploration had come to a plateau; 0 before.
    """

    model: nn.Module
    masks: Masks
    config: DynamicSparsity
    total_steps: int
    generator: torch.Generator
    criterion: Callable[[Tensor, Tensor, str], float] | None
    initial: dict[str, Tensor]
    before_update: Callable[[int, Masks], None] | None
    on_update: Callable[[int, Masks], None] | None
    fired: Masks = field(init=False)
    explored: Masks = field(init=False)
    step: int = field(init=False, default=0)
    stopped: int = field(init=False, default=0)

    def __post_init__(self):
        self._parameters = check_masks(self.model, self.masks)
        self.fired = {name: mask.clone() for name, mask in self.masks.items()}
        self.explored = {name: mask.clone() for name, mask in self.masks.items()}
        averaged = self._parameters if self.config.grow == "momentum" else {}
        self._momentum = {name: torch.zeros_like(parameter.detach()) for name, parameter in averaged.items()}
        self._history: list[list[float]] = []  # step, R_s with and without rejected candidates, R_s of each layer
        self._note(0)

    def __call__(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Take one step, counted from 1, with the gradients in place."""
        self.step, config = step, self.config
        for name, average in self._momentum.items():  # the optimiser's own knows nothing of pruned weights
            if self._parameters[name].grad is not None:
                average.mul_(MOMENTUM).add_(self._parameters[name].grad)
        due = step % config.update_every == 0 and step < config.t_end_frac * self.total_steps and not self.stopped
        if not (due and config.replace_step):
            optimizer.step()
        if due and self._finite():
            if self.before_update is not None:
                self.before_update(step, self.masks)
            self._update(zeta(config, step, self.total_steps))
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
        return [
            dict(step=int(step), fired=fired, explored=explored, layers=dict(zip(self.masks, layers, strict=True)))
            for step, fired, explored, *layers in self._history
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed training needs besides model and optimiser.

        Returns
        -------
        dict of name to Tensor
            Copies on the CPU that `safetensors.torch.save_file` can write: masks, what was explored, gradient
            averages, the state of the generator, numbers.
        """
        groups = {"mask": self.masks, "fired": self.fired, "explored": self.explored, "momentum": self._momentum}
        tensors = {f"{group}.{name}": t for group, found in groups.items() for name, t in found.items()}
        return {name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()} | {
            "generator": self.generator.get_state(),
            "history": torch.tensor(self._history, dtype=torch.float64),
            "numbers": torch.tensor([self.step, self.stopped]),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where another stepper was when it gave its state.

        Replaces the entries of the masks in place and sets the generator; do it before `fsp.training.fit` is called.
        The training goes on to the last bit as if uninterrupted (CPU, one number of threads) if the model and the
        optimiser, momentum included, are restored too and the next call is for step ``self.step + 1``.

        Parameters
        ----------
        state : dict of name to Tensor
            From `state_dict`.

        Raises
        ------
        ValueError
            If the state is of other layers or another kind of growth; nothing has been changed then.
        """
        own = self.state_dict()
        if different := sorted(own.keys() ^ state.keys()):
            raise ValueError(
                f"the state {'lacks' if different[0] in own else 'holds'} {different[0]!r}, and this stepper does not: "
                "it was saved with other masks or another `grow`"
            )
        for name, here in own.items():
            there, free = state[name], int(name == "history")  # as many rows as updates
            if there.dtype != here.dtype or there.shape[free:] != here.shape[free:]:
                raise ValueError(
                    f"{name!r} of the state is {there.dtype} {tuple(there.shape)}, and {here.dtype} "
                    f"{tuple(here.shape)} here: it was saved with other masks"
                )
        for name, parameter in self._parameters.items():
            for group, found in (("mask", self.masks), ("fired", self.fired), ("explored", self.explored)):
                found[name] = state[f"{group}.{name}"].to(found[name].device, copy=True)
            if name in self._momentum:
                self._momentum[name] = state[f"momentum.{name}"].to(parameter.device, copy=True)
        self.generator.set_state(state["generator"].cpu())
        self._history = state["history"].tolist()
        self.step, self.stopped = state["numbers"].tolist()

    def _finite(self) -> bool:
        """Whether all can be ranked: what is not finite has no order, and `fit` ends a training that diverges."""
        weights = self._parameters.values()
        ranked = [t for p in weights for t in (p, p.grad) if t is not None] + [*self._momentum.values()]
        return all(t.isfinite().all() for t in ranked)

    @torch.no_grad()
    def _update(self, fraction: float) -> None:
        """Move every mask once."""
        config, generator = self.config, self.generator
        for name, parameter in self._parameters.items():
            old = self.masks[name]
            growths = [self._growth(name, parameter) for _ in range(config.candidates)]
            survivors = _after_drop(parameter, old, fraction, config.drop, generator)
            n = int(old.sum() - survivors.sum())
            best, highest = None, -math.inf
            for growth in growths:
                mask = survivors | _grown(survivors, n, growth, config.exact_counts, generator)
                self.explored[name] |= mask
                weight = self._weight_under(name, mask, old)
                value = -math.inf
                if config.candidates > 1:
                    value = float(self.criterion(mask, weight, name))
                    value = -math.inf if math.isnan(value) else value
                if value >= highest:
                    best, highest = (mask, weight), value
            self.masks[name] = best[0]
            self.fired[name] |= best[0]
            parameter.copy_(best[1])

    def _growth(self, name: str, parameter: Tensor) -> Tensor:
        """What grows first in one layer."""
        if self.config.grow == "gradient":
            return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.abs()
        if self.config.grow == "momentum":
            return self._momentum[name].abs()
        # a Bernoulli draw compares with small probabilities, which float32 is too coarse for
        dtype = torch.float32 if self.config.exact_counts else torch.float64
        drawn = torch.rand(parameter.shape, generator=self.generator, dtype=dtype).to(parameter.device)
        return drawn if self.config.grow == "random" else drawn + ~self.fired[name]

    def _weight_under(self, name: str, mask: Tensor, old: Tensor) -> Tensor:
        """Weights of one layer after an update; those that were kept before have their value, dropped and back too."""
        new = self.initial.get(name, torch.zeros((), device=mask.device))
        weight = self._parameters[name].detach()
        return torch.where(mask & old, weight, torch.where(mask, new.to(weight), 0))

    def _note(self, step: int) -> None:
        """Add to the history; stop at a plateau."""
        rates = [density(self.fired), density(self.explored), *layer_densities(self.fired).values()]
        self._history.append([step, *rates])
        if self.config.plateau is not None and len(self._history) > PLATEAU_UPDATES:
            rise = abs(self._history[-1][1] - self._history[-1 - PLATEAU_UPDATES][1])
            if 100 * rise / PLATEAU_UPDATES <= self.config.plateau:
                self.stopped = step
