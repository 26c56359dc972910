"""Multiply-adds and parameters of a model, counted from the modules and products that are there."""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fast_prompt.backends import BACKENDS, use_backend

importlib.import_module("fast_prompt.ops.flops")  # the formulas of the ops of this package

# A backend that takes every call and runs none: tensors without memory come no further than an op's fake kernel.
COUNTED = ModuleType("counted")
vars(COUNTED).update(suffix="", unavailable=lambda: None, refuses=lambda call: None)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made within have no memory (they live on the meta device and say that they are on the CPU).

    Every op takes the form that it has where there is a kernel for it, whether one is built here or not.
    """
    BACKENDS[COUNTED.__name__] = COUNTED
    try:
        with use_backend(COUNTED.__name__), FakeTensorMode():
            yield
    finally:
        del BACKENDS[COUNTED.__name__]


def _addmm_flops(added: list[int], left: list[int], right: list[int], **_: object) -> int:
    """The FLOPs of `added += left @ right`, which torch counts out of place only."""
    return 2 * left[0] * left[1] * right[1]


@torch.no_grad()
def count_macs(model: nn.Module, **inputs: Tensor) -> int:
    """Multiply-adds of a forward pass on `inputs` [B, ...], per sample.

    Counted from the matrix products and convolutions that run. Attention is run as plain products, since torch has no
    formula for its fused form on a CPU.
    """
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter,
    ):
        model(**inputs)
    return counter.get_total_flops() // 2 // len(next(iter(inputs.values())))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Elements of all parameters, and of those that train."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
