"""A run of consecutive adapters in one call, against as many calls of one, eager and ours."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fast_prompt import ops
from fast_prompt.bench import skip_adapter
from fast_prompt.bench.contender import Contender
from fast_prompt.bench.skip_adapter import baseline_forms, our_forms, placed
from fast_prompt.parity import Problem
from fast_prompt.parity.skip_adapter import Case, draw

SHAPE_KEYS = (*skip_adapter.SHAPE_KEYS, "run")
LARGEST: dict[str, int] = {}
PASSES = skip_adapter.PASSES
DEFAULT_SHAPES = tuple({"B": 8, "n": 237, "d": d, "width": width, "run": 3} for d, width in ((384, 48), (768, 192)))
PARAMETERS = skip_adapter.PARAMETERS
products = skip_adapter.products


def problem(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Problem:
    """Arguments of this shape, every gradient wanted."""
    sizes = (shape["B"], shape["n"]), shape["d"], shape["width"], shape["run"]
    return placed(draw(Case("bench", *sizes, without=("scale",)), dtype), device)


def flops(shape: dict[str, int], backward: bool) -> int:
    """FLOPs of all adapters. Computing rows between two of them again in the backward is not counted."""
    return shape["run"] * skip_adapter.flops(shape, backward)


def traffic(shape: dict[str, int], dtype: torch.dtype, backward: bool) -> int:
    """Bytes that must be read and written once: x and the result once for all, weights and hidden layers for each."""
    rows, d, width, run = shape["B"] * shape["n"], shape["d"], shape["width"], shape["run"]
    forward, hidden, weights = 2 * rows * d, run * rows * width, run * 2 * d * width
    return dtype.itemsize * (2 * forward + rows * d + 2 * hidden + 3 * weights if backward else forward + weights)


def contenders(shape: dict[str, int], dtype: torch.dtype, device: torch.device, backward: bool) -> list[Contender]:
    """Baselines first; then ours one adapter at a time, and all in one call."""
    eager = {name: partial(one_by_one, form) for name, form in skip_adapter.EAGER.items()}
    compiled = {"compiled_eager": partial(one_by_one, skip_adapter.eager)}
    return [
        *baseline_forms(eager, compiled, dtype),
        *our_forms(partial(one_by_one, ops.skip_adapter), shape, dtype, device, "_one_by_one"),
        *our_forms(ops.skip_adapter, shape, dtype, device),
    ]


def one_by_one(function: Callable[..., Tensor], x: Tensor, **arguments: Any) -> Tensor:
    """Each adapter of the stack by a call of its own."""
    parameters = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in arguments.items() if name not in parameters}
    stacked = zip(*(value.unbind(0) for value in parameters.values()), strict=True)
    for each in stacked:
        x = function(x, **dict(zip(parameters, each, strict=True)), **options)
    return x
