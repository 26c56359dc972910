"""T5."""

from fast_prompt.models.architectures.architecture import Architecture, Visual
from fast_prompt.models.architectures.forwards import adapt_before
from fast_prompt.models.architectures.parameters import HIDDEN, MEMORY
from fast_prompt.models.visual import t5 as visual_t5

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
    visual=Visual(
        stacks=("T5Stack",),
        backbones=("T5Model",),
        blocks="block",
        sublayers=("layer.0.dropout", "layer.1.dropout", "layer.2.dropout"),
        adapt=adapt_before,
        pooling="mean",
        type_embedding=True,
        prepare=visual_t5.prepare,
        block_forward=visual_t5.block_forward,
        read_out=visual_t5.read_out,
        answer_inputs=visual_t5.answer_inputs,
        decodes=True,
        drop_visual=visual_t5.encoder_forward,
    ),
)
