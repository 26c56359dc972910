"""Checks of plain settings: each raises a ValueError naming the field, what came and what was expected."""

import math
import sys
from collections.abc import Collection


def check_count(name: str, value: object, largest: int | None = None) -> None:
    """A whole number of at least 1 (a bool is none), and at most ``largest``."""
    expected = "a whole number of at least 1" if largest is None else f"a whole number from 1 to {largest:,}"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (largest and value > largest):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_index(name: str, value: object) -> None:
    """A whole number of at least 0 (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: expected a whole number of at least 0, got {value!r}")


def check_probability(name: str, value: object) -> None:
    """A number in [0, 1); NaN is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")


def check_bool(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """One of the strings ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_finite(name: str, value: object) -> None:
    """A number that is neither infinite nor NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_positive(name: str, value: object) -> None:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
