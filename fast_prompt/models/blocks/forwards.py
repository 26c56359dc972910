"""The forwards of blocks that are skipped, or kept beside parallel adapters.

A parallel adapter reads what its sublayer reads before any norm, and is computed together with the residual:
``x + ad(x)`` is one pass, to which the sublayer's result is added. For that, a pre-LN block's sublayers are called from
here; without adapters they must give what the block's own forward gives, which a trial call checks.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fast_prompt.models.blocks.skip import adapter_in_place
from fast_prompt.models.cache import cache_in
from fast_prompt.tuning.adapters import at_site
from fast_prompt.tuning.site import CHILD

# Children under which the parallel adapters are kept: beside a pre-LN block's attention and MLP, beside the second half
# of BERT's block, and behind a norm of LLaMA's.
ATTENTION_CHILD, MLP_CHILD = f"{CHILD}_attention", f"{CHILD}_mlp"
PARALLEL_CHILD = f"{CHILD}_parallel"
AFTER_CHILD = f"{CHILD}_after"


def skippable_forward(self: Any, forward: Callable[..., Tensor], *, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The forward of a block that returns its hidden states alone; what it keeps of adapters is deeper inside."""
    adapter = adapter_in_place(self)
    if adapter is not None:
        return adapter.replace(hidden_states, kwargs.get("attention_mask"), cache_in(kwargs))
    return forward(self, hidden_states=hidden_states, **kwargs)


def vilt_forward(
    self: Any,
    forward: Callable[..., tuple[Any, ...]],
    *,
    hidden_states: Tensor,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """The forward of ViLT's block, pre-LN; it returns a tuple."""
    adapter = adapter_in_place(self)
    if adapter is not None:
        return (adapter.replace(hidden_states, kwargs.get("attention_mask")), *((None,) if output_attentions else ()))
    run = vilt_sublayers if _has_parallel(self) else forward
    return run(self, hidden_states=hidden_states, output_attentions=output_attentions, **kwargs)


def vilt_sublayers(self: Any, *, hidden_states: Tensor, **kwargs: Any) -> tuple[Any, ...]:
    """The sublayers of ViLT's block, each beside its adapter."""
    attended, *weights = self.attention(self.layernorm_before(hidden_states), **kwargs)
    hidden_states = attended + at_site(self, ATTENTION_CHILD, hidden_states).to(attended.device)
    wide = self.intermediate(self.layernorm_after(hidden_states))
    return (self.output(wide, at_site(self, MLP_CHILD, hidden_states)), *weights)


def vit_forward(self: Any, forward: Callable[..., Tensor], *, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The forward of ViT's block, pre-LN."""
    adapter = adapter_in_place(self)
    if adapter is not None:
        return adapter.replace(hidden_states, kwargs.get("attention_mask"))
    run = vit_sublayers if _has_parallel(self) else forward
    return run(self, hidden_states=hidden_states, **kwargs)


def vit_sublayers(self: Any, *, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The sublayers of ViT's block, each beside its adapter."""
    attended, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
    hidden_states = self.dropout(attended) + at_site(self, ATTENTION_CHILD, hidden_states)
    wide = self.mlp(self.layernorm_after(hidden_states))
    return self.dropout(wide) + at_site(self, MLP_CHILD, hidden_states)


def clip_forward(self: Any, forward: Callable[..., Tensor], *, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The forward of a block of either CLIP tower, pre-LN."""
    adapter = adapter_in_place(self)
    if adapter is not None:
        return adapter.replace(hidden_states, kwargs.get("attention_mask"))
    run = clip_sublayers if _has_parallel(self) else forward
    return run(self, hidden_states=hidden_states, **kwargs)


def clip_sublayers(self: Any, *, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The sublayers of CLIP's block, each beside its adapter."""
    attended, _ = self.self_attn(hidden_states=self.layer_norm1(hidden_states), **kwargs)
    hidden_states = at_site(self, ATTENTION_CHILD, hidden_states) + attended
    return at_site(self, MLP_CHILD, hidden_states) + self.mlp(self.layer_norm2(hidden_states))


def parallel_forward(self: Any, forward: Callable[..., Tensor], hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """The forward of the second ``output`` of BERT's block: the adapter of the first half's result beside it all."""
    output, adapter = forward(self, hidden_states, input_tensor), getattr(self, PARALLEL_CHILD).in_use()
    return output if adapter is None else output + adapter(input_tensor)


def after_forward(self: Any, forward: Callable[..., Tensor], hidden_states: Tensor) -> Tensor:
    """The forward of LLaMA's norm before a sublayer, which then reads what the adapter makes of it."""
    return at_site(self, AFTER_CHILD, forward(self, hidden_states))


def _has_parallel(block: Any) -> bool:
    """Whether an adapter that keeps this pre-LN block is in use."""
    adapters = getattr(block, ATTENTION_CHILD, None)
    return adapters is not None and adapters.in_use() is not None
