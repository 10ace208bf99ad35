"""Residual networks: the CIFAR family (depth 6n + 2) and ResNet-18/34/50, with or without skips.

Parameters are called ``stem.conv``, ``blocks.<i>.conv1``, ``blocks.<i>.conv2`` (and ``blocks.<i>.conv3`` in a
bottleneck), ``blocks.<i>.shortcut.conv`` (where a shortcut projects), ``classifier``, each convolution followed by its
norm; blocks are counted through all stages.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fsp.checks import check_choice, check_count
from fsp.models.axes import half, per_axis

# blocks in each stage, and what a block is
RESNET_STAGES = {18: ((2, 2, 2, 2), "basic"), 34: ((3, 4, 6, 3), "basic"), 50: ((3, 4, 6, 3), "bottleneck")}


class PadShortcut(nn.Module):
    """Option A of He et al.: keep every `stride`-th pixel, append `extra` channels of zeros. No parameters."""

    def __init__(self, extra: int, stride: int):
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + extra, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class BasicBlock(nn.Module):
    """Two convolutions with batch norm, the shortcut added before the last ReLU.

    Without `skip` there is no shortcut, no addition and no last ReLU: the block is a plain stack.
    """

    expansion = 1  # outputs are so many times `width`

    def __init__(self, inputs: int, width: int, kernel: tuple[int, int], stride: int, shortcut: str, skip: bool):
        super().__init__()
        outputs, padding = width, half(kernel)
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, kernel, padding=padding, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = skip
        if skip:
            self.shortcut = _shortcut(inputs, outputs, stride, shortcut)
            self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu2(y + self.shortcut(x)) if self.skip else y


class Bottleneck(nn.Module):
    """A convolution between two of 1×1 that narrow to `width` channels and widen to four times as many.

    The stride is that of the middle convolution. Without `skip` the block is a plain stack, as in `BasicBlock`.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, kernel: tuple[int, int], stride: int, shortcut: str, skip: bool):
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, kernel, stride=stride, padding=half(kernel), bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.skip = skip
        if skip:
            self.shortcut = _shortcut(inputs, outputs, stride, shortcut)
            self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, 4 * width, ceil(H / stride), ceil(W / stride))."""
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.relu2(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return self.relu3(y + self.shortcut(x)) if self.skip else y


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


def _shortcut(inputs: int, outputs: int, stride: int, option: str) -> nn.Module:
    """The way around a block: identity where the shape stays, else option A (padding) or B (projection)."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    if option == "A":
        return PadShortcut(outputs - inputs, stride)
    conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs)))


def stem_of(shape: tuple[int, int, int], width: int, stem: str) -> nn.Sequential:
    """Layers before the first block: a convolution to `width` channels, batch norm, ReLU and perhaps a max-pool.

    Parameters
    ----------
    shape : (channels, height, width)
        Of the network's input; kernel and window have one pixel along an axis on which it has one.
    width : int, >= 1
    stem : {"3x3", "3x3+pool", "7x7"}
        A 3×3 convolution of stride 1; the same and a 3×3 max-pool of stride 2; a 7×7 convolution of stride 2 and that
        pool, as for ImageNet.

    Returns
    -------
    nn.Sequential
        ``conv``, ``norm``, ``relu`` and, but for "3x3", ``pool``.

    Raises
    ------
    ValueError
        Unknown `stem`.
    """
    check_choice("stem", stem, ("3x3", "3x3+pool", "7x7"))
    size, stride = (7, 2) if stem == "7x7" else (3, 1)
    kernel, window = per_axis(shape, size), per_axis(shape, 3)
    conv = nn.Conv2d(shape[0], width, kernel, stride=stride, padding=half(kernel), bias=False)
    layers = OrderedDict(conv=conv, norm=nn.BatchNorm2d(width), relu=nn.ReLU())
    if stem != "3x3":
        layers["pool"] = nn.MaxPool2d(window, stride=2, padding=half(window))
    return nn.Sequential(layers)


def _residual(
    stages: Sequence[int],
    shape: tuple[int, int, int],
    classes: int,
    width: int,
    shortcut: str,
    skip: bool,
    block: str,
    stem: str = "3x3",
) -> nn.Sequential:
    """Stem, ``stages[s]`` blocks of ``width * 2**s`` channels in stage s, global average pool, classifier."""
    check_count("width", width, 1)
    check_choice("shortcut", shortcut, ("A", "B"))
    check_choice("skip", skip, (True, False))
    check_choice("block", block, BLOCKS)
    kernel = per_axis(shape, 3)  # a stride has nothing to skip along an axis of one pixel
    first, blocks, inputs = stem_of(shape, width, stem), [], width  # made in the order of the forward pass
    for stage, count in enumerate(stages):
        channels = width * 2**stage
        for i in range(count):
            stride = 2 if stage > 0 and i == 0 else 1
            blocks.append(BLOCKS[block](inputs, channels, kernel, stride, shortcut, skip))
            inputs = channels * BLOCKS[block].expansion
    return nn.Sequential(
        OrderedDict(
            stem=first,
            blocks=nn.Sequential(*blocks),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(inputs, classes),
        )
    )


def cifar_resnet(
    depth: int,
    shape: tuple[int, int, int],
    classes: int,
    *,
    width: int = 16,
    shortcut: str = "B",
    skip: bool = True,
    block: str = "basic",
) -> nn.Sequential:
    """CIFAR ResNet of depth 6n + 2: three stages of n blocks with `width`, 2 `width` and 4 `width` channels.

    Parameters
    ----------
    depth : int
        8, 14, 20, 26, 32 ...; counts the stem, the 6n convolutions of the basic blocks and the classifier.
    shape : (channels, height, width)
        Of one input. Any height and width: stages two and three halve the map, a global average ends it. Along an axis
        of one pixel the kernels have one pixel.
    classes : int
        Number of outputs (logits).
    width : int, >= 1
        Channels of the stem and the first stage. ``cifar_resnet(32, ..., width=32)`` is GraSP's ResNet-32.
    shortcut : {"B", "A"}
        Where the shape changes: "B" a 1×1 convolution with batch norm (OpenLTH, SynFlow), "A" subsampling with
        zero channels appended (no parameters).
    skip : bool
        False takes the shortcuts out, projections included, and with them the last ReLU of each block, as the ICLR'23
        study of skip connections does.
    block : {"basic", "bottleneck"}
        "bottleneck" has n blocks of three convolutions in a stage, which end in four times as many channels, and so
        9n + 2 layers in all. ``cifar_resnet(104, ..., block="bottleneck")``, of 155 layers, is what the code of ToST
        builds for a ResNet-104 (D61).

    Returns
    -------
    nn.Sequential
        6n + 2 prunable tensors, two more with "B" and `skip`; of bottlenecks 9n + 2, and three more.

    Raises
    ------
    ValueError
        `depth` is not 6n + 2 with n >= 1; `width`, `shortcut`, `skip` or `block` is out of range.

    References
    ----------
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, §4.2. Hoang et al., "Revisiting Pruning at
    Initialization through the Lens of Ramanujan Graph", ICLR 2023 (`skip`). Jaiswal et al., "Training Your Sparse
    Neural Network Better with Any Mask", ICML 2022 (`block`).
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth={depth!r}: expected 6n + 2 with n >= 1 (8, 20, 32, 56, 110 ...)")
    return _residual(((depth - 2) // 6,) * 3, shape, classes, width, shortcut, skip, block)


def resnet(
    depth: int,
    shape: tuple[int, int, int],
    classes: int,
    *,
    width: int = 64,
    shortcut: str = "B",
    stem: str = "3x3",
    skip: bool = True,
) -> nn.Sequential:
    """ResNet-18, -34 or -50: by default for small images, with a 3×3 stem of stride 1 and no max-pool.

    Parameters
    ----------
    depth : {18, 34, 50}
        50 is made of bottlenecks, the others of basic blocks.
    shape : (channels, height, width)
        Of one input. Any height and width: stages two to four halve the map, a global average ends it. Along an axis
        of one pixel the kernels have one pixel.
    classes : int
        Number of outputs (logits).
    width : int, >= 1
        Channels of the stem and the first stage; doubled in each later stage.
    shortcut : {"B", "A"}
        As in `cifar_resnet`.
    stem : {"3x3", "3x3+pool", "7x7"}
        "7x7" is that of ImageNet and of torchvision, a 7×7 convolution of stride 2 and a 3×3 max-pool of stride 2: a
        32×32 input leaves it as 8×8. The ICLR'23 paper takes it for CIFAR. "3x3+pool" is the small stem with that
        pool, as in the code of Prune and Tune Ensembles.
    skip : bool
        As in `cifar_resnet`.

    Returns
    -------
    nn.Sequential
        21 (ResNet-18), 37 (ResNet-34) or 54 (ResNet-50) prunable tensors with "B"; three fewer with "A" or without
        `skip`, and four fewer of ResNet-50.

    Raises
    ------
    ValueError
        `depth` is not 18, 34 or 50; `width`, `shortcut`, `stem` or `skip` is out of range.

    Notes
    -----
    The classifier has a bias. The networks of ITOP and of the full-spectrum code have none, which changes the total
    by `classes` and leaves the prunable weights as they are.

    References
    ----------
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, Table 1.
    """
    check_choice("depth", depth, RESNET_STAGES)
    stages, block = RESNET_STAGES[depth]
    return _residual(stages, shape, classes, width, shortcut, skip, block, stem)
