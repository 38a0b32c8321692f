"""Checks of settings. Each names the setting, what it must be and what it was."""

from __future__ import annotations

import math
from collections.abc import Sequence

INT32_MAX = 2**31 - 1


def integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """An int from `low` to `high`; None: to what an int32 on the device holds."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, was {type(value).__name__}")
    if high is None:
        high, bounds = INT32_MAX - 1, f"at least {low}" if value < low else "below 2**31 - 1"
    else:
        bounds = f"between {low} and {high}"
    if not low <= value <= high:
        raise ValueError(f"{name} must be {bounds}, was {value}")


def number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """A finite number from `low` to `high`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, was {type(value).__name__}")
    if not (low <= value <= high and math.isfinite(value)):
        bounds = f"between {low:g} and {high:g}" if math.isfinite(high) else f"finite and at least {low:g}"
        raise ValueError(f"{name} must be {bounds}, was {value}")


def ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids: ints that are not negative."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of token ids, was {type(value).__name__}")
    for index in value:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"{name} must hold ints, was {type(index).__name__}")
        if index < 0:
            raise ValueError(f"{name} must hold ids of at least 0, was {index}")
    return tuple(value)
