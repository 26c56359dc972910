"""T5: prompts enter the decoder before its start token; each sees what that sees, so both see each other.

Positions are relative, and the bias that stands for them is computed by the first block for all. Where prompts enter
later, it is computed anew for the longer sequence and goes on from there. The bias of a token that lies ahead is that
of distance 0, as in any T5 decoder.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fast_prompt.models.cache import cache_in
from fast_prompt.models.visual.call import VisualPrompts, text_in
from fast_prompt.models.visual.masks import add_keys, add_queries, causal


def prepare(model: Any, prompts: VisualPrompts, inputs: dict[str, Any]) -> None:
    """Have the first block's attention at hand, which holds the relative bias.

    Args:
        model: the adapted model.
        prompts: what the blocks will get.
        inputs: the forward's arguments by name.
    """
    prompts.place = model.get_submodule(prompts.prompter.stack).block[0].layer[0].SelfAttention


def block_forward(
    self: Any,
    forward: Callable[..., Any],
    *,
    hidden_states: Tensor,
    visual_prompts: VisualPrompts | None = None,
    **kwargs: Any,
) -> Any:
    """A decoder block's forward: prompts enter before block K, stay in the later ones, and leave after the last."""
    layer = self.layer[0].SelfAttention.layer_idx
    if visual_prompts is None or layer < visual_prompts.prompter.layer:
        return forward(self, hidden_states=hidden_states, **kwargs)
    mask, number, cache = kwargs.get("attention_mask"), visual_prompts.number, cache_in(kwargs)
    if layer == visual_prompts.prompter.layer:
        hidden_states = visual_prompts.enter(hidden_states, kwargs["encoder_hidden_states"])
        kwargs["encoder_decoder_position_bias"] = None
        kwargs["position_bias"] = _relative_bias(visual_prompts, hidden_states, cache, layer)
    if not visual_prompts.cached:
        mask = causal(hidden_states.shape[1] - number, hidden_states.device) if mask is None else mask
        mask = _full(add_queries(add_keys(mask, number), number), hidden_states.shape[1])
        kwargs["encoder_attention_mask"] = add_queries(kwargs.get("encoder_attention_mask"), number)
    else:
        mask = add_keys(mask, number)
    output = forward(self, hidden_states=hidden_states, **kwargs | {"attention_mask": mask})
    return (visual_prompts.leave(output[0], layer, cache), *output[1:])


def _full(mask: Tensor | None, length: int) -> Tensor | None:
    """A mask of one row, which is the start token's, for all rows."""
    return mask if mask is None or mask.dim() == 2 else mask.expand(-1, -1, length, -1)


def _relative_bias(prompts: VisualPrompts, hidden: Tensor, cache: Any, layer: int) -> Tensor:
    past = prompts.number + cache.get_seq_length(layer) if prompts.cached else 0
    length = hidden.shape[1]
    return prompts.place.compute_bias(length, past + length, device=hidden.device, past_seen_tokens=past)


def encoder_forward(
    self: Any,
    forward: Callable[..., Any],
    *args: Any,
    visual_prompts: VisualPrompts | None = None,
    visual_embeds: Tensor | None = None,
    visual_attention_mask: Tensor | None = None,
    visual_query_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The encoder's forward: T5 gives its arguments to both stacks, and these are the decoder's."""
    return forward(self, *args, **kwargs)


def answer_inputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Let the decoder begin with the start token, where it was given nothing to begin with."""
    if inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None:
        return inputs
    text = text_in(inputs)
    if text is None:
        return inputs
    start = torch.full((text.shape[0], 1), model.config.decoder_start_token_id, device=text.device)
    return inputs | {"decoder_input_ids": start}


def read_out(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The decoder's last position; ``mask`` is the encoder's."""
    return hidden[:, -1]
