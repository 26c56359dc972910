"""RoBERTa, which is BERT with other embeddings."""

from typing import Any

from fast_prompt.models.architectures.architecture import Architecture, Counted
from fast_prompt.models.architectures.bert import forwards, post_norm_blocks, visual


def positions(config: Any) -> int:
    """The most tokens of a text: positions are counted from behind the padding's."""
    return config.max_position_embeddings - config.pad_token_id - 1


ROBERTA = Architecture(
    name="RoBERTa",
    model_type="roberta",
    forwards=forwards("Roberta"),
    attentions=("RobertaAttention",),
    blocks=post_norm_blocks("RobertaLayer"),
    visual=visual("Roberta"),
    counted=Counted(
        config="RobertaConfig",
        model="RobertaModel",
        text_length=16,
        positions=positions,
        settings={"max_position_embeddings": 514},
    ),
)
