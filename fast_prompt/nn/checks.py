"""Checks of plain settings: each raises a ValueError naming the field, what came and what was expected."""

import sys
from collections.abc import Collection
from typing import TypeGuard

# No size or number that is set by hand is larger; the product of two is still a tensor's.
LARGEST = 2**31 - 1


def check_count(name: str, value: object, largest: int | None = None) -> None:
    """A whole number of at least 1 (a bool is none), and at most ``largest``, by default ``LARGEST``."""
    expected = "a whole number of at least 1" if largest is None else f"a whole number from 1 to {largest:,}"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (largest and value > largest):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    if largest is None:
        _check_not_larger(name, value)


def check_index(name: str, value: object) -> None:
    """A whole number of at least 0 (a bool is none), and at most ``LARGEST``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: expected a whole number of at least 0, got {value!r}")
    _check_not_larger(name, value)


def _check_not_larger(name: str, value: int) -> None:
    if value > LARGEST:
        raise ValueError(f"{name}: expected at most {LARGEST:,}, got {value!r}")


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
    if not _is_finite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_not_negative(name: str, value: object) -> None:
    """A finite number of at least 0."""
    if not _is_finite(value) or value < 0:
        raise ValueError(f"{name}: expected a finite number from 0, got {value!r}")


def check_positive(name: str, value: object) -> None:
    """A finite number above 0."""
    if not _is_finite(value) or value <= 0:
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


def _is_finite(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
