"""Weights that accelerate keeps elsewhere (on the CPU, on disk) and brings when their module is called.

Meanwhile the module's own are on the meta device. Accelerate is never imported: what it leaves on a module says enough.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# A module's hook, or several in one, is kept under this name.
_HOOK = "_hf_hook"


def _hooks(module: nn.Module | None) -> list[Any]:
    hook = getattr(module, _HOOK, None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own weights are elsewhere until it is called."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a hook lets the module compute; None where none says."""
    devices = (getattr(hook, "execution_device", None) for hook in _hooks(module))
    return next((torch.device(device) for device in devices if device is not None), None)


def read(module: nn.Module | None, *names: str) -> list[Any]:
    """The module's own tensors of these names, or None, for a computation that does not call the module.

    Those that accelerate keeps elsewhere are brought as for a call.
    """
    found = [getattr(module, name, None) for name in names]
    if module is None or not _hooks(module) or not any(value is not None and value.is_meta for value in found):
        return found
    hook: Any = getattr(module, _HOOK)
    hook.pre_forward(module)
    found = [getattr(module, name, None) for name in names]
    hook.post_forward(module, None)
    return found


def with_values(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``model``, those that accelerate keeps elsewhere with their values from there.

    Raises:
        ValueError: one is on the meta device and has no value anywhere; the message names it.
    """
    if not any(value.is_meta for value in tensors.values()):
        return dict(tensors)
    holders = {
        id(value): (module, name)
        for module in model.modules()
        for name, value in (*module._parameters.items(), *module._buffers.items())
    }
    values = dict(tensors)
    for key, value in tensors.items():
        if value.is_meta:
            kept = _kept(*holders[id(value)]) if id(value) in holders else None
            if kept is None:
                raise ValueError(f"{key}: it is on the meta device, and has no value")
            values[key] = kept.to(value.dtype)
    return values


def _kept(module: nn.Module, name: str) -> Tensor | None:
    maps = (getattr(hook, "weights_map", None) for hook in _hooks(module))
    return next((each.get(name) for each in maps if each is not None), None)
