"""A plain convolutional network: ``conv1``, ``conv2`` ..., ``classifier``."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from fsp.checks import check_choice, is_count
from fsp.models.axes import half, per_axis


def cnn(
    shape: tuple[int, int, int],
    classes: int,
    *,
    widths: Sequence[int] = (32, 32, 32, 32),
    kernel: int = 5,
    strides: Sequence[int] | None = None,
    norm: bool = True,
) -> nn.Sequential:
    """Convolutions with batch norm and ReLU, a global average and a linear classifier.

    Parameters
    ----------
    shape : (channels, height, width)
        Of one input, any size. The kernels have one pixel along an axis on which the input has one.
    classes : int
        Number of outputs (logits).
    widths : sequence of int, each >= 1
        Channels of the convolutions, one or more.
    kernel : int, odd
        Side of their kernels; the padding keeps the map's size where the stride is 1.
    strides : sequence of int, each >= 1, optional
        One for each convolution; by default 1 for the first and 2 for each further one.
    norm : bool
        False leaves out batch norm; the convolutions have a bias then.

    Returns
    -------
    nn.Sequential
        Prunable tensors ``conv1.weight`` ... and ``classifier.weight``, ``len(widths) + 1`` of them.

    Raises
    ------
    ValueError
        An option is out of range, or there are more or fewer strides than widths.

    Examples
    --------
    >>> [tuple(weight.shape) for name, weight in cnn((1, 1, 40), 10).named_parameters() if weight.ndim > 1]
    [(32, 1, 1, 5), (32, 32, 1, 5), (32, 32, 1, 5), (32, 32, 1, 5), (10, 32)]

    Notes
    -----
    Weights do not depend on the input's height and width, as in the residual networks: the average over the last map
    makes the classifier blind to where a pattern lies.
    """
    if not isinstance(widths, Sequence) or not widths or not all(is_count(width, 1) for width in widths):
        raise ValueError(f"widths={widths!r}: expected a sequence of positive integers such as (32, 32, 32, 32)")
    if not is_count(kernel, 1) or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel!r}: expected an odd integer of at least 1")
    if strides is None:
        strides = (1,) + (2,) * (len(widths) - 1)
    if not isinstance(strides, Sequence) or [is_count(s, 1) for s in strides] != [True] * len(widths):
        raise ValueError(f"strides={strides!r}: expected {len(widths)} positive integers, one for each of the widths")
    check_choice("norm", norm, (True, False))
    sides, inputs = per_axis(shape, kernel), shape[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (outputs, stride) in enumerate(zip(widths, strides, strict=True), start=1):
        conv = nn.Conv2d(inputs, outputs, sides, per_axis(shape, stride), half(sides), bias=not norm)
        layers[f"conv{i}"] = conv
        if norm:
            layers[f"norm{i}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{i}"] = nn.ReLU()
        inputs = outputs
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)
