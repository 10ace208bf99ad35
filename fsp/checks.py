"""Checks of arguments that several wings share: an error names the value and what was expected."""

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral

import torch


def is_count(value: object, least: int) -> bool:
    """True for an integer of at least `least`; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least  # type: ignore[operator]  # mypy knows no order of the numbers of `numbers`


def check_count(name: str, value: object, least: int) -> None:
    """Raise a ValueError unless the value is an integer of at least `least`."""
    if not is_count(value, least):
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")


def check_shape(shape: object) -> None:
    """Raise a ValueError unless this is the shape of one image."""
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(is_count(side, 1) for side in shape):
        raise ValueError(f"shape={shape!r}: expected (channels, height, width), three integers of at least 1")


def check_choice(name: str, value: object, choices: Iterable) -> None:
    """Raise a ValueError unless the value is one of the choices; 1 is not True."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}{nearest(value, choices)}")


def check_options(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError for options that the owner does not have, naming those that it has."""
    unknown = [name for name in given if name not in known]
    if unknown:
        takes = f"it takes {', '.join(known) or 'none'}{nearest(unknown, known)}"
        raise TypeError(f"{owner} has no option {', '.join(unknown)}; {takes}")


def nearest(value: object, names: Iterable) -> str:
    """Which names text that is none of them may mean, be it alone, in a list or a key; "" if none is near.

    Examples
    --------
    >>> nearest("sinp", ["snip", "synflow"])
    '; did you mean snip?'
    """
    names = [name for name in names if isinstance(name, str)]
    texts = [value] if isinstance(value, str) or not isinstance(value, Iterable) else value
    wrong = [text for text in texts if isinstance(text, str) and text not in names]
    meant = dict.fromkeys(name for text in wrong for name in difflib.get_close_matches(text.lower(), names, n=1))
    return f"; did you mean {' and '.join(meant)}?" if meant else ""


def check_generator(generator: object) -> None:
    """Raise a ValueError for anything but a generator on the CPU: results must not depend on the device."""
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise ValueError(
            f"generator={generator!r}: expected a torch.Generator on the CPU, such as torch.Generator().manual_seed(0)"
        )


def given_or_seed_0(generator: torch.Generator | None) -> torch.Generator:
    """The generator, checked, or for None a fresh one with seed 0: no global state is read."""
    if generator is None:
        return torch.Generator().manual_seed(0)
    check_generator(generator)
    return generator


def check_tensors(what: str, given: Mapping[str, object]) -> None:
    """Raise a ValueError naming an entry that is no tensor, such as an array of NumPy."""
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{what} {name!r} is a {type(value).__module__}.{type(value).__name__}: expected a tensor, as "
                "torch.as_tensor makes it"
            )


@contextmanager
def plain_precision() -> Iterator[None]:
    """Autocast off, whatever is set around."""
    accelerator = torch.accelerator.current_accelerator()  # None without one
    with ExitStack() as stack:
        for kind in {"cpu", accelerator.type if accelerator else "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def plain_settings() -> Iterator[None]:
    """Neither inference mode nor autocast nor gradients, whatever is set around: what comes out is ordinary tensors."""
    with torch.inference_mode(False), torch.no_grad(), plain_precision():
        yield


def check_device(device: str | torch.device | None) -> torch.device:
    """The CPU for None, else the CPU or the CUDA device that is named; a ValueError unless this machine has it."""
    try:
        found = torch.device("cpu") if device is None else torch.device(device)
        there = found.type == "cpu" or (found.type == "cuda" and (found.index or 0) < torch.cuda.device_count())
    except (RuntimeError, TypeError):
        there = False
    if not there:
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise ValueError(f"device={device!r}: expected a device of torch that this machine has, of {here}")
    return found


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model computes: the device of its first parameter or buffer, the CPU if it has neither."""
    return next((t.device for t in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))


def check_has_values(model: torch.nn.Module) -> None:
    """Raise a ValueError naming a parameter without values: lazy, or on the meta device."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise ValueError(f"{name!r} has no shape yet: the layer is lazy, run the model on one batch first")
        if parameter.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values: load or initialise the weights first")
