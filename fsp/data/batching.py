"""Batches of a dataset: random crop and flip, epochs, examples for scoring.

Every random choice is drawn on the CPU from a `torch.Generator`, so that it does not depend on the device.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fsp.checks import check_choice, check_count, check_generator
from fsp.data.datasets import Data, Split


def augment(
    images: Tensor,
    *,
    padding: int = 4,
    mode: str = "zeros",
    flip: bool = True,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Tensor:
    """Random crop of the padded image, then a horizontal flip with probability one half; each image on its own.

    Parameters
    ----------
    images : Tensor, shape (N, C, H, W), any dtype
        Before normalisation: the zeros around them are black, as in the reference transforms.
    padding : int, at least 0
        Pixels added on each side. Each of the (2 padding + 1)^2 offsets is equally likely.
    mode : {"zeros", "reflect"}
        What lies in the padding. "reflect" mirrors the image without repeating its edge, and is what the
        full-spectrum papers use for CIFAR-10.
    flip : bool
    generator : torch.Generator
        On the CPU. Draws N row offsets, N column offsets and, if `flip`, N coins, in this order. A sequence of
        generators: one for each of as many equal parts of the images, which move as they would alone.

    Returns
    -------
    Tensor
        A new tensor of the same shape, dtype and device.

    Raises
    ------
    ValueError
        `images` is not four-dimensional, `padding` is negative or too wide to reflect, `mode` is unknown,
        `generator` is not a CPU generator, or the images do not part equally among several.

    Examples
    --------
    >>> images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    >>> moved = augment(images, generator=torch.Generator().manual_seed(0))
    >>> moved.shape, moved.dtype, moved.unique()
    (torch.Size([2, 3, 32, 32]), torch.uint8, tensor([  0, 255], dtype=torch.uint8))
    """
    if images.ndim != 4:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (N, C, H, W)")
    check_choice("mode", mode, ("zeros", "reflect"))
    check_count("padding", padding, 0)
    n, _, height, width = images.shape
    if mode == "reflect" and padding >= min(height, width):
        raise ValueError(f"padding={padding}: a {height}x{width} image reflects at most {min(height, width) - 1}")
    generators = generator if isinstance(generator, Sequence) else [generator]
    for one in generators:
        check_generator(one)
    if not generators or n % len(generators):
        raise ValueError(f"{n} images do not part equally among {len(generators)} generators")

    draws = torch.cat([_drawn(n // len(generators), padding, flip, one) for one in generators], dim=1)
    if images.is_cuda:  # pragma: no cover - needs CUDA
        draws = draws.pin_memory()  # from other memory a copy waits for all the work that the GPU has been given
    rows, columns, *coins = draws.to(images.device, non_blocking=True)  # one transfer
    if mode == "zeros":
        padded = F.pad(images, (padding,) * 4)
    else:  # by index, because F.pad reflects uint8 images only on some devices
        padded = images[:, :, _mirrored(height, padding, images.device)]
        padded = padded[:, :, :, _mirrored(width, padding, images.device)]
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2p+1, 2p+1, H, W), a view
    cropped = windows[torch.arange(n, device=images.device), :, rows, columns]  # (N, C, H, W)
    if not flip:
        return cropped
    return torch.where(coins[0].bool().view(-1, 1, 1, 1), cropped.flip(-1), cropped)


def _drawn(n: int, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Row offsets, column offsets and, if asked for, coins of n images: a row each."""
    of_draws: dict[str, Any] = {"generator": generator, "dtype": torch.int64, "device": "cpu"}
    offsets = torch.randint(2 * padding + 1, (2, n), **of_draws)
    return torch.cat([offsets, torch.randint(2, (1, n), **of_draws)]) if flip else offsets


def _mirrored(side: int, padding: int, device: torch.device) -> Tensor:
    """Indices of one axis, reflected at both ends: for example, side 3, padding 2 gives 2 1 0 1 2 1 0."""
    index = torch.arange(-padding, side + padding, device=device).abs()
    return side - 1 - (side - 1 - index).abs()


def batches(
    split: Split | tuple[Tensor, Tensor],
    size: int,
    *,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a split into batches that hold every example once.

    Parameters
    ----------
    split : Split or (images, labels)
    size : int, at least 1
        Examples in a batch; the last one may be smaller.
    generator : torch.Generator, optional
        On the CPU. Given: a new random order, drawn when `batches` is called. Without: the stored order, as views.
    drop_last : bool
        Leave out a smaller last batch.

    Returns
    -------
    iterator of (images, labels)
        As stored, not normalised, on the device of the split.

    Raises
    ------
    ValueError
        `size` is not a positive integer, images and labels differ in number, or `generator` is not a CPU generator.

    Examples
    --------
    >>> split = Split(torch.zeros(5, 1, 2, 2), torch.arange(5))
    >>> [labels.tolist() for _, labels in batches(split, 2)]
    [[0, 1], [2, 3], [4]]
    """
    images, labels = split
    check_count("size", size, 1)
    if images.ndim == 0 or labels.ndim == 0:
        raise ValueError("images or labels of the split are a single number: expected one along the first dimension")
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels: they must be of one split")
    starts = range(0, len(labels) - len(labels) % size if drop_last else len(labels), size)
    if generator is None:
        return ((images[start : start + size], labels[start : start + size]) for start in starts)
    check_generator(generator)
    order = _permutation(len(labels), generator).to(images.device)
    chosen = (order[start : start + size] for start in starts)
    return ((images[index], labels[index]) for index in chosen)


def scoring_batches(
    data: Data,
    *,
    per_class: int = 10,
    batch_size: int = 256,
    balanced: bool = True,
    augmented: bool = False,
    generator: torch.Generator,
) -> list[tuple[Tensor, Tensor]]:
    """Training examples on which a pruning score is computed.

    Parameters
    ----------
    data : Data
        Examples come from ``data.train``, without replacement.
    per_class : int, at least 1
        The batches hold ``per_class * data.classes`` examples altogether.
    batch_size : int, at least 1
    balanced : bool
        True: exactly `per_class` of each class, as in GraSP's code. False: drawn uniformly from all classes, as in
        SynFlow's code.
    augmented : bool
        Crop (zero padding of 4) and flip the chosen examples, as GraSP's and SynFlow's code do.
    generator : torch.Generator
        On the CPU. The same generator state gives the same batches.

    Returns
    -------
    list of (images, labels)
        Normalised float32 images and int64 labels, on the device of `data`, in random order.

    Raises
    ------
    ValueError
        There are too few training examples (of a class), a number is not a positive integer, `generator` is not a
        CPU generator, or `augmented` is asked for a dataset that has no such recipe.

    Notes
    -----
    GraSP's code cuts its examples into batches sorted by class, so that its two halves see disjoint classes; here
    they are shuffled first.

    References
    ----------
    .. [1] Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019.
    .. [2] Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020.
    .. [3] Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow",
       NeurIPS 2020.
    """
    check_count("per_class", per_class, 1)
    check_count("batch_size", batch_size, 1)
    check_generator(generator)
    if augmented and not data.augmented:
        raise ValueError(f"augmented=True, but {data.name} is not trained with crop and flip: pass augmented=False")
    images, labels = data.train
    total = per_class * data.classes
    if balanced:
        on_cpu = labels.cpu()
        by_class = [(on_cpu == label).nonzero().flatten() for label in range(data.classes)]
        for label, members in enumerate(by_class):
            if len(members) < per_class:
                raise ValueError(
                    f"per_class={per_class}, but class {label} of {data.name} has {len(members)} training examples: "
                    "lower per_class or pass balanced=False"
                )
        drawn = [member[_permutation(len(member), generator)[:per_class]] for member in by_class]
        chosen = torch.cat(drawn)[_permutation(total, generator)]
    else:
        if total > len(labels):
            raise ValueError(
                f"per_class={per_class} asks for {total} examples, but {data.name} has {len(labels)} for training"
            )
        chosen = _permutation(len(labels), generator)[:total]
    chosen = chosen.to(images.device)
    images, labels = images[chosen], labels[chosen]
    if augmented:
        images = augment(images, generator=generator)
    return list(batches((data.normalise(images), labels), batch_size))


def batch_size(batch: object) -> int:
    """Number of examples in a batch, whatever its inputs and labels are made of.

    Parameters
    ----------
    batch : (inputs, labels)
        Where the labels are one tensor, or a list with a dict for each example, their length counts; otherwise that of
        the first tensor of the inputs, which may lie in a dict, list or tuple, or of the labels.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    TypeError
        If the batch is no pair, the labels are None, or nothing in it is a tensor.
    ValueError
        If the batch has no example, or no dimension for the examples.

    Examples
    --------
    >>> batch_size((torch.zeros(36, 3), {"class": torch.zeros(36), "box": torch.zeros(36, 4)}))
    36
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        several = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(f"a batch is {type(batch).__name__}{several}: expected batches=[(inputs, labels), ...]")
    inputs, labels = batch
    if labels is None:
        raise TypeError(
            "the labels of a batch are None: expected what the loss compares the outputs with, such as "
            "batches=[(inputs, inputs)] for an autoencoder"
        )
    if isinstance(labels, list | tuple) and labels and all(isinstance(one, Mapping) for one in labels):
        return len(labels)
    if isinstance(inputs, PackedSequence) and not isinstance(labels, Tensor):
        return int(inputs.batch_sizes[0])
    found = [_first_tensor(inputs), _first_tensor(labels)]
    shapes = [tensor.shape for tensor in found if tensor is not None]
    if not shapes:
        raise TypeError("neither inputs nor labels of a batch hold a tensor: how many examples it has is unknown")
    counted = labels.shape if isinstance(labels, Tensor) else shapes[0]
    if len(counted) == 0 or len(shapes[0]) == 0:
        raise ValueError(
            f"a batch has inputs of shape {tuple(shapes[0])} and labels of shape {tuple(shapes[-1])}: expected several "
            "examples along the first dimension, or inputs[None] and labels[None] for a single one"
        )
    if counted[0] == 0:
        raise ValueError(f"a batch holds no example (inputs of shape {tuple(shapes[0])}): leave it out")
    return counted[0]


@contextmanager
def explained(batch: tuple[object, object]) -> Iterator[None]:
    """Say of an error which batch a model met it on, and what to do about a batch of one under batch norm.

    Raises
    ------
    ValueError
        If batch norm is given one number a channel, because there is one example.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        if batch_size(batch) == 1 and "more than 1 value per channel" in str(error):
            raise ValueError(
                "a batch holds one example, which batch norm cannot normalise in train mode: add it to another batch, "
                f"leave it out, or pass training=False ({error})"
            ) from error
        shapes = [f"{name} of {_described(part)}" for name, part in zip(("inputs", "labels"), batch, strict=True)]
        error.add_note(f"This was a batch with {' and '.join(shapes)}; does the model take such inputs?")
        raise


def _described(part: object) -> str:
    """Shape of a tensor, or the type of something else."""
    return f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else f"type {type(part).__name__}"


def _first_tensor(value: object) -> Tensor | None:
    """The first tensor in nested dicts, lists and tuples; None if there is none."""
    if isinstance(value, Tensor):
        return value
    parts = list(value.values()) if isinstance(value, Mapping) else value
    for part in parts if isinstance(parts, list | tuple) else ():
        found = _first_tensor(part)
        if found is not None:
            return found
    return None


def _permutation(n: int, generator: torch.Generator) -> Tensor:
    """Random order of n things, on the CPU whatever torch's default device is."""
    return torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")
