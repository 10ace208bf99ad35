"""CIFAR-C, on small files in the published format."""

import io

import numpy as np
import pytest
import torch

from fsp.data import BENCHMARK, EXTRA, Data, Split, corrupted
from fsp.files import DamagedFile
from fsp.training import evaluate

N = 7
CLEAN = Split(torch.zeros(N, 3, 32, 32, dtype=torch.uint8), torch.arange(N) % 10)
DATA = {name: Data(name, CLEAN, CLEAN, CLEAN, 10, (0.5,) * 3, (0.5,) * 3, True) for name in ("cifar10", "cifar100")}


@pytest.fixture(params=[("cifar10", "CIFAR-10-C"), ("cifar100", "CIFAR-100-C")], ids=lambda pair: pair[0])
def files(request, tmp_path):
    """A file for each corruption, (5 N, 32, 32, 3), and the labels five times over; its data set and its folder."""
    name, folder_name = request.param
    folder = tmp_path / folder_name
    folder.mkdir()
    for seed, corruption in enumerate(BENCHMARK + EXTRA):
        np.save(folder / f"{corruption}.npy", published(seed))
    np.save(folder / "labels.npy", np.tile(np.arange(N) % 10, 5))
    return DATA[name], folder


def published(seed):
    return np.random.default_rng(seed).integers(0, 256, (5 * N, 32, 32, 3), dtype=np.uint8)


def test_the_names_are_the_fifteen_of_the_benchmark_and_four_more():
    assert (len(BENCHMARK), len(EXTRA), len({*BENCHMARK, *EXTRA})) == (15, 4, 19)


def test_every_severity_of_every_corruption_comes_as_a_split_in_test_order(files, tmp_path):
    data, _ = files
    found = list(corrupted(data, root=tmp_path, names=BENCHMARK + EXTRA))
    assert [pair[:2] for pair in found] == [(name, level) for name in BENCHMARK + EXTRA for level in range(1, 6)]
    for position, (_, severity, split) in enumerate(found):
        rows = published(position // 5)[(severity - 1) * N : severity * N]
        for image, row in zip(split.images, rows, strict=True):
            assert all(torch.equal(image[channel], torch.from_numpy(row[:, :, channel])) for channel in range(3))
        assert torch.equal(split.labels, CLEAN.labels)
    assert [pair[0] for pair in corrupted(data, root=tmp_path, severities=[5])] == list(BENCHMARK)


def test_corrupted_splits_are_what_evaluate_takes(files, tmp_path):
    data, _ = files
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.arange(10) == 3)
    ((_, severity, split),) = corrupted(data, root=tmp_path, names=["fog"], severities=[4])
    assert severity == 4
    assert evaluate(model, data, split)["accuracy"] == pytest.approx(1 / N)


def test_missing_files_are_named_with_where_they_come_from_before_anything_is_read(files, tmp_path):
    data, folder = files
    (folder / "fog.npy").unlink()
    (folder / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        corrupted(data, root=tmp_path, names=["snow", "fog"])
    source = {"cifar10": "records/2535967", "cifar100": "records/3555552"}[data.name]
    for part in (f"fog.npy, labels.npy not found in {folder}", f"{folder.name}.tar from https://zenodo.org/{source}"):
        assert part in str(caught.value)


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def zipped():
    file = io.BytesIO()
    np.savez(file, images=published(0))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "snow",
            saved(published(0)[:-1]),
            r"uint8 of shape \(34, 32, 32, 3\), expected uint8 of shape \(35, 32, 32, 3\)",
        ),
        ("snow", saved(published(0).transpose(0, 3, 1, 2)), r"\(35, 3, 32, 32\), expected"),
        ("snow", saved(published(0).astype(np.float32)), "it holds float32"),
        ("snow", saved(published(0))[:-1], "length"),
        ("snow", b"", "No data"),
        ("snow", b"no array", "pickled"),
        ("snow", saved(np.array([{"an": "object"}]), allow_pickle=True), "object"),
        ("snow", zipped(), "several arrays"),
        ("labels", saved(np.arange(5 * N) % 10), "28 of 35 labels are not those of the test images"),
        ("labels", saved(np.tile(np.arange(N) % 10, 4)), r"int64 of shape \(28,\), expected integers of shape \(35,\)"),
        ("labels", saved(np.zeros(5 * N)), "it holds float64"),
    ],
)
def test_a_file_that_is_not_as_published_is_refused_by_name_before_anything_is_yielded(
    files, tmp_path, name, content, message
):
    data, folder = files
    (folder / f"{name}.npy").write_bytes(content)
    with pytest.raises(DamagedFile, match=rf"{name}\.npy is no whole file of .*{message}"):
        corrupted(data, root=tmp_path, names=["fog", "snow"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["fog", "rain"]}, "names has 'rain': expected some of gaussian_noise, .*saturate"),
        ({"severities": [1, 6]}, "severities has 6: expected integers from 1 to 5"),
        ({"severities": [True, 0]}, "severities has True, 0"),
    ],
)
def test_unknown_corruptions_and_severities_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        corrupted(DATA["cifar10"], root=tmp_path, **options)


def test_other_data_than_cifar_are_refused(tmp_path):
    digits = Data("digits", CLEAN, CLEAN, CLEAN, 10, (0.5,) * 3, (0.5,) * 3, False)
    with pytest.raises(ValueError, match=r"data\.name='digits': expected data of load\(\"cifar10\"\)"):
        corrupted(digits, root=tmp_path)
