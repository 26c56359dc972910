"""What autocast makes of an op's activations; the method's own tensors may stay float32."""

import torch
from torch import Tensor

from fast_prompt.reference.autocast import has_autocast


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast makes of matrix products' operands on such a device; None where it is off."""
    if has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def activation_dtype(activation: Tensor) -> torch.dtype:
    """What autocast would make of a matrix product's operand; it leaves float64 alone."""
    wanted = None if activation.dtype == torch.float64 else autocast_dtype(activation.device.type)
    return wanted or activation.dtype
