"""What turns a sample's image into prompts: a pooled query, cross-attention, a type embedding."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fast_prompt.nn import PromptCompressor
from fast_prompt.nn.offload import read


def first_real(mask: Tensor | None, length: int, device: torch.device, batch: int) -> Tensor:
    """Index [B] of each row's first token that ``mask`` [B, n] does not hide."""
    return torch.zeros(batch, dtype=torch.long, device=device) if mask is None else mask.long().argmax(-1)


def last_real(mask: Tensor | None, length: int, device: torch.device, batch: int) -> Tensor:
    """Index [B] of each row's last token that ``mask`` [B, n] does not hide."""
    if mask is None:
        return torch.full((batch,), length - 1, device=device)
    return length - 1 - mask.flip(-1).long().argmax(-1)


def take(source: Tensor, mask: Tensor | None, find: Callable[..., Tensor]) -> Tensor:
    """The row of ``source`` [B, n, d] that ``find`` points to, [B, d]."""
    batch, length = source.shape[:2]
    index = find(mask, length, source.device, batch)
    return source[torch.arange(batch, device=source.device), index]


def pool_first(source: Tensor, mask: Tensor | None) -> Tensor:
    """The first real token."""
    return take(source, mask, first_real)


def pool_last(source: Tensor, mask: Tensor | None) -> Tensor:
    """The last real token."""
    return take(source, mask, last_real)


def pool_mean(source: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the real tokens."""
    if mask is None:
        return source.mean(1)
    weight = mask.unsqueeze(-1).to(source.dtype)
    return (source * weight).sum(1) / weight.sum(1).clamp(min=1)


# How a sequence [B, n, d] with its mask (1 = real token; or None) becomes the query [B, d].
POOLINGS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "first": pool_first,
    "last": pool_last,
    "mean": pool_mean,
}


class VisualPrompter(nn.Module):
    """Dynamic visual prompting's learned part: prompts of an image, asked for by the text.

    The query is the text pooled to one vector; for m > 1 prompts each has that vector plus an offset of its own.

    Args:
        compressor: the cross-attention.
        num_prompts: m.
        pooling: a name in ``POOLINGS``.
        type_embedding: whether text and prompts get a learned vector each.
        type_embedding_std: the standard deviation it starts with.
        family: name of the architecture's family.
        stack: path of the blocks' parent in the model.
        layer: K, the block before which the prompts enter.
        num_blocks: L.
        answer_token_id: where given, the text at this token's first place asks alone, in samples that have it.

    Attributes:
        query_offsets: [m, d], from N(0, 0.02), or None when m is 1.
        type_embedding: [2, d]; text and prompts; or None.

    Source: "Adapting Pre-trained Language Models to Vision-Language Tasks via Dynamic Visual Prompting",
    arXiv 2306.00409, section 3.
    """

    def __init__(
        self,
        compressor: PromptCompressor,
        *,
        num_prompts: int,
        pooling: str,
        type_embedding: bool,
        type_embedding_std: float,
        family: str,
        stack: str,
        layer: int,
        num_blocks: int,
        answer_token_id: int | None,
    ) -> None:
        super().__init__()
        self.compressor = compressor
        self.num_prompts, self.pooling, self.answer_token_id = num_prompts, pooling, answer_token_id
        self.family, self.stack, self.layer, self.last_layer = family, stack, layer, num_blocks - 1
        weight, dim = compressor.out_proj.weight, compressor.out_proj.out_features
        offsets = nn.init.normal_(weight.new_empty(num_prompts, dim), std=0.02)
        self.query_offsets = nn.Parameter(offsets) if num_prompts > 1 else None
        types = nn.init.normal_(weight.new_empty(2, dim), std=type_embedding_std)
        self.type_embedding = nn.Parameter(types) if type_embedding else None

    @property
    def visual_width(self) -> int:
        """d_v, the width of the visual tokens."""
        return self.compressor.k_proj.in_features

    def mark(self, hidden: Tensor) -> Tensor:
        """The text [B, n, d] with its type embedding added."""
        (types,) = read(self, "type_embedding")
        return hidden if types is None else hidden + types[0].to(hidden.dtype)

    def forward(self, source: Tensor, mask: Tensor | None, visual: Tensor, padding: Tensor | None) -> Tensor:
        """The prompts of a batch.

        Args:
            source: [B, n, d], the text that asks.
            mask: [B, n], 1 where a token of ``source`` asks, or None where all do.
            visual: [B, Nv, d_v], the visual tokens.
            padding: bool [B, Nv], True where a visual token is padding, or None.

        Returns:
            [B, m, d], dtype of ``source``; where a sample's image is padding alone, nothing but the type embedding.
        """
        dtype = self.compressor.q_proj.weight.dtype
        query = POOLINGS[self.pooling](source, mask).unsqueeze(1).to(dtype)
        if self.query_offsets is not None:
            query = query + self.query_offsets
        prompts = self.compressor(query, visual.to(source.device, dtype), padding)
        if self.type_embedding is not None:
            prompts = prompts + self.type_embedding[1].to(prompts.dtype)
        return prompts.to(source.dtype)

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        return f"layer={self.layer}, num_prompts={self.num_prompts}, pooling={self.pooling!r}"
