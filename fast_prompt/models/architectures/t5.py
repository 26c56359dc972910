"""T5."""

from fast_prompt.models.architectures.architecture import Architecture
from fast_prompt.models.architectures.parameters import HIDDEN, MEMORY

T5 = Architecture(
    name="T5",
    model_type="t5",
    forwards={
        "T5Block": (
            *(*HIDDEN, "attention_mask", "position_bias", *MEMORY),
            *("encoder_decoder_position_bias", "cache", "kwargs"),
        ),
        "T5Stack": ("input_ids", "attention_mask", *MEMORY, "inputs_embeds", "cache", "use_cache", "kwargs"),
    },
    named_attentions=("SelfAttention",),
)
