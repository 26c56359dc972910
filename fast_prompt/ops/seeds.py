"""Dropout seeds as tensors: readable by a kernel, capturable in a CUDA graph, traceable by torch.compile."""

import torch
from torch import Tensor

from fast_prompt.ops import checks


def seed_tensor(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """``seed`` as an int64 scalar tensor on ``device``; None without dropout, which needs no seed.

    Where no seed came it is drawn from torch's generator of that device. One that is no seed is refused at any rate.
    """
    if seed is not None:
        _check(seed, device)
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.reshape(()).to(device)
    return torch.full((), seed, dtype=torch.int64, device=device)  # made there: a copy could not be captured


def _check(seed: object, device: torch.device) -> None:
    if isinstance(seed, Tensor):
        checks.check_dense("seed", seed)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed: expected one int64 element, got {seed.dtype} of shape {tuple(seed.shape)}")
        if device.type != "meta":
            checks.check_has_values("seed", seed)
        return
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a 64-bit signed integer, got {seed}")
