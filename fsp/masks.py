"""Mask algebra: which weights are prunable, which are kept, and how they stay that way.

Masks are a plain dict, parameter name to bool tensor, True = kept, in the model's parameter order.  A density is the
fraction of prunable weights kept.  Counts are exact: a density d keeps N - floor((1 - d) N) of N weights, d read as
the decimal it prints as.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from numbers import Real
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.hooks import RemovableHandle

from fsp.paths import replacing

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
    own = {id(p) for m in model.modules() if isinstance(m, PRUNABLE) for n, p in m.named_parameters() if n in NAMES}
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
        For an unknown scope, a density outside (0, 1], a ``nan`` or ``+inf`` score (naming the tensor), or fewer
        scores above ``-inf`` than have to be kept.

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
    kept = _top(flat, kept_count(flat.numel(), density), _generator(generator), "all layers together")
    parts = kept.split([s.numel() for s in scores.values()])
    return {name: part.view_as(s) for (name, s), part in zip(scores.items(), parts, strict=True)}


def keep_counts(
    scores: Mapping[str, Tensor], counts: Mapping[str, int], generator: torch.Generator | None = None
) -> Masks:
    """Masks of the highest scores of each tensor, with a given count for each.

    Parameters
    ----------
    scores : dict of name to Tensor
    counts : dict of name to int
        How many to keep, 0 to the tensor's size; see `fsp.allocate`.
    generator : torch.Generator on the CPU, optional
        As for `keep_top`, which also lists the errors.

    Returns
    -------
    Masks
    """
    _check_scores(scores)
    generator = _generator(generator)
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


def _generator(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or a fresh one with seed 0: no global state is read."""
    return torch.Generator().manual_seed(0) if generator is None else generator


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
    if scope == "layer":
        return {name: _permuted(m.flatten(), generator).view_as(m) for name, m in masks.items()}
    check_scope(scope)
    flat = _permuted(torch.cat([m.flatten() for m in masks.values()]), generator)
    parts = flat.split([m.numel() for m in masks.values()])
    return {name: part.view_as(m) for (name, m), part in zip(masks.items(), parts, strict=True)}


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
    new = shuffle(masks, generator=generator)
    return new, _reordered(masks, new, model, generator)


def shuffle_weights(masks: Mapping[str, Tensor], model: nn.Module, *, generator: torch.Generator) -> dict[str, Tensor]:
    """The kept weights of every layer in random order on the same masks.

    The control for the weights a method has chosen: neither topology nor the distribution of weights change, only
    which weight lies where.

    Parameters
    ----------
    masks : Masks
    model : nn.Module
        Gives the weights; it is not changed.
    generator : torch.Generator on the CPU

    Returns
    -------
    dict of name to Tensor
        Zero off the masks; ``model.load_state_dict(weights, strict=False)`` puts them in.

    Raises
    ------
    ValueError
        If a mask fits no parameter of the model.

    References
    ----------
    Su et al., Sanity-checking pruning methods: random tickets can win the jackpot. NeurIPS 2020.
    """
    return _reordered(masks, masks, model, generator)


def _reordered(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], model: nn.Module, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights that `old` keeps, in random order at the places that `new` keeps."""
    weights = {}
    for name, parameter in check_masks(model, old).items():
        kept = _permuted(parameter.detach()[old[name]], generator)
        weights[name] = torch.zeros_like(parameter.detach()).masked_scatter_(new[name], kept)
    return weights


def _permuted(flat: Tensor, generator: torch.Generator) -> Tensor:
    """Entries in random order, the order drawn on the CPU."""
    return flat[torch.randperm(len(flat), generator=generator).to(flat.device)]


# ---- holding a model to its masks --------------------------------------------------------------------------------


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


@torch.no_grad()
def apply_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights of the model to 0, in place.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
        On any device.

    Raises
    ------
    ValueError
        If a mask is not bool or fits no parameter.
    """
    for name, parameter in check_masks(model, masks).items():
        parameter.masked_fill_(~masks[name].to(parameter.device), 0)


def hold_(optimizer: torch.optim.Optimizer, model: nn.Module, masks: Masks) -> RemovableHandle:
    """Keep pruned weights at exactly 0 while `optimizer` trains the model, momentum and weight decay included.

    Applies the masks now and again after every optimiser step, to the weights and to every optimiser state of a
    weight's shape (momentum buffers), so that a weight that is grown later starts without momentum.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    model : nn.Module
    masks : Masks
        Read anew at every step: replacing an entry (dynamic sparse training) takes effect at the next one.

    Returns
    -------
    handle
        ``handle.remove()`` lets go.

    Raises
    ------
    ValueError
        If a mask is not bool or fits no parameter.
    """
    parameters = check_masks(model, masks)

    @torch.no_grad()
    def zero_pruned(optimizer, *_):
        for name, parameter in parameters.items():
            pruned = ~masks[name].to(parameter.device)
            parameter.masked_fill_(pruned, 0)  # not a product: an infinite gradient times 0 would be nan
            for state in optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    state.masked_fill_(pruned, 0)

    apply_(model, masks)
    return optimizer.register_step_post_hook(zero_pruned)


# ---- masks of torch.nn.utils.prune -------------------------------------------------------------------------------


def to_torch_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Prune the model with ``torch.nn.utils.prune``, in place, for tools that know its masks.

    Every masked ``weight`` becomes a parameter ``weight_orig`` and a buffer ``weight_mask``, multiplied before each
    forward pass.  ``torch.nn.utils.prune.remove`` makes it a plain weight again, with zeros.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
        On any device.  A weight that several modules share is pruned in each of them.

    Raises
    ------
    ValueError
        If a mask is not bool or fits no parameter, or its parameter is parametrised or pruned by torch already.
        Nothing has been changed then.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 1))
    >>> to_torch_(model, {"0.weight": torch.tensor([[True, False]])})
    >>> [name for name, _ in model[0].named_parameters()], from_torch(model)
    (['bias', 'weight_orig'], {'0.weight': tensor([[ True, False]])})
    """
    parameters = check_masks(model, masks)
    check_plain(masks)
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners = [
        (module, key, masks[names[id(parameter)]].to(parameter.device))
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if id(parameter) in names
    ]
    for module, key, mask in owners:
        prune.custom_from_mask(module, key, mask)


def from_torch(model: nn.Module) -> Masks:
    """Masks of a model that was pruned with ``torch.nn.utils.prune``.

    Parameters
    ----------
    model : nn.Module
        It is not changed.

    Returns
    -------
    Masks
        Of every parameter that is pruned there, biases too if some are.  Names are those that the parameters have
        again after ``torch.nn.utils.prune.remove``; one that several modules share appears once.

    Raises
    ------
    ValueError
        If nothing is pruned there, or modules that share a parameter prune it differently.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    masks, first = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        mask = buffers.get(f"{name.removesuffix('_orig')}_mask")
        if not name.endswith("_orig") or mask is None:
            continue
        plain = name.removesuffix("_orig")
        shared = first.setdefault(id(parameter), plain)
        if shared == plain:
            masks[plain] = mask != 0
        elif not torch.equal(masks[shared], mask != 0):
            raise ValueError(f"{shared!r} and {plain!r} are one parameter with two different masks")
    if not masks:
        raise ValueError("the model holds no masks of torch.nn.utils.prune; fsp.masks.to_torch_ puts some there")
    return masks


# ---- files -------------------------------------------------------------------------------------------------------

OWN_KEYS = ("shapes", "achieved_density", "achieved_layer_densities", "checksum")  # of `metadata`


def save(path: str | Path, masks: Mapping[str, Tensor], /, **metadata: object) -> None:
    """Write masks to a safetensors file, one bit a weight, atomically.

    Parameters
    ----------
    path : str or path
    masks : Masks
    **metadata
        Anything JSON can hold (method, seed, options ...); kept in the header beside shapes, achieved densities and
        the SHA-256 of the masks.

    Raises
    ------
    TypeError
        If metadata cannot be written as JSON.
    ValueError
        If metadata has a name that `metadata` itself gives: shapes, achieved_density, achieved_layer_densities,
        checksum.
    """
    taken = [key for key in OWN_KEYS if key in metadata]
    if taken:
        raise ValueError(f"metadata may not be called {', '.join(taken)}: fsp.masks.metadata tells these by itself")
    packed = {name: torch.from_numpy(np.packbits(m.cpu().numpy().reshape(-1))) for name, m in masks.items()}
    shapes = {name: list(m.shape) for name, m in masks.items()}
    header = {
        "shapes": shapes,
        "layer_densities": layer_densities(masks),
        "density": density(masks),
        "checksum": _checksum(shapes, packed),
        "metadata": metadata,
    }
    with replacing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(packed, metadata={"fsp_masks": json.dumps(header)}))


def load(path: str | Path) -> Masks:
    """Read masks that `save` wrote.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    Masks
        On the CPU, in the order they were saved in.

    Raises
    ------
    ValueError
        If the file holds no masks of this package, or not those of the densities and SHA-256 in its header (files
        written before there was a checksum have densities alone).
    """
    with _opened(path) as (file, header):
        shapes = header["shapes"]
        packed = {name: file.get_tensor(name) for name in shapes}
        masks = {}
        for name, shape in shapes.items():
            bits = np.unpackbits(packed[name].numpy(), count=math.prod(shape))
            masks[name] = torch.from_numpy(bits.astype(bool)).view(shape)
        achieved = header["layer_densities"]
    checksum = _checksum(shapes, packed)
    if layer_densities(masks) != achieved or header.get("checksum", checksum) != checksum:
        raise ValueError(f"{path} is damaged: its masks do not have the densities and the SHA-256 in its header")
    return masks


def metadata(path: str | Path) -> dict[str, object]:
    """What a file of masks tells of itself; no mask is read.

    Parameters
    ----------
    path : str or path
        Written by `save`.

    Returns
    -------
    dict
        The metadata given to `save` (method, seed, options ...) under their own names, and shapes, achieved_density,
        achieved_layer_densities and checksum: the SHA-256, in hexadecimal, of names, shapes and bits, the same for
        equal masks in equal order.  It is ``None`` for a file written before there was one.

    Raises
    ------
    ValueError
        If the file holds no masks of this package.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "masks.safetensors"
    >>> save(path, {"w": torch.tensor([True, False])}, method="snip", seed=3)
    >>> told = metadata(path)
    >>> told["method"], told["seed"], told["achieved_density"], len(told["checksum"])
    ('snip', 3, 0.5, 64)
    """
    with _opened(path) as (_, header):
        own = (header["shapes"], header["density"], header["layer_densities"], header.get("checksum"))
        return {**header["metadata"], **dict(zip(OWN_KEYS, own, strict=True))}


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[safe_open, dict]]:
    """An open file of masks and its header; whatever fails while reading is a ValueError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads(file.metadata()["fsp_masks"])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds no whole masks ({error}): fsp.masks.save writes them") from error


def _checksum(shapes: Mapping[str, list[int]], packed: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and packed bits."""
    digest = hashlib.sha256(json.dumps(shapes).encode())
    for name in shapes:
        digest.update(packed[name].numpy())
    return digest.hexdigest()
