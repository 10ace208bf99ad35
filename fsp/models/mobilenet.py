"""MobileNetV1 for small images: a stem, then blocks of a depthwise and a pointwise convolution.

Parameters are called ``stem.conv``, ``blocks.<i>.conv1`` (depthwise), ``blocks.<i>.conv2`` (1×1), ``classifier``, each
convolution followed by its norm.
"""

from collections import OrderedDict

from torch import nn

from fsp.checks import check_count
from fsp.models.axes import half, per_axis
from fsp.models.resnet import stem_of

# Of each block: outputs as a multiple of the stem's, and stride
MOBILENET_PLAN = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *((16, 1),) * 5, (32, 2), (32, 1))


def mobilenet(shape: tuple[int, int, int], classes: int, *, width: int = 32) -> nn.Sequential:
    """MobileNetV1 with a stem of stride 1: 13 depthwise separable blocks, a global average and a linear classifier.

    Parameters
    ----------
    shape : (channels, height, width)
        Of one input, any size: four blocks halve the map. Along an axis of one pixel the kernels have one pixel.
    classes : int
        Number of outputs (logits).
    width : int, >= 1
        Channels of the stem; the last block has 32 times as many.

    Returns
    -------
    nn.Sequential
        28 prunable tensors. A depthwise weight has shape (channels, 1, 3, 3): as a graph it is a star of nine inputs
        and one output for each channel.

    Raises
    ------
    ValueError
        `width` is out of range.

    Examples
    --------
    >>> model = mobilenet((3, 32, 32), 10)
    >>> sum(parameter.numel() for parameter in model.parameters())
    3217226

    Notes
    -----
    Papers that prune "MobileNet" on CIFAR seldom say which; this is version 1 as common code for CIFAR has it (D62).

    References
    ----------
    Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
    arXiv:1704.04861, 2017, Table 1.
    """
    check_count("width", width, 1)
    kernel = per_axis(shape, 3)
    first, blocks, inputs = stem_of(shape, width, "3x3"), [], width  # made in the order of the forward pass
    for multiple, stride in MOBILENET_PLAN:
        outputs = multiple * width
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"] = nn.Conv2d(inputs, inputs, kernel, stride, half(kernel), groups=inputs, bias=False)
        layers["norm1"] = nn.BatchNorm2d(inputs)
        layers["relu1"] = nn.ReLU()
        layers["conv2"] = nn.Conv2d(inputs, outputs, 1, bias=False)
        layers["norm2"] = nn.BatchNorm2d(outputs)
        layers["relu2"] = nn.ReLU()
        blocks.append(nn.Sequential(layers))
        inputs = outputs
    return nn.Sequential(
        OrderedDict(
            stem=first,
            blocks=nn.Sequential(*blocks),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(inputs, classes),
        )
    )
