"""Checks of user input: every message names the argument, the value and what to pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import nn


def require_module(value: Any) -> None:
    """The model itself, because hooks in its layers collect the statistics; other optimizers take its parameters here.

    Raises:
        TypeError: if value is not a module.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, but is {type(value).__name__}; pass the model itself, as in KFAC(model, ...), "
            "not its parameters"
        )


def real(name: str, value: Any, *, low: float = 0.0, high: float = math.inf, open_low: bool = False) -> float:
    """A finite real number in [low, high), or (low, high) with open_low.

    Raises:
        TypeError: if value is not a real number.
        ValueError: if it is outside the interval or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, but is {value!r} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not math.isfinite(number) or number < low or number >= high or (open_low and number == low):
        bounds = f"{'greater than' if open_low else 'at least'} {low:g}" + (
            f" and less than {high:g}" if high < math.inf else ""
        )
        raise ValueError(f"{name} must be finite and {bounds}, but is {value!r}")
    return number


def whole(name: str, value: Any, *, low: int = 1) -> int:
    """An integer of at least low.

    Raises:
        TypeError: if value is not an integer.
        ValueError: if it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, but is {value!r} ({type(value).__name__})")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, but is {value}")
    return value


def choice(name: str, value: Any, options: Sequence[str]) -> str:
    """One of a few strings.

    Raises:
        TypeError: if value is not a string.
        ValueError: if it is none of the options.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, one of {', '.join(options)}, but is {value!r}")
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, but is {value!r}")
    return value


def flag(name: str, value: Any) -> None:
    """True or False.

    Raises:
        TypeError: if value is anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but is {value!r}")
