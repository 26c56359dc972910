"""The adapter that takes a block's place."""

from typing import Any

import torch
from torch import Tensor, nn

from fast_prompt.models.cache import self_attention, tokens_in
from fast_prompt.models.checks import check_data
from fast_prompt.nn import SkipAdapter
from fast_prompt.tuning.site import CHILD

# The child under which a block keeps such adapters.
SKIP_CHILD = f"{CHILD}_skip"

PACKED = (
    "attention_mask: expected one sequence in each row where experts are mixed (num_experts), since their gates come "
    "from its first token; got several"
)


class BlockSkip(SkipAdapter):
    """A ``SkipAdapter`` in the place of a transformer block.

    Args:
        dim: d, the width of x.
        width: the bottleneck's width.
        layer: the block's number in its stack, which is that of its part of a key-value cache.
        settings: as those of ``SkipAdapter``.

    Attributes:
        skips: whether the block is skipped right now; a search flips it.
    """

    def __init__(self, dim: int, width: int, layer: int, **settings: Any) -> None:
        super().__init__(dim, width, **settings)
        self.layer = layer
        self.skips = True

    def replace(self, hidden: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """The block's output [B, n, d] in its stead.

        Args:
            hidden: [B, n, d], its input.
            mask: the block's attention mask, or None; it says which token is a sample's first.
            cache: the key-value cache of ``transformers`` that the block would have filled, or None.

        Raises:
            ValueError: with experts, where several sequences share a row.
        """
        if self.expert_gate is None:
            if cache is not None:
                self._count(cache, hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1))
            return self(hidden)
        first = first_token(mask, hidden.shape[0])
        return self(hidden, self.gates(hidden, first) if cache is None else self._kept_gates(hidden, first, cache))

    def _kept_gates(self, hidden: Tensor, first: Tensor | None, cache: Any) -> Tensor:
        """The gates of the sequence's first token, which may lie in the cache, or in what this call adds to it.

        They are kept as the values of the tokens that came with it, through every reordering of the samples.
        """
        batch, length = hidden.shape[:2]
        here = None if first is None else (first - tokens_in(cache, self.layer)).clamp(0, length - 1)
        gates = self.gates(hidden, here)
        assert gates is not None
        kept = self._count(cache, gates.to(hidden.dtype)[:, None, None].expand(-1, 1, length, -1))[:, 0]
        return kept[:, 0] if first is None else kept[torch.arange(batch, device=kept.device), first]

    def _count(self, cache: Any, values: Tensor) -> Tensor:
        """Enter ``values`` [B, 1, n, v] into the block's part of the cache; all that it holds.

        Positions and masks are made from the length of the cache's first part, so a skipped block must count its
        tokens: the keys are one element each.
        """
        return self_attention(cache).update(values[..., :1], values, self.layer)[1]


def first_token(mask: Tensor | None, batch: int) -> Tensor | None:
    """Where among the keys each of B samples begins, by what its last token sees; None where no mask came.

    Args:
        mask: as an attention takes it: [B, k], or [B, 1, q, k], bool (True = visible) or added to the scores.
        batch: B.

    Raises:
        ValueError: several sequences share a row, or the mask is no tensor.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention mask: expected a tensor, got {type(mask).__name__}; mixtures of experts work with the "
            "attention implementations 'sdpa', 'eager' and 'flash_attention_2'"
        )
    visible = mask if mask.dtype == torch.bool else mask > (0 if mask.dim() == 2 else torch.finfo(mask.dtype).min / 2)
    last = visible if visible.dim() == 2 else visible[:, 0, -1]
    first = last.long().argmax(-1)
    if visible.dim() == 4 and visible.shape[2] == visible.shape[3]:
        check_data(_alone(visible[:, 0], first), PACKED)
    return first.expand(batch)


def _alone(visible: Tensor, first: Tensor) -> Tensor:
    """Whether what comes before each sample's first token is padding, of which none sees itself but not that token."""
    samples, before = torch.arange(visible.shape[0], device=first.device), (first - 1).clamp(min=0)
    another = visible[samples, before, before] & ~visible[samples, before, first]
    return ~(another & (first > 0)).any()


def adapter_in_place(block: nn.Module) -> BlockSkip | None:
    """What runs in the place of ``block`` right now; None where the block itself does."""
    adapters = getattr(block, SKIP_CHILD, None)
    adapter = None if adapters is None else adapters.in_use()
    return adapter if adapter is not None and adapter.skips else None
