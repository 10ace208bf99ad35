"""CIFAR-10-C and CIFAR-100-C: the test images of CIFAR under nineteen corruptions of five severities each."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fsp import paths
from fsp.checks import is_count
from fsp.data.datasets import Data, Split
from fsp.files import reading

BENCHMARK = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
_SOURCES = {  # data set: folder in its archive, and where that is kept
    "cifar10": ("CIFAR-10-C", "https://zenodo.org/records/2535967"),
    "cifar100": ("CIFAR-100-C", "https://zenodo.org/records/3555552"),
}
_SEVERITIES = 5


def corrupted(
    data: Data,
    *,
    names: Iterable[str] = BENCHMARK,
    severities: Iterable[int] = (1, 2, 3, 4, 5),
    root: str | Path = paths.RAW,
) -> Iterator[tuple[str, int, Split]]:
    """Corrupted copies of a CIFAR test set, read from the published files.

    Parameters
    ----------
    data : Data
        ``load("cifar10")`` or ``load("cifar100")``. Its test labels are compared with those of the files.
    names : iterable of str
        From `BENCHMARK`, the 15 corruptions of the benchmark, or `EXTRA`, the 4 that its authors keep for choosing
        hyperparameters (D66).
    severities : iterable of int in 1..5
    root : path
        Holds the folder ``CIFAR-10-C`` or ``CIFAR-100-C``, as its archive unpacks: a file ``<name>.npy`` for each
        corruption, and ``labels.npy``. They are not downloaded here: the error for a missing one says where they are.

    Yields
    ------
    name : str
    severity : int
    split : Split
        As many uint8 images as ``data.test`` has, in its order and on its device; not normalised, so as
        `fsp.training.evaluate` and `fsp.training.predict` take them.

    Raises
    ------
    ValueError
        If `data` is no CIFAR, or a name or severity is unknown.
    FileNotFoundError
        If a file is missing; nothing is yielded then.
    DamagedFile
        If a file is no array of 8-bit images (or of labels) for each test image and severity, or its labels are not
        those of ``data.test``. Of the images, shape and type are checked before the first are yielded.

    Notes
    -----
    The files are mapped, not read whole: one severity of one corruption is in memory at a time, 31 MB.

    References
    ----------
    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
    ICLR 2019, section 3.
    """
    if data.name not in _SOURCES:
        raise ValueError(f'data.name={data.name!r}: expected data of load("cifar10") or load("cifar100")')
    names, severities = list(names), list(severities)
    unknown = [name for name in names if name not in BENCHMARK + EXTRA]
    if unknown:
        raise ValueError(f"names has {', '.join(map(repr, unknown))}: expected some of {', '.join(BENCHMARK + EXTRA)}")
    wrong = [severity for severity in severities if not is_count(severity, 1) or severity > _SEVERITIES]
    if wrong:
        raise ValueError(f"severities has {', '.join(map(repr, wrong))}: expected integers from 1 to {_SEVERITIES}")
    folder_name, source = _SOURCES[data.name]
    folder = Path(root).expanduser() / folder_name
    missing = [f"{name}.npy" for name in [*names, "labels"] if not (folder / f"{name}.npy").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)} not found in {folder}. Get {folder_name}.tar from {source} and unpack it in {root}, "
            "or pass root=..., the folder where it was unpacked."
        )
    n = len(data.test.labels)
    _check_labels(folder / "labels.npy", data.test.labels)
    for name in names:
        _mapped(folder / f"{name}.npy", (_SEVERITIES * n, *data.shape[1:], data.shape[0]))
    return _blocks(folder, names, severities, data)


def _blocks(folder: Path, names: list[str], severities: list[int], data: Data) -> Iterator[tuple[str, int, Split]]:
    """Read the block of each severity, (n, H, W, C), from the file of each corruption."""
    n = len(data.test.labels)
    for name in names:
        images = _mapped(folder / f"{name}.npy", (_SEVERITIES * n, *data.shape[1:], data.shape[0]))
        for severity in severities:
            block = np.ascontiguousarray(images[(severity - 1) * n : severity * n].transpose(0, 3, 1, 2))
            yield name, severity, Split(torch.from_numpy(block).to(data.test.images.device), data.test.labels)


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Images of a file, left on disk, once type and shape are found right."""
    images = _array(path)
    with reading(path, "corrupted images"):
        if images.dtype != np.uint8 or images.shape != shape:
            raise ValueError(f"it holds {images.dtype} of shape {images.shape}, expected uint8 of shape {shape}")
    return images


def _check_labels(path: Path, expected: Tensor) -> None:
    """Raise unless the labels are those of the test images, once for each severity."""
    labels = _array(path)
    with reading(path, "labels"):
        if labels.shape != (_SEVERITIES * len(expected),) or labels.dtype.kind not in "iu":
            wanted = f"integers of shape ({_SEVERITIES * len(expected)},)"
            raise ValueError(f"it holds {labels.dtype} of shape {labels.shape}, expected {wanted}")
        differing = (labels.reshape(_SEVERITIES, -1) != expected.cpu().numpy()).sum()
        if differing:
            raise ValueError(f"{differing} of {labels.size} labels are not those of the test images, in their order")


def _array(path: Path) -> np.ndarray:
    """An array of a .npy file, mapped; anything else, such as one that would need unpickling, is refused."""
    with reading(path, "one NumPy array"):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except EOFError as error:
            raise ValueError(str(error)) from error
        if not isinstance(array, np.ndarray):
            raise ValueError("it holds several arrays")
    return array
