"""The static facts of one call of each op: what the choice of a backend may depend on."""

from typing import NamedTuple

import torch


class PromptDiffusionCall(NamedTuple):
    """One call of ``prompt_diffusion``.

    Attributes:
        device: where the activations are.
        dtype: the activations' dtype.
        weight_dtype: the dtype of the prompts and keys.
        width: the model's width d.
        num_prompts: the number of prompts p.
        transformed: whether forward-mode AD or ``torch.func`` transforms it.
    """

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    width: int
    num_prompts: int
    transformed: bool = False


class PromptCompressCall(NamedTuple):
    """One call of ``prompt_compress``.

    Attributes:
        device: where the visual tokens are.
        dtype: the dtype of the query and the visual tokens.
        weight_dtype: the projections' dtype.
        num_queries: m.
        num_heads: h.
        head_dim: d_h, the width of one head.
        visual_width: d_v, the width of a visual token.
        transformed: whether forward-mode AD or ``torch.func`` transforms it.
    """

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    num_queries: int
    num_heads: int
    head_dim: int
    visual_width: int
    transformed: bool = False


class SkipAdapterCall(NamedTuple):
    """One call of ``skip_adapter``.

    Attributes:
        device: where x is.
        dtype: the dtype of x.
        weight_dtype: the adapters' dtype.
        width: d, the model's width.
        adapter_width: w, the width of an adapter's hidden layer.
        num_adapters: A.
        num_experts: E, or 0 without gates.
        transformed: whether forward-mode AD or ``torch.func`` transforms it.
    """

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    width: int
    adapter_width: int
    num_adapters: int = 1
    num_experts: int = 0
    transformed: bool = False


Call = PromptDiffusionCall | PromptCompressCall | SkipAdapterCall

CALLS: dict[str, type[Call]] = {
    "prompt_diffusion": PromptDiffusionCall,
    "prompt_compress": PromptCompressCall,
    "skip_adapter": SkipAdapterCall,
}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses_kernels(call: Call) -> str | None:
    """Why no kernel of ours, on any device, can take a call, or None."""
    if call.transformed:
        return "has no rules for torch.func and forward-mode AD"
    if call.dtype not in _DTYPES:
        return f"has float32, bfloat16 and float16, not {call.dtype}"
    if call.weight_dtype not in (call.dtype, torch.float32):
        return f"has weights in {call.dtype} or float32 beside {call.dtype} activations, not in {call.weight_dtype}"
    return None
