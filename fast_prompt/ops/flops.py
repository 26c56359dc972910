"""Importing this module lets ``torch.utils.flop_counter.FlopCounterMode`` count the ops' arithmetic.

A module of its own, since torch's counter imports triton, which takes as long as the rest of this package.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from fast_prompt.backends import BACKENDS
from fast_prompt.ops.declaration import OPS, Argument, Op, Option


def count(op: Op) -> None:
    """Lets torch's counter count an op, forward and backward, on every backend that it has kernels for."""
    for backend in {BACKENDS[name].suffix: name for name in op.kernels}.values():
        suffixes = ("", "_") if op.overwritten else ("",)
        for suffix in suffixes:
            _register(op.registered(backend, suffix), op.forward_arguments, op.flops)
        _register(op.registered(backend, "_backward"), op.backward_arguments, op.flops_backward)


def _register(registered: Any, arguments: Sequence[Argument | Option], flops: Callable[..., int]) -> None:
    names = [argument.name for argument in arguments]

    def formula(*values: Any, **_: Any) -> int:
        return flops(**dict(zip(names, values, strict=True)))

    register_flop_formula(registered.overloadpacket)(formula)


for _op in OPS.values():
    count(_op)
