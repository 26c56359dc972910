"""Who runs against whom in ``prompt_diffusion``: plain PyTorch, eager forms by hand, torch.compile, every backend.

The forms by hand are for the op's defaults, ReLU and the maximum; each is here because it was the fastest of several
at some shape, dtype and pass.
"""

from typing import Any

import torch
from torch import Tensor

from fast_prompt import ops, reference
from fast_prompt.bench.contender import Contender, backends_for, forced, in_float32
from fast_prompt.ops.prompt_diffusion import MAX_PROMPTS
from fast_prompt.parity import Problem
from fast_prompt.parity.prompt_diffusion import draw

SHAPE_KEYS = ("B", "n", "d", "p")
LARGEST = {"p": MAX_PROMPTS}
PASSES = ("fwd", "fwdbwd")
ONE_ROW = {"B": 1, "n": 1}
DEFAULT_SHAPES = tuple({"B": 8, "n": 237, "d": 768, "p": p} for p in (4, 16, 64, 200))
GPU_SHAPES = tuple(
    {"B": batch, "n": 577, "d": 768, "p": p} for batch, p in ((64, 16), (64, 64), (64, 200), (1, 16), (1, 200))
)
PARAMETERS = ("prompts", "keys", "log_scale")


def problem(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Problem:
    """Arguments of this shape, every gradient wanted."""
    drawn = draw((shape["B"], shape["n"]), shape["d"], shape["p"], dtype, dtype)
    tensors = {name: tensor.to(device) for name, tensor in drawn.tensors.items()}
    return Problem(tensors, drawn.grad.to(device), drawn.options, drawn.trained)


def products(shape: dict[str, int]) -> list[tuple[int, int, int]]:
    """(m, k, n) of its matrix products: the scores, and the diffusion."""
    rows, width, num_prompts = shape["B"] * shape["n"], shape["d"], shape["p"]
    return [(rows, width, num_prompts), (rows, num_prompts, width)]


def flops(shape: dict[str, int], backward: bool) -> int:
    """Two products of 2·M·p·d forward, and four backward: dR, dX, dP, dK. Recomputing the scores is not counted."""
    return (12 if backward else 4) * shape["B"] * shape["n"] * shape["d"] * shape["p"]


def traffic(shape: dict[str, int], dtype: torch.dtype, backward: bool) -> int:
    """Bytes that must be read and written once: hidden, source, output; then gradient, both again, two gradients."""
    activations, weights = shape["B"] * shape["n"] * shape["d"], shape["p"] * shape["d"]
    return dtype.itemsize * ((8 * activations + 6 * weights) if backward else (3 * activations + 2 * weights))


def contenders(shape: dict[str, int], dtype: torch.dtype, device: torch.device, backward: bool) -> list[Contender]:
    """Baselines first. Every function takes hidden, source, prompts, keys, log_scale and the op's options."""
    eager = EAGER_WITH_BACKWARD if backward else EAGER_FORWARD
    if dtype != torch.float32:
        eager = eager | {f"{name}_in_fp32": in_float32(function) for name, function in eager.items()}
    definition = reference.prompt_diffusion
    forms = {"reference": definition, **eager}
    forms |= {name: torch.compile(form, dynamic=False) for name, form in COMPILED.items()}
    baselines = [Contender(name, "baseline", form, definition) for name, form in forms.items()]
    backends = backends_for("prompt_diffusion", device, dtype, width=shape["d"], num_prompts=shape["p"])
    return baselines + [Contender(name, "ours", forced(ops.prompt_diffusion, name), definition) for name in backends]


def eager_in_place(
    hidden: Tensor, source: Tensor, prompts: Tensor, keys: Tensor, log_scale: Tensor, **options: Any
) -> Tensor:
    """The fastest forward by hand: one [M, p] buffer changed in place, the scale folded into the last product."""
    rows = source.flatten(0, -2)
    diffusion = torch.mm(rows, keys.t()).relu_()
    diffusion.mul_(diffusion.amax(-1, keepdim=True))
    return _scaled_addmm(hidden.flatten(0, -2), diffusion, prompts, log_scale).view(hidden.shape)


def _scaled_addmm(hidden: Tensor, diffusion: Tensor, prompts: Tensor, log_scale: Tensor) -> Tensor:
    """The scale inside the product, where reading it as a number costs nothing; a GPU would be waited for."""
    if hidden.device.type != "cpu":
        return torch.addmm(hidden, diffusion, prompts).mul_(log_scale.exp())
    scale = float(log_scale.exp())
    return torch.addmm(hidden, diffusion, prompts, beta=scale, alpha=scale)


def eager_addmm(
    hidden: Tensor, source: Tensor, prompts: Tensor, keys: Tensor, log_scale: Tensor, **options: Any
) -> Tensor:
    """For autograd: the row weight goes into ``R`` [M, p] instead of ``R P`` [M, d]; one addmm, then the scale.

    Scaling ``hidden`` and ``prompts`` before the addmm instead was a tenth slower at most shapes.
    """
    diffusion = torch.relu(source.flatten(0, -2) @ keys.t())
    weight = diffusion.detach().amax(-1, keepdim=True)
    output = torch.addmm(hidden.flatten(0, -2), diffusion * weight, prompts)
    return (output * log_scale.exp().to(output.dtype)).view(hidden.shape)


class _HandWritten(torch.autograd.Function):
    """The fastest backward by hand: the scale inside every product, three [M, p] buffers, no [M, d] one but results."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, source: Tensor, prompts: Tensor, keys: Tensor, log_scale: Tensor) -> Tensor:
        diffusion = torch.mm(source, keys.t()).relu_()
        weight = diffusion.amax(-1, keepdim=True)
        output = _scaled_addmm(hidden, diffusion * weight, prompts, log_scale)
        ctx.save_for_backward(source, prompts, keys, diffusion, weight, output)
        ctx.scale = log_scale.exp()
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        source, prompts, keys, diffusion, weight, output = ctx.saved_tensors
        grad = grads[0] * ctx.scale
        grad_scores = torch.mm(grad, prompts.t()).mul_(weight)
        grad_prompts = torch.mm((diffusion * weight).t(), grad)
        grad_scores = torch.ops.aten.threshold_backward(grad_scores, diffusion, 0)
        grad_scale = torch.dot(grads[0].flatten(), output.flatten())
        return grad, grad_scores @ keys, grad_prompts, grad_scores.t() @ source, grad_scale


def eager_function(
    hidden: Tensor, source: Tensor, prompts: Tensor, keys: Tensor, log_scale: Tensor, **options: Any
) -> Tensor:
    """``_HandWritten`` on [..., n, d]."""
    output = _HandWritten.apply(hidden.flatten(0, -2), source.flatten(0, -2), prompts, keys, log_scale)
    return output.view(hidden.shape)


EAGER_FORWARD = {"eager_in_place": eager_in_place, "eager_addmm": eager_addmm}
EAGER_WITH_BACKWARD = {"eager_addmm": eager_addmm, "eager_function": eager_function}
COMPILED = {"compiled_reference": reference.prompt_diffusion, "compiled_eager": eager_addmm}
