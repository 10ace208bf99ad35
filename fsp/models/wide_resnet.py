"""Wide residual networks: norm and ReLU before each convolution, three stages of n blocks.

Parameters are called ``stem.conv``, ``blocks.<i>.norm1``, ``blocks.<i>.conv1``, ``blocks.<i>.norm2``,
``blocks.<i>.conv2``, ``blocks.<i>.shortcut`` (where a shortcut projects), ``norm``, ``classifier``; blocks are counted
through all stages.
"""

from collections import OrderedDict

from torch import Tensor, nn

from fsp.checks import check_choice, check_count, is_count
from fsp.models.axes import half, per_axis


class WideBlock(nn.Module):
    """Two convolutions, each behind its norm and ReLU; where the shape changes, a 1×1 convolution as shortcut.

    A variant "plain" has the stride in the first convolution and projects what has passed the first norm and ReLU;
    "pat" has it in the second, projects the block's input, and its convolutions have biases.
    """

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, variant: str):
        super().__init__()
        pat = variant == "pat"
        first, second = (1, stride) if pat else (stride, 1)
        padding = half(kernel)
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, stride=first, padding=padding, bias=pat)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, kernel, stride=second, padding=padding, bias=pat)
        projects = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=pat) if projects else nn.Identity()
        self.from_input = pat or not projects

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        active = self.relu1(self.norm1(x))
        y = self.conv2(self.relu2(self.norm2(self.conv1(active))))
        return y + self.shortcut(x if self.from_input else active)


def wide_resnet(
    depth: int, factor: int, shape: tuple[int, int, int], classes: int, *, variant: str = "plain"
) -> nn.Sequential:
    """WRN-`depth`-`factor`: three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times `factor` channels.

    Parameters
    ----------
    depth : int
        10, 16, 22, 28 ...; counts the stem, the convolutions of the blocks and three shortcuts.
    factor : int, >= 1
        The widening factor k.
    shape : (channels, height, width)
        Of one input. Any height and width: stages two and three halve the map, a global average ends it. Along an axis
        of one pixel the kernels have one pixel.
    classes : int
        Number of outputs (logits).
    variant : {"plain", "pat"}
        "pat" is the network of the code of Prune and Tune Ensembles: convolutions and shortcuts have biases, the stride
        is in the second convolution of a block, shortcuts project the block's input, and the last norm has the
        momentum .9 (D60).

    Returns
    -------
    nn.Sequential
        depth + 1 prunable tensors: a stem, depth - 4 convolutions in blocks, three shortcuts and the classifier; with
        the factor 1, whose first stage does not change the shape, one fewer.

    Raises
    ------
    ValueError
        `depth` is not 6n + 4 with n >= 1; `factor` or `variant` is out of range.

    Examples
    --------
    >>> model = wide_resnet(16, 4, (3, 32, 32), 10)
    >>> sum(parameter.numel() for parameter in model.parameters())
    2748890

    References
    ----------
    Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, Table 1. Whitaker and Whitley, "Prune and Tune
    Ensembles: Low-Cost Ensemble Learning with Sparse Independent Subnetworks", AAAI 2022 (the variant "pat").
    """
    if not is_count(depth, 10) or depth % 6 != 4:
        raise ValueError(f"depth={depth!r}: expected 6n + 4 with n >= 1 (10, 16, 22, 28 ...)")
    check_count("factor", factor, 1)
    check_choice("variant", variant, ("plain", "pat"))
    pat, kernel = variant == "pat", per_axis(shape, 3)
    first, blocks, inputs = nn.Conv2d(shape[0], 16, kernel, padding=half(kernel), bias=pat), [], 16
    for stage in range(3):
        outputs = 16 * factor * 2**stage
        for i in range((depth - 4) // 6):
            stride = 2 if stage > 0 and i == 0 else 1
            blocks.append(WideBlock(inputs, outputs, kernel, stride, variant))
            inputs = outputs
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(OrderedDict(conv=first)),
            blocks=nn.Sequential(*blocks),
            norm=nn.BatchNorm2d(inputs, momentum=0.9 if pat else 0.1),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(inputs, classes),
        )
    )
