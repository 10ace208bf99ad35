"""Kernels of one pixel along an axis on which the image has one pixel, a rule of all convolutional families."""


def per_axis(shape: tuple[int, int, int], size: int) -> tuple[int, int]:
    """`size` along height and width, but 1 along an axis on which the image has a single pixel.

    A kernel of three pixels sees nothing but padding on both sides of such an axis: two thirds of its weights would be
    without effect on any output, and a mask that keeps them would keep nothing.

    Parameters
    ----------
    shape : (channels, height, width)
        Of the network's input.
    size : int, >= 1
        Side of a kernel, of a pooling window or of a resized map.

    Returns
    -------
    (int, int)

    Examples
    --------
    >>> per_axis((3, 32, 32), 3), per_axis((1, 1, 40), 3)
    ((3, 3), (1, 3))
    """
    height, width = (size if side > 1 else 1 for side in shape[1:])
    return height, width


def half(kernel: tuple[int, int]) -> tuple[int, int]:
    """Padding with which a kernel of odd sides and stride 1 keeps height and width."""
    height, width = kernel
    return height // 2, width // 2
