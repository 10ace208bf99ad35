r"""Prune and tune: a trained parent, children pruned from it and tuned for a few epochs, and their joint prediction.

The masks of the children come from `fsp.masks.children`; what the probabilities are worth says
`fsp.training.probabilities`::

    recipe = ensemble.PRESETS["large"]
    parent = models.build("resnet18", data.shape, data.classes)
    fit(parent, data, recipe.parent)
    family = []
    for number, kept in enumerate(masks.children(parent, recipe.kind, recipe.children, generator=generator)):
        child, history = ensemble.tune(parent, kept, data, replace(recipe.tuning, seed=number))
        family.append(child)
    ensemble.predict(family, data, "test")

References
----------
.. [1] Whitaker, Whitley: Prune and tune ensembles: low-cost ensemble learning with sparse independent subnetworks.
   AAAI 2022.
"""

import copy
import dataclasses
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from fsp.checks import check_choice, check_count, check_generator, check_tensors, plain_settings
from fsp.data import Data, Split
from fsp.masks import Masks, check_masks
from fsp.training.many import check_members
from fsp.training.train import History, TrainConfig, fit

COMBINATIONS = ("probabilities", "logits")


class Recipe(NamedTuple):
    """How one ensemble of the paper is made.

    Attributes
    ----------
    parent, tuning : TrainConfig
        Training of the parent, and of each child from the parent's weights.
    kind : str
        Of `fsp.masks.children`.
    children : int
    """

    parent: TrainConfig
    tuning: TrainConfig
    kind: str
    children: int


_ADAM = TrainConfig(lr=1e-3, weight_decay=0.0, schedule="constant", optimizer="adam")  # its weight decay is not printed

# [1], tables 2 and 1: two hundred epochs and sixteen, all networks together
PRESETS = {
    "large": Recipe(
        TrainConfig(epochs=140, schedule="pat_parent"), TrainConfig(epochs=10, schedule="one_cycle"), "antirandom", 6
    ),
    "small": Recipe(dataclasses.replace(_ADAM, epochs=8), dataclasses.replace(_ADAM, epochs=1), "antirandom", 8),
}


# ---- members -----------------------------------------------------------------------------------------------------


def bagged(data: Data, share: float = 0.9, *, generator: torch.Generator) -> Data:
    """The same data with fewer training examples, drawn without replacement; for a bagged ensemble.

    Parameters
    ----------
    data : fsp.data.Data
    share : float, in (0, 1]
        Of the training examples that are left, rounded to a whole number.
    generator : torch.Generator on the CPU

    Returns
    -------
    fsp.data.Data
        Training examples in their old order; validation and test are those of `data`.

    Raises
    ------
    ValueError
        For a share outside (0, 1] or that leaves no example, or a generator that is not on the CPU.

    Examples
    --------
    >>> from fsp.data import load
    >>> data = load("digits")
    >>> fewer = bagged(data, generator=torch.Generator().manual_seed(0))
    >>> len(data.train.labels), len(fewer.train.labels)
    (1293, 1164)

    References
    ----------
    [1]_, table 1: eight networks, each on 90 % of the data.
    """
    check_generator(generator)
    n = len(data.train.labels)
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1 or round(share * n) < 1:
        raise ValueError(f"share={share!r} of {n} training examples: expected a share in (0, 1] that leaves an example")
    order = torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")
    chosen = order[: round(share * n)].sort().values.to(data.train.labels.device)
    return dataclasses.replace(data, train=Split(data.train.images[chosen], data.train.labels[chosen]))


def tune(
    parent: nn.Module, masks: Masks, data: Data, config: TrainConfig, **options: object
) -> tuple[nn.Module, History]:
    """Copy a parent, prune the copy, and train it.

    Parameters
    ----------
    parent : nn.Module
        Trained; it is not changed.
    masks : Masks
        Of the child; what they do not name is inherited as it is: biases, norms, running statistics, the classifier.
    data : fsp.data.Data
    config : TrainConfig
        Give every child its own seed, else all see their batches in one order.
    **options
        For `fsp.training.fit`, such as ``checkpoint``.

    Returns
    -------
    child : nn.Module
        In eval mode, pruned weights 0.
    history : History

    Raises
    ------
    ValueError
        If a mask fits no parameter, or as `fsp.training.fit` says.
    """
    check_masks(parent, masks)
    child = copy.deepcopy(parent)
    return child, fit(child, data, config, masks=masks, **options)


# ---- prediction --------------------------------------------------------------------------------------------------


@plain_settings()
def member_logits(
    members: Sequence[nn.Module],
    data: Data,
    split: str | Split | Tensor,
    *,
    batch_size: int = 1000,
    at_once: bool | None = None,
) -> Tensor:
    """Logits of every member; leaves them in eval mode.

    Parameters
    ----------
    members : sequence of nn.Module
        Of one architecture, with different weights, on one device.
    data : fsp.data.Data
        Normalises the images.
    split : {"train", "validation", "test"}, fsp.data.Split or Tensor
        As for `fsp.training.predict`.
    batch_size : int
    at_once : bool, optional
        All members in one vectorised pass over a copy of all weights, or one member after the other: equal but for
        rounding.  Default: at once on CUDA; on the CPU small convolutions take three times as long that way.

    Returns
    -------
    Tensor, float32, shape (members, N, classes)
        On the members' device.

    Raises
    ------
    ValueError
        If there is no member, or members differ in architecture: the message names what differs first; or for a
        `batch_size` below 1.
    """
    check_choice("at_once", at_once, (True, False, None))
    check_count("batch_size", batch_size, 1)
    check_members(members, "predict one by one and average where they are not")
    for member in members:
        member.eval()
    examples = getattr(data, split) if isinstance(split, str) else split
    images = examples if isinstance(examples, Tensor) else examples.images
    parts = map(data.normalise, images.split(batch_size))
    if not (images.is_cuda if at_once is None else at_once):
        return torch.cat([torch.stack([member(part).float() for member in members]) for part in parts], dim=1)

    def logits(weights: tuple[dict[str, Tensor], ...], inputs: Tensor) -> Tensor:
        return functional_call(members[0], weights, (inputs,))

    every, weights = vmap(logits, in_dims=(0, None)), stack_module_state(list(members))
    return torch.cat([every(weights, part).float() for part in parts], dim=1)


@plain_settings()
def combine(logits: Tensor, by: str = "probabilities") -> Tensor:
    r"""Probabilities of an ensemble.

    .. math:: p = \frac 1 M \sum_m \mathrm{softmax}(z_m) \quad\text{or}\quad p = \mathrm{softmax}\Big(\frac 1 M
        \sum_m z_m\Big)

    Parameters
    ----------
    logits : Tensor, shape (members, N, classes)
        See `member_logits`.
    by : {"probabilities", "logits"}
        Which of them are averaged.  The paper says the first; its code takes the second for accuracy and likelihood
        (D72).

    Returns
    -------
    Tensor, float64, shape (N, classes)

    Raises
    ------
    ValueError
        If `by` is unknown, or `logits` has another number of dimensions or no member.

    Examples
    --------
    >>> logits = torch.tensor([[[0.0, 0.0]], [[9.0, 0.0]]])
    >>> combine(logits).round(decimals=3), combine(logits, "logits").round(decimals=3)
    (tensor([[0.7500, 0.2500]], dtype=torch.float64), tensor([[0.9890, 0.0110]], dtype=torch.float64))
    """
    check_choice("by", by, COMBINATIONS)
    check_tensors("argument", {"logits": logits})
    if logits.ndim != 3 or len(logits) == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: expected (members, N, classes), at least one member")
    if by == "logits":
        return logits.double().mean(0).softmax(-1)
    return logits.double().softmax(-1).mean(0)


def predict(
    members: Sequence[nn.Module],
    data: Data,
    split: str | Split | Tensor,
    *,
    by: str = "probabilities",
    parent: nn.Module | None = None,
    batch_size: int = 1000,
) -> Tensor:
    """Class probabilities of an ensemble.

    Parameters
    ----------
    members, data, split, batch_size
        As for `member_logits`, and so are the errors.
    by : {"probabilities", "logits"}
        As for `combine`.
    parent : nn.Module, optional
        Counts as one more member.  It does in the published code, and it does not in the paper (D72).

    Returns
    -------
    Tensor, float64, shape (N, classes)
        On the members' device; each row sums to 1.
    """
    check_choice("by", by, COMBINATIONS)
    check_members(members, "predict one by one and average where they are not")
    every = list(members) if parent is None else [*members, parent]
    return combine(member_logits(every, data, split, batch_size=batch_size), by)
