"""Masks that one trained parent is pruned by into several children, and how far such masks are apart.

References
----------
.. [1] Whitaker, Whitley: Prune and tune ensembles: low-cost ensemble learning with sparse independent subnetworks.
   AAAI 2022.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fsp.checks import check_choice, check_count, check_generator, check_has_values, check_tensors, plain_settings
from fsp.masks.algebra import Masks, check_density, check_scope, keep_top, prunable, unflattened
from fsp.masks.layers import PRUNABLE
from fsp.masks.randomise import permuted
from fsp.masks.wiring import PLAIN, wiring_of

KINDS = ("random", "antirandom", "partition")


@plain_settings()
def children(
    parent: nn.Module,
    kind: str,
    count: int,
    density: float | None = None,
    *,
    structure: str = "weights",
    scope: str = "layer",
    prune_classifier: bool = False,
    exclude: Iterable[str] = (),
    generator: torch.Generator,
) -> list[Masks]:
    r"""Masks for `count` children of one parent, drawn without a look at its weights.

    Parameters
    ----------
    parent : nn.Module
        Gives names and shapes; it is not changed.
    kind : {"random", "antirandom", "partition"}
        "random": independent masks.  "antirandom": pairs in which the second mask is the complement of the first.
        "partition": the weights are dealt out among all children, so that each weight is in one child; with two
        children that is an antirandom pair.
    count : int, at least 2
        Even, if antirandom.
    density : float, in (0, 1]
        Needed by "random".  The other kinds have one density only, 1/2 and 1/count, and take it for granted.
    structure : {"weights", "neurons"}
        Draw single weights, or output channels with all their weights.  Biases and norms of a pruned channel stay.
    scope : {"layer", "global"}
        Draw in every tensor by itself, or over all tensors together, so that densities of layers vary.
    prune_classifier : bool
        Whether the last convolution or linear layer that the parent has registered is pruned too.  By default it
        stays dense in every child, outside the masks.
    exclude : iterable of str
        Other parameters or modules to leave dense.
    generator : torch.Generator on the CPU

    Returns
    -------
    list of Masks
        On the parent's devices.  A random child keeps exactly N - floor((1 - density) N) of N.  Shares of a partition
        or a pair differ by at most one, in every tensor (scope "layer") and altogether (D70).  With neurons, all of
        this counts output channels.

    Raises
    ------
    ValueError
        For an unknown kind, structure or scope; a single child, or an odd number of antirandom ones; a density that is
        missing, outside (0, 1] or not that of the kind; if nothing prunable is left; for neurons of a transposed
        convolution; a parent without values, or a generator that is not on the CPU.

    Examples
    --------
    >>> parent = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> one, other = children(parent, "antirandom", 2, generator=torch.Generator().manual_seed(0))
    >>> list(one), bool((one["0.weight"] ^ other["0.weight"]).all())
    (['0.weight'], True)

    References
    ----------
    [1]_, sections on random and anti-random pruning; partitions are described there, without a result.
    """
    check_choice("kind", kind, KINDS)
    check_choice("structure", structure, ("weights", "neurons"))
    check_scope(scope)
    check_choice("prune_classifier", prune_classifier, (True, False))
    check_generator(generator)
    _check_family(kind, count, density)
    check_has_values(parent)
    found = prunable(parent, exclude=[*exclude, *([] if prune_classifier else [_classifier(parent)])])
    units = {name: _units(parent, name, p.shape, structure) for name, p in found.items()}
    if kind == "random":
        drawn = [_random(units, density, scope, generator) for _ in range(count)]  # type: ignore[arg-type]  # `_check_family`: it is a number here
    else:
        of_family = 2 if kind == "antirandom" else count
        drawn = [masks for _ in range(count // of_family) for masks in _dealt(units, of_family, scope, generator)]
    return [{name: masks[name].expand(p.shape).clone().to(p.device) for name, p in found.items()} for masks in drawn]


def _check_family(kind: str, count: int, density: float | None) -> None:
    """Raise a ValueError unless there can be so many children of this kind at this density."""
    check_count("count", count, 2)  # one child is no ensemble
    if kind == "antirandom" and count % 2:
        raise ValueError(f"count={count}: antirandom children come in pairs, so expected an even number")
    if density is None and kind == "random":
        raise ValueError("density=None: random children need the fraction of weights that each keeps, such as 0.5")
    if density is None:
        return
    check_density(density)
    own = 1 / 2 if kind == "antirandom" else 1 / count
    if kind != "random" and not math.isclose(density, own):
        raise ValueError(
            f"density={density!r}: {kind} children, {count} of them, have a density of {own:g} each; leave it out, or "
            'choose kind="random"'
        )


def _classifier(model: nn.Module) -> str:
    """Name of the last convolution or linear layer."""
    names = [name for name, module in model.named_modules() if isinstance(module, PRUNABLE)]
    if len(names) < 2:
        raise ValueError(
            f"the parent has {len(names)} prunable layers, and the last one is its classifier, which "
            "stays dense: pass prune_classifier=True, or a parent with more layers"
        )
    return names[-1]


def _units(model: nn.Module, name: str, shape: torch.Size, structure: str) -> Tensor:
    """An empty mask with an entry for each thing that is drawn; it broadcasts to the weight's shape."""
    if structure == "weights":
        return torch.zeros(shape, dtype=torch.bool, device="cpu")
    if wiring_of(model).get(name, PLAIN).transposed:
        raise ValueError(
            f"{name!r} is of a transposed convolution, whose output channels are not in the first dimension: exclude "
            'it, or choose structure="weights"'
        )
    return torch.zeros(shape[0], *(1 for _ in shape[1:]), dtype=torch.bool, device="cpu")


def _random(units: Masks, density: float, scope: str, generator: torch.Generator) -> Masks:
    """One mask, uniform among those that keep so many units."""
    of_draws: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    scores = {name: torch.rand(unit.shape, **of_draws) for name, unit in units.items()}
    return keep_top(scores, density, scope=scope, generator=generator)


def _dealt(units: Masks, count: int, scope: str, generator: torch.Generator) -> list[Masks]:
    """Masks of children among whom all units are dealt out, each to one of them.

    A tensor begins with the child after the one that got the last unit of the tensor before: else the same child would
    have the extra unit of every odd layer.
    """
    if scope == "global":
        flat = torch.cat([unit.flatten() for unit in units.values()])
        return [unflattened(masks["all"], units) for masks in _dealt({"all": flat}, count, "layer", generator)]
    drawn: list[Masks] = [{} for _ in range(count)]
    turn = 0
    for name, unit in units.items():
        owner = permuted((torch.arange(unit.numel(), device="cpu") + turn) % count, generator).view_as(unit)
        turn += unit.numel()
        for child, masks in enumerate(drawn):
            masks[name] = owner == child
    return drawn


# ---- how far masks are apart -------------------------------------------------------------------------------------


@plain_settings()
def overlapping(masks: Mapping[str, Tensor], share: float, *, generator: torch.Generator) -> Masks:
    """Random masks with the counts of other masks, and a given overlap with them in every tensor.

    The dose between two kinds of `children`: at density 1/2 an overlap of 0 makes an antirandom pair, 1/2 is what
    random children have on average, and 1 makes twins.  Not in the paper (D74).

    Parameters
    ----------
    masks : Masks
    share : float, in [0, 1]
        Of the kept entries of each tensor, rounded to a whole number: so many are kept by both.
    generator : torch.Generator on the CPU

    Returns
    -------
    Masks
        On the devices of the others.  In a tensor of an odd size that keeps half, rounded up, an overlap of 0 leaves
        room for one fewer.

    Raises
    ------
    ValueError
        If the pruned entries are too few for so small an overlap (the message has the smallest); for a share
        outside [0, 1], a mask that is not bool, or a generator that is not on the CPU.

    Examples
    --------
    >>> masks = {"w": torch.tensor([True, True, False, False])}
    >>> overlapping(masks, 0.0, generator=torch.Generator().manual_seed(0))
    {'w': tensor([False, False,  True,  True])}
    """
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
        raise ValueError(f"share={share!r}: expected a number in [0, 1], the share of the kept weights that both keep")
    check_generator(generator)
    _check_bool(masks)
    for name, mask in masks.items():
        kept, size = int(mask.count_nonzero()), mask.numel()
        if 2 * kept - size > max(1, round(share * kept)):
            raise ValueError(
                f"share={share!r}: {name!r} keeps {kept} of {size} weights, so a second mask with as many overlaps "
                f"with it by at least {(2 * kept - size) / kept:.3g}"
            )
    new = {}
    for name, mask in masks.items():
        flat = mask.flatten().cpu()
        kept, pruned = (permuted(side.nonzero()[:, 0], generator) for side in (flat, ~flat))
        common = round(share * len(kept))
        drawn = torch.zeros_like(flat)
        drawn[kept[:common]] = True
        drawn[pruned[: len(kept) - common]] = True
        new[name] = drawn.view_as(mask).to(mask.device)
    return new


@plain_settings()
def mask_distances(members: Sequence[Mapping[str, Tensor]]) -> Tensor:
    r"""Distance between the masks of every two members, the root of the number of weights that one of them keeps.

    .. math:: CD(A, B) = \sqrt{\textstyle\sum_i |a_i - b_i|}

    One root over the sum, as the paper prints it, over all tensors together.  For N weights it is largest, the root of
    N, between complements.

    Parameters
    ----------
    members : sequence of Masks
        With the same names and shapes.

    Returns
    -------
    Tensor, float64, shape (members, members), on the CPU
        Symmetric, with zeros on the diagonal.  Its sum is the paper's total distance, in which every pair counts
        twice (D74).

    Raises
    ------
    ValueError
        For no members, members with different names or shapes, or a mask that is not bool.

    Examples
    --------
    >>> one = {"w": torch.tensor([True, True, False, False])}
    >>> mask_distances([one, {"w": ~one["w"]}]).sum()
    tensor(4., dtype=torch.float64)

    References
    ----------
    [1]_, the Cartesian distance CD and the total distance TD.
    """
    if not members:
        raise ValueError("members is empty: expected the masks of at least one child")
    shapes = [{name: tuple(mask.shape) for name, mask in masks.items()} for masks in members]
    for number, (masks, own) in enumerate(zip(members, shapes, strict=True)):
        _check_bool(masks)
        if own != shapes[0]:
            name = next(n for n in {**own, **shapes[0]} if own.get(n) != shapes[0].get(n))
            raise ValueError(
                f"mask {name!r} of member {number} has shape {own.get(name)}, and of member 0 {shapes[0].get(name)}: "
                "expected masks of one network"
            )
    flat = [torch.cat([masks[name].flatten().cpu() for name in shapes[0]]) for masks in members]
    return torch.tensor([[(a ^ b).sum() for b in flat] for a in flat], dtype=torch.float64, device="cpu").sqrt()


def farthest(distances: Tensor, count: int) -> list[int]:
    """Which of many candidates are far apart: greedily, each next one is the farthest from its nearest chosen one.

    The first two are the pair with the largest distance.  The smallest distance among the chosen is at least half of
    the largest that any choice of so many could have, if the distances obey the triangle inequality.  Not in the paper:
    it turns a distance of masks, such as that of their coordinates (`fsp.spectrum.distance`), into a family (D74).

    Parameters
    ----------
    distances : Tensor, shape (candidates, candidates)
        Symmetric, finite, at least 0.
    count : int, from 2 to the number of candidates

    Returns
    -------
    list of int
        In the order of choice; of equals, the candidate with the lowest number.

    Raises
    ------
    ValueError
        If `distances` is no such matrix, or `count` is out of range.

    Examples
    --------
    >>> places = torch.tensor([0.0, 1.0, 5.0, 10.0])
    >>> farthest((places[:, None] - places).abs(), 3)
    [0, 3, 2]

    References
    ----------
    Gonzalez: Clustering to minimize the maximum intercluster distance.  Theoretical Computer Science 38, 1985.
    """
    check_tensors("argument", {"distances": distances})
    if distances.dtype == torch.bool or distances.is_complex():
        raise ValueError(f"distances is {distances.dtype}: expected real numbers")
    if distances.ndim != 2 or len(distances) != distances.shape[1]:
        raise ValueError(f"distances has shape {tuple(distances.shape)}: expected (candidates, candidates)")
    if not (distances.isfinite().all() and (distances >= 0).all() and torch.allclose(distances, distances.T)):
        raise ValueError(
            "distances is not a symmetric matrix of finite numbers of at least 0; leave out candidates "
            "whose distance is undefined (nan)"
        )
    check_count("count", count, 2)
    if count > len(distances):
        raise ValueError(f"count={count}: there are {len(distances)} candidates to choose from")
    apart = distances.clone().fill_diagonal_(-1)  # else equal candidates would be a pair of one
    chosen = list(divmod(int(apart.argmax()), len(apart)))
    while len(chosen) < count:
        nearest = distances[chosen].amin(0)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


def _check_bool(masks: Mapping[str, Tensor]) -> None:
    """Raise a ValueError naming a mask that is not bool."""
    check_tensors("mask", masks)
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"mask {name!r} is {mask.dtype}: expected bool, as {name!r} != 0 would be")
