"""Triton on NVIDIA and AMD GPUs, and in Triton's interpreter where ``TRITON_INTERPRET=1`` says so.

An op's kernels are imported at its first call: triton takes long to import, and may be absent.
"""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from fast_prompt.backends.call import Call, Kernels, refuses_kernels

__all__ = ["compiled", "interpreted", "name", "refuses", "run", "suffix", "unavailable"]

name, suffix, compiled = "triton", "_triton", False

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


def refuses(call: Call) -> str | None:
    """Why this backend cannot take a call of any op, or None."""
    if call.device.type != "cuda" and not (call.device.type == "cpu" and interpreted()):
        return f"runs on cuda, not on {call.device.type}"
    return refuses_kernels(call) or _refuses_chip(call.device)


@functools.cache
def _refuses_chip(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= _LEAST_CAPABILITY else f"needs compute capability 8.0, not {major}.{minor}"


def run(name: str, kernels: Kernels, *arguments: Any) -> list[Tensor]:
    """The function of that name in the op's module of kernels."""
    op = name.partition("::")[2].replace(suffix, "")
    module = kernels.backward if op.endswith("_backward") else kernels.forward
    return getattr(importlib.import_module(module), op)(*arguments)
