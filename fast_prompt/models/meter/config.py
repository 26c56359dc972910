"""METER's settings."""

from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig, RobertaConfig

# CLIP ViT-B/16 without its twelfth block, at the image size of VQA; its text tower's partner, RoBERTa-base.
VISION = {"image_size": 384, "patch_size": 16, "num_hidden_layers": 11}
TEXT = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
VQA_ANSWERS = 3129


class MeterConfig(PreTrainedConfig):
    """Settings of METER; the defaults are those of the published CLIP-ViT-B/16 and RoBERTa model, fine-tuned on VQA.

    Attributes:
        text_config: a ``RobertaConfig`` or its settings, over the defaults of ``TEXT``.
        vision_config: a ``CLIPVisionConfig`` or its settings, over the defaults of ``VISION``.
        hidden_size: d of the fusion layers.
        num_hidden_layers: fusion layers of each stream.
        num_attention_heads: of the fusion layers.
        intermediate_size: width of their feed-forward.
        hidden_act: its activation.
        hidden_dropout_prob: probability that an output of a sublayer is dropped in training.
        attention_probs_dropout_prob: the same of an attention weight.
        layer_norm_eps: of the fusion layers; RoBERTa's config's default, which is not RoBERTa-base's 1e-5.
        initializer_range: standard deviation of fresh weights.
        classifier_token: whether a learned vector takes the place of the first text token's features, as in DAS's and
            APT's releases.
        num_labels: answers of the VQA head; 3,129 by default.

    Raises:
        ValueError: the number of heads does not divide d.
    """

    model_type = "meter"
    sub_configs = {"text_config": RobertaConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012 (transformers' form)

    text_config: Any = None
    vision_config: Any = None
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    classifier_token: bool = False
    is_decoder: bool = False  # RoBERTa's attention asks

    def __post_init__(self, **kwargs: Any) -> None:
        for name, (config_class, defaults) in PARTS.items():
            given = getattr(self, name) or {}
            if isinstance(given, dict):
                setattr(self, name, config_class(**(defaults | given)))
        if self.id2label is None:
            kwargs.setdefault("num_labels", VQA_ANSWERS)
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )


PARTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "text_config": (RobertaConfig, TEXT),
    "vision_config": (CLIPVisionConfig, VISION),
}
