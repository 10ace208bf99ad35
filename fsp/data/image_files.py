"""Image files as tensors: Tiny ImageNet, and any folder with a folder of images for each class.

Both are read as 8-bit RGB, whatever the files hold, by the reader of torchvision's `ImageFolder`.
"""

import io
import re
import stat
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from fsp.checks import is_count
from fsp.files import replacing
from fsp.progress import bar

TINY_URL = "https://cs231n.stanford.edu/tiny-imagenet-200.zip"
# As other projects list it. We had no copy of the archive when this was written, so we could not verify it ourselves.
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_CLASSES, TINY_SIDE = 200, 64
TINY_PER_CLASS = {"train": 500, "val": 50}
_TINY_FOLDER = "tiny-imagenet-200"
_TINY_TRAIN = re.compile(rf"{_TINY_FOLDER}/train/(n\d+)/images/[^/]+\.JPEG")
_TINY_VAL = f"{_TINY_FOLDER}/val/val_annotations.txt"


def find_tinyimagenet(root: Path) -> Path:
    """Path of the archive, or of the folder unpacked from it; a FileNotFoundError with the remedy without either."""
    archive, folder = root / f"{_TINY_FOLDER}.zip", root / _TINY_FOLDER
    if archive.is_file():
        return archive
    if (root / _TINY_VAL).is_file() and (folder / "train").is_dir():
        return folder
    raise FileNotFoundError(f"tinyimagenet: {archive.name} not found in {root}. {_tiny_remedy(root)}")


def _tiny_remedy(root: Path) -> str:
    """What to do about missing or damaged files."""
    return (
        'Run load("tinyimagenet", download=True) on a machine with internet access (and copy the file to '
        f"{root}), or put {_TINY_FOLDER}.zip from {TINY_URL}, or the folder unpacked from it, into {root}."
    )


def read_tinyimagenet(root: Path, download: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of Tiny ImageNet: those for training by class, then those of its validation folder.

    The archive is verified and read where it lies: nothing is unpacked to disk.

    Parameters
    ----------
    root : Path
        Folder of the archive, or of the folder unpacked from it.
    download : bool
        Fetch the archive if neither is there.

    Returns
    -------
    images : Tensor, uint8, shape (N, 3, 64, 64)
    labels : Tensor, int64, shape (N,)
        Position of the class among the sorted names of the training folders.

    Raises
    ------
    FileNotFoundError
        If the files are not there and `download` is False.
    RuntimeError
        If the download fails, the archive has another checksum or a member that no dataset has, or an image is
        missing, damaged or of another size.
    """
    try:
        source = find_tinyimagenet(root)
    except FileNotFoundError:
        if not download:
            raise
        _fetch(TINY_URL, root / f"{_TINY_FOLDER}.zip", TINY_MD5, _tiny_remedy(root))
        source = find_tinyimagenet(root)
    try:
        if source.is_dir():
            names = [path.relative_to(root).as_posix() for path in source.rglob("*.JPEG")]
            return _tiny_images(names, lambda name: (root / name).read_bytes())
        _check_md5(source, TINY_MD5)
        with zipfile.ZipFile(source) as archive:
            _check_members(archive)
            return _tiny_images(archive.namelist(), archive.read)
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise RuntimeError(
            f"tinyimagenet: {source} could not be read: {error}. If it is damaged, delete it. {_tiny_remedy(root)}"
        ) from error


def _fetch(url: str, path: Path, md5: str, remedy: str) -> None:
    """Download a file over https; it is there whole and with its checksum, or not at all."""
    try:
        with replacing(path) as temporary:
            with urllib.request.urlopen(url, timeout=60) as response, temporary.open("wb") as file:
                if not response.url.startswith("https://"):
                    raise ValueError(f"it leads to {response.url}, which is not encrypted")
                total = int(response.headers.get("Content-Length") or 0) or None
                with bar(total=total, unit="B", unit_scale=True, desc=path.name) as progress:
                    while part := response.read(2**20):
                        file.write(part)
                        progress.update(len(part))
            _check_md5(temporary, md5)
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise RuntimeError(f"{url} could not be downloaded: {error}. {remedy}") from error


def _check_md5(path: Path, md5: str) -> None:
    """Raise a ValueError unless the file has the checksum."""
    from torchvision.datasets.utils import check_integrity

    if not check_integrity(path, md5):
        raise ValueError(f"it does not have the checksum {md5}")


def _check_members(archive: zipfile.ZipFile) -> None:
    """Raise a ValueError naming a member that would not stay below a folder it were unpacked in, or is a link."""
    for member in archive.infolist():
        path = PurePosixPath(member.orig_filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in member.orig_filename or "\0" in member.orig_filename:
            raise ValueError(f"its member {member.orig_filename!r} points outside, as in no published archive")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"its member {member.orig_filename!r} is a link, as in no published archive")


def _tiny_images(names: Iterable[str], read: Callable[[str], bytes]) -> tuple[Tensor, Tensor]:
    """All images, given the names of the files and how to read one; val's labels are in its annotation file."""
    found = [(match[0], match[1]) for match in map(_TINY_TRAIN.fullmatch, sorted(names)) if match]
    lines = [line.split("\t") for line in read(_TINY_VAL).decode().splitlines() if line]
    annotated = [(f"{_TINY_FOLDER}/val/images/{name}", label) for name, label, *_ in lines]
    classes = sorted({label for _, label in found})
    if len(classes) != TINY_CLASSES:
        raise ValueError(f"it has {len(classes)} training classes, expected {TINY_CLASSES}")
    for part, members in (("train", found), ("val", annotated)):
        count = Counter(label for _, label in members)
        wrong = sorted(
            label for label in {*classes, *count} if (label in classes) * TINY_PER_CLASS[part] != count[label]
        )
        if wrong:
            label = wrong[0]
            raise ValueError(
                f"{part} has {count[label]} images of class {label}, expected {TINY_PER_CLASS[part]} of each of the "
                f"{TINY_CLASSES} training classes"
            )
    number = {label: position for position, label in enumerate(classes)}
    members = found + annotated
    images = _stacked([name for name, _ in members], lambda name: io.BytesIO(read(name)), (TINY_SIDE, TINY_SIDE))
    return images, torch.tensor([number[label] for _, label in members], dtype=torch.int64, device="cpu")


def _stacked(
    names: list[str],
    opened: Callable[[str], io.BytesIO | str],
    side: tuple[int, int] | None = None,
    *,
    resize: bool = False,
) -> Tensor:
    """Images as one uint8 tensor (N, 3, H, W); all of the height and width `side`, by default those of the first."""
    from PIL import Image  # here, like torchvision, which brings it: few processes read image files

    images: Tensor | None = None
    for position, name in enumerate(bar(names, desc="images", unit="", leave=False)):
        try:
            with Image.open(opened(name)) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of some damaged PNG files
            raise RuntimeError(f"{name} is no image that can be read ({error}): delete or replace it") from error
        if resize and side is not None:
            image = image.resize(side[::-1], Image.Resampling.BILINEAR)
        side = side or (image.height, image.width)
        if (image.height, image.width) != side:
            raise ValueError(f"{name} is {image.height}x{image.width} pixels, expected {side[0]}x{side[1]}")
        if images is None:
            images = torch.empty(len(names), 3, *side, dtype=torch.uint8, device="cpu")
        images[position] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return images  # type: ignore[return-value]  # there is an image at least


def find_folder(root: Path) -> tuple[Path, Path]:
    """Folders of the training and the test images; a FileNotFoundError naming the one that is missing."""
    remedy = (
        "Pass root=..., the folder that holds train/<class>/<image> for training and test/<class>/<image> or "
        "val/<class>/<image> for testing."
    )
    if not (root / "train").is_dir():
        raise FileNotFoundError(f"folder: train not found in {root}. {remedy}")
    for name in ("test", "val"):
        if (root / name).is_dir():
            return root / "train", root / name
    raise FileNotFoundError(f"folder: neither test nor val found in {root}. {remedy}")


def read_folder(root: Path, size: tuple[int, int] | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Training and test images with their labels, as torchvision's `ImageFolder` finds them below two folders.

    Parameters
    ----------
    root : Path
        Holds ``train`` and ``test`` (or ``val``, if there is no ``test``), each with a folder for each class.
    size : (height, width), optional
        Every image is resized to it, bilinearly, its aspect ratio not kept. Without it all images must have one size.

    Returns
    -------
    train, test : (images, labels)
        uint8 of shape (N, 3, H, W), and int64 of shape (N,).
    classes : int
        Number of class folders; a label is the position of a folder among their sorted names.

    Raises
    ------
    FileNotFoundError
        If a folder is missing, or a class folder has no image.
    ValueError
        If `size` is no size, training and test have other classes, or images differ in size.
    RuntimeError
        If a file is no image that can be read.
    """
    from torchvision.datasets import ImageFolder

    if size is not None and not (
        isinstance(size, tuple | list) and len(size) == 2 and all(is_count(s, 1) for s in size)
    ):
        raise ValueError(f"size={size!r}: expected (height, width), two integers of at least 1, or None")
    folders = find_folder(root)
    try:
        train, test = (ImageFolder(folder) for folder in folders)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"folder: {error} Every class folder below {root} needs an image.") from error
    if train.classes != test.classes:
        differing = ", ".join(sorted({*train.classes} ^ {*test.classes}))
        raise ValueError(
            f"folder: {folders[0]} and {folders[1]} need the same class folders, but only one of them has {differing}"
        )
    resize, read = size is not None, []
    for part in (train, test):
        try:
            images = _stacked([path for path, _ in part.samples], str, size, resize=resize)
        except ValueError as error:
            raise ValueError(f"folder: {error}; pass size=(height, width) to resize all images") from error
        size = images.shape[2], images.shape[3]
        read.append((images, torch.tensor(part.targets, dtype=torch.int64, device="cpu")))
    return read[0], read[1], len(train.classes)
