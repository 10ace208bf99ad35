"""The matrices in a layer's tensor: which of its entries connects which input to which output."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn


class Wiring(NamedTuple):
    """How the entries of a layer's weight connect inputs and outputs.

    Attributes
    ----------
    groups : int
        Of a grouped convolution; a depthwise one has as many as channels.
    transposed : bool
        Whether inputs come first, as in the weight of a transposed convolution.
    """

    groups: int = 1
    transposed: bool = False


PLAIN = Wiring()


def wiring_of(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Wiring]:
    """Wiring of every convolution's weight in a model, by parameter name; anything else has the default.

    Weights under `torch.nn.utils.prune` (``weight_orig``) and under a parametrisation are found too.  A dict of
    weights does not say what they belong to: all have the default.
    """
    found = {}
    for prefix, module in weights.named_modules() if isinstance(weights, nn.Module) else ():
        if isinstance(module, nn.modules.conv._ConvNd):
            wiring = Wiring(module.groups, module.transposed)
            for name in ("weight", "weight_orig", "parametrizations.weight.original"):
                found[f"{prefix}.{name}" if prefix else name] = wiring
    return found


def blocks(tensor: Tensor, wiring: Wiring = PLAIN) -> Tensor:
    """A layer's tensor as one matrix a group, outputs by unrolled inputs.

    Parameters
    ----------
    tensor : Tensor, shape ``(C_out, C_in / groups, *kernel)``, or ``(C_in, C_out / groups, *kernel)`` if transposed
    wiring : Wiring

    Returns
    -------
    Tensor, shape (groups, C_out / groups, C_in / groups * prod(kernel))

    Raises
    ------
    ValueError
        For a tensor of fewer than two dimensions or without entries, or whose first dimension the groups do not divide.
    """
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise ValueError(
            f"a layer's tensor has shape (outputs, inputs, ...) and entries, this has {tuple(tensor.shape)}"
        )
    groups, transposed = wiring
    if tensor.shape[0] % groups:
        raise ValueError(f"{groups} groups do not divide the first dimension of {tuple(tensor.shape)}")
    if not transposed:
        return tensor.reshape(groups, tensor.shape[0] // groups, -1)
    split = tensor.reshape(groups, tensor.shape[0] // groups, tensor.shape[1], -1)  # (groups, in, out, kernel)
    return split.transpose(1, 2).flatten(2)


def joined(matrices: Tensor, shape: tuple[int, ...], wiring: Wiring = PLAIN) -> Tensor:
    """The tensor of a layer whose `blocks` are these matrices.

    Parameters
    ----------
    matrices : Tensor, shape (groups, C_out / groups, C_in / groups * prod(kernel))
    shape : tuple of int
        Of the layer's tensor.
    wiring : Wiring

    Returns
    -------
    Tensor of that shape

    Examples
    --------
    >>> import torch
    >>> tensor = torch.arange(24).view(4, 3, 2)
    >>> torch.equal(joined(blocks(tensor, Wiring(2, True)), (4, 3, 2), Wiring(2, True)), tensor)
    True
    """
    groups, transposed = wiring
    if not transposed:
        return matrices.reshape(shape)
    split = matrices.reshape(groups, shape[1], shape[0] // groups, math.prod(shape[2:]))  # (groups, out, in, kernel)
    return split.transpose(1, 2).reshape(shape)
