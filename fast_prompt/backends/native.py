"""The compiled library: whether it is here, and its ops, which run where their tensors are, on CPU or CUDA."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast_prompt.backends.call import Kernels

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


def run(name: str, kernels: Kernels, *arguments: Any) -> list[Tensor]:
    """Loads the library, whose kernels torch finds from then on by itself, and makes the call again.

    Raises:
        RuntimeError: there is no library, or it has no kernel of that name for the tensors' device.
    """
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    key = "CUDA" if device.type == "cuda" else "CPU"
    reason = unavailable()
    if reason or device.type not in ("cpu", "cuda") or not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
        raise RuntimeError(f"{name}: {reason or f'the native library has no kernel for {device.type}'}")
    namespace, _, op = name.partition("::")
    return getattr(getattr(torch.ops, namespace), op).default(*arguments)
