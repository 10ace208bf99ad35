"""Multilayer perceptrons: ``linear1``, ``linear2`` ..., ``classifier``."""

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from fsp.checks import check_choice, is_count


def mlp(
    shape: tuple[int, int, int], classes: int, *, hidden: Sequence[int] = (256, 256), norm: bool = False
) -> nn.Sequential:
    """Fully connected network with ReLU between the layers and a bias in each of them.

    Parameters
    ----------
    shape : (channels, height, width)
        Of one input, which is flattened.
    classes : int
        Number of outputs (logits).
    hidden : sequence of int, each >= 1
        Widths of the hidden layers; empty for a linear classifier.
    norm : bool
        Put a ``BatchNorm1d`` before each ReLU.

    Returns
    -------
    nn.Sequential
        Prunable tensors ``linear1.weight`` ... and ``classifier.weight``, ``len(hidden) + 1`` of them.

    Raises
    ------
    ValueError
        `hidden` is not a sequence of positive integers, `norm` is not a bool.

    Examples
    --------
    >>> [name for name, _ in mlp((1, 8, 8), 10, hidden=(32,)).named_parameters()]
    ['linear1.weight', 'linear1.bias', 'classifier.weight', 'classifier.bias']
    """
    if not isinstance(hidden, Sequence) or not all(is_count(width, 1) for width in hidden):
        raise ValueError(f"hidden={hidden!r}: expected a sequence of positive integers such as (256, 256)")
    check_choice("norm", norm, (True, False))
    features = math.prod(shape)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, units in enumerate(hidden, start=1):
        layers[f"linear{i}"] = nn.Linear(features, units)
        if norm:
            layers[f"norm{i}"] = nn.BatchNorm1d(units)
        layers[f"relu{i}"] = nn.ReLU()
        features = units
    layers["classifier"] = nn.Linear(features, classes)
    return nn.Sequential(layers)


def lenet300(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """LeNet-300-100: the `mlp` with hidden layers of 300 and 100 units; 266,610 parameters on 28×28 digits."""
    return mlp(shape, classes, hidden=(300, 100))
