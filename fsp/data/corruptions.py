r"""Corruptions of images and signals that are made here, for data sets of which no corrupted copy is published.

They have nothing in common with the files of CIFAR-C but the idea; those are read by `fsp.data.corrupted` (D67).

A corruption is a function of float32 images (N, C, H, W), an amount and a generator. An axis one pixel long stays as it
is, so that a signal is corrupted along its one axis. Lengths are fractions of the side, so that images of 8 and of 64
pixels are hurt alike.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from fsp.checks import check_choice, check_generator, is_count, plain_settings
from fsp.data.datasets import Split


def _noise(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Add white noise, whose standard deviation is this times that of all pixels."""
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32, device="cpu")
    return images + amount * images.std(correction=0) * noise


def _blur(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Blur by a Gaussian, whose standard deviation is this part of a side."""
    deviations = [0, 0] + [amount * side for side in images.shape[2:]]
    return torch.from_numpy(gaussian_filter(images.numpy(), deviations, mode="nearest"))


def _contrast(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Move every pixel by this part of its way to the mean of its image."""
    return images.lerp(images.mean((1, 2, 3), keepdim=True), amount)


def _shift(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Move each image by this part of a side, along each axis in a direction that a coin decides; zeros follow."""
    coins = torch.randint(2, (len(images), 2), generator=generator, dtype=torch.int64, device="cpu")
    return _resampled(images, 1.0, amount * (2.0 * coins - 1))


def _scale(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Shrink the sides of what is seen by this part, about the centre; zeros surround it."""
    return _resampled(images, 1 - amount, torch.zeros(len(images), 2, dtype=torch.float32, device="cpu"))


def _occlusion(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Cover a window with this part of each side, somewhere inside each image, by the mean of the image."""
    inside = torch.ones(len(images), 1, 1, 1, dtype=torch.bool, device="cpu")
    for axis in (2, 3):
        side = images.shape[axis]
        if side > 1:
            length = math.ceil(amount * side)
            of_draws: dict[str, Any] = {"generator": generator, "dtype": torch.int64, "device": "cpu"}
            start = torch.randint(side - length + 1, (len(images), 1), **of_draws)
            place = torch.arange(side, device="cpu")
            covered = (start <= place) & (place < start + length)
            inside = inside & covered.view(-1, 1, *((side, 1) if axis == 2 else (1, side)))
    return torch.where(inside, images.mean((1, 2, 3), keepdim=True), images)


def _resampled(images: Tensor, scale: float, shifts: Tensor) -> Tensor:
    """Scale images about their centre, then move them by parts of their sides, (N, 2) for rows and columns."""
    long = [side > 1 for side in images.shape[2:]]
    maps = torch.zeros(len(images), 2, 3, dtype=torch.float32, device="cpu")  # from places in the result, x before y
    maps[:, 0, 0], maps[:, 1, 1] = (1 / scale if axis else 1.0 for axis in reversed(long))
    maps[:, 0, 2] = -2 * shifts[:, 1] / scale * long[1]  # a side is from -1 to 1
    maps[:, 1, 2] = -2 * shifts[:, 0] / scale * long[0]
    places = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, align_corners=False)


# function, and its amount at each of the five severities
CORRUPTIONS = {
    "noise": (_noise, (0.2, 0.4, 0.6, 0.8, 1.0)),
    "blur": (_blur, (0.04, 0.06, 0.08, 0.1, 0.12)),
    "contrast": (_contrast, (0.2, 0.4, 0.6, 0.75, 0.9)),
    "shift": (_shift, (0.03, 0.06, 0.09, 0.12, 0.15)),
    "scale": (_scale, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "occlusion": (_occlusion, (0.125, 0.25, 0.375, 0.5, 0.625)),
}


def corrupt(split: Split, name: str, severity: int, *, generator: torch.Generator) -> Split:
    """Corrupted copies of the images of a split, with the same labels.

    Parameters
    ----------
    split : Split
        Not normalised; uint8 in 0..255 or floating point.
    name : {"noise", "blur", "contrast", "shift", "scale", "occlusion"}
        A key of `CORRUPTIONS`, where the five amounts of each are. ``noise``: white, of a standard deviation in units
        of that of all pixels of the split. ``blur``: Gaussian. ``contrast``: towards the mean of the image. ``shift``:
        along every axis, in a random direction. ``scale``: smaller, in the middle. ``occlusion``: a window at a random
        place has the mean of the image. What ``shift`` and ``scale`` leave free is 0.
    severity : int in 1..5
    generator : torch.Generator
        On the CPU. ``noise``, ``shift`` and ``occlusion`` draw from it; the same state gives the same noise and the
        same directions for every severity.

    Returns
    -------
    Split
        Images of the same shape, dtype and device, uint8 ones rounded and kept in 0..255; the labels themselves.

    Raises
    ------
    ValueError
        If `name` or `severity` is unknown, the images are none, not four-dimensional or of another dtype, or
        `generator` is not a CPU generator.

    Examples
    --------
    >>> from fsp.data import load
    >>> digits = load("digits")
    >>> noisy = corrupt(digits.test, "noise", 3, generator=torch.Generator().manual_seed(0))
    >>> round((noisy.images - digits.test.images).std().item() / digits.test.images.std().item(), 2)
    0.6

    Notes
    -----
    All is computed on the CPU, in float32: the result does not depend on the device. Floating-point images may leave
    the range of their source. These are no copies of the corruptions of CIFAR-C, and accuracies under them cannot be
    laid beside those that are published for CIFAR-C (D67).

    References
    ----------
    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
    ICLR 2019, section 3: the idea of types by severities.
    """
    check_choice("corruption", name, CORRUPTIONS)
    change, amounts = CORRUPTIONS[name]
    if not is_count(severity, 1) or severity > len(amounts):
        raise ValueError(f"severity={severity!r}: expected an integer from 1 to {len(amounts)}")
    check_generator(generator)
    images, labels = split
    eight_bit = images.dtype == torch.uint8
    if images.ndim != 4 or not (eight_bit or images.is_floating_point()):
        raise ValueError(
            f"images is {images.dtype} of shape {tuple(images.shape)}; expected uint8 or floating point, (N, C, H, W)"
        )
    if images.numel() == 0 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: expected as many of both, and at least one")
    with plain_settings():
        found = change(images.to("cpu", torch.float32), amounts[severity - 1], generator)
        if eight_bit:
            found = found.round().clamp(0, 255)
        return Split(found.to(images.device, images.dtype), labels)
