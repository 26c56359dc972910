"""The forward of a model that takes visual prompts."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fast_prompt.models.cache import cache_in
from fast_prompt.models.visual.call import VisualPrompts, check_visual
from fast_prompt.models.visual.families import family_called
from fast_prompt.tuning.site import CHILD

# Arguments from which the batch can be told, each [B, ...].
BATCHED = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def visual_forward(
    self: Any,
    forward: Callable[..., Any],
    *,
    visual_embeds: Tensor | None = None,
    visual_attention_mask: Tensor | None = None,
    **inputs: Any,
) -> Any:
    """A model's forward with the features of an image.

    Args:
        self: the adapted model; while its adapter is disabled, the features are ignored.
        forward: the model's own.
        visual_embeds: [B, Nv, d_v] floating point; the visual tokens. Not needed where the key-value cache holds
            the prompts already.
        visual_attention_mask: [B, Nv] bool or whole numbers, 1 = real token, or None where all are real. The prompts of
            a sample without a real one are 0 (and their type embedding).
        inputs: the forward's own arguments.

    Returns:
        what the model returns. Its last hidden state holds the text's n tokens; the hidden states before it, from block
        K on, hold the m prompts and then the text.
    """
    prompter = getattr(self, CHILD).in_use()
    if prompter is None:
        return forward(self, **inputs)
    prompts = VisualPrompts(prompter, None, None, _two_dimensional(inputs.get("attention_mask")))
    prompts.cached = _past(cache_in(inputs)) > 0
    if not prompts.cached:
        batch = _batch(inputs, visual_embeds)
        prompts.visual, prompts.padding = check_visual(
            visual_embeds, visual_attention_mask, batch, prompter.visual_width
        )
        input_ids = inputs.get("input_ids")
        if prompter.answer_token_id is not None and input_ids is not None:
            prompts.marker = input_ids == prompter.answer_token_id
    family_called(prompter.family).prepare(self, prompts, inputs)
    return forward(self, visual_prompts=prompts, **inputs)


def _two_dimensional(mask: Tensor | None) -> Tensor | None:
    return mask if mask is not None and mask.dim() == 2 else None


def _past(cache: Any) -> int:
    """How many tokens the key-value cache holds."""
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"past_key_values: {type(cache).__name__} cannot hold prompts that enter at a later block; use a "
            "DynamicCache, or none"
        )
    return int(cache.get_seq_length())


def _batch(inputs: dict[str, Any], visual_embeds: Tensor | None) -> int:
    """B of the text, by whichever argument came."""
    for name in BATCHED:
        if inputs.get(name) is not None:
            return int(inputs[name].shape[0])
    encoded = inputs.get("encoder_outputs")
    if encoded is not None:
        return int(encoded[0].shape[0])
    return 0 if visual_embeds is None else len(visual_embeds)
