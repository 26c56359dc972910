"""ViT."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fast_prompt.models.architectures.architecture import Architecture, Blocks
from fast_prompt.models.architectures.forwards import ATTENTION_CHILD, MLP_CHILD, has_parallel, pre_norm
from fast_prompt.models.architectures.parameters import MASKED
from fast_prompt.models.skip import adapter_in_place
from fast_prompt.tuning.adapters import at_site


def block_forward(self: Any, forward: Callable[..., Tensor], *, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The forward of a block, pre-norm."""
    adapter = adapter_in_place(self)
    if adapter is not None:
        return adapter.replace(hidden_states, kwargs.get("attention_mask"))
    run = sublayers if has_parallel(self) else forward
    return run(self, hidden_states=hidden_states, **kwargs)


def sublayers(self: Any, *, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The sublayers of a block, each beside its adapter."""
    attended, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
    hidden_states = self.dropout(attended) + at_site(self, ATTENTION_CHILD, hidden_states)
    wide = self.mlp(self.layernorm_after(hidden_states))
    return self.dropout(wide) + at_site(self, MLP_CHILD, hidden_states)


VIT = Architecture(
    name="ViT",
    model_type="vit",
    forwards={"ViTAttention": MASKED, "ViTLayer": MASKED},
    attentions=("ViTAttention",),
    blocks=Blocks(
        classes=("ViTLayer",),
        norm="layernorm_before",
        outputs=("attention.o_proj", "mlp.fc2"),
        **pre_norm(block_forward, sublayers),
    ),
)
