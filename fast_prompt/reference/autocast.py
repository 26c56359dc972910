"""Autocast, where a device has it: not so the meta device, on which shapes alone are computed."""

from contextlib import AbstractContextManager, nullcontext

import torch


def has_autocast(device_type: str) -> bool:
    """Whether torch casts for operations on such a device, when it is asked to."""
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which ``device`` computes in the dtypes that it is given."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device.type) else nullcontext()
