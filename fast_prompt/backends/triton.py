"""Triton on NVIDIA and AMD GPUs, and in Triton's interpreter where ``TRITON_INTERPRET=1`` says so.

The kernels are in ``fast_prompt_kernels``, imported at an op's first call: triton takes long to import, and may be
absent.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fast_prompt.backends.call import (
    Call,
    PromptCompressCall,
    PromptDiffusionCall,
    SkipAdapterCall,
    refuses_kernels,
)

name = "triton"

_MOST_PROMPTS = 1024  # a row's scores stay on chip
_MOST_PROMPTS_AMD_FLOAT32 = 512  # a step through 1024 keys in float32 is all of the chip's 64 KiB of shared memory
_MOST_ROWS = 64  # of a tile
_MOST_HEADS = 65535  # of a launch grid's second dimension
_MOST_HIDDEN = 768  # a row's hidden layer stays on chip
_MOST_ITEMS = 65535  # of a launch grid's third dimension
_LEAST_CAPABILITY = (8, 0)  # Ampere


def interpreted() -> bool:
    """Whether Triton interprets its kernels, slowly, on the CPU: ``TRITON_INTERPRET`` when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def unavailable() -> str | None:
    """Why there is no Triton here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if not interpreted() and not torch.cuda.is_available():
        return "there is no CUDA or ROCm device, and TRITON_INTERPRET=1 is not set"
    return None


def refuses(op: str, call: Call) -> str | None:
    """Why this backend cannot take a call, or None."""
    if call.device.type != "cuda" and not (call.device.type == "cpu" and interpreted()):
        return f"runs on cuda, not on {call.device.type}"
    return refuses_kernels(call) or _REFUSES_SIZES[op](call) or _refuses_chip(call.device)


def _refuses_prompts(call: PromptDiffusionCall) -> str | None:
    amd_float32 = torch.version.hip is not None and call.dtype == torch.float32
    most = _MOST_PROMPTS_AMD_FLOAT32 if amd_float32 else _MOST_PROMPTS
    if call.num_prompts > most:
        return f"takes up to {most} prompts, not {call.num_prompts}"
    if max(call.num_prompts, _MOST_ROWS) * call.width >= 2**31:
        return f"takes weights and row tiles of fewer than 2**31 elements, not width {call.width}"
    return None


def _refuses_heads(call: PromptCompressCall) -> str | None:
    return f"takes up to {_MOST_HEADS} heads, not {call.num_heads}" if call.num_heads > _MOST_HEADS else None


def _refuses_hidden(call: SkipAdapterCall) -> str | None:
    if call.adapter_width > _MOST_HIDDEN:
        return f"takes hidden layers of up to {_MOST_HIDDEN}, not {call.adapter_width}"
    if max(call.num_experts, 1) * call.adapter_width * call.width >= 2**31:
        return f"takes an adapter's weights of fewer than 2**31 elements, not width {call.width}"
    if max(call.num_adapters, call.num_experts) > _MOST_ITEMS:
        return f"takes up to {_MOST_ITEMS} adapters or experts, not {max(call.num_adapters, call.num_experts)}"
    return None


_REFUSES_SIZES: dict[str, Callable[..., str | None]] = {
    "prompt_diffusion": _refuses_prompts,
    "prompt_compress": _refuses_heads,
    "skip_adapter": _refuses_hidden,
}


@functools.cache
def _refuses_chip(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= _LEAST_CAPABILITY else f"needs compute capability 8.0, not {major}.{minor}"


def prompt_diffusion(
    hidden: Tensor,
    source: Tensor,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    seed: Tensor | None,
    activation: str,
    row_weight: str,
    dropout_p: float,
) -> Tensor:
    """``fast_prompt.reference.prompt_diffusion`` for hidden and source [B, n, d], not empty, log_scale float32."""
    return _kernels("prompt_diffusion").prompt_diffusion(
        hidden, source, prompts, keys, log_scale, seed, activation, row_weight, dropout_p
    )


def prompt_diffusion_backward(
    grad: Tensor,
    hidden: Tensor | None,
    source: Tensor,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    seed: Tensor | None,
    activation: str,
    row_weight: str,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``prompt_diffusion`` for ``grad`` [B, n, d].

    Args:
        grad: the output's gradient; the other tensors are the forward's.
        hidden: may be None where the gradient of log_scale is not needed.
        needs: for hidden, source, prompts, keys and log_scale, whether its gradient is wanted.

    Returns:
        Five gradients, contiguous, in their inputs' dtypes; None where not wanted.
    """
    settings = (activation, row_weight, dropout_p)
    return _kernels("prompt_diffusion").prompt_diffusion_backward(
        grad, hidden, source, prompts, keys, log_scale, seed, *settings, needs
    )


def prompt_compress(
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout_p: float,
    keep_probabilities: bool,
    keep_attended: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``fast_prompt.reference.prompt_compress`` in its absorbed form, for inputs of which none is empty.

    Returns:
        The output [B, m, E], contiguous, and in float32: the logarithms of the softmax's sums [B, h, m], the
        probabilities before dropout [B, h, m, n], and the tokens weighted by them after it [B, h, m, d_v]; these two
        None where they are not to be kept.
    """
    tensors = (query, visual, key_weight, value_weight, value_bias, key_padding_mask, seed)
    return _kernels("prompt_compress").prompt_compress(
        *tensors, num_heads, dropout_p, keep_probabilities, keep_attended
    )


def prompt_compress_backward(
    grad: Tensor,
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout_p: float,
    logsumexp: Tensor,
    probabilities: Tensor | None,
    attended: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``prompt_compress`` for ``grad`` [B, m, E].

    Args:
        grad: the output's gradient; query to dropout_p are the forward's arguments.
        logsumexp, probabilities, attended: what the forward returned; the last two may be None.
        needs: for query, visual, key_weight, value_weight and value_bias, whether its gradient is wanted.

    Returns:
        Five gradients, contiguous, in their inputs' dtypes; None where not wanted.
    """
    tensors = (grad, query, visual, key_weight, value_weight, value_bias, key_padding_mask, seed)
    kept = (logsumexp, probabilities, attended)
    return _kernels("prompt_compress_backward").prompt_compress_backward(*tensors, num_heads, dropout_p, *kept, needs)


def skip_adapter(
    output: Tensor,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    gates: Tensor | None,
    route: Tensor | None,
    seed: Tensor | None,
    norm: str,
    activation: str,
    residual: str,
    eps: float,
    dropout_p: float,
    keep_hidden: bool,
) -> Tensor | None:
    """Writes ``fast_prompt.reference.skip_adapter`` for x [B, n, d], not empty, to ``output``.

    Args:
        output: [B, n, d], contiguous, dtype of x; with a route its samples of route -1 are left as they are.
        down_weight to norm_bias: with a leading dimension A; up_bias [1, E, d] with gates.
        scale, gates: float32 [A] and [B, E].
        route: int64 [B], on the device of x.

    Returns:
        Where ``keep_hidden``, the hidden layer before its activation, [A, B, n, w] ([1, B, n, w] with a route), dtype
        of x; the rows of samples of route -1 are undefined.
    """
    parameters = (down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, scale, gates)
    settings = (norm, activation, residual, eps, dropout_p)
    return _kernels("skip_adapter").skip_adapter(output, x, *parameters, route, seed, *settings, keep_hidden)


def skip_adapter_backward(
    grad: Tensor,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    gates: Tensor | None,
    route: Tensor | None,
    seed: Tensor | None,
    hidden: Tensor,
    norm: str,
    activation: str,
    residual: str,
    eps: float,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``skip_adapter`` for ``grad`` [B, n, d].

    Args:
        grad: the output's gradient; x to dropout_p are the forward's arguments.
        hidden: what the forward returned.
        needs: for x, the parameters and the gates, whether its gradient is wanted.

    Returns:
        Nine gradients, contiguous, in their inputs' dtypes; None where not wanted. With a route, rows of samples of
        route -1 are undefined in that of x.
    """
    parameters = (down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, scale, gates)
    settings = (norm, activation, residual, eps, dropout_p)
    return _kernels("skip_adapter_backward").skip_adapter_backward(
        grad, x, *parameters, route, seed, hidden, *settings, needs
    )


@functools.cache
def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"fast_prompt_kernels.{module}")
