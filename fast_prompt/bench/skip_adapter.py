"""Who runs against whom in ``skip_adapter``: plain PyTorch, eager forms by hand, both compiled, every backend.

A LayerNorm before, ReLU, biases and the residual, as in dynamic architecture skipping; every gradient wanted.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, relu

from fast_prompt import ops, reference
from fast_prompt.bench.contender import Contender, backends_for, forced, in_float32
from fast_prompt.parity import Problem
from fast_prompt.parity.skip_adapter import Case, draw

SHAPE_KEYS = ("B", "n", "d", "width")
LARGEST: dict[str, int] = {}
PASSES = ("fwd", "fwdbwd")
ONE_ROW = {"B": 1, "n": 1}
DEFAULT_SHAPES = tuple({"B": 8, "n": 237, "d": d, "width": width} for d, width in ((768, 96), (768, 192), (384, 48)))
GPU_SHAPES = tuple(
    {"B": batch, "n": n, "d": d, "width": width}
    for batch, n, d, width in ((64, 577, 768, 96), (64, 577, 768, 288), (8, 512, 4096, 256), (1, 1, 4096, 256))
)
PARAMETERS = ("down_weight", "up_weight", "down_bias", "up_bias", "norm_weight", "norm_bias")


def problem(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Problem:
    """Arguments of this shape, every gradient wanted."""
    case = Case("bench", (shape["B"], shape["n"]), shape["d"], shape["width"], without=("scale",))
    return placed(draw(case, dtype), device)


def placed(drawn: Problem, device: torch.device) -> Problem:
    """The problem on a device."""
    tensors = {name: tensor.to(device) for name, tensor in drawn.tensors.items()}
    trained = tuple(name for name in drawn.trained if name in tensors)
    return Problem(tensors, drawn.grad.to(device), drawn.options, trained)


def products(shape: dict[str, int]) -> list[tuple[int, int, int]]:
    """(m, k, n) of its matrix products: down and up."""
    rows, d, width = shape["B"] * shape["n"], shape["d"], shape["width"]
    return [(rows, d, width), (rows, width, d)]


def flops(shape: dict[str, int], backward: bool) -> int:
    """Two products of 2·M·d·w each forward, and four backward: of the hidden layer, x and both weights."""
    return (12 if backward else 4) * shape["B"] * shape["n"] * shape["d"] * shape["width"]


def traffic(shape: dict[str, int], dtype: torch.dtype, backward: bool) -> int:
    """Bytes that must be read and written once: x, output; then gradient, x, the hidden layer and a gradient again."""
    rows, d, width = shape["B"] * shape["n"], shape["d"], shape["width"]
    forward, hidden, weights = 2 * rows * d, rows * width, 2 * d * width
    return dtype.itemsize * (2 * forward + rows * d + 2 * hidden + 3 * weights if backward else forward + weights)


def contenders(shape: dict[str, int], dtype: torch.dtype, device: torch.device, backward: bool) -> list[Contender]:
    """Baselines first."""
    baselines = baseline_forms(EAGER, COMPILED, dtype)
    return baselines + our_forms(ops.skip_adapter, shape, dtype, device)


def baseline_forms(eager: dict[str, Any], compiled: dict[str, Any], dtype: torch.dtype) -> list[Contender]:
    """The eager forms, in half precision also on float32 copies; and what is compiled."""
    if dtype != torch.float32:
        eager = eager | {f"{name}_in_fp32": in_float32(function) for name, function in eager.items()}
    forms = eager | {name: torch.compile(form, dynamic=False) for name, form in compiled.items()}
    return [Contender(name, "baseline", form, reference.skip_adapter) for name, form in forms.items()]


def our_forms(
    function: Any, shape: dict[str, int], dtype: torch.dtype, device: torch.device, suffix: str = ""
) -> list[Contender]:
    """``function`` on every backend worth timing."""
    sizes = {
        "width": shape["d"],
        "adapter_width": shape["width"],
        "num_adapters": shape.get("run", 1),
        "num_experts": 0,
    }
    return [
        Contender(f"{name}{suffix}", "ours", forced(function, name), reference.skip_adapter)
        for name in backends_for("skip_adapter", device, dtype, **sizes)
    ]


def eager(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor,
    up_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    **options: Any,
) -> Tensor:
    """As everyone writes it, out of torch's own fused pieces."""
    normed = layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    return x + linear(relu(linear(normed, down_weight, down_bias)), up_weight, up_bias)


def eager_in_place(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor,
    up_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    **options: Any,
) -> Tensor:
    """The fastest by hand: ReLU and residual in place of their own buffers. It works under autograd too."""
    normed = layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    return linear(linear(normed, down_weight, down_bias).relu_(), up_weight, up_bias).add_(x)


def eager_addmm(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor,
    up_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    **options: Any,
) -> Tensor:
    """The residual as the last product's own summand; the bias afterwards."""
    rows = x.flatten(0, -2)
    normed = layer_norm(rows, x.shape[-1:], norm_weight, norm_bias)
    hidden = torch.addmm(down_bias, normed, down_weight.t()).relu_()
    return torch.addmm(rows, hidden, up_weight.t()).add_(up_bias).view(x.shape)


EAGER = {"eager": eager, "eager_in_place": eager_in_place, "eager_addmm": eager_addmm}
COMPILED = {"compiled_reference": reference.skip_adapter, "compiled_eager": eager}
