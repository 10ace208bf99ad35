"""Tiny ImageNet and folders of images, on small files in the true format, without network."""

import hashlib
import io
import urllib.error
import urllib.request
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from fsp.data import STATISTICS, check_files, image_files, load

# ---- Tiny ImageNet -----------------------------------------------------------------------------------------------

CLASSES = [f"n{11 * number:08d}" for number in range(1, 201)]
PER_CLASS = {"train": 2, "val": 1}
FOLDER, ARCHIVE = "tiny-imagenet-200", "tiny-imagenet-200.zip"
COLOURS = np.random.default_rng(0).integers(30, 226, (600, 3))  # of one image each, so that JPEG keeps them


def jpeg(colour, mode="RGB", side=64):
    file = io.BytesIO()
    Image.new("RGB", (side, side), tuple(int(value) for value in colour)).convert(mode).save(file, "JPEG", quality=95)
    return file.getvalue()


def published_members():
    """Names and bytes in the archive: classes shuffled, validation images by file name alone, test without labels."""
    members = {f"{FOLDER}/": b"", f"{FOLDER}/wnids.txt": "\n".join(reversed(CLASSES)).encode()}
    for number, name in reversed(list(enumerate(CLASSES))):
        members[f"{FOLDER}/train/{name}/{name}_boxes.txt"] = b"a box"
        for image in range(2):
            members[f"{FOLDER}/train/{name}/images/{name}_{image}.JPEG"] = jpeg(COLOURS[2 * number + image])
    lines = []
    for image, number in enumerate(np.random.default_rng(1).permutation(200)):
        lines.append(f"val_{image}.JPEG\t{CLASSES[number]}\t0\t32\t44\t62")
        members[f"{FOLDER}/val/images/val_{image}.JPEG"] = jpeg(COLOURS[400 + number])
    members[f"{FOLDER}/val/val_annotations.txt"] = ("\n".join(lines) + "\n").encode()
    members[f"{FOLDER}/test/images/test_0.JPEG"] = jpeg(COLOURS[0])
    return members


MEMBERS = published_members()


def write_archive(monkeypatch, root, members):
    """An archive, with the checksum that is looked for set to its own."""
    path = root / ARCHIVE
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    monkeypatch.setattr(image_files, "TINY_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


@pytest.fixture(autouse=True)
def _few_images_a_class(monkeypatch):
    for part, count in PER_CLASS.items():
        monkeypatch.setitem(image_files.TINY_PER_CLASS, part, count)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def colours(split):
    return split.images.double().mean((2, 3)).round().long().numpy()


def is_whole(data):
    """Whether every image has its class; colours may move by two in a JPEG file."""
    train = np.abs(colours(data.train) - COLOURS[:400]).max() <= 2
    test = np.abs(colours(data.test) - COLOURS[400 + data.test.labels.numpy()]).max() <= 2
    return train and test and data.train.labels.tolist() == [label for label in range(200) for _ in range(2)]


def test_tiny_imagenet_is_read_from_its_archive_with_validation_labels_of_the_annotation_file(monkeypatch, tmp_path):
    write_archive(monkeypatch, tmp_path, MEMBERS)
    check_files("tinyimagenet", root=tmp_path)
    data = load("tinyimagenet", root=tmp_path, validation=0)
    assert is_whole(data)
    assert sorted(data.test.labels.tolist()) == list(range(200))
    assert data.test.labels.tolist() == np.random.default_rng(1).permutation(200).tolist()
    assert data.train.images.dtype == torch.uint8
    assert (data.shape, data.classes, data.augmented) == ((3, 64, 64), 200, True)
    assert (data.mean, data.std) == STATISTICS["tinyimagenet"]["grasp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [ARCHIVE, "tinyimagenet.safetensors"]  # not unpacked
    (tmp_path / ARCHIVE).unlink()
    check_files("tinyimagenet", root=tmp_path)
    held = load("tinyimagenet", root=tmp_path)  # from the file of tensors
    assert (len(held.train.labels), len(held.validation.labels), len(held.test.labels)) == (360, 40, 200)
    cached = tmp_path / "tinyimagenet.safetensors"
    cached.write_bytes(cached.read_bytes()[:-1] + b"x")
    with pytest.raises(FileNotFoundError, match=r"tiny-imagenet-200\.zip not found in .*download=True"):
        load("tinyimagenet", root=tmp_path)


def test_an_unpacked_tiny_imagenet_is_read_like_its_archive(tmp_path):
    for name, content in MEMBERS.items():
        if content:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    assert is_whole(load("tinyimagenet", root=tmp_path, validation=0))


def test_grey_images_of_tiny_imagenet_become_rgb(monkeypatch, tmp_path):
    name = f"{FOLDER}/train/{CLASSES[0]}/images/{CLASSES[0]}_0.JPEG"
    write_archive(monkeypatch, tmp_path, MEMBERS | {name: jpeg((90, 90, 90), "L")})
    assert load("tinyimagenet", root=tmp_path, validation=0).train.images[0].unique().tolist() == [90]


@pytest.mark.parametrize(
    ("name", "link"),
    [("../outside.JPEG", 0), ("/outside.JPEG", 0), ("a/../../outside.JPEG", 0), ("..\\outside.JPEG", 0),
     ("C:\\outside.JPEG", 0), (f"{FOLDER}/link", 0o120777 << 16)],
)  # fmt: skip
def test_an_archive_with_a_member_that_points_outside_is_refused_by_name(monkeypatch, tmp_path, name, link):
    root = tmp_path / "raw"
    member = zipfile.ZipInfo(name)
    member.external_attr = link
    write_archive(monkeypatch, root, MEMBERS | {member: b"/etc"})
    with pytest.raises(RuntimeError, match=r"its member '.*(outside\.JPEG|link)' (points outside|is a link)"):
        load("tinyimagenet", root=root)
    assert [path.name for path in tmp_path.rglob("*")] == ["raw", ARCHIVE]


def without(part):
    return {name: content for name, content in MEMBERS.items() if part not in name}


FIRST = f"{FOLDER}/train/{CLASSES[0]}/images/{CLASSES[0]}_0.JPEG"
ANNOTATIONS = f"{FOLDER}/val/val_annotations.txt"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (without(CLASSES[3]), "it has 199 training classes, expected 200"),
        (without(FIRST), f"train has 1 images of class {CLASSES[0]}, expected 2"),
        (without("val_7."), r"val_7\.JPEG"),
        (without("annotations"), "val_annotations"),
        (MEMBERS | {ANNOTATIONS: MEMBERS[ANNOTATIONS].replace(b"n00000011", b"n99999999")}, "expected 1 of each"),
        (MEMBERS | {ANNOTATIONS: b"val_0.JPEG"}, "not enough values"),
        (MEMBERS | {FIRST: jpeg((1, 2, 3), side=32)}, "_0.JPEG is 32x32 pixels, expected 64x64"),
        (MEMBERS | {FIRST: b"no image"}, "_0.JPEG is no image that can be read"),
        (MEMBERS | {FIRST: MEMBERS[FIRST][:300]}, "_0.JPEG is no image that can be read"),
    ],
)
def test_an_archive_that_is_not_whole_is_refused_with_what_is_wrong_and_what_to_do(
    monkeypatch, tmp_path, members, message
):
    write_archive(monkeypatch, tmp_path, members)
    with pytest.raises(RuntimeError, match=f"could not be read: .*{message}.*download=True"):
        load("tinyimagenet", root=tmp_path)


def test_an_archive_with_another_checksum_is_refused(tmp_path):
    (tmp_path / ARCHIVE).write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="does not have the checksum 90528d7c"):
        load("tinyimagenet", root=tmp_path, download=True)


class Response(io.BytesIO):
    def __init__(self, content, url):
        super().__init__(content)
        self.url, self.headers = url, {"Content-Length": str(len(content))}


def test_the_archive_is_fetched_over_https_only_when_that_is_asked_for(monkeypatch, tmp_path):
    content = write_archive(monkeypatch, tmp_path / "there", MEMBERS).read_bytes()
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return Response(content, url)

    monkeypatch.setattr("urllib.request.urlopen", answer)
    with pytest.raises(FileNotFoundError):
        load("tinyimagenet", root=tmp_path / "here")
    assert asked == []
    assert is_whole(load("tinyimagenet", root=tmp_path / "here", download=True, validation=0))
    assert asked == ["https://cs231n.stanford.edu/tiny-imagenet-200.zip"]
    load("tinyimagenet", root=tmp_path / "here", download=True)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda url, timeout: Response(b"a page that says sorry", url), "does not have the checksum"),
        (lambda url, timeout: Response(b"", "http://elsewhere.example/file.zip"), "which is not encrypted"),
        (lambda url, timeout: (_ for _ in ()).throw(urllib.error.URLError("no route")), "no route"),
    ],
)
def test_a_download_that_fails_leaves_no_file_and_says_what_to_do(monkeypatch, tmp_path, answer, message):
    monkeypatch.setattr("urllib.request.urlopen", answer)
    with pytest.raises(RuntimeError, match=rf"could not be downloaded: .*{message}.* put tiny-imagenet-200\.zip"):
        load("tinyimagenet", root=tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


# ---- folders of images -------------------------------------------------------------------------------------------


def pixels(seed, height=6, width=5):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_folder(root, parts=("train", "test"), classes=("ant", "bee"), count=4, **size):
    """PNG files, which keep every pixel; returns the images and labels of each part in the order of their names."""
    written = {}
    for part in parts:
        images, labels = [], []
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                image = pixels([len(part), label, number], **size)
                Image.fromarray(image).save(root / part / name / f"{number}.png")
                images.append(image)
                labels.append(label)
        written[part] = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)
    return written


@pytest.mark.parametrize("tested", ["test", "val"])
def test_a_folder_of_images_is_read_by_class_and_normalised_by_its_own_statistics(tmp_path, tested):
    written = write_folder(tmp_path, ("train", tested))
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    check_files("folder", root=tmp_path)
    data = load("folder", root=tmp_path, validation=0)
    for split, (images, labels) in ((data.train, written["train"]), (data.test, written[tested])):
        assert torch.equal(split.images, images)
        assert torch.equal(split.labels, labels)
    assert (data.shape, data.classes, data.augmented) == ((3, 6, 5), 2, False)
    normalised = data.normalise(data.train.images).double()
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-5
    assert (normalised.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    held = load("folder", root=tmp_path, validation=0.25, augmented=True)
    assert (len(held.train.labels), len(held.validation.labels), held.augmented) == (6, 2, True)
    assert (held.mean, held.std) == (data.mean, data.std)


def test_where_a_folder_has_both_test_is_the_test_split(tmp_path):
    written = write_folder(tmp_path, ("train", "val", "test"))
    assert torch.equal(load("folder", root=tmp_path).test.images, written["test"][0])


def test_images_of_many_sizes_are_resized_when_a_size_is_given(tmp_path):
    write_folder(tmp_path)
    Image.new("RGB", (40, 30), (10, 20, 30)).save(tmp_path / "train" / "ant" / "0.png")
    with pytest.raises(ValueError, match=r"1\.png is 6x5 pixels, expected 30x40; pass size=\(height, width\)"):
        load("folder", root=tmp_path)
    data = load("folder", root=tmp_path, size=(8, 9), validation=0)
    assert data.shape == (3, 8, 9)
    assert data.test.images.shape == (8, 3, 8, 9)
    assert data.train.images[0].flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]


def test_a_test_image_of_another_size_than_the_training_images_is_refused(tmp_path):
    write_folder(tmp_path, ("train",))
    write_folder(tmp_path, ("test",), height=7)
    with pytest.raises(ValueError, match=r"0\.png is 7x5 pixels, expected 6x5"):
        load("folder", root=tmp_path)


def test_what_a_folder_lacks_is_named(tmp_path):
    ask = partial(load, "folder", root=tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"train not found in {tmp_path}.*Pass root="):
        ask()
    write_folder(tmp_path, ("train",))
    with pytest.raises(FileNotFoundError, match=rf"neither test nor val found in {tmp_path}.*Pass root="):
        ask()
    write_folder(tmp_path, ("test",), ("ant", "cat"))
    with pytest.raises(ValueError, match="same class folders, but only one of them has bee, cat"):
        ask()
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match=r"dog.*needs an image"):
        ask()


def test_a_file_of_a_folder_that_is_no_image_is_named(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "test" / "bee" / "2.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RuntimeError, match=rf"{path} is no image that can be read \(.*delete or replace it"):
        load("folder", root=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 32}, ValueError, r"size=32: expected \(height, width\)"),
        ({"size": (32, 0)}, ValueError, r"size=\(32, 0\)"),
        ({"augmented": 1}, ValueError, "augmented=1: expected True or False"),
        ({"colour": "grey"}, TypeError, "it takes size, augmented"),
    ],
)
def test_bad_options_of_a_folder_are_refused_before_it_is_looked_for(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        load("folder", root=tmp_path, **options)


def test_a_folder_of_images_with_a_constant_channel_is_refused(tmp_path):
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            image = pixels(3)
            image[:, :, 1] = 7
            Image.fromarray(image).save(tmp_path / part / name / "0.png")
    with pytest.raises(ValueError, match="has one value, so it cannot be normalised"):
        load("folder", root=tmp_path, validation=0)
