"""Who takes part in a benchmark."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fast_prompt.backends import BACKENDS, refusals, use_backend
from fast_prompt.ops.explain import CALL_FACTS
from fast_prompt.parity import Problem


@dataclass(frozen=True)
class Contender:
    """One way to compute an op.

    Attributes:
        name: of our own it begins with the backend's.
        kind: what we are measured against, or ours.
        function: takes the op's arguments.
    """

    name: str
    kind: Literal["baseline", "ours"]
    function: Callable[..., Tensor]


def ours(op: Callable[..., Tensor], problem: Problem) -> list[Contender]:
    """Every backend that can take this call, through the public face; plain PyTorch is a baseline, so not here."""
    reasons = refusals(op.__name__, CALL_FACTS[op.__name__](*problem.tensors.values()))
    return [
        Contender(name, "ours", _forced(op, name)) for name in BACKENDS if name != "reference" and reasons[name] is None
    ]


def _forced(op: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    def call(*tensors: Tensor, **options: Any) -> Tensor:
        with use_backend(backend):
            return op(*tensors, **options)

    return call
