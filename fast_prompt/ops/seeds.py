"""Dropout seeds as tensors: readable by a kernel, capturable in a CUDA graph, traceable by torch.compile."""

import torch
from torch import Tensor


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """``seed`` as an int64 scalar tensor on ``device``; drawn from torch's generator of that device when None."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed: expected one int64 element, got {seed.dtype} of shape {tuple(seed.shape)}")
        return seed.reshape(()).to(device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a 64-bit signed integer, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)  # made there: a copy could not be captured
