"""One call of a model with visual prompts: what its forward checks, and hands on to the blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast_prompt.models.visual.prompter import VisualPrompter


@dataclass
class VisualPrompts:
    """What the model's forward hands to its blocks, as the keyword argument ``visual_prompts``.

    Attributes:
        prompter: the adapter in use.
        visual: [B, Nv, d_v]; None where the prompts are in the cache already.
        padding: bool [B, Nv], True where a visual token is padding, or None.
        mask: [B, n], 1 where a token of the query's source is real, or None.
        marker: bool [B, n], True at the answer's marker, or None.
        cached: whether the prompts are in the key-value cache already, so that none enter.
        place: what the family's blocks need to give the prompts a position.
    """

    prompter: VisualPrompter
    visual: Tensor | None
    padding: Tensor | None
    mask: Tensor | None
    marker: Tensor | None = None
    cached: bool = False
    place: Any = None

    @property
    def number(self) -> int:
        """m."""
        return self.prompter.num_prompts

    def enter(self, hidden: Tensor, source: Tensor) -> Tensor:
        """``hidden`` [B, n, d] with the prompts before it, [B, m + n, d]; ``source`` [B, s, d] asks for them."""
        if self.cached:
            return self.prompter.mark(hidden)
        assert self.visual is not None
        prompts = self.prompter(source, self.mask, self.marker, self.visual, self.padding)
        return torch.cat([prompts, self.prompter.mark(hidden)], 1)

    def leave(self, hidden: Tensor, layer: int) -> Tensor:
        """Block ``layer``'s output, without the prompts after the last block."""
        return hidden if self.cached or layer != self.prompter.last_layer else hidden[:, self.number :]


def check_visual(embeds: object, mask: object, batch: int, width: int) -> tuple[Tensor, Tensor | None]:
    """The visual tokens, and where they are padding (None where no mask came).

    Args:
        embeds: what came as ``visual_embeds``.
        mask: what came as ``visual_attention_mask``.
        batch: B of the text.
        width: d_v.

    Raises:
        TypeError: something else than a tensor, or of a wrong dtype.
        ValueError: nothing came, or of a wrong shape.
    """
    if embeds is None:
        raise ValueError(
            f"visual_embeds: expected the image features [{batch}, n, {width}], got None; for text alone use "
            "`with model.disable_adapter():`"
        )
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        got = embeds.dtype if isinstance(embeds, Tensor) else type(embeds).__name__
        raise TypeError(f"visual_embeds: expected a floating-point tensor, got {got}")
    if embeds.dim() != 3 or embeds.shape[0] != batch or embeds.shape[2] != width:
        raise ValueError(
            f"visual_embeds: expected shape [{batch}, n, {width}] (the text's batch, visual tokens, visual_width), "
            f"got {list(embeds.shape)}"
        )
    if mask is None:
        return embeds, None
    if not isinstance(mask, Tensor) or mask.is_floating_point():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"visual_attention_mask: expected a bool or whole-number tensor, 1 = real token, got {got}")
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"visual_attention_mask: expected shape {list(embeds.shape[:2])} (as visual_embeds), got {list(mask.shape)}"
        )
    return embeds, mask == 0


def text_in(inputs: Mapping[str, Any]) -> Tensor | None:
    """The text among a forward's arguments: ids [B, n] or embeddings [B, n, d]; None where neither came."""
    return next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)


def check_length(length: int, limit: int, meaning: str) -> None:
    """A text that the model has positions for."""
    if length > limit:
        raise ValueError(f"input_ids: {length} {meaning} are more than the {limit} that the model has positions for")
