"""Attentions that ``transformers`` computes step by step, through torch's fused attention instead."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fast_prompt.tuning.classes import base_class


def vilt_self_attention(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
) -> tuple[Tensor, ...]:
    """The forward of ``ViltSelfAttention`` in inference; its own where the probabilities are asked for."""
    if output_attentions:
        return base_class(self).forward(self, hidden_states, attention_mask, output_attentions)
    heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
    query, key, value = (
        project(hidden_states).view(heads).transpose(1, 2) for project in (self.query, self.key, self.value)
    )
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
    return (context.transpose(1, 2).flatten(2),)


# By the attention's class: the child whose forward is replaced while the model is folded, and the replacement.
FUSED: dict[str, tuple[str, Callable[..., Any]]] = {"ViltAttention": ("attention", vilt_self_attention)}
