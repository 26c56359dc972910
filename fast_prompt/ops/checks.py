"""Checks that all ops share: each error names the argument, what came and what was expected."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_KINDS = 4096


def _kind(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.layout
    return type(value), value


def once_a_kind(check: Callable[..., None]) -> Callable[..., None]:
    """Makes a check once for all calls alike: on few rows it takes longer than the op.

    The check may read no more of a tensor than its shape, dtype, device and layout. Tensors come as arguments of their
    own, not in sequences.
    """
    passed: set[object] = set()

    @functools.wraps(check)
    def checked(*arguments: Any) -> None:
        if torch.compiler.is_compiling():
            return check(*arguments)
        kind = tuple([_kind(value) for value in arguments])
        try:
            known = kind in passed
        except TypeError:  # what cannot be hashed, such as a list or a symbolic size
            return check(*arguments)
        if not known:
            check(*arguments)
            if len(passed) == MOST_KINDS:
                passed.clear()
            passed.add(kind)
        return None

    return checked


def check_tensor(name: str, value: object, *, minimum_rank: int = 0) -> None:
    """A dense floating tensor of at least ``minimum_rank`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dim() < minimum_rank:
        raise ValueError(f"{name}: expected at least {minimum_rank} dimensions, got shape {tuple(value.shape)}")


def check_shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Exactly the shape ``expected``; ``meaning`` says where that comes from."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)} ({meaning}), got {tuple(value.shape)}")


def check_dtype(name: str, value: Tensor, expected: Collection[torch.dtype], meaning: str) -> None:
    """One of the dtypes ``expected``; ``meaning`` says where they come from."""
    if value.dtype not in expected:
        names = " or ".join(str(dtype) for dtype in dict.fromkeys(expected))
        raise TypeError(f"{name}: expected dtype {names} ({meaning}), got {value.dtype}")


def check_device(name: str, value: Tensor, expected: torch.device, meaning: str) -> None:
    """On the device ``expected``."""
    if value.device != expected:
        raise ValueError(f"{name}: expected device {expected} ({meaning}), got {value.device}")


def check_mask(name: str, value: object) -> None:
    """A bool tensor."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a bool tensor, True where a token is padding, got {got}")


def check_count(name: str, value: object) -> None:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number of at least 1, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """One of the strings ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_probability(name: str, value: object) -> None:
    """A number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1), got {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
