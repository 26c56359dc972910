"""Attention masks that cover prompts, which stand before the text.

Masks are those of ``transformers``: None, [B, k] (flash attention), or [B, 1, q, k], bool (True = visible) or added to
the scores.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_keys(mask: Tensor | None, number: int) -> Tensor | None:
    """The mask with ``number`` keys before the others, visible to all."""
    if mask is None or not number:
        return mask
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention mask: expected a tensor, got {type(mask).__name__}; visual prompts work with the attention "
            "implementations 'sdpa', 'eager' and 'flash_attention_2'"
        )
    additive = mask.dim() == 4 and mask.dtype != torch.bool
    return F.pad(mask, (number, 0), value=0 if additive else 1)


def add_queries(mask: Tensor | None, number: int) -> Tensor | None:
    """The mask with ``number`` queries before the others, which see what the first of those sees."""
    if mask is None or mask.dim() == 2 or mask.shape[-2] == 1:
        return mask
    return torch.cat([mask[..., :1, :].expand(-1, -1, number, -1), mask], -2)


def add_causal_queries(mask: Tensor | None, number: int) -> Tensor | None:
    """The mask with ``number`` queries before the others, each of which sees the keys up to its own."""
    if mask is None or mask.dim() == 2:
        return mask
    visible = torch.ones(number, mask.shape[-1], dtype=torch.bool, device=mask.device).tril()
    if mask.dtype != torch.bool:
        visible = torch.where(visible, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
    return torch.cat([visible.expand(*mask.shape[:2], -1, -1), mask], -2)


def causal(length: int, device: torch.device) -> Tensor:
    """The causal mask [1, 1, n, n], bool."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
