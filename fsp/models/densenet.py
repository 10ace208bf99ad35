"""DenseNet-121 for small images, made of torchvision's dense blocks.

Parameters are called ``stem.conv``, ``block<b>.denselayer<i>.conv1`` and ``.conv2``, ``transition<b>.conv``, ``norm``,
``classifier``, with the norms ``block<b>.denselayer<i>.norm1``, ``.norm2`` and ``transition<b>.norm`` before them.
"""

from collections import OrderedDict

from torch import nn

from fsp.checks import check_choice, check_count
from fsp.models.axes import half, per_axis
from fsp.models.resnet import stem_of

DENSENET_BLOCKS = {121: (6, 12, 24, 16)}  # layers in each block


def densenet(
    depth: int, shape: tuple[int, int, int], classes: int, *, growth: int = 32, stem: str = "3x3"
) -> nn.Sequential:
    """DenseNet-BC: each layer reads the channels of all layers of its block before it and adds `growth` to them.

    Parameters
    ----------
    depth : {121}
    shape : (channels, height, width)
        Of one input, any size. Three transitions halve the map; a side that has shrunk to one pixel is not pooled
        again. Along an axis of one pixel the kernels have one pixel.
    classes : int
        Number of outputs (logits).
    growth : int, >= 1
        New channels of a layer; the stem has twice as many.
    stem : {"3x3", "3x3+pool", "7x7"}
        As in `resnet`: "3x3+pool" is that of Prune and Tune Ensembles, "7x7" that of ImageNet and of torchvision.

    Returns
    -------
    nn.Sequential
        121 prunable tensors.

    Raises
    ------
    ValueError
        `depth`, `growth` or `stem` is out of range.

    Notes
    -----
    Dense layers and transitions are objects of torchvision, which have the same names, order and numbers here; stem,
    3×3 kernels and pools are fitted to the image, and no ReLU works in place.

    References
    ----------
    Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, Table 1. Whitaker and Whitley, "Prune and Tune
    Ensembles: Low-Cost Ensemble Learning with Sparse Independent Subnetworks", AAAI 2022 (the stem "3x3+pool").
    """
    check_choice("depth", depth, DENSENET_BLOCKS)
    check_count("growth", growth, 1)
    from torchvision.models import DenseNet

    layers = OrderedDict(stem=stem_of(shape, 2 * growth, stem))
    whole = DenseNet(growth, DENSENET_BLOCKS[depth], 2 * growth, num_classes=classes)
    parts = dict(whole.features.named_children())
    sides = _after_stem(shape, stem)
    kernel = per_axis(shape, 3)
    for b, _ in enumerate(DENSENET_BLOCKS[depth], start=1):
        layers[f"block{b}"] = parts[f"denseblock{b}"]
        for layer in layers[f"block{b}"].values():
            new = layer.conv2
            layer.conv2 = nn.Conv2d(new.in_channels, growth, kernel, padding=half(kernel), bias=False)
        if f"transition{b}" in parts:
            window = tuple(min(2, side) for side in sides)
            layers[f"transition{b}"] = parts[f"transition{b}"]
            layers[f"transition{b}"].pool = nn.AvgPool2d(window)
            sides = [side // step for side, step in zip(sides, window, strict=True)]
    layers |= OrderedDict(norm=parts["norm5"], relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    layers["classifier"] = whole.classifier
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def _after_stem(shape: tuple[int, int, int], stem: str) -> list[int]:
    """Height and width of the first block's map: a stride of 2 rounds up."""
    halvings = {"3x3": 0, "3x3+pool": 1, "7x7": 2}[stem]
    return [-(-side // 2**halvings) for side in shape[1:]]
