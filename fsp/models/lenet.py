"""The three LeNets of Prune and Tune Ensembles: ``conv1``, ``conv2``, ``linear1``, ``linear2``, ``classifier``."""

import math
from collections import OrderedDict

from torch import nn

from fsp.checks import check_choice
from fsp.models.axes import per_axis

LENET_PLANS = {
    "s": (16, 32, 256, 128),
    "m": (32, 64, 512, 256),
    "l": (64, 128, 1024, 512),
}  # conv, conv, linear, linear


def lenet(size: str, shape: tuple[int, int, int], classes: int, *, norm: bool = False) -> nn.Sequential:
    """Two 5×5 convolutions without padding, each with ReLU and a pool of 2×2, and three linear layers.

    Parameters
    ----------
    size : {"s", "m", "l"}
        Channels of the convolutions and outputs of the first two linear layers: 16, 32, 256, 128; twice that; four
        times that.
    shape : (channels, height, width)
        Of one input; height and width are 16 or more. An axis of one pixel is left alone: the kernels have one pixel
        along it.
    classes : int
        Number of outputs (logits).
    norm : bool
        Put a batch norm before each ReLU. Without it a sparse random mask loses the signal on its way to the output.

    Returns
    -------
    nn.Sequential
        Five prunable tensors; every layer has a bias. On 3×32×32 and 10 classes 253,290, 1,007,306 or 4,017,546
        parameters without `norm`.

    Raises
    ------
    ValueError
        `size` or `norm` is out of range; `shape` is too small.

    References
    ----------
    Whitaker and Whitley, "Prune and Tune Ensembles: Low-Cost Ensemble Learning with Sparse Independent Subnetworks",
    AAAI 2022 (LeNet-S, -M and -L).
    """
    check_choice("size", size, LENET_PLANS)
    check_choice("norm", norm, (True, False))
    inputs, *sides = shape
    if any(1 < side < 16 for side in sides):
        raise ValueError(f"shape={shape!r}: a LeNet needs a height and width of at least 16 pixels, or of exactly 1")
    kernel, window = per_axis(shape, 5), per_axis(shape, 2)
    widths = LENET_PLANS[size]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, outputs in enumerate(widths[:2], start=1):
        layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, kernel)
        if norm:
            layers[f"norm{i}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(window)
        sides = [(side - k + 1) // step for side, k, step in zip(sides, kernel, window, strict=True)]
        inputs = outputs
    layers["flatten"] = nn.Flatten()
    inputs *= math.prod(sides)
    for i, outputs in enumerate(widths[2:], start=1):
        layers[f"linear{i}"] = nn.Linear(inputs, outputs)
        if norm:
            layers[f"norm{i + 2}"] = nn.BatchNorm1d(outputs)
        layers[f"relu{i + 2}"] = nn.ReLU()
        inputs = outputs
    layers["classifier"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)
