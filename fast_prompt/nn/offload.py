"""Weights that accelerate keeps elsewhere (on the CPU, on disk) and brings when their module is called.

Meanwhile the module's own are on the meta device. Accelerate is never imported: what it leaves on a module says enough.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# A module's hook, or several in one, is kept under this name.
_HOOK = "_hf_hook"


def _hooks(module: nn.Module | None) -> list[Any]:
    hook = getattr(module, _HOOK, None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def is_offloaded(model: nn.Module, path: str) -> bool:
    """Whether the own weights of the module at ``path`` are elsewhere until it is called, or what it lies within."""
    own = any(getattr(hook, "offload", False) for hook in _hooks(model.get_submodule(path)))
    return own or brought_with(model, path) is not None


def brought_with(model: nn.Module, path: str) -> str | None:
    """Path of what accelerate brings whole (``preload_module_classes``), the module at ``path`` with it; or None."""
    parts = path.split(".") if path else []
    within = [".".join(parts[:number]) for number in range(len(parts) + 1)]
    return next((each for each in within if any(map(_brings_all, _hooks(model.get_submodule(each))))), None)


def _brings_all(hook: Any) -> bool:
    return getattr(hook, "offload", False) and getattr(hook, "place_submodules", False)


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
    places = {
        id(value): (hook, name)
        for module in model.modules()
        for hook in _hooks(module)
        for name, value in _brought_by(hook, module)
    }
    values = dict(tensors)
    for key, value in tensors.items():
        if value.is_meta:
            if id(value) not in places:
                raise ValueError(f"{key}: it is on the meta device, and has no value")
            hook, name = places[id(value)]
            values[key] = hook.weights_map[name].to(value.dtype)
    return values


def _brought_by(hook: Any, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if getattr(hook, "offload", False):
        recurse = _brings_all(hook)
        yield from module.named_parameters(recurse=recurse)
        yield from module.named_buffers(recurse=recurse)
