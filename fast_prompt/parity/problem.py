"""One call of an op as data: its arguments, its incoming gradient, and what comes out of a function given them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fast_prompt.tolerances import relative_error

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """The arguments of one forward and backward call.

    Attributes:
        tensors: the op's tensor arguments by name, already rounded to their dtypes.
        grad: the incoming gradient, of the output's shape and dtype.
        options: the op's other keyword arguments.
        trained: the names of the tensors that need a gradient.
    """

    tensors: dict[str, Tensor]
    grad: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    trained: tuple[str, ...] = ()

    def double(self) -> "Problem":
        """The same numbers in float64."""
        tensors = {name: tensor.double() for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, grad=self.grad.double())

    def leaves(self) -> dict[str, Tensor]:
        """The tensors as autograd leaves, strides kept; those in ``trained`` ask for a gradient."""
        return {name: tensor.detach().requires_grad_(name in self.trained) for name, tensor in self.tensors.items()}


def evaluate(function: Callable[..., Tensor], problem: Problem, backward: bool = True) -> dict[str, Tensor]:
    """What ``function`` makes of a problem: ``{"forward": output, name: gradient, ...}``."""
    if not backward:
        with torch.no_grad():
            return {"forward": function(**problem.tensors, **problem.options)}
    leaves = problem.leaves()
    output = function(**leaves, **problem.options)
    gradients = torch.autograd.grad(output, [leaves[name] for name in problem.trained], problem.grad)
    return {"forward": output.detach(), **dict(zip(problem.trained, gradients, strict=True))}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of each result (fast_prompt.tolerances); infinity where a shape is not as expected."""
    return {name: _error(actual[name], expected[name]) for name in expected}


def _error(actual: Tensor, expected: Tensor) -> float:
    return relative_error(actual, expected) if actual.shape == expected.shape else float("inf")
