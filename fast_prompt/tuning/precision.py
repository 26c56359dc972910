"""What trains of a half-precision base: kept in float32, where small steps add up, and cast where it is used.

A module whose own parameters became float32 runs under autocast in the dtype that its base has, and hands on that
dtype; its neighbours see no difference.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fast_prompt.tuning.classes import is_replaceable, replace_forward, restore_forward

HALF = (torch.float16, torch.bfloat16)

# A buffer of the dtype that such a module's base has: ``.to()`` takes it along.
BASE_DTYPE = "fast_prompt_base_dtype"


def trained_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what a parameter of ``dtype`` trains."""
    return torch.float32 if dtype in HALF else dtype


def half_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The half-precision parameters of ``module`` itself."""
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dtype in HALF]


def widen(module: nn.Module) -> None:
    """Give ``module`` and those within it float32 parameters, and buffers beside them, in place of half-precision ones.

    Buffers such as a batch norm's averages are made of small steps too.
    """
    holders = [(holder, halves[0].dtype) for holder in module.modules() if (halves := half_parameters(holder))]
    for holder, dtype in holders:
        for value in (*holder.parameters(recurse=False), *holder.buffers(recurse=False)):
            value.data = value.data.to(trained_dtype(value.dtype))
        cast_forward_to(holder, dtype)


def cast_forward_to(module: nn.Module, dtype: torch.dtype) -> None:
    """Let ``module`` compute as if its own parameters had the half-precision ``dtype``; once is enough."""
    if not hasattr(module, BASE_DTYPE):
        device = next(module.parameters()).device
        module.register_buffer(BASE_DTYPE, torch.zeros((), dtype=dtype, device=device), persistent=False)
        replace_forward(module, cast_forward, inmost=True)


def restore_cast_forward(module: nn.Module) -> None:
    """Undo ``cast_forward_to``; nothing happens where it was not called."""
    if hasattr(module, BASE_DTYPE):
        delattr(module, BASE_DTYPE)
        restore_forward(module, cast_forward)


def as_it_computes(module: nn.Module) -> nn.Module:
    """``module``, or where it casts, a copy whose parameters have been cast."""
    if not hasattr(module, BASE_DTYPE):
        return module
    duplicate, dtype = copy.deepcopy(module), getattr(module, BASE_DTYPE).dtype
    restore_cast_forward(duplicate)
    return duplicate.to(dtype)


def cast_forward(self: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a module whose parameters are wider than its base."""
    base = getattr(self, BASE_DTYPE)
    if base.dtype not in HALF:
        return forward(self, *args, **kwargs)
    with torch.autocast(base.device.type, base.dtype):
        result = forward(self, *args, **kwargs)
    return tree_map_only(Tensor, lambda each: each.to(base.dtype) if each.dtype == torch.float32 else each, result)


def check_castable(module: nn.Module, path: str) -> None:
    """Raise a ValueError that names ``path`` if ``module`` holds half precision and cannot be made to cast."""
    if half_parameters(module) and not is_replaceable(module):
        raise ValueError(
            f"{path}: a float32 copy of it would train, but its forward was already replaced by something else, which "
            "knows of no cast; undo that first"
        )
