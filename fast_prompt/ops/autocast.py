"""What autocast makes of an op's activations; the method's own tensors may stay float32."""

import torch
from torch import Tensor

from fast_prompt.reference.autocast import has_autocast


def activation_dtype(activation: Tensor) -> torch.dtype:
    """What autocast would make of a matrix product's operand; it leaves float64 alone."""
    device_type = activation.device.type
    if has_autocast(device_type) and torch.is_autocast_enabled(device_type) and activation.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return activation.dtype


def autocast(activation: Tensor) -> Tensor:
    """The activation in that dtype."""
    dtype = activation_dtype(activation)
    return activation if activation.dtype == dtype else activation.to(dtype)
