"""What the choice of a backend may depend on: the static facts of a call, and what a backend has for an op."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """One call of an op.

    Attributes:
        device: where the activations are.
        dtype: the activations' dtype.
        weight_dtype: the parameters' dtype.
        sizes: widths and counts by the names that the op's declaration gives them, such as ``"num_prompts"``.
        transformed: whether forward-mode AD or ``torch.func`` transforms it.
    """

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    sizes: Mapping[str, int]
    transformed: bool = False


@dataclass(frozen=True)
class Kernels:
    """What a backend has for an op.

    Attributes:
        refuses: says for which sizes it has no kernel, or None; given as None where it has one for every size.
        forward: the module that holds the op's function, for a backend that runs Python.
        backward: the module that holds its backward.
    """

    refuses: Callable[[Call], str | None] | None = None
    forward: str = ""
    backward: str = ""


class HasKernels(Protocol):
    """An op as backends see it: its name, and what each has for it."""

    name: str
    kernels: dict[str, Kernels]


def refuses_kernels(call: Call) -> str | None:
    """Why no kernel, on any device, can take a call, or None."""
    if call.transformed:
        return "has no rules for torch.func and forward-mode AD"
    if call.dtype not in DTYPES:
        return f"has float32, bfloat16 and float16, not {call.dtype}"
    if call.weight_dtype not in (call.dtype, torch.float32):
        return f"has weights in {call.dtype} or float32 beside {call.dtype} activations, not in {call.weight_dtype}"
    return None
