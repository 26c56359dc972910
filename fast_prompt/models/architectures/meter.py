"""METER: two encoders, whose streams its fusion layers join."""

from fast_prompt.models.architectures.architecture import Architecture, Counted
from fast_prompt.models.architectures.bert import post_norm_blocks
from fast_prompt.models.architectures.roberta import positions

METER = Architecture(
    name="METER",
    model_type="meter",
    forwards={
        "MeterFusionLayer": ("hidden_states", "encoder_hidden_states", "attention_mask", "encoder_attention_mask")
    },
    blocks=post_norm_blocks("MeterFusionLayer"),
    joins_towers=True,
    counted=Counted(
        config="MeterConfig",
        model="MeterForVisualQuestionAnswering",
        text_length=40,
        positions=lambda config: positions(config.text_config),
        vision=lambda config: config.vision_config,
        adapter_widths=(96, 288),
    ),
)
