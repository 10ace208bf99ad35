"""Evenly cascaded networks: a low-level stream that is modulated, a high-level one that grows, maps that shrink evenly.

Parameters are called ``stem.conv``, ``layers.<i>.norm1``, ``layers.<i>.conv1`` (and ``layers.<i>.norm2``,
``layers.<i>.conv2``), ``norm``, ``classifier``.
"""

import math
from collections import OrderedDict
from fractions import Fraction
from numbers import Real
from typing import NamedTuple

from torch import Tensor, nn

from fsp.checks import check_choice, check_count, check_shape
from fsp.models.axes import half, per_axis
from fsp.models.resnet import PadShortcut


class CascadeStep(NamedTuple):
    """What leaves the stem, as layer 0, or a cascade layer: size of the map, and channels of the two streams."""

    layer: int
    height: int
    width: int
    low: int
    high: int


class CascadeLayer(nn.Module):
    """One or two convolutions behind norm and ReLU, added to the low-level stream; then the map is resized.

    The first channels of a result are the layer's input plus what the convolutions make of it, the last, new ones what
    they make alone. Without `low_stream` nothing is added.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        size: tuple[int, int],
        convs: int,
        low_stream: bool,
    ):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, padding=half(kernel), bias=False)
        self.convs = convs
        if convs == 2:
            self.norm2 = nn.BatchNorm2d(outputs)
            self.relu2 = nn.ReLU()
            self.conv2 = nn.Conv2d(outputs, outputs, kernel, padding=half(kernel), bias=False)
        self.low_stream = low_stream
        if low_stream:
            self.low = PadShortcut(outputs - inputs, 1)
        self.resize = nn.Upsample(size=size, mode="bilinear", align_corners=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to ``(N, outputs, *size)``."""
        y = self.conv1(self.relu1(self.norm1(x)))
        if self.convs == 2:
            y = self.conv2(self.relu2(self.norm2(y)))
        return self.resize(y + self.low(x) if self.low_stream else y)


def ecn(
    shape: tuple[int, int, int],
    classes: int,
    *,
    layers: int = 6,
    width: int = 8,
    growth: int = 8,
    rate: float = 0.75,
    convs: int = 2,
    low_stream: bool = True,
) -> nn.Sequential:
    r"""Evenly cascaded network: a stem, cascade layers, norm and ReLU, a global average, a linear classifier.

    With C channels at its input x and growth g, a cascade layer makes a map y of C + g channels by convolutions and
    returns

    .. math:: \mathrm{resize}\big(\mathrm{concat}(x + y_{1 \ldots C},\; y_{C+1 \ldots C+g})\big)

    where resize, bilinear with aligned corners, multiplies height and width by a constant rate, rounded down.

    Parameters
    ----------
    shape : (channels, height, width)
        Of one input. An axis of one pixel is left alone: kernels have one pixel along it, and maps are not resized.
    classes : int
        Number of outputs (logits).
    layers : int, >= 1
        Cascade layers.
    width : int, >= 1
        Channels of the stem.
    growth : int, >= 0
        Channels that a layer adds, the high-level stream; with 0 there is none.
    rate : float, in (0, 1]
        Height and width of a layer's result over those of its input. With 1 no map shrinks. Below .5 the resize skips
        pixels.
    convs : {2, 1}
        Convolutions in a layer.
    low_stream : bool
        False takes the addition away, so that a layer is its convolutions and the resize alone.

    Returns
    -------
    nn.Sequential
        ``layers * convs + 2`` prunable tensors.

    Raises
    ------
    ValueError
        An option is out of range, or the map would shrink below one pixel.

    Examples
    --------
    >>> model = ecn((3, 32, 32), 10)
    >>> sum(parameter.numel() for parameter in model.parameters())
    146242

    Notes
    -----
    The paper describes the streams, the rate and the growth; what is in a layer is a reconstruction (D63). `ecn_plan`
    shows the sizes and channels.

    A resize to one pixel takes the first of the pixels, since corners are aligned. On a GPU its gradient is summed in
    no fixed order unless ``torch.use_deterministic_algorithms`` is set.

    References
    ----------
    Ye, Devaraj, Maynord, Fermüller and Aloimonos, "Evenly Cascaded Convolutional Networks", arXiv:1807.00456, 2018,
    Figure 1.
    """
    steps = ecn_plan(shape, layers=layers, width=width, growth=growth, rate=rate)
    check_choice("convs", convs, (2, 1))
    check_choice("low_stream", low_stream, (True, False))
    kernel = per_axis(shape, 3)
    first, cascade = nn.Conv2d(shape[0], width, kernel, padding=half(kernel), bias=False), []
    for step in steps[1:]:
        size = step.height, step.width
        cascade.append(CascadeLayer(step.low, step.low + step.high, kernel, size, convs, low_stream))
    channels = width + layers * growth
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(OrderedDict(conv=first)),
            layers=nn.Sequential(*cascade),
            norm=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(channels, classes),
        )
    )


def ecn_plan(
    shape: tuple[int, int, int], *, layers: int = 6, width: int = 8, growth: int = 8, rate: float = 0.75
) -> list[CascadeStep]:
    """Sizes of the maps and channels of both streams of an `ecn`, from the stem to the last layer.

    Parameters
    ----------
    shape, layers, width, growth, rate
        As in `ecn`.

    Returns
    -------
    list of CascadeStep
        ``layers + 1`` rows (layer, height, width, low, high). The stem is layer 0, all of its channels are new.

    Raises
    ------
    ValueError
        An option is out of range, or the map would shrink below one pixel.

    Examples
    --------
    >>> for step in ecn_plan((3, 32, 32), layers=3):
    ...     print(*step)
    0 32 32 0 8
    1 24 24 8 8
    2 18 18 16 8
    3 13 13 24 8
    """
    check_shape(shape)
    check_count("layers", layers, 1)
    check_count("width", width, 1)
    check_count("growth", growth, 0)
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < rate <= 1:
        raise ValueError(f"rate={rate!r}: expected a number above 0 and at most 1, such as 0.75")
    ratio = Fraction(str(rate))  # .7 of 10 pixels are 7, whatever binary fraction stands for .7
    steps = [CascadeStep(0, *shape[1:], 0, width)]
    for layer in range(1, layers + 1):
        last = steps[-1]
        sides = (last.height, last.width)
        new = [math.floor(ratio * s) if whole > 1 else 1 for s, whole in zip(sides, shape[1:], strict=True)]
        if min(new) < 1:
            found = " to ".join(f"{step.height}x{step.width}" for step in steps)
            remedy = f"at most {layer - 1} layers, or a rate nearer to 1" if layer > 1 else "a rate nearer to 1"
            raise ValueError(
                f"layers={layers!r} at rate={rate!r} shrink the map from {found}, and layer {layer} would have less "
                f"than one pixel: use {remedy}"
            )
        steps.append(CascadeStep(layer, *new, last.low + last.high, growth))
    return steps
