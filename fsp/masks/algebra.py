"""Which weights are prunable, and which of them a mask keeps."""

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor, nn

from fsp.checks import check_generator, given_or_seed_0

Masks = dict[str, Tensor]

PRUNABLE = (nn.Linear, nn.modules.conv._ConvNd)  # _ConvNd is the only common base of the Conv* modules
NAMES = ("weight", "weight_orig", "parametrizations.weight.original")  # the last two: pruned by torch, parametrised


def prunable(model: nn.Module, *, exclude: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Weights that may be pruned: those of every convolution and linear layer; biases and norms never.

    Parameters
    ----------
    model : nn.Module
    exclude : iterable of str
        Names of parameters (``"classifier.weight"``) or modules (``"classifier"``, with all below it) to leave dense.

    Returns
    -------
    dict of parameter name to parameter
        In the model's order; a weight that two modules share appears once.

    Raises
    ------
    ValueError
        If an excluded name matches nothing, or nothing prunable is left.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    >>> list(prunable(model)), list(prunable(model, exclude=["3"]))
    (['0.weight', '3.weight'], ['0.weight'])
    """
    if isinstance(exclude, str):
        raise ValueError(f"exclude={exclude!r} is a text: expected a list of names, such as [{exclude!r}]")
    own = set()
    for module in model.modules():
        if isinstance(module, PRUNABLE):
            own |= {id(p) for name, p in module.named_parameters() if name in NAMES}
    every = {name: p for name, p in model.named_parameters() if id(p) in own}
    excluded = set()
    for name in exclude:
        matched = {n for n in every if n == name or n.startswith(f"{name}.")}
        if not matched:
            raise ValueError(f"exclude={name!r} matches no prunable weight; there are {', '.join(every)}")
        excluded |= matched
    found = {name: p for name, p in every.items() if name not in excluded}
    if not found:
        raise ValueError("the model has no prunable weight: no Conv* or Linear layer is left")
    return found


# ---- how many, and which -----------------------------------------------------------------------------------------


def check_density(density: float) -> None:
    """Raise a ValueError unless 0 < density <= 1."""
    if isinstance(density, bool) or not isinstance(density, Real) or not 0 < density <= 1:
        raise ValueError(f"density {density!r} is not in (0, 1]: it is the fraction of weights kept, such as 0.05")


def check_scope(scope: str) -> None:
    """Raise a ValueError unless a scope is "global" or "layer"."""
    if scope not in ("global", "layer"):
        raise ValueError(f'scope is "global" or "layer", not {scope!r}')


def kept_count(n: int, density: float) -> int:
    """Number of weights of `n` that `density` keeps: n - floor((1 - density) n), and at least 1.

    Parameters
    ----------
    n : int
    density : float, in (0, 1]
        Read as the decimal it prints as, so that 0.9 of 10 is 9 although 1 - 0.9 is a little less than 0.1.

    Returns
    -------
    int

    Examples
    --------
    >>> kept_count(10, 0.9), kept_count(14_761_664, 0.1), kept_count(5, 0.01)
    (9, 1476167, 1)
    """
    check_density(density)
    return max(1, n - math.floor((1 - Fraction(repr(float(density)))) * n))


def keep_top(
    scores: Mapping[str, Tensor],
    density: float,
    *,
    scope: str = "global",
    generator: torch.Generator | None = None,
) -> Masks:
    """Masks of the highest scores: exactly N - floor((1 - density) N) are kept.

    Parameters
    ----------
    scores : dict of name to Tensor
        Higher is kept.  ``-inf`` marks a weight that must not be kept.
    density : float, in (0, 1]
    scope : {"global", "layer"}
        Rank all weights together, or every tensor by itself.
    generator : torch.Generator on the CPU, optional
        Breaks ties at the threshold at random; default a fresh generator with seed 0.

    Returns
    -------
    Masks
        On the device of the scores.

    Raises
    ------
    ValueError
        For an unknown scope, a density outside (0, 1], a ``nan`` or ``+inf`` score (naming the tensor), fewer
        scores above ``-inf`` than have to be kept, or a generator that is not on the CPU.

    Examples
    --------
    >>> keep_top({"w": torch.tensor([0.1, 0.9, -0.2, 0.5]), "v": torch.tensor([0.7, 0.8])}, 0.5)
    {'w': tensor([False,  True, False, False]), 'v': tensor([True, True])}
    """
    if scope == "layer":
        return keep_counts(scores, {name: kept_count(s.numel(), density) for name, s in scores.items()}, generator)
    check_scope(scope)
    _check_scores(scores)
    flat = torch.cat([s.flatten() for s in scores.values()])
    kept = _top(flat, kept_count(flat.numel(), density), given_or_seed_0(generator), "all layers together")
    return _unflattened(kept, scores)


def keep_counts(
    scores: Mapping[str, Tensor], counts: Mapping[str, int], generator: torch.Generator | None = None
) -> Masks:
    """Masks of the highest scores of each tensor, with a given count for each.

    Parameters
    ----------
    scores : dict of name to Tensor
    counts : dict of name to int
        How many to keep, 0 to the tensor's size; see `fsp.pruning.allocate`.
    generator : torch.Generator on the CPU, optional
        As for `keep_top`, which also lists the errors.

    Returns
    -------
    Masks
    """
    _check_scores(scores)
    generator = given_or_seed_0(generator)
    return {name: _top(s.flatten(), counts[name], generator, name).view_as(s) for name, s in scores.items()}


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raise if a score cannot be ranked."""
    for name, s in scores.items():
        if torch.isnan(s).any() or torch.isposinf(s).any():
            raise ValueError(
                f"the scores of {name!r} hold nan or inf, so nothing can be ranked: score in float64 "
                "(dtype=torch.float64), or check the weights and the loss"
            )


def _top(flat: Tensor, k: int, generator: torch.Generator, where: str) -> Tensor:
    """Bool tensor with exactly the `k` largest entries of `flat`, ties at the threshold drawn at random."""
    if not 0 <= k <= flat.numel():
        raise ValueError(f"{where}: {k} weights are to be kept of {flat.numel()}")
    if k == 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    # the k-th largest value splits the entries into kept, pruned and tied; a threshold alone would miscount ties
    threshold = flat.kthvalue(flat.numel() - k + 1).values
    if torch.isneginf(threshold):
        raise ValueError(
            f"{where}: {k} weights are to be kept, only {int((flat > threshold).sum())} may be; lower the density"
        )
    kept = flat > threshold
    tied = (flat == threshold).nonzero()[:, 0]
    chosen = torch.randperm(len(tied), generator=generator)[: k - int(kept.sum())]
    kept[tied[chosen.to(tied.device)]] = True
    return kept


# ---- what masks look like ----------------------------------------------------------------------------------------


def density(masks: Mapping[str, Tensor]) -> float:
    """Fraction of the masked weights that are kept, over all tensors together; 0 of nothing.

    Examples
    --------
    >>> density({"w": torch.tensor([True, False]), "v": torch.tensor([True, True])})
    0.75
    """
    return sum(int(m.sum()) for m in masks.values()) / max(1, sum(m.numel() for m in masks.values()))


def layer_densities(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Fraction kept in each tensor.

    Examples
    --------
    >>> layer_densities({"w": torch.tensor([True, False]), "v": torch.tensor([True, True])})
    {'w': 0.5, 'v': 1.0}
    """
    return {name: int(m.sum()) / max(1, m.numel()) for name, m in masks.items()}


def shuffle(masks: Mapping[str, Tensor], *, scope: str = "layer", generator: torch.Generator) -> Masks:
    """Masks with their entries permuted at random: the topology goes, the counts stay.

    Parameters
    ----------
    masks : Masks
    scope : {"layer", "global"}
        Permute within each tensor (keeps its count), or over all tensors together (keeps the total).
    generator : torch.Generator on the CPU

    Returns
    -------
    Masks
        New tensors on the devices of the old ones.

    References
    ----------
    Frankle et al., Pruning neural networks at initialization: why are we missing the mark? ICLR 2021, section 5.
    """
    check_generator(generator)
    if scope == "layer":
        return {name: _permuted(m.flatten(), generator).view_as(m) for name, m in masks.items()}
    check_scope(scope)
    flat = _permuted(torch.cat([m.flatten() for m in masks.values()]), generator)
    return _unflattened(flat, masks)


def scattered(
    masks: Mapping[str, Tensor], model: nn.Module, *, generator: torch.Generator
) -> tuple[Masks, dict[str, Tensor]]:
    """Random masks with the same count in every layer, and the kept weights in random order on them.

    The control for a topology: neither densities nor the distribution of weights change, only positions.

    Parameters
    ----------
    masks : Masks
    model : nn.Module
        Gives the weights; it is not changed.
    generator : torch.Generator on the CPU

    Returns
    -------
    masks : Masks
    weights : dict of name to Tensor
        Zero off the new masks.

    Raises
    ------
    ValueError
        If a mask fits no parameter of the model.
    """
    new, weights = shuffle(masks, generator=generator), {}
    for name, parameter in check_masks(model, masks).items():
        weight = parameter.detach()
        kept = _permuted(weight[masks[name]], generator)
        weights[name] = torch.zeros_like(weight).masked_scatter_(new[name], kept)
    return new, weights


def _unflattened(flat: Tensor, like: Mapping[str, Tensor]) -> Masks:
    """One flat tensor cut into the tensors that it was joined from."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(like.items(), parts, strict=True)}


def _permuted(flat: Tensor, generator: torch.Generator) -> Tensor:
    """Entries in random order, the order drawn on the CPU."""
    return flat[torch.randperm(len(flat), generator=generator).to(flat.device)]


# ---- checks of masks ---------------------------------------------------------------------------------------------


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The masked parameters of the model; raises a ValueError naming a mask that fits none."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"mask {name!r} belongs to no parameter of this model")
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise ValueError(
                f"mask {name!r} is {mask.dtype} {tuple(mask.shape)}, "
                f"its parameter needs bool {tuple(parameters[name].shape)}"
            )
    return {name: parameters[name] for name in masks}


def check_plain(masks: Mapping[str, Tensor]) -> None:
    """Raise a ValueError naming a masked parameter that torch has pruned or parametrised."""
    for name in masks:
        if name.endswith("_orig") or "parametrizations." in name:
            raise ValueError(
                f"{name!r} is not the weight itself but what it is computed from: make it plain first, with "
                "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )
