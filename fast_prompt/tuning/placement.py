"""Where what is new in a model goes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fast_prompt.nn.offload import brought_with, execution_device


def placement(model: nn.Module, path: str) -> dict[str, Any]:
    """Device and dtype of new parameters beside the module at ``path``, as keywords.

    The device is the one that the module computes on, also where accelerate keeps its weights elsewhere; where it has
    none left, one of the model's. The dtype is float32, or float64 in a float64 model.

    Raises:
        ValueError: accelerate brings the weights there by a list that would lack the new ones.
    """
    whole = brought_with(model, path)
    if whole is not None:
        raise ValueError(
            f"{path}: accelerate brings the weights of {whole!r} as a whole (preload_module_classes), by a list that "
            "lacks an adapter's; adapt the model first, and offload it then"
        )
    near = [model.get_submodule(path), model]
    first = next(parameter for module in near for parameter in module.parameters())
    device = next((device for module in near for device in _devices(module)), first.device)
    return {"device": device, "dtype": torch.float64 if first.dtype == torch.float64 else torch.float32}


def _devices(module: nn.Module) -> Iterator[torch.device]:
    """Where hooks let it compute, then where its weights are, unless that is the meta device."""
    hooked = (execution_device(each) for each in module.modules())
    yield from (device for device in hooked if device is not None)
    yield from (parameter.device for parameter in module.parameters() if not parameter.is_meta)
