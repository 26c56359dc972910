"""CLIP: two towers of the same blocks."""

from typing import Any

from torch import Tensor

from fast_prompt.models.architectures.architecture import Architecture, Blocks, Counted
from fast_prompt.models.architectures.forwards import ATTENTION_CHILD, MLP_CHILD, pre_norm
from fast_prompt.models.architectures.parameters import MASKED
from fast_prompt.tuning.adapters import at_site


def sublayers(self: Any, *, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The sublayers of a block, each beside its adapter."""
    attended, _ = self.self_attn(hidden_states=self.layer_norm1(hidden_states), **kwargs)
    hidden_states = at_site(self, ATTENTION_CHILD, hidden_states) + attended
    return at_site(self, MLP_CHILD, hidden_states) + self.mlp(self.layer_norm2(hidden_states))


CLIP = Architecture(
    name="CLIP",
    model_type="clip",
    forwards={"CLIPAttention": MASKED, "CLIPEncoderLayer": MASKED},
    attentions=("CLIPAttention",),
    blocks=Blocks(
        classes=("CLIPEncoderLayer",),
        norm="layer_norm1",
        outputs=("self_attn.out_proj", "mlp.fc2"),
        **pre_norm(sublayers),
    ),
    counted=Counted(
        config="CLIPConfig",
        model="CLIPModel",
        text_length=77,
        positions=lambda config: config.text_config.max_position_embeddings,
        settings={"vision_config": {"patch_size": 16}},
        vision=lambda config: config.vision_config,
    ),
)
