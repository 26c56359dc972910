"""ViLT: one encoder for words and patches together."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast_prompt.models.architectures.architecture import Architecture, Blocks, Counted
from fast_prompt.models.architectures.forwards import ATTENTION_CHILD, MLP_CHILD, has_parallel, pre_norm
from fast_prompt.models.architectures.parameters import HIDDEN, RESIDUAL
from fast_prompt.models.fused import attend_by_sample
from fast_prompt.models.skip import adapter_in_place
from fast_prompt.tuning.adapters import at_site

MASKED = (*HIDDEN, "attention_mask", "output_attentions")
VQA_ANSWERS = 3129


def block_forward(
    self: Any,
    forward: Callable[..., tuple[Any, ...]],
    *,
    hidden_states: Tensor,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """The forward of a block, pre-norm; it returns a tuple."""
    adapter = adapter_in_place(self)
    if adapter is not None:
        return (adapter.replace(hidden_states, kwargs.get("attention_mask")), *((None,) if output_attentions else ()))
    run = sublayers if has_parallel(self) else forward
    return run(self, hidden_states=hidden_states, output_attentions=output_attentions, **kwargs)


def sublayers(self: Any, *, hidden_states: Tensor, **kwargs: Any) -> tuple[Any, ...]:
    """The sublayers of a block, each beside its adapter."""
    attended, *weights = self.attention(self.layernorm_before(hidden_states), **kwargs)
    hidden_states = attended + at_site(self, ATTENTION_CHILD, hidden_states).to(attended.device)
    wide = self.intermediate(self.layernorm_after(hidden_states))
    return (self.output(wide, at_site(self, MLP_CHILD, hidden_states)), *weights)


def self_attention(
    self: Any,
    forward: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> Any:
    """The forward of ``ViltSelfAttention`` in inference, fused; its own where the probabilities are asked for."""
    if output_attentions:
        return forward(self, hidden_states, attention_mask, output_attentions)
    heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
    query, key, value = (
        project(hidden_states).view(heads).transpose(1, 2) for project in (self.query, self.key, self.value)
    )
    by_sample = query.is_cpu and query.dtype == torch.float32 and not torch.compiler.is_compiling()
    attend = attend_by_sample if by_sample else F.scaled_dot_product_attention
    return (attend(query, key, value, attention_mask).transpose(1, 2).flatten(2),)


def take_every_patch(model: nn.Module) -> None:
    """Let a ViLT embed square images without looking at their pixels: the patches of all, in order.

    Its own forward draws the patches' order and drops those that a mask hides, for which it must know their values.
    """
    for module in model.modules():
        if hasattr(module, "visual_embed"):
            module.visual_embed = partial(_embed_every_patch, module)  # type: ignore[assignment]


def _embed_every_patch(self: Any, pixel_values: Tensor, pixel_mask: Tensor, max_image_length: int) -> Any:
    patches = self.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
    tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.position_embeddings
    return tokens, tokens.new_ones(tokens.shape[:2]), None


VILT = Architecture(
    name="ViLT",
    model_type="vilt",
    forwards={
        "ViltAttention": MASKED,
        "ViltLayer": MASKED,
        "ViltSelfAttention": MASKED,
        "ViltSelfOutput": RESIDUAL,
    },
    attentions=("ViltAttention",),
    fused={"ViltAttention": ("attention", self_attention)},
    blocks=Blocks(
        classes=("ViltLayer",),
        norm="layernorm_before",
        outputs=("attention.output.dense", "output.dense"),
        **pre_norm(sublayers, block_forward),
    ),
    counted=Counted(
        config="ViltConfig",
        model="ViltForQuestionAnswering",
        text_length=40,
        positions=lambda config: config.max_position_embeddings,
        settings={"num_labels": VQA_ANSWERS},
        vision=lambda config: config,
        prepare=take_every_patch,
    ),
)
