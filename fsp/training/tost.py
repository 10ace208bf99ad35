r"""ToST: a recipe that trains any masked network better, with ghosts that are gone at the end.

Four parts, each of which can be left out (`dataclasses.replace` of `Recipe`):

* soft activations: each ReLU begins as Swish or Mish and becomes itself, see `fsp.training.ghosts.SoftReLU`;
* ghost skips: 1×1 branches around convolutions, whose weight :math:`\alpha` falls from 1 to 0;
* re-scaled initialisation: see `fsp.training.rescaling.rescale_`;
* smoothed labels: the target is :math:`1 - a` for the class and :math:`a / (C - 1)` for each of the other ones.

With p the fraction of the steps made, and the two ends :math:`e_0, e_1` of the window,

.. math:: \alpha = \max(0, 1 - p / e_1), \qquad w = (p - e_0) / (e_1 - e_0) \text{ within } [0, 1],

w for the activations.  From :math:`e_1` on the network is the given one: exact ReLUs, no branches.  What the paper's
schedules are is unknown, these are ours (D55).

References
----------
.. [1] Jaiswal, Ma, Chen, Ding, Wang: Training your sparse neural network better with any mask. ICML 2022.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsp.checks import check_generator
from fsp.data import Data
from fsp.masks import Masks, check_masks
from fsp.training import train
from fsp.training.ghosts import ACTIVATIONS, Branch, Ghosted, places_of, strip_
from fsp.training.hooks import check_hooks
from fsp.training.rescaling import Rescaling, rescale_
from fsp.training.settings import check_settings, is_number
from fsp.training.train import History, TrainConfig


@dataclass(frozen=True)
class Recipe:
    """Which parts of ToST a training has, and when the ghosts go.

    Attributes
    ----------
    e0, e1 : float, 0 <= e0 <= e1 < 1
        Beginning and end of the annealing, as fractions of the training: as `TrainConfig.milestones`, so that one
        recipe serves a training of any length.  The default end is the default of the first milestone.
    activation : {"swish", "mish", None}
        What a ReLU begins as; None leaves it.
    skips : bool
        Ghost skips.  A network without convolutions that take them has none.
    rescale : Rescaling, optional
        Settings of the re-scaled initialisation; None leaves it out.
    labels : float, in [0, 1)
        Probability on the other classes together, in the training loss alone (D59); 0 leaves the labels as they are.
    annealed : bool
        False: activations and skips stay as they begin, to the end and in the trained network, as in the authors'
        code; `e0` and `e1` are without effect.

    Examples
    --------
    >>> dataclasses.replace(Recipe(), skips=False, rescale=None).activation
    'swish'
    """

    e0: float = 0.0
    e1: float = 0.5
    activation: str | None = "swish"
    skips: bool = True
    rescale: Rescaling | None = field(default_factory=Rescaling)
    labels: float = 0.1
    annealed: bool = True

    def __post_init__(self):
        ends = is_number(self.e1) and 0 <= self.e1 < 1
        choice = any(type(self.activation) is type(known) and self.activation == known for known in ACTIVATIONS)
        rescaling = self.rescale is None or isinstance(self.rescale, Rescaling)
        rules = [
            ("e1", ends, "a fraction of the training, in [0, 1)"),
            ("e0", ends and is_number(self.e0) and 0 <= self.e0 <= self.e1, "in [0, e1]"),
            ("activation", choice, f"one of {', '.join(map(repr, ACTIVATIONS))}"),
            ("skips", isinstance(self.skips, bool), "True or False"),
            ("rescale", rescaling, "a Rescaling, such as Rescaling(iterations=90), or None"),
            ("labels", is_number(self.labels) and 0 <= self.labels < 1, "in [0, 1)"),
            ("annealed", isinstance(self.annealed, bool), "True or False"),
        ]
        check_settings(self, rules)

    def alpha(self, over: float) -> float:
        """Weight of the ghost skips after this fraction of the training."""
        if not self.annealed:
            return 1.0
        return 1 - over / self.e1 if over < self.e1 else 0.0

    def hardness(self, over: float) -> float:
        """How much of the annealing of the activations is over after this fraction of the training, in [0, 1]."""
        if not self.annealed:
            return 0.0
        if over >= self.e1:
            return 1.0
        return max(0.0, over - self.e0) / (self.e1 - self.e0)


TOST = Recipe()


def fit(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    masks: Masks | None = None,
    recipe: Recipe = TOST,
    hooks: Sequence[object] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every_s: float = 300.0,
    generator: torch.Generator | None = None,
) -> History:
    """Train a model by `fsp.training.fit` with the parts of ToST; it ends as it came, without ghosts.

    Parameters
    ----------
    model : nn.Module
        Maps images to logits; trained in place, left in eval mode.  Any network that `torch.fx` can trace and whose
        ReLUs are modules.
    data : fsp.data.Data
        On the model's device.
    config : TrainConfig
        Without label smoothing of its own where the recipe smooths labels.
    masks : Masks, optional
        Of the model's own weights; ghosts are never masked, and not counted in the density.
    recipe : Recipe
    hooks : sequence of objects
        As in `fsp.training.fit`.  They are made from `model`, whose ``state_dict`` never has ghosts in it.
    checkpoint, checkpoint_every_s
        As in `fsp.training.fit`; a training that goes on calls this function with all arguments as they were before
        the first call, `generator` too.
    generator : torch.Generator on the CPU, optional
        Draws the batches of the re-scaled initialisation.  Default: a fresh one with the seed of `config`.

    Returns
    -------
    History
        The best epoch is one of those that began when the annealing was over: the weights are then those of the
        network without ghosts, and so are the running statistics of its batch norms.

    Raises
    ------
    ValueError
        Before any training, beside the cases of `fsp.training.fit`: no epoch begins after `e1`; the model cannot be
        traced, has ghosts already or calls a ReLU that is no module; both recipe and config smooth the labels.

    Notes
    -----
    Where nothing is annealed, the model keeps what was trained: soft activations, and each branch as the module
    ``ghost`` of its convolution.  `fsp.training.ghosts.strip` gives a copy without them.

    Ghosts are trained with the settings of everything else, weight decay included.  With alpha at 0 they are not
    computed and not changed.

    References
    ----------
    Jaiswal et al., ICML 2022, section 3.

    Examples
    --------
    >>> from fsp import data, models, pruning, training
    >>> digits, net = data.load("digits"), models.build("cnn", (1, 8, 8), 10, widths=(8, 8))
    >>> masks = pruning.prune(net, "erk", 0.3, generator=torch.Generator().manual_seed(0))
    >>> recipe = Recipe(rescale=Rescaling(iterations=10))
    >>> history = fit(net, digits, training.TrainConfig(epochs=2), masks=masks, recipe=recipe)
    >>> history.best_epoch, [type(module).__name__ for module in net][:3]
    (2, ['Conv2d', 'BatchNorm2d', 'ReLU'])
    """
    check_masks(model, masks or {})
    check_hooks(hooks)
    train.check_last_batch(model, data, config)
    config = _with_labels(config, data, recipe)
    if recipe.annealed and (config.epochs - 1) / config.epochs < recipe.e1:
        raise ValueError(
            f"e1={recipe.e1!r}: no epoch of {config.epochs} begins when the annealing is over; expected at most "
            f"{math.floor(1000 * (config.epochs - 1) / config.epochs) / 1000}, or more epochs"
        )
    generator = torch.Generator().manual_seed(config.seed) if generator is None else generator
    check_generator(generator)
    places = places_of(model, data.shape, activation=recipe.activation, skips=recipe.skips)
    if recipe.rescale is not None:
        options: dict[str, Any] = {"settings": recipe.rescale, "augmented": config.augmented, "generator": generator}
        rescale_(model, data, masks=masks, **options)
    ghosted = Ghosted(model, places, recipe.activation)
    annealing = Annealing(ghosted, recipe, train.steps(data, config), config.epochs)
    try:
        options = {"checkpoint": checkpoint, "checkpoint_every_s": checkpoint_every_s}
        history = train.fit(ghosted, data, config, masks=masks, hooks=[*hooks, annealing], **options)
    except BaseException:
        strip_(model)
        raise
    if recipe.annealed:
        strip_(model)
    else:
        ghosted.keep_()
    return history


def overhead(model: nn.Module, shape: tuple[int, int, int], *, masks: Masks | None = None) -> dict[str, float]:
    """Ghost parameters that a training with ghost skips has beside the model's.

    Parameters
    ----------
    model : nn.Module
        May be on the meta device.
    shape : (channels, height, width)
        Of one input.
    masks : Masks, optional

    Returns
    -------
    dict
        ``parameters``, how many there are, and ``share``, how many for each parameter of the model that `masks` keep.

    Raises
    ------
    ValueError
        As `fit`, for a model that takes no ghost skips, and masks that fit no parameter.

    Examples
    --------
    >>> from fsp import models
    >>> overhead(models.build("resnet8", (3, 32, 32), 10), (3, 32, 32))["parameters"]
    8640
    """
    masks = masks or {}
    pruned = sum(int((~masks[name]).sum()) for name in check_masks(model, masks))
    kept = sum(parameter.numel() for parameter in model.parameters()) - pruned
    places = places_of(model, shape, activation=None, skips=True)
    branches = [Branch(model.get_submodule(around.conv)) for around in places.branches]
    ghosts = sum(parameter.numel() for branch in branches for parameter in branch.parameters())
    return {"parameters": ghosts, "share": ghosts / kept}


def _with_labels(config: TrainConfig, data: Data, recipe: Recipe) -> TrainConfig:
    """The settings with the recipe's labels; PyTorch spreads its smoothing over all classes, the true one included."""
    if recipe.labels == 0:
        return config
    if config.label_smoothing:
        raise ValueError(
            f"label_smoothing={config.label_smoothing!r} of the config and labels={recipe.labels!r} of the recipe both "
            "smooth the labels: set one of them to 0"
        )
    smoothing = recipe.labels * data.classes / (data.classes - 1)
    if smoothing >= 1:
        raise ValueError(
            f"labels={recipe.labels!r}: with {data.classes} classes expected less than "
            f"{1 - 1 / data.classes:.3g}, so that the true class is the most probable one"
        )
    return dataclasses.replace(config, label_smoothing=smoothing)


class Annealing:
    """A hook that moves the ghosts through their schedules.

    Parameters
    ----------
    ghosted : Ghosted
    recipe : Recipe
    total_steps, epochs : int
        Of the whole training.
    """

    def __init__(self, ghosted: Ghosted, recipe: Recipe, total_steps: int, epochs: int):
        self.ghosted, self.recipe, self.total_steps, self.epochs = ghosted, recipe, total_steps, epochs
        self.identity = {type(self).__qualname__: dataclasses.asdict(recipe)}
        self._move(0)

    def _move(self, step: int) -> None:
        self.step, over = step, step / self.total_steps
        self.ghosted.set_(alpha=self.recipe.alpha(over), over=self.recipe.hardness(over))

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Set what the next step, and evaluations before it, see."""
        self._move(step)

    def selects(self, epoch: int) -> bool:
        """Whether an epoch began when the annealing was over."""
        return not self.recipe.annealed or (epoch - 1) / self.epochs >= self.recipe.e1

    def state_dict(self) -> dict[str, int]:
        """How many steps were made."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after that many."""
        self._move(state["step"])
