"""CUDA C++ on NVIDIA GPUs: the kernels of csrc/cuda, in the same library as the CPU's."""

import functools
from collections.abc import Callable

import torch

from fast_prompt.backends import native
from fast_prompt.backends.call import (
    Call,
    PromptCompressCall,
    PromptDiffusionCall,
    SkipAdapterCall,
    refuses_kernels,
)
from fast_prompt.backends.native import (
    prompt_compress,
    prompt_compress_backward,
    prompt_diffusion,
    prompt_diffusion_backward,
    skip_adapter,
    skip_adapter_backward,
)

__all__ = [
    "name",
    "prompt_compress",
    "prompt_compress_backward",
    "prompt_diffusion",
    "prompt_diffusion_backward",
    "refuses",
    "skip_adapter",
    "skip_adapter_backward",
    "unavailable",
]

name = "cuda"

_LEAST_CAPABILITY = (8, 0)  # Ampere: cp.async, bf16 and TF32 products
_MOST_PROMPTS = 1024  # a row's activations stay on chip
_MOST_PROMPTS_FLOAT32_SMALL = 768  # in float32 on a chip with 99 KiB of shared memory a block; others have 163 and more
# skip_adapter: a row's hidden layer, once for each expert, stays on chip; in bytes, and on a chip with 99 KiB.
_MOST_HIDDEN_BYTES, _MOST_HIDDEN_BYTES_SMALL = 6144, 2560
_SMALL_CHIPS = ((8, 6), (8, 9), (12, 0), (12, 1))


@functools.cache
def unavailable() -> str | None:
    """Why there are no CUDA kernels here, or None."""
    if reason := native.unavailable():
        return reason
    built = native.build_info().get("cuda", {"built": False, "reason": "it was built before there were any"})
    if not built["built"]:
        return f"the native library was built without CUDA kernels: {built['reason']}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def refuses(op: str, call: Call) -> str | None:
    """Why this backend cannot take a call, or None."""
    if call.device.type != "cuda":
        return f"runs on cuda, not on {call.device.type}"
    return refuses_kernels(call) or _refuses_chip(call.device) or _REFUSES_SIZES[op](call)


def _refuses_chip(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    return None


def _is_small(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in _SMALL_CHIPS


def _refuses_prompts(call: PromptDiffusionCall) -> str | None:
    small = call.dtype == torch.float32 and _is_small(call.device)
    most = _MOST_PROMPTS_FLOAT32_SMALL if small else _MOST_PROMPTS
    return f"takes up to {most} prompts, not {call.num_prompts}" if call.num_prompts > most else None


def _refuses_nothing(call: PromptCompressCall) -> None:
    """Rows are taken 16 at a time, and wide tokens in groups of columns: every size has its kernel."""


def _refuses_hidden(call: SkipAdapterCall) -> str | None:
    columns = call.adapter_width * max(1, call.num_experts)
    most = (_MOST_HIDDEN_BYTES_SMALL if _is_small(call.device) else _MOST_HIDDEN_BYTES) // call.dtype.itemsize
    return f"takes adapters up to {most} columns wide, over all experts, not {columns}" if columns > most else None


_REFUSES_SIZES: dict[str, Callable[..., str | None]] = {
    "prompt_diffusion": _refuses_prompts,
    "prompt_compress": _refuses_nothing,
    "skip_adapter": _refuses_hidden,
}
