"""The compiled library: whether it is here, and its operators, which run where their tensors are, on CPU or CUDA."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# By op, what its options may be: the native ops take their numbers, in the order of csrc/bind.h, which says why.
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "prompt_diffusion": {"activation": ("relu", "softmax"), "row_weight": ("max", "none")},
    "skip_adapter": {
        "norm": ("none", "layer", "rms", "layer_after"),
        "activation": ("relu", "silu", "gelu"),
        "residual": ("input", "normed", "none"),
    },
}

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARY = _PACKAGE / "_native.so"
_RECORD = _PACKAGE / "_build.json"


def build_info() -> dict[str, Any]:
    """How the library was built: compiler, flags, instruction sets, torch; or ``{"built": False, "reason": ...}``."""
    if not _RECORD.exists():
        return {"built": False, "reason": "not compiled; pip install --no-build-isolation . compiles it"}
    return json.loads(_RECORD.read_text())


@functools.cache
def unavailable() -> str | None:
    """Why the library is not here, or None once it is loaded."""
    info = build_info()
    if not info["built"]:
        return f"the native library was not built: {info['reason']}"
    try:
        torch.ops.load_library(_LIBRARY)
        torch.ops.fast_prompt_native.cpu_isa()
    except (OSError, RuntimeError) as error:
        return f"the native library, built against torch {info['torch']}, does not work here: {error}"
    return None


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
    weights = _unit_stride(prompts), _unit_stride(keys)
    options = _numbers("prompt_diffusion", activation, row_weight)
    return torch.ops.fast_prompt_native.prompt_diffusion.default(
        _unit_stride(hidden), _unit_stride(source), *weights, log_scale, seed, *options, dropout_p
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
    weights = _unit_stride(prompts), _unit_stride(keys)
    settings = (*_numbers("prompt_diffusion", activation, row_weight), dropout_p)
    hidden = None if hidden is None else _unit_stride(hidden)
    results = iter(
        torch.ops.fast_prompt_native.prompt_diffusion_backward.default(
            _unit_stride(grad), hidden, _unit_stride(source), *weights, log_scale, seed, *settings, *needs
        )
    )
    return tuple(next(results) if needed else None for needed in needs)


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
) -> tuple[Tensor | None, ...]:
    """``fast_prompt.reference.prompt_compress`` for query [B, m, E] and visual [B, n, d_v], not empty.

    Returns:
        The output; then, float32, for the backward: the logarithms of the softmax's sums [B, h, m], the probabilities
        before dropout [B, h, m, n], and the weighted tokens [B, h, m, d_v]; the last two None where not to be kept.
    """
    tensors = _rows(query, visual, key_weight, value_weight, value_bias)
    options = (key_padding_mask, seed, num_heads, dropout_p)
    results = iter(
        torch.ops.fast_prompt_native.prompt_compress.default(*tensors, *options, keep_probabilities, keep_attended)
    )
    return tuple(next(results) if kept else None for kept in (True, True, keep_probabilities, keep_attended))


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
        grad: the output's gradient; the other tensors are the forward's.
        logsumexp, probabilities, attended: what the forward kept; the last two may be None, whatever it kept.
        needs: for query, visual, key_weight, value_weight and value_bias, whether its gradient is wanted.

    Returns:
        Five gradients, contiguous, in their inputs' dtypes; None where not wanted.
    """
    tensors = _rows(grad, query, visual, key_weight, value_weight, value_bias)
    options = (key_padding_mask, seed, num_heads, dropout_p)
    kept = (logsumexp, probabilities, attended)
    results = iter(torch.ops.fast_prompt_native.prompt_compress_backward.default(*tensors, *options, *kept, *needs))
    return tuple(next(results) if needed else None for needed in needs)


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
    """``fast_prompt.reference.skip_adapter`` for x [B, n, d], not empty; the other tensors lead with the adapters, A.

    Args:
        output: [B, n, d], contiguous; written, but for the samples of a route below 0.
        scale: float32 [A]; gates: float32 [B, E]; route: int64 [B], on the device of x.
        keep_hidden: whether the hidden layer is wanted.

    Returns:
        The hidden layer before its activation, [A, B, n, w] ([1, B, n, w] with a route), contiguous, dtype of ``x``,
        float32 for float16; or None.
    """
    tensors = _rows(x, down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias)
    settings = (*_numbers("skip_adapter", norm, activation, residual), eps, dropout_p)
    kept = torch.ops.fast_prompt_native.skip_adapter.default(
        output, *tensors, *_contiguous(scale, gates), route, seed, *settings, keep_hidden
    )
    return kept[0] if keep_hidden else None


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
        grad: the output's gradient; the other tensors are the forward's.
        hidden: what the forward kept.
        needs: for the nine arguments from x to gates, whether its gradient is wanted.

    Returns:
        Nine gradients, contiguous, in their inputs' dtypes; None where not wanted. Of that of x, the samples of a
        route below 0 are not written.
    """
    tensors = _rows(grad, x, down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias)
    settings = (*_numbers("skip_adapter", norm, activation, residual), eps, dropout_p)
    results = iter(
        torch.ops.fast_prompt_native.skip_adapter_backward.default(
            *tensors, *_contiguous(scale, gates), route, seed, hidden, *settings, list(needs)
        )
    )
    return tuple(next(results) if needed else None for needed in needs)


def _numbers(op: str, *values: str) -> list[int]:
    """An op's options by number; ValueError names one that there is not."""
    numbers = []
    for (option, known), value in zip(OPTIONS[op].items(), values, strict=True):
        if value not in known:
            raise ValueError(f"{option}: expected one of {', '.join(map(repr, known))}, got {value!r}")
        numbers.append(known.index(value))
    return numbers


def _rows(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else _unit_stride(tensor) for tensor in tensors]


def _unit_stride(tensor: Tensor) -> Tensor:
    """The tensor as it is, or a copy where the elements of a row are not neighbours."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
