"""Philox 4x32-10, the counter-based generator behind every dropout mask of this package.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A mask element depends on the
seed and on the element's own index alone, so every backend draws the same mask in any order, and the
backward pass draws it again instead of storing it.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of ``a * b``; both factors are below 2**32, held in int64."""
    high_part = a * (b >> 16)  # below 2**48
    low_part = a * (b & 0xFFFF)  # below 2**48
    middle = high_part + (low_part >> 16)
    return middle >> 16, ((middle << 16) | (low_part & 0xFFFF)) & _MASK


def philox(seed: Tensor, index: Tensor) -> Tensor:
    """The first of the four words that Philox 4x32-10 gives for each counter.

    Args:
        seed: int64 scalar tensor, any value; its low and high words are the key.
        index: int64 tensor of non-negative counters, any shape.

    Returns:
        int64 tensor of the shape of ``index`` with values in [0, 2**32).
    """
    c0, c1 = index & _MASK, (index >> 32) & _MASK
    c2 = c3 = torch.zeros_like(index)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0


def dropout_threshold(dropout_p: float) -> int:
    """Elements whose Philox word is below this 32-bit integer are dropped."""
    return min(round(dropout_p * 2**32), _MASK)


# An op of its own, since Inductor would inline the ten rounds into one another without end.
@torch.library.custom_op("fast_prompt::dropout_mask", mutates_args=())
def dropout_mask(seed: Tensor, rows: int, columns: int, dropout_p: float, device: torch.device) -> Tensor:
    """Boolean [rows, columns]: True where an element is kept; element (i, j) has counter ``i * columns + j``."""
    index = torch.arange(rows * columns, dtype=torch.int64, device=device).view(rows, columns)
    return philox(seed.to(device), index) >= dropout_threshold(dropout_p)


@dropout_mask.register_fake
def _(seed: Tensor, rows: int, columns: int, dropout_p: float, device: torch.device) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.bool, device=device)
