"""Checks of settings."""

import math
from collections.abc import Iterable
from numbers import Real


def is_number(value: object) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_settings(config: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raise for the first setting that is not as expected.

    Parameters
    ----------
    config : object
    rules : iterable of (name, valid, expected)
        Name of an attribute of `config`, whether its value is valid, and what a valid one is.

    Raises
    ------
    ValueError
        Naming the setting, its value and what was expected.
    """
    for name, valid, expected in rules:
        if not valid:
            raise ValueError(f"{type(config).__name__}: {name} = {getattr(config, name)!r} is not {expected}")
