"""ViT."""

from typing import Any

from torch import Tensor

from fast_prompt.models.architectures.architecture import Architecture, Blocks
from fast_prompt.models.architectures.forwards import ATTENTION_CHILD, MLP_CHILD, pre_norm
from fast_prompt.models.architectures.parameters import MASKED
from fast_prompt.tuning.adapters import at_site


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
        **pre_norm(sublayers),
    ),
)
