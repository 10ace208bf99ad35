"""Loading, splitting, augmenting and batching of datasets, without network.

CIFAR and MNIST go through torchvision's own reading and checksum code, on small files in the published format.
"""

import gzip
import hashlib
import pickle
import shutil
import struct
import tarfile

import numpy as np
import pytest
import torch
from torchvision import datasets

from fsp import paths
from fsp.data import DATASETS, STATISTICS, Data, Split, load
from fsp.data.batching import augment, batches, corrupted, scoring_batches


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _global_random_state_stays():
    """Every test of this file is also a test that the global generators are left alone."""
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    yield
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


# Files in the published formats


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels(n, seed, shape):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2's str, which is what the published CIFAR files hold (and their keys are)."""

    def save_str(self, obj):
        self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)

    dispatch = pickle._Pickler.dispatch | {bytes: save_str}


def write_pickle(path, content):
    with path.open("wb") as file:
        _Python2Pickler(file, protocol=2).dump(content)


def write_cifar(monkeypatch, root, kind, label_key, per_batch):
    """Pickled batches as CIFAR's own, with torchvision's checksum tables set to them; returns what they hold."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    classes = 100 if kind is datasets.CIFAR100 else 10
    contents, tables = {}, {}
    for table in ("train_list", "test_list"):
        entries, images, labels = [], [], []
        for seed, (file, _) in enumerate(getattr(kind, table), start=len(table)):
            data = pixels(per_batch, seed, (3072,))
            marks = [(seed + 7 * i) % classes for i in range(per_batch)]
            write_pickle(folder / file, {b"data": data, label_key: marks, b"batch_label": b"made by a test"})
            entries.append([file, md5(folder / file)])
            images.append(data.reshape(-1, 3, 32, 32))
            labels += marks
        tables[table] = entries
        contents[table] = torch.from_numpy(np.concatenate(images)), torch.tensor(labels)
    meta = dict(kind.meta)
    write_pickle(folder / meta["filename"], {meta["key"].encode(): [b"a name"] * classes})
    meta["md5"] = md5(folder / meta["filename"])
    for name, value in {**tables, "meta": meta}.items():
        monkeypatch.setattr(kind, name, value)
    return contents


@pytest.fixture
def cifar10(monkeypatch, tmp_path):
    return write_cifar(monkeypatch, tmp_path, datasets.CIFAR10, b"labels", 8)


@pytest.fixture
def cifar100(monkeypatch, tmp_path):
    return write_cifar(monkeypatch, tmp_path, datasets.CIFAR100, b"fine_labels", 30)


def idx(array):
    """Big-endian header (type 8 = unsigned byte, dimensions, sizes) and the bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def mnist(monkeypatch, tmp_path):
    """The four gzip files as downloaded, not yet unpacked."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    contents, resources = {}, []
    for part, n in (("train", 20), ("t10k", 6)):
        images, labels = pixels(n, n, (28, 28)), (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array)))
            resources.append((path.name, md5(path)))
        contents[part] = torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    return contents


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def same(split, images, labels):
    return torch.equal(split.images, images) and torch.equal(split.labels, labels)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_as_stored_through_torchvision(name, classes, request, tmp_path, no_network):
    contents = request.getfixturevalue(name)
    data = load(name, root=tmp_path, validation=0)
    assert same(data.train, *contents["train_list"])
    assert same(data.test, *contents["test_list"])
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.is_contiguous()
    assert data.train.labels.dtype == torch.int64
    assert (data.shape, data.classes, data.augmented) == ((3, 32, 32), classes, True)
    assert (data.mean, data.std) == STATISTICS[name]["default"]
    assert data.validation.images.shape == (0, 3, 32, 32)
    assert len(load(name, root=tmp_path).validation.labels) == round(0.1 * len(contents["train_list"][1]))


def test_cifar_statistics_follow_the_named_preset(cifar10, tmp_path):
    data = load("cifar10", root=tmp_path, statistics="fsp2023")
    assert data.std == (0.2023, 0.1994, 0.2010)


def test_a_damaged_cifar_file_is_refused(cifar10, tmp_path, no_network):
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"corrupted.*download=True"):
        load("cifar10", root=tmp_path)


@pytest.mark.parametrize("lost", ["data_batch_2", "test_batch", "batches.meta"])
def test_a_missing_cifar_file_is_named_with_folder_and_remedy(cifar10, tmp_path, no_network, lost):
    (tmp_path / "cifar-10-batches-py" / lost).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load("cifar10", root=tmp_path)
    for part in (lost, str(tmp_path), 'load("cifar10", download=True)', "cifar-10-python.tar.gz"):
        assert part in str(caught.value)


def pack(monkeypatch, root):
    """Move the CIFAR-10 folder into the archive as it is published."""
    folder, archive = root / "cifar-10-batches-py", root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    return archive


def test_a_cifar_archive_put_into_the_folder_is_unpacked_without_network(cifar10, monkeypatch, tmp_path, no_network):
    pack(monkeypatch, tmp_path)
    assert same(load("cifar10", root=tmp_path, validation=0).train, *cifar10["train_list"])


def test_a_damaged_archive_is_refused_and_not_replaced_from_the_network(cifar10, monkeypatch, tmp_path, no_network):
    archive = pack(monkeypatch, tmp_path)
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(RuntimeError, match="does not have the checksum"):
        load("cifar10", root=tmp_path)
    assert not (tmp_path / "cifar-10-batches-py").exists()


def test_download_fetches_only_when_it_is_asked_for(cifar10, monkeypatch, tmp_path):
    archive = pack(monkeypatch, tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "url", archive.as_uri())
    monkeypatch.setattr(
        "torchvision.datasets.utils._urlretrieve", lambda url, target: shutil.copy(url.removeprefix("file://"), target)
    )
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(FileNotFoundError):
        load("cifar10", root=elsewhere)
    assert same(load("cifar10", root=elsewhere, download=True, validation=0).train, *cifar10["train_list"])


def test_a_failed_download_says_what_to_do(cifar10, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "nothing.tar.gz").as_uri())
    with pytest.raises(RuntimeError, match=r"could not be read: .*put cifar-10-python\.tar\.gz into"):
        load("cifar10", root=tmp_path / "elsewhere", download=True)


def test_mnist_is_unpacked_and_read_as_stored(mnist, tmp_path, no_network):
    data = load("mnist", root=tmp_path, validation=0)
    assert same(data.train, *mnist["train"])
    assert same(data.test, *mnist["t10k"])
    assert (data.shape, data.classes, data.augmented) == ((1, 28, 28), 10, False)
    assert (data.mean, data.std) == ((0.1307,), (0.3081,))
    for archive in (tmp_path / "MNIST" / "raw").glob("*.gz"):
        archive.unlink()
    assert same(load("mnist", root=tmp_path, validation=0).test, *mnist["t10k"])  # the unpacked files suffice


def test_a_damaged_mnist_archive_is_refused(mnist, tmp_path, no_network):
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(20, np.uint8))))
    with pytest.raises(RuntimeError, match="does not have the checksum"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx(pixels(20, 0, (28, 28)))[:-1], "could not be read"),
        ("train-images-idx3-ubyte", idx(pixels(19, 0, (28, 28))), "19 images and 20 labels"),
        ("train-images-idx3-ubyte", b"", "could not be read"),
        ("train-images-idx3-ubyte", bytes(16), "could not be read: AssertionError"),
        ("t10k-labels-idx1-ubyte", idx(np.full(6, 10, np.uint8)), "expected 0 to 9"),
    ],
)
def test_damaged_unpacked_mnist_files_are_refused(mnist, tmp_path, no_network, name, content, message):
    load("mnist", root=tmp_path)  # unpacks
    (tmp_path / "MNIST" / "raw" / name).write_bytes(content)
    with pytest.raises(RuntimeError, match=message):
        load("mnist", root=tmp_path)


# Splits


def rows(split):
    """Each example as bytes, to compare splits as collections."""
    return [image.numpy().tobytes() + bytes([label]) for image, label in zip(*split, strict=True)]


@pytest.mark.parametrize(("name", "options"), [("digits", {}), ("synthetic", {"shape": (2, 5, 3), "size": 200})])
@pytest.mark.parametrize("validation", [0.1, 0.35])
def test_training_and_validation_split_the_pool_and_leave_the_test_split(name, options, validation):
    full = load(name, validation=0, **options)
    data = load(name, validation=validation, seed=5, **options)
    pool = len(full.train.labels)
    assert len(data.validation.labels) == round(validation * pool)
    assert sorted(rows(data.train) + rows(data.validation)) == sorted(rows(full.train))
    assert rows(data.test) == rows(full.test)
    assert len(set(rows(full.train) + rows(full.test))) == pool + len(full.test.labels)  # nothing lies in two


@pytest.mark.parametrize(("name", "options"), [("digits", {}), ("synthetic", {"shape": (1, 4, 4)})])
def test_the_seed_moves_the_validation_split_only(name, options):
    first, again, other = (load(name, seed=seed, **options) for seed in (1, 1, 2))
    for one, two in zip(splits(first), splits(again), strict=True):
        assert same(one, *two)
    assert rows(first.validation) != rows(other.validation)
    assert same(first.test, *other.test)
    assert (first.mean, first.std) == (other.mean, other.std)


def splits(data):
    return data.train, data.validation, data.test


def test_digits_are_all_there_with_a_stratified_test_split_of_a_fifth():
    data = load("digits", validation=0)
    count = torch.bincount(data.train.labels) + torch.bincount(data.test.labels)
    assert count.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # counts published with the set
    assert (torch.bincount(data.test.labels) - 0.2 * count).abs().max() < 1
    assert data.train.images.dtype == torch.float32
    assert (data.train.images * 16).unique().tolist() == list(range(17))


def test_digits_statistics_come_from_the_training_pool():
    data = load("digits", validation=0)
    images = data.train.images.numpy().astype(np.float64)
    assert data.mean == pytest.approx((images.mean(),), rel=1e-12)
    assert data.std == pytest.approx((images.std(),), rel=1e-12)
    normalised = data.normalise(data.train.images)
    assert normalised.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalised.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_every_image_file_dataset_has_default_statistics_and_each_has_one_number_a_channel():
    assert set(DATASETS) - {"digits", "synthetic"} <= set(STATISTICS)
    for name, presets in STATISTICS.items():
        assert "default" in presets
        for mean, std in presets.values():
            assert len(mean) == len(std) == (1 if name == "mnist" else 3)
            assert all(0 < value < 1 for value in mean + std)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_default_statistics_are_those_of_the_training_pixels(name):
    try:
        data = load(name, validation=0)
    except FileNotFoundError:
        pytest.skip(f"{name} is not in {paths.RAW}")
    channels = data.train.images.transpose(0, 1).flatten(1).numpy()
    assert [round(channel.mean() / 255, 4) for channel in channels] == list(data.mean)
    assert [round(channel.std() / 255, 4) for channel in channels] == list(data.std)


def test_synthetic_data_follow_their_options():
    data = load("synthetic", shape=(2, 5, 3), classes=4, size=50, validation=0)
    assert (data.shape, data.classes, data.augmented) == ((2, 5, 3), 4, False)
    assert (len(data.train.labels), len(data.test.labels)) == (40, 10)
    assert set(data.test.labels.tolist()) == {0, 1, 2, 3}
    assert len(data.mean) == len(data.std) == 2
    other = load("synthetic", shape=(2, 5, 3), classes=4, size=50, validation=0, task=1)
    assert not torch.equal(data.test.images, other.test.images)


def test_synthetic_data_are_learnable():
    data = load("synthetic", shape=(1, 6, 6), size=500)
    centres = torch.stack([data.train.images[data.train.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(data.test.images.flatten(1), centres.flatten(1)).argmin(1)
    assert (nearest == data.test.labels).double().mean() > 0.9


# Normalisation


def tiny(images, classes=2, augmented=True, mean=(0.5,), std=(0.25,)):
    labels = torch.arange(len(images)) % classes
    split = Split(images, labels)
    return Data("tiny", split, split, split, classes, mean, std, augmented)


def test_normalising_8_bit_images_divides_by_255_first_and_floats_are_taken_as_they_are():
    data = tiny(torch.zeros(1, 2, 1, 2, dtype=torch.uint8), mean=(0.2, 0.6), std=(0.4, 0.1))
    eight_bit = torch.tensor([[[[0, 255]], [[51, 204]]]], dtype=torch.uint8)
    expected = torch.tensor([[[[-0.5, 2.0]], [[-4.0, 2.0]]]])
    torch.testing.assert_close(data.normalise(eight_bit), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(data.normalise(eight_bit.double() / 255), expected, rtol=0, atol=1e-5)


def test_normalising_changes_nothing_in_place():
    images = torch.full((2, 1, 3, 3), 0.75)
    normalised = tiny(images).normalise(images)
    assert torch.equal(images, torch.full((2, 1, 3, 3), 0.75))
    assert torch.equal(normalised, torch.ones(2, 1, 3, 3))


def test_normalising_first_in_inference_mode_leaves_gradients_possible():
    images = torch.rand(2, 1, 3, 3, generator=seeded()).requires_grad_()
    data = tiny(images.detach(), mean=(0.123,), std=(0.5,))  # constants no other test has cached
    with torch.inference_mode():
        data.normalise(images)
    data.normalise(images).sum().backward()
    assert torch.equal(images.grad, torch.full_like(images, 2.0))


# Augmentation


def slow_augment(image, row, column, flipped, padding, mode):
    """One image at a time, by numpy's own padding."""
    width = ((0, 0), (padding, padding), (padding, padding))
    padded = np.pad(image.numpy(), width, mode="constant" if mode == "zeros" else "reflect")
    crop = padded[:, row : row + image.shape[1], column : column + image.shape[2]]
    return crop[:, :, ::-1] if flipped else crop


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("padding", "flip"), [(0, True), (2, False), (4, True)])
def test_augmentation_equals_a_slow_one_image_oracle(mode, dtype, padding, flip):
    images = torch.randint(1, 256, (40, 3, 7, 5), generator=seeded(1)).to(dtype)
    draws = seeded(2)
    shifts = torch.randint(2 * padding + 1, (2, 40), generator=draws)
    coins = torch.randint(2, (1, 40), generator=draws)[0] if flip else torch.zeros(40, dtype=torch.int64)
    expected = [
        slow_augment(image, row, column, coin, padding, mode)
        for image, row, column, coin in zip(images, *shifts.tolist(), coins.tolist(), strict=True)
    ]
    before = images.clone()
    result = augment(images, padding=padding, mode=mode, flip=flip, generator=seeded(2))
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.numpy(), np.stack(expected))
    assert torch.equal(images, before)


def test_every_offset_and_both_flips_are_reached_equally_often():
    n = 20_000
    images = torch.zeros(n, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4], images[:, :, 4, 5] = 1, 2  # the centre, and a mark on its right
    moved = augment(images, padding=2, generator=seeded())[:, 0]
    centre, mark = ((moved == value).flatten(1).int().argmax(1) for value in (1, 2))
    places = torch.stack([centre // 9, centre % 9, (mark - centre + 1) // 2], 1)
    found, count = places.unique(dim=0, return_counts=True)
    assert {tuple(place) for place in found.tolist()} == {
        (row, column, side) for row in range(2, 7) for column in range(2, 7) for side in (0, 1)
    }
    assert count.min() > 0.75 * n / 50  # five standard deviations below the mean
    assert count.max() < 1.25 * n / 50


def test_augmentation_is_drawn_from_the_generator():
    images = torch.randint(0, 256, (50, 1, 8, 8), generator=seeded()).byte()
    one, same_one, other = (augment(images, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same_one)
    assert not torch.equal(one, other)


# Batches


def numbered(n):
    return Split(torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1), torch.arange(n))


@pytest.mark.parametrize(("n", "size"), [(10, 3), (9, 3), (2, 5), (0, 4), (1, 1)])
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_hold_each_example_exactly_once(n, size, seed, drop_last):
    cut = list(batches(numbered(n), size, generator=None if seed is None else seeded(seed), drop_last=drop_last))
    sizes = [len(labels) for _, labels in cut]
    assert sizes == [size] * (n // size) + [n % size] * (n % size > 0 and not drop_last)
    labels = [label for _, part in cut for label in part.tolist()]
    images = [value for part, _ in cut for value in part.flatten().tolist()]
    assert images == labels  # an image keeps its label
    assert len(set(labels)) == len(labels)
    if not drop_last:
        assert set(labels) == set(range(n))
    if seed is None:
        assert labels == sorted(labels)


def test_shuffled_batches_follow_the_generator_and_change_every_epoch():
    generator = seeded(7)
    epochs = [[part.tolist() for _, part in batches(numbered(40), 16, generator=generator)] for _ in range(2)]
    again = [part.tolist() for _, part in batches(tuple(numbered(40)), 16, generator=seeded(7))]
    assert epochs[0] == again
    assert epochs[0] != epochs[1]
    assert [label for part in again for label in part] != list(range(40))


# Scoring examples


@pytest.mark.parametrize(("per_class", "batch_size"), [(10, 256), (7, 16)])
def test_scoring_batches_are_balanced_shuffled_normalised_and_from_the_training_split(per_class, batch_size):
    data = load("digits")
    cut = scoring_batches(data, per_class=per_class, batch_size=batch_size, generator=seeded())
    images, labels = (torch.cat(parts) for parts in zip(*cut, strict=True))
    assert torch.bincount(labels).tolist() == [per_class] * 10
    assert [len(part) for _, part in cut[:-1]] == [batch_size] * (len(cut) - 1)
    assert images.dtype == torch.float32
    stored = Split(data.normalise(data.train.images), data.train.labels)
    assert set(rows(Split(images, labels))) <= set(rows(stored))
    assert len(set(rows(Split(images, labels)))) == 10 * per_class  # none drawn twice
    # Sorted by class, neighbours would be equal in all but 9 of the places.
    assert (labels[1:] == labels[:-1]).double().mean() < 0.3
    assert len(labels[:20].unique()) > 5


def test_scoring_batches_follow_the_generator():
    data = load("digits")
    first, again, other = (scoring_batches(data, generator=seeded(seed))[0] for seed in (1, 1, 2))
    assert same(Split(*first), *again)
    assert set(rows(Split(*first))) != set(rows(Split(*other)))  # other examples, not only another order


def test_uniform_scoring_batches_have_the_same_number_but_not_balance():
    data = load("digits")
    (images, labels), *rest = scoring_batches(data, balanced=False, generator=seeded())
    assert not rest
    assert len(labels) == len(set(rows(Split(images, labels)))) == 100
    assert len(set(torch.bincount(labels, minlength=10).tolist())) > 1


def test_augmented_scoring_examples_are_cropped_from_black_before_normalising():
    data = tiny(torch.full((40, 1, 6, 6), 255, dtype=torch.uint8))
    plain = scoring_batches(data, generator=seeded())[0][0]
    moved = scoring_batches(data, augmented=True, generator=seeded())[0][0]
    assert plain.unique().tolist() == [2.0]  # white
    assert moved.unique().tolist() == [-2.0, 2.0]  # white and black: the padding was there before normalising


# Corrupted scoring examples


def coloured(sizes=(40, 40, 25)):
    """Batches of labelled images, each value of which occurs once; the labels are 0, 3 and 7."""
    images = torch.arange(sum(sizes) * 3 * 4 * 5, dtype=torch.float32).view(-1, 3, 4, 5)
    labels = tensor_of_labels(sum(sizes))
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def tensor_of_labels(n):
    return torch.tensor([0, 3, 7])[torch.arange(n) % 3]


def pairs_equal(a, b):
    return len(a) == len(b) and all(same(Split(*x), *y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["labels", "pixels", "half"])
def test_corrupted_examples_follow_the_generator_and_leave_the_originals(kind):
    original = coloured()
    first = corrupted(original, kind, generator=seeded(1))
    assert pairs_equal(original, coloured())
    assert pairs_equal(first, corrupted(original, kind, generator=seeded(1)))
    assert not pairs_equal(first, corrupted(original, kind, generator=seeded(2)))
    for images, labels in first:
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        images.zero_()
        labels.zero_()
    assert pairs_equal(original, coloured())  # new tensors, not views


def test_random_labels_are_uniform_over_those_that_occur_and_the_images_stay():
    new = corrupted(coloured(sizes=(3000, 600)), "labels", generator=seeded())
    assert [len(labels) for _, labels in new] == [3000, 600]
    for (images, _), (old, _) in zip(new, coloured(sizes=(3000, 600)), strict=True):
        assert torch.equal(images, old)
    labels = torch.cat([labels for _, labels in new])
    values, counts = labels.unique(return_counts=True)
    assert values.tolist() == [0, 3, 7]
    assert ((counts - 1200.0) ** 2 / 1200).sum() < 24  # chi-squared with 2 degrees of freedom
    agreeing = (labels == tensor_of_labels(3600)).double().mean()
    assert agreeing == pytest.approx(1 / 3, abs=0.05)  # six standard errors


def test_shuffled_pixels_stay_in_their_image_with_their_channels_in_an_order_of_its_own():
    new = corrupted(coloured(), "pixels", generator=seeded())
    orders = []
    for (images, labels), (old, old_labels) in zip(new, coloured(), strict=True):
        assert images.shape == old.shape
        assert not torch.equal(labels, old_labels)
        for image, before in zip(images.flatten(2), old.flatten(2), strict=True):
            order = image[0] - before[0, 0]  # the values count upwards
            assert sorted(order.tolist()) == list(range(20))
            assert torch.equal(image, before[:, order.long()])
            orders.append(tuple(order.tolist()))
    assert len(set(orders)) == len(orders) == 105


def test_every_pixel_goes_everywhere_equally_often():
    image = torch.arange(4.0).view(1, 1, 2, 2).repeat(2400, 1, 1, 1)
    ((images, _),) = corrupted([(image, tensor_of_labels(2400))], "pixels", generator=seeded(3))
    counts = torch.stack([(images.flatten(1) == value).sum(0) for value in range(4)])
    assert ((counts - 600.0) ** 2 / 600).sum() < 35  # chi-squared with 9 degrees of freedom


def test_half_of_the_examples_keep_their_labels_and_none_is_drawn_twice():
    original = coloured()
    half = corrupted(original, "half", generator=seeded())
    assert [len(labels) for _, labels in half] == [40, 12]  # of 105, in batches of the first one's size
    old, new = ([row for pair in pairs for row in rows(Split(*pair))] for pairs in (original, half))
    labels = {bytes(row): label for row, label in zip(old, torch.cat([y for _, y in original]), strict=True)}
    assert len(set(new)) == 52
    assert [labels[bytes(row)] for row in new] == torch.cat([y for _, y in half]).tolist()


# Bad input

four = torch.zeros(4, 1, 5, 5)
BAD = {
    "unknown dataset": (lambda: load("cifar"), ValueError, "digits, mnist, cifar10, cifar100, synthetic"),
    "unknown statistics": (lambda: load("cifar10", statistics="none"), ValueError, "default, pat, synflow"),
    "statistics of digits": (lambda: load("digits", statistics="grasp"), ValueError, "one of default"),
    "validation of one": (lambda: load("digits", validation=1), ValueError, "validation=1"),
    "negative validation": (lambda: load("digits", validation=-0.1), ValueError, "validation=-0.1"),
    "nan validation": (lambda: load("digits", validation=float("nan")), ValueError, "validation=nan"),
    "validation as text": (lambda: load("digits", validation="0.1"), ValueError, "validation='0.1'"),
    "no validation image": (lambda: load("digits", validation=1e-6), ValueError, "both sides"),
    "no training image": (lambda: load("digits", validation=0.9999), ValueError, "both sides"),
    "negative seed": (lambda: load("digits", seed=-1), ValueError, "seed=-1"),
    "huge seed": (lambda: load("digits", seed=2**63), ValueError, "seed=9223372036854775808"),
    "fractional seed": (lambda: load("digits", seed=1.0), ValueError, "seed=1.0"),
    "true as seed": (lambda: load("digits", seed=True), ValueError, "seed=True"),
    "device without data": (lambda: load("digits", device="meta"), ValueError, "'meta' cannot be used here.*cpu"),
    "unknown device": (lambda: load("digits", device="gpu"), ValueError, "'gpu' cannot be used here.*cpu"),
    "device none": (lambda: load("digits", device=None), ValueError, "'None' cannot be used here"),
    "option of another set": (lambda: load("digits", shape=(1, 8, 8)), TypeError, "options are: none"),
    "option of files": (lambda: load("cifar10", kind=1), TypeError, "no option 'kind'.*none"),
    "unknown option": (lambda: load("synthetic", sise=9), TypeError, "shape, classes, size, noise, task"),
    "two-number shape": (lambda: load("synthetic", shape=(8, 8)), ValueError, "shape="),
    "flat shape": (lambda: load("synthetic", shape=64), ValueError, "shape=64"),
    "empty image": (lambda: load("synthetic", shape=(1, 0, 8)), ValueError, "shape="),
    "no class": (lambda: load("synthetic", classes=0), ValueError, "classes=0"),
    "too few examples": (lambda: load("synthetic", size=49), ValueError, "size=49.*50"),
    "negative noise": (lambda: load("synthetic", noise=-1), ValueError, "noise=-1"),
    "infinite noise": (lambda: load("synthetic", noise=float("inf")), ValueError, "noise=inf"),
    "negative task": (lambda: load("synthetic", task=-1), ValueError, "task=-1"),
    "flat images": (lambda: augment(four[0], generator=seeded()), ValueError, "(1, 5, 5)"),
    "unknown mode": (lambda: augment(four, mode="edge", generator=seeded()), ValueError, "zeros"),
    "negative padding": (lambda: augment(four, padding=-1, generator=seeded()), ValueError, "padding=-1"),
    "too wide to reflect": (
        lambda: augment(four, padding=5, mode="reflect", generator=seeded()),
        ValueError,
        "at most 4",
    ),
    "no generator": (lambda: augment(four, generator=None), ValueError, "CPU torch.Generator"),
    "seed for generator": (lambda: batches(numbered(4), 2, generator=0), ValueError, "CPU torch.Generator"),
    "empty batches": (lambda: batches(numbered(4), 0), ValueError, "size=0"),
    "unequal split": (lambda: batches((four, torch.zeros(3)), 2), ValueError, "4 images but 3 labels"),
    "too few of a class": (
        lambda: scoring_batches(tiny(four), per_class=3, generator=seeded()),
        ValueError,
        "class 0 of tiny has 2",
    ),
    "too few to draw": (
        lambda: scoring_batches(tiny(four), per_class=3, balanced=False, generator=seeded()),
        ValueError,
        "6 examples, but tiny has 4",
    ),
    "none of a class": (
        lambda: scoring_batches(tiny(four), per_class=0, generator=seeded()),
        ValueError,
        "per_class=0",
    ),
    "augmented digits": (
        lambda: scoring_batches(tiny(four, augmented=False), per_class=1, augmented=True, generator=seeded()),
        ValueError,
        "augmented=False",
    ),
    "unknown corruption": (
        lambda: corrupted(coloured(), "noise", generator=seeded()),
        ValueError,
        "kind='noise': expected one of labels, pixels, half",
    ),
    "nothing to corrupt": (lambda: corrupted([], "labels", generator=seeded()), ValueError, "no batches"),
    "corruption without generator": (
        lambda: corrupted(coloured(), "labels", generator=None),
        ValueError,
        "CPU torch.Generator",
    ),
    "no pixels": (
        lambda: corrupted([(torch.zeros(4, 5), torch.zeros(4))], "pixels", generator=seeded()),
        ValueError,
        r"\(4, 5\) have no pixels",
    ),
    "half of one": (
        lambda: corrupted([(four[:1], torch.zeros(1))], "half", generator=seeded()),
        ValueError,
        "half of one example",
    ),
    "channels": (lambda: tiny(four).normalise(torch.zeros(1, 3, 5, 5)), ValueError, r"\(1, 3, 5, 5\)"),
    "integer images": (lambda: tiny(four).normalise(four.int()), ValueError, "torch.int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_at_once_with_what_was_expected(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ValueError, match="'cuda' cannot be used here; there are: cpu"):
        load("digits", device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_device_changes_no_random_choice(mode, dtype):
    images = torch.randint(0, 256, (30, 3, 8, 8), generator=seeded()).to(dtype)
    on_gpu = augment(images.cuda(), mode=mode, generator=seeded(1))
    assert torch.equal(on_gpu.cpu(), augment(images, mode=mode, generator=seeded(1)))
    here, there = load("digits"), load("digits", device="cuda")
    assert there.train.images.is_cuda
    pairs = zip(scoring_batches(here, generator=seeded()), scoring_batches(there, generator=seeded()), strict=True)
    for (images_here, labels_here), (images_there, labels_there) in pairs:
        torch.testing.assert_close(images_there.cpu(), images_here)
        assert torch.equal(labels_there.cpu(), labels_here)
