"""`fsp.files`: what is written comes back, damage is always told, and a failure leaves the file that was there."""

import os

import pytest
import torch
from safetensors.torch import save_file

from fsp.files import DamagedFile, differences, digest, leftovers, load_content, load_tensors, replacing, save_tensors

SHARED = torch.rand(4, 6)
TENSORS = {
    "bool": torch.tensor([True, False, True]),
    "bfloat16": torch.tensor([0.1, float("nan")], dtype=torch.bfloat16),
    "a number": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3, dtype=torch.int64),
    "whole": SHARED,
    "rows of it": SHARED[1:3],
    "turned": SHARED.T,
    "learnt": torch.nn.Parameter(torch.ones(2, dtype=torch.float16)),
}
CONTENT = {"é": [1, None, "x"], "step": 3, "nested": {"lr": 0.1}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "some.safetensors"


def test_tensors_of_every_kind_and_their_content_come_back_to_the_bit(path):
    save_tensors(path, "test", TENSORS, CONTENT)
    tensors, content = load_tensors(path, "test")
    assert content == load_content(path, "test") == CONTENT
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(tensors[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)  # shape, dtype too
        assert tensors[name].is_contiguous()
    path.write_bytes(b"")
    assert tensors["bool"].tolist() == [True, False, True]  # they are no longer of the file


def test_a_file_that_is_not_there_is_no_damaged_file(path):
    for load in (load_tensors, load_content):
        with pytest.raises(FileNotFoundError, match=r"some\.safetensors"):
            load(path, "test")


def refuses(path, load=load_tensors):
    with pytest.raises(DamagedFile, match=r"some\.safetensors is no whole file of test"):
        load(path, "test")


def test_a_file_that_is_cut_anywhere_is_damaged(path):
    save_tensors(path, "test", TENSORS, CONTENT)
    content = path.read_bytes()
    begin_of_tensors = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 1, 7, 8, 9, begin_of_tensors // 2, begin_of_tensors, begin_of_tensors + 1, len(content) - 1):
        path.write_bytes(content[:length])
        refuses(path)
        refuses(path, load_content)
    path.write_bytes(content + b"\0")
    refuses(path)


def test_one_changed_bit_anywhere_is_damage(path):
    save_tensors(path, "test", {"w": torch.ones(3), "b": torch.ones(2, dtype=torch.bool)}, {"seed": 3, "a": "b"})
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
        refuses(path)


def test_what_is_no_file_of_this_kind_is_damaged(path):
    save_tensors(path, "other", TENSORS, CONTENT)
    refuses(path)
    refuses(path, load_content)
    save_file({"w": torch.ones(2)}, path)
    refuses(path)
    path.write_text("not a safetensors file, but long enough to look at")
    refuses(path)


def test_a_file_without_checksum_is_read_only_if_that_is_asked_for_and_a_wrong_checksum_never(path):
    path.parent.mkdir()
    save_file({"w": torch.ones(2)}, path, metadata={"fsp_test": '{"seed": 1}'})
    refuses(path)
    assert load_tensors(path, "test", unsigned=True)[1] == {"seed": 1}
    save_file({"w": torch.ones(2)}, path, metadata={"fsp_test": '{"seed": 1}', "sha256": ""})
    refuses(path, lambda *asked: load_tensors(*asked, unsigned=True))


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(path):
    save_tensors(path, "test", TENSORS, CONTENT)
    content = path.read_bytes()
    with pytest.raises(TypeError):
        save_tensors(path, "test", TENSORS, {"function": print})
    with pytest.raises(ValueError, match="__metadata__"):
        save_tensors(path, "test", {"__metadata__": torch.ones(1)}, {})
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
        temporary.write_bytes(content[:9])
        raise KeyboardInterrupt
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_files_have_the_permissions_of_the_umask(path):
    before = os.umask(0o027)
    try:
        save_tensors(path, "test", {}, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_leftovers_are_the_temporary_files_of_one_path(path):
    with replacing(path) as temporary, replacing(path.with_name("some-other.safetensors")):
        (path.parent / ".some-note.safetensors.txt").touch()
        assert leftovers(path) == [temporary]
    assert leftovers(path) == []


def test_a_digest_tells_names_types_shapes_bits_and_text_apart_and_no_order():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -0.0])
    same = digest({"a": one, "b": two}, "text")
    assert same == digest({"b": two, "a": one.repeat_interleave(2)[::2]}, "text")
    others = [
        ({"a": one, "c": two}, "text"),
        ({"a": one, "b": two.view(torch.int32)}, "text"),
        ({"a": one, "b": two[None]}, "text"),
        ({"a": one, "b": two.abs()}, "text"),
        ({"a": one, "b": two}, "texts"),
    ]
    assert len({same, *(digest(*other) for other in others)}) == 6


def test_differences_are_told_by_name_and_tuples_count_as_lists():
    assert differences({"shape": [1, 2], "lr": 0.1, "mode": None}, {"shape": (1, 2), "lr": 0.1}) == ""
    told = differences({"lr": 0.1, "seed": 0, "old": 1}, {"lr": 0.2, "seed": 0, "new": "x"})
    assert told == "lr is 0.1 there and 0.2 here; old is 1 there and None here; new is None there and 'x' here"
