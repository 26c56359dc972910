"""What ``torch.func`` and forward-mode AD make of a call: the kernels see plain numbers, and would lose derivatives."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(*arguments: Any) -> bool:
    """Whether ``torch.func`` transforms the call (grad, vmap, jvp), or one of its tensors carries a tangent."""
    return _in_transform() or carries_tangent(*arguments)


def carries_tangent(*arguments: Any) -> bool:
    """Whether a tensor has a forward-mode derivative; within a transform or a trace any may have one that is hidden."""
    if forward_ad._current_level < 0:
        return False
    if _in_transform() or torch.compiler.is_compiling():
        return True
    return any(forward_ad.unpack_dual(value).tangent is not None for value in arguments if isinstance(value, Tensor))


def _in_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# Burnt in, as the choice of a backend is: torch.compile guards on the stack of transforms by itself.
_in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_derivatives_of_backward(op: str, grad: Tensor) -> None:
    """Raise a RuntimeError where a backward pass of the kernels is to be differentiated, in either mode."""
    second = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if second or carries_tangent(grad):
        how = "create_graph=True" if second else "a gradient with a tangent"
        raise RuntimeError(
            f'{op}: its kernels have no second derivatives ({how}); with fast_prompt.use_backend("reference"): has'
        )
