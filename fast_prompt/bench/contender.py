"""Who takes part in a benchmark, and what each must compute."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fast_prompt.backends import Call, refusals, use_backend
from fast_prompt.ops.declaration import OPS


@dataclass(frozen=True)
class Contender:
    """One way to compute something.

    Attributes:
        name: of our own it begins with the backend's.
        kind: what we are measured against, or ours.
        function: takes the problem's tensors and options, by name.
        definition: what ``function`` must agree with, given the same in float64.
    """

    name: str
    kind: Literal["baseline", "ours"]
    function: Callable[..., Tensor]
    definition: Callable[..., Tensor]


def backends_for(op: str, device: torch.device, dtype: torch.dtype, **sizes: int) -> list[str]:
    """The backends that can take a call of these sizes, its weights of its dtype, and are worth timing.

    Plain PyTorch is a baseline, and Triton on a CPU is its interpreter, whose time means nothing.
    """
    call = Call(device, dtype, dtype, sizes)
    left_out = {"reference", "triton"} if device.type == "cpu" else {"reference"}
    return [name for name, reason in refusals(OPS[op], call).items() if reason is None and name not in left_out]


def forced(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """``function`` with every op in it on ``backend``, or an error."""

    def call(*arguments: Any, **options: Any) -> Tensor:
        with use_backend(backend):
            return function(*arguments, **options)

    return call


def in_float32(function: Any) -> Any:
    """The same form on float32 copies: faster where the processor multiplies half types slowly."""

    @functools.wraps(function)
    def widened(**arguments: Any) -> Tensor:
        wide = {name: value.float() if isinstance(value, Tensor) else value for name, value in arguments.items()}
        return function(**wide).to(next(iter(arguments.values())).dtype)

    return widened
