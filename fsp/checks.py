"""Checks of arguments that several wings share: an error names the value and what was expected."""

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch


def is_count(value: object, least: int) -> bool:
    """True for an integer of at least `least`; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


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
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def check_options(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError for options that the owner does not have, naming those that it has."""
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{owner} has no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}")


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
