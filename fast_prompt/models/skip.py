"""The adapter that takes a block's place."""

from typing import Any

from torch import Tensor, nn

from fast_prompt.nn import SkipAdapter
from fast_prompt.tuning.site import CHILD

# The child under which a block keeps such adapters.
SKIP_CHILD = f"{CHILD}_skip"


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

    def replace(self, hidden: Tensor, cache: Any = None) -> Tensor:
        """The block's output [B, n, d] in its stead.

        Args:
            hidden: [B, n, d], its input.
            cache: the key-value cache of ``transformers`` that the block would have filled, or None.
        """
        gates = self.gates(hidden)
        if cache is not None:
            gates = self._count(cache, hidden, gates)
        return self(hidden, gates)

    def _count(self, cache: Any, hidden: Tensor, gates: Tensor | None) -> Tensor | None:
        """Enter the tokens into the block's part of the cache; the gates of the sequence's first token.

        Positions and masks are made from the length of the cache's first part, so a skipped block must count its
        tokens: one element each. Their values carry the experts' gates, which the first token decides for all that
        follow, through every reordering of the samples.
        """
        cache = getattr(cache, "self_attention_cache", cache)
        batch, length = hidden.shape[:2]
        keys = hidden.new_zeros(batch, 1, length, 1)
        values = keys if gates is None else gates.to(hidden.dtype)[:, None, None].expand(-1, 1, length, -1)
        _, values = cache.update(keys, values, self.layer)
        return None if gates is None else values[:, 0, 0]


def adapter_in_place(block: nn.Module) -> BlockSkip | None:
    """What runs in the place of ``block`` right now; None where the block itself does."""
    adapters = getattr(block, SKIP_CHILD, None)
    adapter = None if adapters is None else adapters.in_use()
    return adapter if adapter is not None and adapter.skips else None
