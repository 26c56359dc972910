"""BERT and RoBERTa: prompts enter the encoder, before the text, and see what the first text token sees."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fast_prompt.models.visual.call import VisualPrompts, check_length, text_in
from fast_prompt.models.visual.masks import add_keys, add_queries
from fast_prompt.models.visual.prompter import pool_first


def prepare(model: Any, prompts: VisualPrompts, inputs: dict[str, Any]) -> None:
    """Check that the text fits the position embedding; the prompts have no position.

    Args:
        model: the adapted model.
        prompts: what the blocks will get.
        inputs: the forward's arguments by name.
    """
    config = model.get_submodule(prompts.prompter.stack).config
    offset = 0 if config.model_type == "bert" else config.pad_token_id + 1
    text = text_in(inputs)
    if text is not None:
        check_length(text.shape[1], config.max_position_embeddings - offset, "tokens")


def block_forward(
    self: Any,
    forward: Callable[..., Tensor],
    *,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    visual_prompts: VisualPrompts | None = None,
    **kwargs: Any,
) -> Tensor:
    """A block's forward: prompts enter before block K, stay in the later ones, and leave after the last."""
    layer = self.attention.self.layer_idx
    if visual_prompts is None or layer < visual_prompts.prompter.layer:
        return forward(self, hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
    if layer == visual_prompts.prompter.layer:
        hidden_states = visual_prompts.enter(hidden_states, hidden_states)
    mask = add_queries(add_keys(attention_mask, visual_prompts.number), visual_prompts.number)
    output = forward(self, hidden_states=hidden_states, attention_mask=mask, **kwargs)
    return visual_prompts.leave(output, layer)


def read_out(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The text's first token."""
    return pool_first(hidden, mask)
