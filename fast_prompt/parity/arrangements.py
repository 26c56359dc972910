"""Ways for a tensor to lie in memory that an op must take as it comes."""

import torch
from torch import Tensor


def between_nans(tensor: Tensor, dimension: int) -> Tensor:
    """The same values as every second slice of a larger tensor; whoever ignores the strides meets NaN."""
    return torch.stack((torch.full_like(tensor, torch.nan), tensor), dimension).select(dimension, 1)


def rows_sliced(tensor: Tensor) -> Tensor:
    """Every second row of a larger tensor."""
    return between_nans(tensor, -2)


def columns_sliced(tensor: Tensor) -> Tensor:
    """Every second column of a larger tensor."""
    return between_nans(tensor, -1)


def batch_second(tensor: Tensor) -> Tensor:
    """[n, B, d] in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def columns_first(tensor: Tensor) -> Tensor:
    """[..., d, n] in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def expanded_number(tensor: Tensor) -> Tensor:
    """As a gradient from ``output.sum()``: a single one, every stride 0."""
    return torch.ones((), dtype=tensor.dtype, device=tensor.device).expand_as(tensor)
