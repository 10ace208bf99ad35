"""Files that are written whole or not at all, and the one format for tensors on disk.

A file of tensors is a safetensors file.  Its header holds, beside the tensors' names and shapes, what the file is of
(its *kind*, such as "masks" or "checkpoint"), JSON content, and a SHA-256 over the tensors and that content.  Nothing
in it is ever unpickled.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


class DamagedFile(ValueError):
    """A file that is not whole, or not of the kind that was asked for."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: readers see the old content or the new, never a part.

    Yields the path of an empty temporary file in the same folder (made if missing). On a normal exit it is
    flushed to disk and renamed to `path`; on an exception it is removed and `path` stays as it was. Write into
    that very file: ``safetensors.torch.save_file`` would make one more beside it, which a kill leaves there.

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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], content: object) -> None:
    """Write tensors, and what is to be known of them, to one safetensors file, atomically.

    Parameters
    ----------
    path : path
    kind : str
        What the file is of; `load_tensors` asks for it again.
    tensors : dict of name to Tensor
        On any device; tensors that share memory are written each in full.
    content : dict, list or another value of JSON

    Raises
    ------
    TypeError
        If `content` cannot be written as JSON.
    OSError
        If the file cannot be written; one that was there stays.
    """
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = json.dumps(content)
    with replacing(path) as temporary:
        temporary.write_bytes(save(own, metadata={f"fsp_{kind}": text, "sha256": digest(own, text)}))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors, on the CPU, and content of a file that `save_tensors` wrote.

    Raises
    ------
    DamagedFile
        If the file is no safetensors file, of another kind, or not what was written.
    FileNotFoundError
        If there is none.
    """
    with _opened(path, kind) as (file, text, checksum):
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, it is no dict
        if checksum != digest(tensors, text):
            raise ValueError("its content does not have the SHA-256 in its header")
        return tensors, json.loads(text)


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
def _opened(path: str | Path, kind: str) -> Iterator[tuple[safe_open, str, str]]:
    """An open file, its content as text, and its SHA-256; whatever fails while reading is a DamagedFile."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist: expected a safetensors file of {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if f"fsp_{kind}" not in header:
                raise ValueError(f"its header does not say that it is of {kind}")
            yield file, header[f"fsp_{kind}"], header.get("sha256", "")
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
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
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def differences(there: Mapping[str, object], here: Mapping[str, object]) -> str:
    """What differs between settings in a file and those asked for, by name; "" if nothing does.

    Examples
    --------
    >>> differences({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0})
    'lr is 0.1 there and 0.2 here'
    """
    here = json.loads(json.dumps(here))  # as it is read: tuples are lists
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in names)


def _umask() -> int:
    """Permissions mask of this process (mkstemp ignores it and makes private files)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
