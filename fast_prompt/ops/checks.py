"""Checks that all ops share: each error names the argument, what came and what was expected."""

from collections.abc import Collection

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dense(name: str, value: object) -> None:
    """A tensor of plain rows: neither nested nor sparse."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def check_tensor(name: str, value: object, *, minimum_rank: int = 0) -> None:
    """A dense floating tensor of at least ``minimum_rank`` dimensions."""
    check_dense(name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.dim() < minimum_rank:
        raise ValueError(f"{name}: expected at least {minimum_rank} dimensions, got shape {tuple(value.shape)}")


def check_rows(name: str, value: object, width: int, rank: int | None = None) -> None:
    """A dense floating tensor [..., width], of ``rank`` dimensions where that is given."""
    check_tensor(name, value, minimum_rank=1)
    assert isinstance(value, Tensor)
    if value.shape[-1] != width or rank not in (None, value.dim()):
        dimensions = "" if rank is None else f" of {rank} dimensions"
        raise ValueError(f"{name}: expected shape [..., {width}]{dimensions}, got {tuple(value.shape)}")


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
    """A dense bool tensor."""
    check_dense(name, value)
    assert isinstance(value, Tensor)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor, True where a token is padding, got {value.dtype}")


def check_flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_count(name: str, value: object) -> None:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number of at least 1, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """One of the strings ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_probability(name: str, value: object) -> None:
    """A number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1), got {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


def check_has_values(name: str, value: Tensor) -> None:
    """Not on meta, where no number can be read."""
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on meta")
