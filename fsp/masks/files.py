"""Masks on disk: one bit a weight, with what made them, in a file of `fsp.files`."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fsp.files import load_content, load_tensors, reading, save_tensors
from fsp.masks.algebra import Masks, density, layer_densities

KIND = "masks"
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
        If `masks` is no mapping, or metadata cannot be written as JSON.
    ValueError
        If metadata has a name that `metadata` itself gives: shapes, achieved_density, achieved_layer_densities,
        checksum.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"masks is a {type(masks).__name__}: expected save(path, masks), a dict of bool tensors by name"
        )
    taken = [key for key in OWN_KEYS if key in metadata]
    if taken:
        raise ValueError(f"metadata may not be called {', '.join(taken)}: fsp.masks.metadata gives these by itself")
    packed = {name: torch.from_numpy(np.packbits(m.cpu().numpy().reshape(-1))) for name, m in masks.items()}
    shapes = {name: list(m.shape) for name, m in masks.items()}
    content = {
        "shapes": shapes,
        "layer_densities": layer_densities(masks),
        "density": density(masks),
        "checksum": _checksum(shapes, packed),
        "metadata": metadata,
    }
    save_tensors(path, KIND, packed, content)


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
    fsp.files.DamagedFile
        A ValueError: the file holds no masks of this package, or not what was written.  Of files from before they had
        a SHA-256 over everything, the densities and the SHA-256 of the masks are checked, as far as they hold them.
    FileNotFoundError
        If there is none.
    """
    packed, content = load_tensors(path, KIND, unsigned=True)
    with reading(path, KIND):
        shapes = content["shapes"]
        masks = {}
        for name, shape in shapes.items():
            bits = np.unpackbits(packed[name].numpy(), count=math.prod(shape))
            masks[name] = torch.from_numpy(bits.astype(bool)).view(shape)
        checksum = _checksum(shapes, packed)
        if layer_densities(masks) != content["layer_densities"] or content.get("checksum", checksum) != checksum:
            raise ValueError("its masks do not have the densities and the SHA-256 in its header")
        return masks


def metadata(path: str | Path) -> dict[str, object]:
    """What the header of a file of masks says; no mask is read, so they may be damaged.

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
    fsp.files.DamagedFile, FileNotFoundError
        As for `load`.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "masks.safetensors"
    >>> save(path, {"w": torch.tensor([True, False])}, method="snip", seed=3)
    >>> found = metadata(path)
    >>> found["method"], found["seed"], found["achieved_density"], len(found["checksum"])
    ('snip', 3, 0.5, 64)
    """
    content = load_content(path, KIND)
    with reading(path, KIND):
        own = (content["shapes"], content["density"], content["layer_densities"], content.get("checksum"))
        return {**content["metadata"], **dict(zip(OWN_KEYS, own, strict=True))}


def _checksum(shapes: Mapping[str, list[int]], packed: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and packed bits."""
    total = hashlib.sha256(json.dumps(shapes).encode())
    for name in shapes:
        total.update(packed[name].numpy())  # type: ignore[arg-type]  # in Python 3.11 no type says that arrays are buffers
    return total.hexdigest()
