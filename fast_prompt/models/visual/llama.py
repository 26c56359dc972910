"""LLaMA: prompts enter before the text, each sees those before it, and all text sees them.

The text keeps its rotary positions; the prompts take those just before its first real token, whatever the padding.
Only differences of positions count, so this is the same as prompts at 0 … m - 1 with the text behind them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fast_prompt.models.cache import cache_in
from fast_prompt.models.checks import check_data
from fast_prompt.models.visual.call import VisualPrompts, check_length, text_in
from fast_prompt.models.visual.masks import add_causal_queries, add_keys
from fast_prompt.models.visual.prompter import first_real, pool_last, take
from fast_prompt.models.visual.question import marker_in

IGNORED = -100  # the label of a token that no loss counts
PACKED = "position_ids: expected one sequence in each row, since a row has one image's prompts; got several"
LABELS_ASK = (
    "labels: they lie in the text from which the prompts' query is pooled, so that the prompts would tell the model "
    "its answer; every sample needs DVPConfig.answer_token_id before its answer, or visual_query_mask must say which "
    "tokens are the question"
)


def prepare(model: Any, prompts: VisualPrompts, inputs: dict[str, Any]) -> None:
    """Give text and prompts their positions.

    Args:
        model: the adapted model.
        prompts: what the blocks will get.
        inputs: the forward's arguments by name.

    Raises:
        ValueError: no text came; text and prompts together are longer than the model's limit; a row holds several
            sequences; or the labels lie in the text that the query is pooled from.
    """
    stack, text, cache = model.get_submodule(prompts.prompter.stack), text_in(inputs), cache_in(inputs)
    if text is None:
        raise ValueError("input_ids: expected the text, or its embeddings as inputs_embeds, got neither")
    batch, length = text.shape[:2]
    _check_labels(prompts, inputs, length)
    past = 0 if cache is None else cache.get_seq_length()
    if stack.rotary_emb.rope_type != "dynamic":  # which goes past the limit on purpose
        check_length(past + length + prompts.number, stack.config.max_position_embeddings, "tokens, prompts included,")
    if inputs.get("position_ids") is None:
        inputs["position_ids"] = torch.arange(past, past + length, device=text.device).unsqueeze(0)
    elif inputs.get("attention_mask") is None:
        check_data((inputs["position_ids"].diff() >= 0).all(), PACKED)
    if not prompts.cached:
        positions = inputs["position_ids"].expand(batch, -1)
        first = positions.gather(1, first_real(prompts.mask, length, text.device, batch).unsqueeze(1))
        before = first + torch.arange(-prompts.number, 0, device=text.device)
        dtype = next(stack.embed_tokens.parameters()).dtype
        angles = stack.rotary_emb(torch.empty(0, dtype=dtype, device=text.device), torch.cat([before, positions], 1))
        prompts.place = tuple(each[:, : prompts.number] for each in angles)


def _check_labels(prompts: VisualPrompts, inputs: dict[str, Any], length: int) -> None:
    """Where labels lie in the text, no query is pooled from them: it is the first token, the marker or as stated."""
    labels: Tensor | None = inputs.get("labels")
    prompter = prompts.prompter
    if labels is None or labels.dim() != 2 or labels.shape[1] != length or labels.is_floating_point():
        return
    first_asks = prompter.pooling == "first"
    if prompts.cached or prompts.stated or (first_asks and prompter.answer_token_id is None):
        return
    if prompter.answer_token_id is None:
        raise ValueError(LABELS_ASK)
    marker = marker_in(inputs["input_ids"], prompts.mask, prompter.answer_token_id)
    counted = labels != IGNORED
    # Labels that leave the question out begin with the answer, and what comes before the marker may not be one.
    begun = (counted & (marker.cumsum(-1) == 0)).any(-1) & ~take(counted, prompts.mask, first_real)
    told = torch.where(marker.any(-1), begun, not first_asks)
    check_data(~(told & counted.any(-1)).any(), LABELS_ASK)


def block_forward(
    self: Any,
    forward: Callable[..., Tensor],
    *,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    visual_prompts: VisualPrompts | None = None,
    **kwargs: Any,
) -> Tensor:
    """A block's forward: prompts enter before block K, stay in the later ones, and leave after the last."""
    layer = self.self_attn.layer_idx
    enters = visual_prompts is not None and layer >= visual_prompts.prompter.layer
    if enters:
        assert visual_prompts is not None
        if layer == visual_prompts.prompter.layer:
            hidden_states = visual_prompts.enter(hidden_states, hidden_states)
        attention_mask = add_keys(attention_mask, visual_prompts.number)
        if not visual_prompts.cached:
            assert position_embeddings is not None
            attention_mask = add_causal_queries(attention_mask, visual_prompts.number)
            position_embeddings = _with_prompts(visual_prompts.place, position_embeddings)
    output = forward(
        self,
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    return visual_prompts.leave(output, layer, cache_in(kwargs)) if enters and visual_prompts is not None else output


def _with_prompts(prompts: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = (
        torch.cat([first.to(each), each.expand(first.shape[0], -1, -1)], 1)
        for first, each in zip(prompts, text, strict=True)
    )
    return cos, sin


def read_out(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The text's last real token."""
    return pool_last(hidden, mask)
