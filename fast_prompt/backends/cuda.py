"""CUDA C++ on NVIDIA GPUs: the kernels of csrc/cuda, in the same library as the CPU's."""

import functools
from typing import Protocol

import torch

from fast_prompt.backends import cpu

name = "cuda"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)  # Ampere: cp.async, bf16 and TF32 products
_MOST_PROMPTS = 1024  # a row's activations stay on chip
_MOST_PROMPTS_FLOAT32_SMALL = 768  # in float32 on a chip with 99 KiB of shared memory a block; others have 163 and more
_SMALL_CHIPS = ((8, 6), (8, 9), (12, 0), (12, 1))


class _Call(Protocol):
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def weight_dtype(self) -> torch.dtype: ...
    @property
    def num_prompts(self) -> int: ...


@functools.cache
def unavailable() -> str | None:
    """Why there are no CUDA kernels here, or None."""
    if reason := cpu.unavailable():
        return reason
    built = cpu.build_info().get("cuda", {"built": False, "reason": "it was built before there were any"})
    if not built["built"]:
        return f"the native library was built without CUDA kernels: {built['reason']}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def refuses(op: str, call: _Call) -> str | None:
    """Why this backend cannot take a call, or None."""
    if call.device.type != "cuda":
        return f"runs on cuda, not on {call.device.type}"
    if call.dtype not in _DTYPES:
        return f"has float32, bfloat16 and float16, not {call.dtype}"
    if call.weight_dtype not in (call.dtype, torch.float32):
        return f"has weights in {call.dtype} or float32 beside {call.dtype} activations, not in {call.weight_dtype}"
    capability = torch.cuda.get_device_capability(call.device)
    if capability < _LEAST_CAPABILITY:
        return f"needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    small = call.dtype == torch.float32 and capability in _SMALL_CHIPS
    most = _MOST_PROMPTS_FLOAT32_SMALL if small else _MOST_PROMPTS
    return f"takes up to {most} prompts, not {call.num_prompts}" if call.num_prompts > most else None


# The operators are the CPU's; the tensors' device decides which code runs, and on which stream.
prompt_diffusion = cpu.prompt_diffusion
prompt_diffusion_backward = cpu.prompt_diffusion_backward
