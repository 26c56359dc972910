"""One call of a model with visual prompts: what its forward checks, and hands on to the blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast_prompt.models.cache import drop_prompts, mark_prompts, prompts_in
from fast_prompt.models.visual.prompter import VisualPrompter


@dataclass
class VisualPrompts:
    """What the model's forward hands to its blocks, as the keyword argument ``visual_prompts``.

    Attributes:
        prompter: the adapter in use.
        visual: [B, Nv, d_v]; None where the prompts are in the cache already.
        padding: bool [B, Nv], True where a visual token is padding, or None.
        mask: [B, n], 1 where a token is real (of the encoder's text where there is one), or None.
        query: [B, n], 1 where a token asks for the prompts, or None where all do.
        stated: whether the caller has said which tokens ask.
        cached: whether the prompts are in the key-value cache already, so that none enter.
        place: what the family's blocks need to give the prompts a position.
    """

    prompter: VisualPrompter
    visual: Tensor | None = None
    padding: Tensor | None = None
    mask: Tensor | None = None
    query: Tensor | None = None
    stated: bool = False
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
        prompts = self.prompter(source, self.query, self.visual, self.padding)
        return torch.cat([prompts, self.prompter.mark(hidden)], 1)

    def leave(self, hidden: Tensor, layer: int, cache: Any = None) -> Tensor:
        """Block ``layer``'s output, without the prompts after the last block; where it has a cache, they are in it."""
        if cache is not None and not self.cached:
            mark_prompts(cache, layer, self.number)
        return hidden if self.cached or layer != self.prompter.last_layer else hidden[:, self.number :]


def holds_prompts(cache: Any, prompter: VisualPrompter) -> bool:
    """Whether the key-value cache holds text, and before it the prompts of this adapter.

    Raises:
        ValueError: it has no room for prompts, or holds text without them, or with others.
    """
    if cache is None:
        return False
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"past_key_values: {type(cache).__name__} cannot hold prompts that enter at a later block; use a "
            "DynamicCache, or none"
        )
    text, layers = cache.get_seq_length(), prompter.last_layer + 1
    if not text:
        drop_prompts(cache, layers)
        return False
    expected = [0 if layer < prompter.layer else prompter.num_prompts for layer in range(layers)]
    found = [prompts_in(cache, layer) for layer in range(layers)]
    if found != expected or cache.get_seq_length(prompter.layer) != text:
        raise ValueError("past_key_values: the cache was filled, or cropped, without these visual prompts")
    return True


def check_free(cache: Any) -> None:
    """A cache that a model without visual prompts can read; ValueError where there are prompts in it."""
    if cache is not None and any(prompts_in(cache, layer) for layer in range(len(cache))):
        raise ValueError(
            "past_key_values: the cache holds visual prompts, which it cannot do without while no adapter is in use"
        )


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


def two_dimensional(mask: Tensor | None) -> Tensor | None:
    """An attention mask that says which tokens are real; None where it says more, or nothing."""
    return mask if mask is not None and mask.dim() == 2 else None


def check_length(length: int, limit: int, meaning: str) -> None:
    """A text that the model has positions for."""
    if length > limit:
        raise ValueError(f"input_ids: {length} {meaning} are more than the {limit} that the model has positions for")
