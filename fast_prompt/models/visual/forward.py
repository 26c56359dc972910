"""The forward of a model that takes visual prompts."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fast_prompt.models.cache import cache_in
from fast_prompt.models.visual.call import (
    VisualPrompts,
    check_free,
    check_visual,
    holds_prompts,
    text_in,
    two_dimensional,
)
from fast_prompt.models.visual.question import asking, visual_generate
from fast_prompt.models.visual.target import visual_of
from fast_prompt.tuning.classes import with_methods
from fast_prompt.tuning.site import CHILD


@with_methods(generate=visual_generate)
def visual_forward(
    self: Any,
    forward: Callable[..., Any],
    *,
    visual_embeds: Tensor | None = None,
    visual_attention_mask: Tensor | None = None,
    visual_query_mask: Tensor | None = None,
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
        visual_query_mask: [B, n'] bool or whole numbers, 1 = token of the question, from which the prompts' query is
            pooled (of the encoder's text where there is one). By default the answer's marker in samples that have it,
            else the text of the call in which the prompts enter; ``generate`` gives its own question to every step.
        inputs: the forward's own arguments.

    Returns:
        what the model returns. Its last hidden state holds the text's n tokens; the hidden states before it, from block
        K on, hold the m prompts and then the text.
    """
    prompter, cache = getattr(self, CHILD).in_use(), cache_in(inputs)
    if prompter is None:
        check_free(cache)
        return forward(self, **inputs)
    mask = two_dimensional(inputs.get("attention_mask"))
    prompts = VisualPrompts(prompter, mask=mask, stated=visual_query_mask is not None)
    prompts.cached, source = holds_prompts(cache, prompter), _source(inputs)
    if not prompts.cached and source is not None:
        prompts.visual, prompts.padding = check_visual(
            visual_embeds, visual_attention_mask, source.shape[0], prompter.visual_width
        )
        prompts.query = asking(prompter, inputs, source, mask, visual_query_mask)
    visual_of(prompter.family).prepare(self, prompts, inputs)
    return forward(self, visual_prompts=prompts, **inputs)


def _source(inputs: dict[str, Any]) -> Tensor | None:
    """The text that asks, as ids, embeddings or the encoder's output; None where none came."""
    text, encoded = text_in(inputs), inputs.get("encoder_outputs")
    return text if text is not None or encoded is None else encoded[0]
