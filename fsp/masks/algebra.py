"""Which weights are prunable, and which of them a mask keeps."""

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from numbers import Real

import numpy as np
import torch
from torch import Tensor, nn

from fsp.checks import check_tensors, given_or_seed_0, plain_settings
from fsp.masks.layers import NAMES, PRUNABLE, layers_of, unpruned, weight_of

Masks = dict[str, Tensor]
EVERYWHERE = "all layers together"  # what an error names where a count is of all of them


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
        In the model's order; a weight that two modules share appears once.  Where torch prunes or parametrises a
        weight, the parameter is what it is computed from, such as ``0.weight_orig``.

    Raises
    ------
    ValueError
        If an excluded name matches nothing, or nothing prunable is left; if the weight of a layer is computed in a way
        that masks cannot follow (weight norm, spectral norm, orthogonal and any other parametrisation but an
        element-wise one that leaves 0 at 0), is lazy, quantised, sparse or spread over processes: exclude that layer.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    >>> list(prunable(model)), list(prunable(model, exclude=["3"]))
    (['0.weight', '3.weight'], ['0.weight'])
    """
    if isinstance(exclude, str):
        raise ValueError(f"exclude={exclude!r} is a text: expected a list of names, such as [{exclude!r}]")
    exclude = tuple(exclude)
    every = _weight_names(model)
    for name in exclude:
        if not any(f"{n}.".startswith(f"{name}.") for n in every):
            raise ValueError(f"exclude={name!r} matches no prunable weight; there are {', '.join(every)}")
    own = {id(layer.parameter) for layer in layers_of(model, excluded=exclude)}
    excluded = {n for n in every if any(f"{n}.".startswith(f"{name}.") for name in exclude)}
    found = {name: p for name, p in model.named_parameters() if id(p) in own and name not in excluded}
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


@plain_settings()
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
        For an unknown scope, a density outside (0, 1], no scores, a ``nan``, ``+inf`` or complex one (naming it), fewer
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
    kept = _top(flat, kept_count(flat.numel(), density), given_or_seed_0(generator), EVERYWHERE)
    return unflattened(kept, scores)


@plain_settings()
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
    check_tensors("score", scores)
    if not scores:
        raise ValueError("scores is empty: expected those of one tensor at least")
    for name, s in scores.items():
        if s.is_complex():
            raise ValueError(f"the scores of {name!r} are complex, which have no order: take their abs()")
        if s.numel() and not s.amax() < math.inf:  # nan is the largest of all, and not less than inf
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
    threshold = _at_rank(flat, flat.numel() - k)
    kept = flat > threshold
    above = int(kept.count_nonzero())
    if threshold == -math.inf:
        raise ValueError(f"{where}: {k} weights are to be kept, only {above} may be; lower the density")
    tied = (flat == threshold).nonzero()[:, 0]
    chosen = torch.randperm(len(tied), generator=generator, device="cpu")[: k - above]
    kept[tied[chosen.to(tied.device)]] = True
    return kept


def _at_rank(flat: Tensor, rank: int) -> float:
    """The value that would stand at a place of the sorted entries, 0 for the smallest."""
    if flat.device.type != "cpu":
        return flat.sort().values[rank].item()
    small = flat.dtype in (torch.float16, torch.bfloat16)
    values = (flat.float() if small else flat).detach().numpy()
    return np.partition(values, rank)[rank].item()  # a tenth of the time of torch's kthvalue


# ---- what masks look like ----------------------------------------------------------------------------------------


def number_kept(mask: Tensor) -> int:
    """How many weights a mask keeps.

    Parameters
    ----------
    mask : Tensor of any shape, bool or 0/1
        On any device; bool on the CPU is counted by NumPy, in a quarter of torch's time.

    Returns
    -------
    int

    Examples
    --------
    >>> number_kept(torch.tensor([True, False, True]))
    2
    """
    if mask.device.type == "cpu" and mask.dtype == torch.bool:
        return int(np.count_nonzero(mask.numpy()))
    return int(mask.count_nonzero())


def density(masks: Mapping[str, Tensor]) -> float:
    """Fraction of the masked weights that are kept, over all tensors together; 0 of nothing.

    Examples
    --------
    >>> density({"w": torch.tensor([True, False]), "v": torch.tensor([True, True])})
    0.75
    """
    return sum(number_kept(m) for m in masks.values()) / max(1, sum(m.numel() for m in masks.values()))


def layer_densities(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Fraction kept in each tensor.

    Examples
    --------
    >>> layer_densities({"w": torch.tensor([True, False]), "v": torch.tensor([True, True])})
    {'w': 0.5, 'v': 1.0}
    """
    return {name: number_kept(m) / max(1, m.numel()) for name, m in masks.items()}


def unflattened(flat: Tensor, like: Mapping[str, Tensor]) -> Masks:
    """One flat tensor cut into the tensors that it was joined from."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(like.items(), parts, strict=True)}


# ---- checks of masks ---------------------------------------------------------------------------------------------


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that masks are of; raises a ValueError naming a mask that fits none.

    The mask of a weight that torch prunes or parametrises may have the name of the weight (``0.weight``), as
    `from_torch` gives it, or of the parameter it is computed from (``0.weight_orig``), as `prunable` does.
    """
    check_tensors("mask", masks)
    named = dict(model.named_parameters())
    known = {_plain_name(name): parameter for name, parameter in named.items()} | named
    for name, mask in masks.items():
        if name not in known:
            related = [n for n in named if f".{n}".endswith(f".{name}") or f".{name}".endswith(f".{n}")]
            hint = f", but {related[0]!r} does: pass the model inside its wrapper, or the wrapper" if related else ""
            raise ValueError(f"mask {name!r} belongs to no parameter of this model{hint}")
        if mask.dtype != torch.bool or mask.shape != known[name].shape:
            raise ValueError(
                f"mask {name!r} is {mask.dtype} {tuple(mask.shape)}, "
                f"its parameter needs bool {tuple(known[name].shape)}"
            )
    found = {name: known[name] for name in masks}
    layers_of(model, only={id(parameter) for parameter in found.values()})  # raises where masks cannot be followed
    return found


def check_plain(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise a ValueError naming a masked parameter that torch has pruned or parametrised."""
    plain = {id(parameter) for name, parameter in model.named_parameters() if _plain_name(name) == name}
    for name, parameter in check_masks(model, masks).items():
        if id(parameter) not in plain:
            raise ValueError(
                f"{name!r} is not the weight itself but what it is computed from: make it plain first, with "
                "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )


def used_weights(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Weights as the forward pass uses them, detached, pruned and parametrised ones computed.

    Parameters
    ----------
    model : nn.Module
    names : iterable of str, optional
        Of masks, those that the model does not have are left out; by default the names of all parameters, and of all
        weights that are computed.

    Returns
    -------
    dict of name to Tensor

    Raises
    ------
    ValueError
        If the weight of a layer cannot be followed, see `prunable`, or layers that share a parameter compute different
        weights from it.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    known = {_plain_name(name): parameter for name, parameter in named.items()} | named
    names = [name for name in (known if names is None else names) if name in known]
    first: dict[int, tuple[str, Tensor]] = {}
    for layer in layers_of(model, only={id(known[name]) for name in names}):
        weight = weight_of(layer.module)
        name, other = first.setdefault(id(layer.parameter), (layer.name, weight))
        if other is not weight and not torch.equal(other, weight):
            raise ValueError(f"{name!r} and {layer.name!r} compute different weights from one parameter: untie them")
    return {n: first[id(known[n])][1] if id(known[n]) in first else known[n].detach() for n in names}


def all_kept(model: nn.Module, *, exclude: Iterable[str] = ()) -> Masks:
    """Masks that keep every prunable weight but those that torch has pruned already.

    Parameters
    ----------
    model, exclude
        As for `prunable`, and so are the errors.

    Returns
    -------
    Masks
    """
    found = prunable(model, exclude=exclude)
    masks = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in found.items()}
    names = {id(parameter): name for name, parameter in found.items()}
    for layer in layers_of(model, only=names):
        if not layer.plain:
            masks[names[id(layer.parameter)]] &= unpruned(layer)
    return masks


def _plain_name(name: str) -> str:
    """The name that a parameter has again when torch no longer prunes or parametrises it."""
    before, inside, after = name.rpartition("parametrizations.")
    if inside and after.endswith(".original"):
        return before + after.removesuffix(".original")
    return name.removesuffix("_orig")


def _weight_names(model: nn.Module) -> list[str]:
    """Names of the weights of all convolutions and linear layers, those that cannot be pruned too."""
    shared = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    names: dict[str, None] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, PRUNABLE):
            own = [p for key, p in module.named_parameters() if key in NAMES]
            names[shared[id(own[0])] if own else f"{prefix}.weight".lstrip(".")] = None
    return list(names)
