"""VGG with batch norm: ``conv1``, ``conv2`` ..., ``classifier``; the longer heads add ``linear1`` and ``linear2``."""

import math
from collections import OrderedDict

from torch import nn

from fsp.checks import check_choice
from fsp.models.axes import half, per_axis

# Channels of the convolutions, one tuple a group; a pool ends each group.
VGG_PLANS = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


def vgg(
    depth: int, shape: tuple[int, int, int], classes: int, *, conv_bias: bool = True, head: str = "linear"
) -> nn.Sequential:
    """VGG for small images: 3×3 convolutions with batch norm and ReLU, five pools, a linear layer of 512 inputs.

    Parameters
    ----------
    depth : {11, 16, 19}
        The plan; with one linear layer the network has 9, 14 or 17 weight layers.
    shape : (channels, height, width)
        Of one input, any size.
    classes : int
        Number of outputs (logits).
    conv_bias : bool
        Convolutions have a bias (as in SynFlow and OpenLTH; GraSP leaves it out). It adds nothing to what the
        network can compute, since batch norm removes the mean, but it counts in the total of parameters.
    head : {"linear", "512", "4096"}
        What follows the convolutions. "512" is that of the full-spectrum paper's VGG-D: two linear layers of 512
        outputs, each with ReLU and then batch norm, and the classifier. "4096" is that of ImageNet and of torchvision,
        as the ICLR'23 paper takes it for CIFAR: the last map spread to 7×7, two linear layers of 4096 outputs with
        ReLU and dropout of a half, then the classifier. Nine tenths of VGG-16's weights are then in these layers.

    Returns
    -------
    nn.Sequential
        Prunable tensors ``conv1.weight`` ... and ``classifier.weight``, with "512" and "4096" also ``linear1.weight``
        and ``linear2.weight``.

    Raises
    ------
    ValueError
        `depth` is not 11, 16 or 19; `conv_bias` is not a bool; `head` is unknown.

    Notes
    -----
    The first four pools take the maximum over 2×2, the last averages what is left: 2×2 on a 32×32 input, as
    in the references, 4×4 on 64×64; before the longer heads it takes the maximum like the others. On smaller inputs
    a side that has already shrunk to one pixel is not pooled again, so an 8×8 input passes 4×4, 2×2, 1×1 and the
    fourth pool drops out. Weights do not depend on the input's height and width, except that an axis of one pixel is
    left alone: kernels have one pixel along it, and the map is not spread along it.

    Dropout draws from torch's global generator, so a training with the head "4096" is repeatable only where that is
    seeded.

    References
    ----------
    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, Table 1
    (configurations A, D, E). Hoang et al., "Don't just prune by magnitude! Your mask topology is a secret weapon",
    NeurIPS 2023 (the head "512").
    """
    check_choice("depth", depth, VGG_PLANS)
    check_choice("conv_bias", conv_bias, (True, False))
    check_choice("head", head, ("linear", "512", "4096"))
    inputs, *size = shape
    kernel = per_axis(shape, 3)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    i = 0
    for group, plan in enumerate(VGG_PLANS[depth], start=1):
        for outputs in plan:
            i += 1
            layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, kernel, padding=half(kernel), bias=conv_bias)
            layers[f"norm{i}"] = nn.BatchNorm2d(outputs)
            layers[f"relu{i}"] = nn.ReLU()
            inputs = outputs
        window = tuple(min(2, side) for side in size)
        if group == len(VGG_PLANS[depth]) and head == "linear":
            layers[f"pool{group}"] = nn.AdaptiveAvgPool2d(1)
        elif max(window) > 1:
            layers[f"pool{group}"] = nn.MaxPool2d(window)
            size = [side // step for side, step in zip(size, window, strict=True)]
    if head != "linear":
        spread = per_axis(shape, 7 if head == "4096" else 1)
        layers["spread"] = nn.AdaptiveAvgPool2d(spread)
        inputs *= math.prod(spread)
    layers["flatten"] = nn.Flatten()
    for j in (1, 2) if head != "linear" else ():
        layers[f"linear{j}"] = nn.Linear(inputs, int(head))
        layers[f"relu{i + j}"] = nn.ReLU()
        if head == "512":
            layers[f"norm{i + j}"] = nn.BatchNorm1d(512)
        else:
            layers[f"dropout{j}"] = nn.Dropout()
        inputs = int(head)
    layers["classifier"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)
