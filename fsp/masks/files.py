"""Masks on disk: safetensors, one bit a weight, with what made them; and digests of tensors."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fsp.files import replacing
from fsp.masks.algebra import Masks, density, layer_densities

OWN_KEYS = ("shapes", "achieved_density", "achieved_layer_densities", "checksum")  # of `metadata`


def save(path: str | Path, masks: Mapping[str, Tensor], /, **metadata: object) -> None:
    """Write masks to a safetensors file, one bit a weight, atomically.

    Parameters
    ----------
    path : str or path
    masks : Masks
    **metadata
        Anything JSON can hold (method, seed, options ...); kept in the header beside shapes, achieved densities and
        the SHA-256 of the masks.

    Raises
    ------
    TypeError
        If metadata cannot be written as JSON.
    ValueError
        If metadata has a name that `metadata` itself gives: shapes, achieved_density, achieved_layer_densities,
        checksum.
    """
    taken = [key for key in OWN_KEYS if key in metadata]
    if taken:
        raise ValueError(f"metadata may not be called {', '.join(taken)}: fsp.masks.metadata tells these by itself")
    packed = {name: torch.from_numpy(np.packbits(m.cpu().numpy().reshape(-1))) for name, m in masks.items()}
    shapes = {name: list(m.shape) for name, m in masks.items()}
    header = {
        "shapes": shapes,
        "layer_densities": layer_densities(masks),
        "density": density(masks),
        "checksum": _checksum(shapes, packed),
        "metadata": metadata,
    }
    with replacing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(packed, metadata={"fsp_masks": json.dumps(header)}))


def load(path: str | Path) -> Masks:
    """Read masks that `save` wrote.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    Masks
        On the CPU, in the order they were saved in.

    Raises
    ------
    ValueError
        If the file holds no masks of this package, or not those of the densities and SHA-256 in its header (files
        written before there was a checksum have densities alone).
    """
    with _opened(path) as (file, header):
        shapes = header["shapes"]
        packed = {name: file.get_tensor(name) for name in shapes}
        masks = {}
        for name, shape in shapes.items():
            bits = np.unpackbits(packed[name].numpy(), count=math.prod(shape))
            masks[name] = torch.from_numpy(bits.astype(bool)).view(shape)
        achieved = header["layer_densities"]
    checksum = _checksum(shapes, packed)
    if layer_densities(masks) != achieved or header.get("checksum", checksum) != checksum:
        raise ValueError(f"{path} is damaged: its masks do not have the densities and the SHA-256 in its header")
    return masks


def metadata(path: str | Path) -> dict[str, object]:
    """What a file of masks tells of itself; no mask is read.

    Parameters
    ----------
    path : str or path
        Written by `save`.

    Returns
    -------
    dict
        The metadata given to `save` (method, seed, options ...) under their own names, and shapes, achieved_density,
        achieved_layer_densities and checksum: the SHA-256, in hexadecimal, of names, shapes and bits, the same for
        equal masks in equal order.  It is ``None`` for a file written before there was one.

    Raises
    ------
    ValueError
        If the file holds no masks of this package.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "masks.safetensors"
    >>> save(path, {"w": torch.tensor([True, False])}, method="snip", seed=3)
    >>> told = metadata(path)
    >>> told["method"], told["seed"], told["achieved_density"], len(told["checksum"])
    ('snip', 3, 0.5, 64)
    """
    with _opened(path) as (_, header):
        own = (header["shapes"], header["density"], header["layer_densities"], header.get("checksum"))
        return {**header["metadata"], **dict(zip(OWN_KEYS, own, strict=True))}


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[safe_open, dict]]:
    """An open file of masks and its header; whatever fails while reading is a ValueError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads(file.metadata()["fsp_masks"])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds no whole masks ({error}): fsp.masks.save writes them") from error


def _checksum(shapes: Mapping[str, list[int]], packed: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and packed bits."""
    total = hashlib.sha256(json.dumps(shapes).encode())
    for name in shapes:
        total.update(packed[name].numpy())
    return total.hexdigest()


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over names, types, shapes and bits of tensors, whatever their order, and a text.

    Examples
    --------
    >>> digest({"w": torch.ones(2)}) == digest({"w": torch.ones(2, dtype=torch.float64)})
    False
    """
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
