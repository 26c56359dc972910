"""CUDA C++ on NVIDIA GPUs: the kernels of csrc/cuda, in the same library as the CPU's."""

import functools

import torch

from fast_prompt.backends import native
from fast_prompt.backends.call import Call, refuses_kernels
from fast_prompt.backends.native import run

__all__ = ["compiled", "has_little_shared_memory", "name", "refuses", "run", "suffix", "unavailable"]

name, suffix, compiled = "cuda", "", True

_LEAST_CAPABILITY = (8, 0)  # Ampere: cp.async, bf16 and TF32 products
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


def refuses(call: Call) -> str | None:
    """Why this backend cannot take a call of any op, or None."""
    if call.device.type != "cuda":
        return f"runs on cuda, not on {call.device.type}"
    return refuses_kernels(call) or _refuses_chip(call.device)


def _refuses_chip(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    return None


def has_little_shared_memory(device: torch.device) -> bool:
    """Whether a block may have 99 KiB of shared memory, where other chips have 163 and more."""
    return torch.cuda.get_device_capability(device) in _SMALL_CHIPS
