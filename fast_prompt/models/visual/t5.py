"""T5: prompts enter the decoder before its start token; each sees what that sees, so both see each other.

Positions are relative, and the bias that stands for them is computed by the first block for all. Where prompts enter
later, it is computed anew for the longer sequence and goes on from there. The bias of a token that lies ahead is that
of distance 0, as in any T5 decoder.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fast_prompt.models.visual.call import VisualPrompts
from fast_prompt.models.visual.masks import add_keys, add_queries, causal


def prepare(model: Any, prompts: VisualPrompts, inputs: dict[str, Any]) -> None:
    """Have the first block's attention at hand, which holds the relative bias.

    Args:
        model: the adapted model.
        prompts: what the blocks will get.
        inputs: the forward's arguments by name.
    """
    prompter = prompts.prompter
    prompts.place = model.get_submodule(prompter.stack).block[0].layer[0].SelfAttention
    if prompts.cached and prompter.layer == 0:
        # The decoder makes its mask as long as the first block's cache, which holds the prompts too.
        inputs["decoder_attention_mask"] = add_keys(inputs.get("decoder_attention_mask"), prompts.number)


def block_forward(
    self: Any,
    forward: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    encoder_decoder_position_bias: Tensor | None = None,
    past_key_values: Any = None,
    visual_prompts: VisualPrompts | None = None,
    **kwargs: Any,
) -> Any:
    """A decoder block's forward: prompts enter before block K, stay in the later ones, and leave after the last."""
    attention = self.layer[0].SelfAttention
    if visual_prompts is not None and attention.layer_idx >= visual_prompts.prompter.layer:
        layer, number, cached = attention.layer_idx, visual_prompts.number, visual_prompts.cached
        enters = layer == visual_prompts.prompter.layer
        if enters:
            assert encoder_hidden_states is not None
            hidden_states = visual_prompts.enter(hidden_states, encoder_hidden_states)
            encoder_decoder_position_bias = None
        if enters and layer > 0:
            position_bias = _relative_bias(visual_prompts, hidden_states, past_key_values, layer)
        if not cached:
            if attention_mask is None:
                attention_mask = causal(hidden_states.shape[1] - number, hidden_states.device)
            attention_mask = add_queries(add_keys(attention_mask, number), number)
            attention_mask = _full(attention_mask, hidden_states.shape[1])
            encoder_attention_mask = add_queries(encoder_attention_mask, number)
        elif visual_prompts.prompter.layer > 0:
            attention_mask = add_keys(attention_mask, number)
    output = forward(
        self,
        hidden_states,
        attention_mask,
        position_bias,
        encoder_hidden_states,
        encoder_attention_mask,
        encoder_decoder_position_bias,
        past_key_values=past_key_values,
        **kwargs,
    )
    if visual_prompts is None:
        return output
    return (visual_prompts.leave(output[0], attention.layer_idx), *output[1:])


def _full(mask: Tensor | None, length: int) -> Tensor | None:
    """A mask of one row, which is the start token's, for all rows."""
    return mask if mask is None or mask.dim() == 2 else mask.expand(-1, -1, length, -1)


def _relative_bias(prompts: VisualPrompts, hidden: Tensor, cache: Any, layer: int) -> Tensor:
    past = 0 if cache is None else int(cache.get_seq_length(layer))
    length = hidden.shape[1]
    return prompts.place.compute_bias(length, past + length, device=hidden.device, past_seen_tokens=past)


def encoder_forward(
    self: Any,
    forward: Callable[..., Any],
    *args: Any,
    visual_prompts: VisualPrompts | None = None,
    visual_embeds: Tensor | None = None,
    visual_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The encoder's forward: T5 gives its arguments to both stacks, and these are the decoder's."""
    return forward(self, *args, **kwargs)


def answer_inputs(model: Any, input_ids: Tensor | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """Let the decoder begin with the start token, where it was given nothing to begin with."""
    if inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None:
        return inputs
    text = input_ids if input_ids is not None else inputs["inputs_embeds"]
    start = torch.full((text.shape[0], 1), model.config.decoder_start_token_id, device=text.device)
    return inputs | {"decoder_input_ids": start}


def read_out(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The decoder's last position; ``mask`` is the encoder's."""
    return hidden[:, -1]
