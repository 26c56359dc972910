"""``prompt_diffusion``: what it is, its declaration and its checks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fast_prompt import reference
from fast_prompt.backends import Call, Kernels, cuda
from fast_prompt.ops import checks
from fast_prompt.ops.declaration import Op, activation, choice, index, number, scalars, weight
from fast_prompt.ops.rows import three_dimensional
from fast_prompt.ops.seeds import seed_tensor
from fast_prompt.reference.prompt_diffusion import ACTIVATIONS, ROW_WEIGHTS

MAX_PROMPTS = 1024


def prompt_diffusion(
    hidden: Tensor,
    source: Tensor,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    *,
    activation: str = "relu",
    row_weight: str = "max",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Approximated prompt tuning's diffusion step, ``exp(log_scale) * (hidden + w * (R @ prompts))``.

    ``R = dropout(activation(source @ keys.T))``; ``w`` is each row's maximum of ``R``, without gradient.
    One read of ``hidden`` and ``source``, one write of the output; the scores are recomputed in the backward
    pass, so only ``source`` is saved for it, and the output where ``log_scale`` trains. Arithmetic is float32
    whatever the storage.
    Under autocast the activations are cast to the autocast dtype; prompts and keys may stay float32.

    Args:
        hidden: [..., n, d] float32, bfloat16, float16 or float64; the attention's output projection with its
            bias, before dropout and residual. Any strides.
        source: [..., n, d], dtype of ``hidden``; the input of the attention's queries. Any strides.
        prompts: [p, d], p from 1 to 1,024; dtype of ``hidden`` or float32.
        keys: [p, d], dtype of ``prompts``.
        log_scale: one floating element; the logarithm of the output's scale. Its gradient is read off the output as
            that is stored: in half precision a sum that cancels is as exact as that.
        activation: ``"relu"`` or ``"softmax"`` (over the p prompts).
        row_weight: ``"max"``, or ``"none"`` for ``w = 1``.
        dropout_p: probability in [0, 1) that an element of ``R`` is dropped; the rest are divided by
            ``1 - dropout_p``.
        seed: int64 number or one-element tensor that fixes the dropout mask; drawn from torch's generator when None.
        inplace: whether the output may be written over ``hidden``, which must then have no other use: a new result's
            memory can cost more than its arithmetic. A leaf that trains, or memory that another argument shares, is
            refused; a later backward pass that needs the old values is an error, as with torch's in-place functions.

    Returns:
        [..., n, d], dtype of ``hidden`` (the autocast dtype under autocast), contiguous. An empty batch gives an
        empty result and zero gradients.

    Raises:
        TypeError: an argument is not a tensor, or dtypes do not go together.
        ValueError: a shape, device or option does not fit; the message names it.
        fast_prompt.BackendError: a backend was forced that cannot take the call.

    Source: "Approximated Prompt Tuning for Vision-Language Pre-trained Models", arXiv 2306.15706, section 3.
    """
    checks.check_flag("inplace", inplace)
    plan = PROMPT_DIFFUSION.plan(hidden, source, prompts, keys, log_scale, activation, row_weight, dropout_p)
    seed = seed_tensor(seed, dropout_p, hidden.device)
    tensors = (hidden, source, prompts, keys, log_scale)
    if plan.form == "reference":
        return plan.define(*tensors, seed=seed)
    if hidden.dim() == 3:
        return plan.run(*tensors, seed, overwrite=inplace)
    rows = (three_dimensional(hidden), three_dimensional(source))
    return plan.run(*rows, *tensors[2:], seed, overwrite=inplace).view(hidden.shape)


def _check(
    hidden: Tensor,
    source: Tensor,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    activation: str,
    row_weight: str,
    dropout_p: float,
) -> None:
    checks.check_tensor("hidden", hidden, minimum_rank=1)
    width = hidden.shape[-1]
    checks.check_shape("source", source, hidden.shape, "that of hidden")
    if prompts.dim() != 2 or prompts.shape[1] != width or not 1 <= prompts.shape[0] <= MAX_PROMPTS or width == 0:
        raise ValueError(
            f"prompts: expected shape [p, {width}] with p from 1 to {MAX_PROMPTS:,} and a width of at least 1 "
            f"(that of hidden), got {tuple(prompts.shape)}"
        )
    checks.check_shape("keys", keys, prompts.shape, "that of prompts")
    if log_scale.numel() != 1:
        raise ValueError(f"log_scale: expected one element, got shape {tuple(log_scale.shape)}")
    checks.check_probability("dropout_p", dropout_p)


def _sizes(hidden: Tensor, prompts: Tensor, **_: Any) -> dict[str, int]:
    """``width``: d; ``num_prompts``: p."""
    return {"width": hidden.shape[-1], "num_prompts": prompts.shape[0]}


def _results(hidden: Tensor, **_: Any) -> list[Tensor]:
    return [torch.empty_like(hidden, memory_format=torch.contiguous_format)]


def _flops(hidden: Sequence[int], prompts: Sequence[int], **_: Any) -> int:
    """Two products of 2·M·p·d each."""
    return 4 * math.prod(hidden) * prompts[0]


def _flops_backward(grad: Sequence[int], prompts: Sequence[int], needs: Sequence[bool], **_: Any) -> int:
    """S again, then one product for each of dR (which dX and dK need), dX, dP and dK."""
    _hidden, need_source, need_prompts, need_keys, _scale = needs
    need_score_gradient = need_source or need_keys
    products = (need_score_gradient or need_prompts) + need_score_gradient + need_source + need_prompts + need_keys
    return 2 * products * math.prod(grad) * prompts[0]


# ---- What backends have no kernels for ----

_MOST_PROMPTS_FLOAT32_SMALL = 768  # of CUDA's, in float32 on a chip with little shared memory
_MOST_PROMPTS_AMD_FLOAT32 = 512  # of Triton's: a step through 1024 keys is all of the chip's 64 KiB of shared memory
_MOST_ROWS = 64  # of a tile of Triton's


def _refuses_prompts(call: Call, most: int) -> str | None:
    count = call.sizes["num_prompts"]
    return f"takes up to {most} prompts, not {count}" if count > most else None


def _cuda_refuses(call: Call) -> str | None:
    """A row's activations stay on chip."""
    small = call.dtype == torch.float32 and cuda.has_little_shared_memory(call.device)
    return _refuses_prompts(call, _MOST_PROMPTS_FLOAT32_SMALL if small else MAX_PROMPTS)


def _triton_refuses(call: Call) -> str | None:
    """A row's scores stay on chip; offsets within weights and row tiles fit 32 bits."""
    amd_float32 = torch.version.hip is not None and call.dtype == torch.float32
    if refusal := _refuses_prompts(call, _MOST_PROMPTS_AMD_FLOAT32 if amd_float32 else MAX_PROMPTS):
        return refusal
    width = call.sizes["width"]
    if max(call.sizes["num_prompts"], _MOST_ROWS) * width >= 2**31:
        return f"takes weights and row tiles of fewer than 2**31 elements, not width {width}"
    return None


PROMPT_DIFFUSION = Op(
    prompt_diffusion,
    reference.prompt_diffusion,
    tensors=(
        activation("hidden", gradient_shape=lambda grad, **_: grad.shape),
        activation("source"),
        weight("prompts"),
        weight("keys"),
        scalars("log_scale"),
        index("seed", planned=False),
    ),
    options=(choice("activation", tuple(ACTIVATIONS)), choice("row_weight", tuple(ROW_WEIGHTS)), number("dropout_p")),
    check=_check,
    sizes=_sizes,
    results=_results,
    kernels={
        "cpu": Kernels(),
        "cuda": Kernels(_cuda_refuses),
        "triton": Kernels(
            _triton_refuses, "fast_prompt_kernels.prompt_diffusion", "fast_prompt_kernels.prompt_diffusion"
        ),
    },
    output_saved_for="log_scale",
    overwritten="hidden",
    flops=_flops,
    flops_backward=_flops_backward,
    cases="fast_prompt.parity.prompt_diffusion",
)
