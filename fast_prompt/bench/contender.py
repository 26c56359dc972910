"""Who takes part in a benchmark, and what each must compute."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fast_prompt.backends import Call, refusals, use_backend


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


def backends_for(op: str, call: Call) -> list[str]:
    """The backends that can take this call and are worth timing.

    Plain PyTorch is a baseline, and Triton on a CPU is its interpreter, whose time means nothing.
    """
    left_out = {"reference", "triton"} if call.device.type == "cpu" else {"reference"}
    return [name for name, reason in refusals(op, call).items() if reason is None and name not in left_out]


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
