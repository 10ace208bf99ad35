"""Files that are written whole or not at all, and the one format for tensors on disk.

A file of tensors is a safetensors file.  Its header holds, beside the tensors' names and shapes, the kind of the file
(such as "masks" or "checkpoint") with its content as JSON, under ``fsp_<kind>``, and a SHA-256 over the tensors and
that content, under ``sha256``.  Nothing in it is ever unpickled.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


class DamagedFile(ValueError):
    """A file that is not whole, or not of the kind that was asked for."""


class CannotResume(ValueError):
    """Files of earlier work from which this work cannot go on: of other settings, or damaged."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: readers see the old content or the new, never a part.

    Yields the path of an empty temporary file in the same folder, which is made if it is missing. On a normal exit
    that file is flushed to disk and renamed to `path`; on an exception it is removed and `path` stays as it was. Write
    into that very file: ``safetensors.torch.save_file`` would make one more beside it, which a kill leaves there.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "made" / "note.txt"
    >>> with replacing(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    temporary.touch(exist_ok=False)  # with the permissions that the umask gives to a new file
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def leftovers(path: str | Path) -> list[Path]:
    """Temporary files of `path` that `replacing` could not remove, because the process was killed."""
    path = Path(path)
    name = re.compile(rf"\.{re.escape(path.stem)}-[a-z0-9_]{{8}}{re.escape(path.suffix)}")
    return sorted(found for found in path.parent.glob(".*") if name.fullmatch(found.name))


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], content: dict[str, object]) -> None:
    """Write tensors, and what is to be known of them, to one safetensors file, atomically.

    Parameters
    ----------
    path : path
    kind : str
        What the file is of; `load_tensors` asks for it again.
    tensors : dict of name to Tensor
        On any device; tensors that share memory are written each in full.
    content : dict
        Of what JSON can hold; tuples come back as lists, and keys as text.

    Raises
    ------
    TypeError
        If `content` cannot be written as JSON.
    ValueError
        If a tensor is called ``__metadata__``, the name of the header itself.
    OSError
        If the file cannot be written.

    Whatever is raised, a file that was there stays.
    """
    if "__metadata__" in tensors:  # safetensors would write a file that it cannot read
        raise ValueError(f"{path} cannot hold a tensor called '__metadata__': safetensors calls its header so")
    own = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    text = json.dumps(content)
    with replacing(path) as temporary:
        temporary.write_bytes(save(own, metadata={f"fsp_{kind}": text, "sha256": digest(own, text)}))


def load_tensors(path: str | Path, kind: str, *, unsigned: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Tensors, on the CPU and in any order, and content of a file that `save_tensors` wrote.

    Parameters
    ----------
    path : path
    kind : str
    unsigned : bool
        Read a file without a SHA-256 in its header too, as some were written before there was one; whoever asks for
        it checks the file as far as it can be.

    Raises
    ------
    DamagedFile
        If the file is no safetensors file, of another kind, or not what was written.
    FileNotFoundError
        If there is none.
    """
    with _opened(path, kind) as (file, text, sha256):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        if sha256 != digest(tensors, text) and not (unsigned and sha256 is None):
            raise ValueError("its content does not have the SHA-256 in its header")
        return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(text)  # no longer of the file


def load_content(path: str | Path, kind: str) -> dict:
    """Content of a file that `save_tensors` wrote; no tensor is read, so the SHA-256 is not checked.

    Raises
    ------
    DamagedFile, FileNotFoundError
        As for `load_tensors`.
    """
    with _opened(path, kind) as (_, text, _):
        return json.loads(text)


@contextmanager
def _opened(path: str | Path, kind: str) -> Iterator[tuple[safe_open, str, str | None]]:
    """An open file, its content as text, and its SHA-256."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist: expected a safetensors file of {kind}")
    with reading(path, kind), safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if f"fsp_{kind}" not in header:
            raise ValueError(f"its header does not say that it is of {kind}")
        yield file, header[f"fsp_{kind}"], header.get("sha256")


@contextmanager
def reading(path: str | Path, kind: str) -> Iterator[None]:
    """Raise what is found wrong with the content of a file as a DamagedFile that names it."""
    try:
        yield
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{path} is no whole file of {kind}: {error}") from error


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
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # in Python 3.11 no type says that arrays are buffers
    return total.hexdigest()


def differences(there: Mapping[str, object], here: Mapping[str, object]) -> str:
    """What differs between settings read from a file and those asked for, by name; "" if nothing does.

    A setting that one side lacks counts as None.

    Examples
    --------
    >>> differences({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0})
    'lr is 0.1 there and 0.2 here'
    """
    here = json.loads(json.dumps(here))  # as it is read: tuples are lists
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in names)
