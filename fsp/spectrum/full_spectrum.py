"""Full-spectrum coordinates of layers and networks, their norms and distances.

References
----------
.. [1] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon. NeurIPS 2023.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from fsp.checks import check_choice, check_device, check_has_values, check_tensors, plain_settings
from fsp.masks import PLAIN, Wiring, number_kept, used_weights, wiring_of
from fsp.spectrum.definitions import (
    Rules,
    mean,
    rules_of,
)
from fsp.spectrum.dense import dense_coordinates
from fsp.spectrum.fast import Layer, sparse_coordinates
from fsp.spectrum.lanczos import PRECISIONS

TASK = 200_000  # kept weights: with fewer, the time goes to the calls and not to the work in them


class Coordinate(NamedTuple):
    r"""The full-spectrum coordinate of one layer, :math:`v = (\Delta_r, \lambda, IMDB, IMSG)`.

    Each entry is ``nan`` where it is undefined.
    """

    ramanujan_gap: float
    weighted_gap: float
    imdb: float
    imsg: float

    @property
    def norm(self) -> float:
        """L2 norm, an undefined entry counted as 0, as published."""
        return math.hypot(*_zeroed(self))


@plain_settings()
def coordinate(
    mask: Tensor,
    weight: Tensor,
    *,
    rules: str | Rules = "fsp2023",
    precision: str = "float64",
    wiring: Wiring = PLAIN,
) -> Coordinate:
    """Full-spectrum coordinate of one layer, measured on the CPU.

    Parameters
    ----------
    mask : Tensor, shape ``(C_out, C_in, *kernel)`` or (out, in), bool or 0/1
    weight : Tensor, same shape
        Weights of the layer; those off the mask are ignored.
    rules : {"iclr2023", "fsp2023"} or Rules
    precision : {"float64", "float32"}
        As for `population`.
    wiring : Wiring, optional
        Of grouped and transposed convolutions.

    Returns
    -------
    Coordinate

    Raises
    ------
    ValueError
        If the shapes differ, the mask is not binary, a weight is not finite, or the tensor is no layer's.

    References
    ----------
    [1]_, full-spectrum coordinate.
    """
    rules = rules_of(rules)
    check_choice("precision", precision, PRECISIONS)
    check_layer("the layer", mask, weight)
    layer = mask.detach().bool().cpu(), weight.detach().cpu(), wiring
    ((found,),) = _on_cpu([[layer]], rules, precision)
    return Coordinate(*found)


def coordinates(
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | nn.Module,
    *,
    rules: str | Rules = "fsp2023",
    precision: str = "float64",
) -> dict[str, Coordinate]:
    """Full-spectrum coordinate of every masked layer of a network.

    Parameters
    ----------
    masks : dict of parameter name to mask, as made by `fsp.pruning.prune`
    weights : dict of parameter name to weights, or the model itself
        May hold more names than `masks`.
    rules : {"iclr2023", "fsp2023"} or Rules
    precision : {"float64", "float32"}
        As for `population`.

    Returns
    -------
    dict of parameter name to Coordinate, in the order of `masks`

    Raises
    ------
    ValueError
        As for `coordinate`, naming the layer; also for a mask without weights and for no masks at all.

    Examples
    --------
    >>> mask = torch.ones(4, 4, dtype=torch.bool)
    >>> [round(x, 4) for x in coordinates({"w": mask}, {"w": torch.ones(4, 4)})["w"]]
    [3.4641, 4.0, 1.9795, 2.2857]
    """
    found = population([masks], weights, rules=rules, precision=precision)[0].tolist()
    return {name: Coordinate(*entries) for name, entries in zip(masks, found, strict=True)}


@plain_settings()
def population(
    masks_list: Sequence[Mapping[str, Tensor]],
    weights: Mapping[str, Tensor] | nn.Module,
    *,
    rules: str | Rules = "fsp2023",
    precision: str = "float64",
    device: str | torch.device | None = None,
    max_bytes: int = 2**30,
) -> Tensor:
    """Full-spectrum coordinates of many masks of one network.

    Parameters
    ----------
    masks_list : sequence of P dicts of parameter name to mask
        Of the same L layers in the same order.
    weights : dict of parameter name to weights, or the model itself
        With a model, grouped and transposed convolutions are recognised; with a dict, every weight is read as
        ``(outputs, inputs, *kernel)``.
    rules : {"iclr2023", "fsp2023"} or Rules
    precision : {"float64", "float32"}
        Singular values are right to 1e-8 of the second one of their graph, or to 1e-5, which takes four fifths of the
        time at a density of .01 and as long at .05: for choosing among masks (D75).  A CUDA device computes in float64
        either way.
    device : str or torch.device, optional
        Where to compute.  A CUDA device measures a layer of many masks in one batch; the CPU, the default, one
        layer a thread.
    max_bytes : int
        Bound on the intermediate memory on a CUDA device; it never changes the numbers.

    Returns
    -------
    Tensor, shape (P, L, 4), float64, on the CPU
        Entries in the order of `Coordinate`, ``nan`` where undefined; the same numbers as `coordinates`.

    Raises
    ------
    ValueError
        As for `coordinates`, naming the mask's index and the layer; also if two masks have other layers, or this
        machine has no such device.
    TypeError
        For one dict of masks instead of a list of them.

    Notes
    -----
    On the CPU, layers are measured in as many threads as `torch.get_num_threads` says.  Neither their number nor the
    other masks change a bit of a result.
    """
    check_choice("precision", precision, PRECISIONS)
    rules, wirings, place = rules_of(rules), wiring_of(weights), check_device(device)
    if isinstance(masks_list, Mapping):
        raise TypeError("masks_list is a dict, the masks of one network: pass a list, [masks]")
    if not masks_list:
        raise ValueError("there is no mask to measure: the list is empty")
    names = list(masks_list[0])
    if not names:
        raise ValueError("there are no masks: fsp.pruning.prune(model, ...) makes them")
    if isinstance(weights, nn.Module):
        check_has_values(weights)
        weights = used_weights(weights, names)
    for i, masks in enumerate(masks_list):
        if list(masks) != names:
            raise ValueError(f"mask {i} has layers {', '.join(masks)}, mask 0 has {', '.join(names)}")
        check_tensors("mask", masks)
        prefix = f"mask {i}: " if len(masks_list) > 1 else ""
        for name in names:
            check_layer(f"{prefix}layer {name!r}", masks[name], weights.get(name))
    if place.type != "cpu":
        found = []
        for name in names:
            several = torch.stack([masks[name].bool() for masks in masks_list]).to(place)
            wiring = wirings.get(name, PLAIN)
            found.append(dense_coordinates(several, weights[name].to(place), rules, wiring, max_bytes))
        return torch.stack(found, 1).cpu()

    on_cpu = {name: weights[name].detach().cpu() for name in names}
    tasks = [(i, part) for i, masks in enumerate(masks_list) for part in _parts(masks)]

    found = torch.empty(len(masks_list), len(names), 4, dtype=torch.float64, device="cpu")
    layers = [
        [(masks_list[i][name].bool().cpu(), on_cpu[name], wirings.get(name, PLAIN)) for name in part]
        for i, part in tasks
    ]
    for (i, part), values in zip(tasks, _on_cpu(layers, rules, precision), strict=True):
        found[i, [names.index(name) for name in part]] = torch.tensor(values, dtype=torch.float64, device="cpu")
    return found


@functools.cache
def _libraries() -> ThreadpoolController:
    """The linear algebra in this process; finding it takes longer than to measure a small layer."""
    return ThreadpoolController()


def _on_cpu(tasks: list[list[Layer]], rules: Rules, precision: str) -> list[list[tuple[float, float, float, float]]]:
    """Entries of the coordinates of the layers of each task."""
    threads = torch.get_num_threads()
    try:
        # one task a thread, and one thread for the linear algebra in it: pools within pools fight for the cores
        with (
            _libraries().limit(limits=1),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            return list(pool.map(lambda layers: sparse_coordinates(layers, rules, precision), tasks))
    finally:
        torch.set_num_threads(threads)


def _parts(masks: Mapping[str, Tensor]) -> list[list[str]]:
    """A network's layers in tasks of at least `TASK` kept weights, the largest layers first."""
    parts, kept = [], TASK
    for name in sorted(masks, key=lambda name: -masks[name].numel()):
        if kept >= TASK:
            parts.append([])
            kept = 0
        parts[-1].append(name)
        kept += number_kept(masks[name])
    return parts


def spectrum_norm(coordinates: Mapping[str, Coordinate]) -> float:
    r"""Full-spectrum norm of a network, :math:`D = \frac1L \sum_\ell \lVert v_\ell \rVert_2`.

    The distance from the origin, with undefined entries counted as 0 (D5; the unweighted form of D4).

    Parameters
    ----------
    coordinates : dict of layer name to Coordinate

    Returns
    -------
    float
    """
    return mean([v.norm for v in coordinates.values()])


def distance(a: Mapping[str, Coordinate], b: Mapping[str, Coordinate]) -> float:
    r"""Distance of two networks' coordinates, :math:`\frac1L \sum_\ell \lVert a_\ell - b_\ell \rVert_2`.

    Undefined entries count as 0, as in the norm.  With :math:`b = 0` it is `spectrum_norm`; with the coordinate of the
    mask that a search started from it is the distance travelled (D5).

    Parameters
    ----------
    a, b : dict of layer name to Coordinate
        Of the same layers.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the layers differ.
    """
    if a.keys() != b.keys():
        raise ValueError(f"coordinates of different layers: {sorted(a.keys() ^ b.keys())} are in one only")
    return mean([math.dist(_zeroed(a[name]), _zeroed(b[name])) for name in a])


def layer_mean(coordinates: Mapping[str, Coordinate]) -> Coordinate:
    """Mean of each quantity over the layers in which it is defined.

    As published; layers without a valid graph drop out of the mean (D27), so report `coverage` beside it.

    Parameters
    ----------
    coordinates : dict of layer name to Coordinate

    Returns
    -------
    Coordinate
        ``nan`` for a quantity that no layer has.

    Examples
    --------
    >>> layer_mean({"a": Coordinate(1.0, 2.0, math.nan, math.nan), "b": Coordinate(3.0, 4.0, 5.0, math.nan)})
    Coordinate(ramanujan_gap=2.0, weighted_gap=3.0, imdb=5.0, imsg=nan)
    """
    return Coordinate(*(mean([v[i] for v in coordinates.values() if not math.isnan(v[i])]) for i in range(4)))


def coverage(coordinates: Mapping[str, Coordinate]) -> Coordinate:
    """Number of layers in which each quantity is defined.

    Parameters
    ----------
    coordinates : dict of layer name to Coordinate

    Returns
    -------
    Coordinate of int

    Examples
    --------
    >>> coverage({"w": Coordinate(1.0, 2.0, math.nan, math.nan)})
    Coordinate(ramanujan_gap=1, weighted_gap=1, imdb=0, imsg=0)
    """
    return Coordinate(*(sum(not math.isnan(v[i]) for v in coordinates.values()) for i in range(4)))


def check_layer(layer: str, mask: Tensor, weight: Tensor | None) -> None:
    """Raise a ValueError that begins with `layer` if mask and weight cannot be measured."""
    if weight is None:
        raise ValueError(f"{layer} has a mask but no weights: pass the model or a dict that holds them")
    if mask.shape != weight.shape:
        raise ValueError(f"{layer}: mask {tuple(mask.shape)} and weights {tuple(weight.shape)} differ in shape")
    if mask.ndim < 2 or mask.numel() == 0:
        raise ValueError(f"{layer}: shape {tuple(mask.shape)} is not (outputs, inputs, ...) with entries")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{layer}: the mask holds values other than 0 and 1")
    # a sum is finite only if every term is, and far cheaper than asking each; weights off the mask may be anything
    total = weight.detach().sum().item()
    if not math.isfinite(total) and not torch.isfinite(weight[mask.bool()]).all():
        raise ValueError(f"{layer}: a kept weight is nan or infinite")


def _zeroed(v: Coordinate) -> list[float]:
    """Entries with undefined ones as 0."""
    return [0.0 if math.isnan(x) else x for x in v]
