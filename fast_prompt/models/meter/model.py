"""METER: CLIP's vision transformer and RoBERTa, whose streams meet in co-attention layers, and a head for VQA.

Modules are named as in the published checkpoint, but for those that are ``transformers``' own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel, RobertaModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.roberta.modeling_roberta import RobertaPooler
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from fast_prompt.models.meter.config import MeterConfig
from fast_prompt.models.meter.fusion import MeterFusionLayer
from fast_prompt.nn.offload import read

TEXT_TYPE, IMAGE_TYPE = 0, 1  # rows of the token-type embedding


@dataclass
class MeterModelOutput(ModelOutput):
    """What ``MeterModel`` returns.

    Attributes:
        last_hidden_state: [B, n, d], the text stream.
        image_hidden_state: [B, m, d], the image stream, CLS first.
        pooler_output: [B, 2 d], the pooled text and the pooled image.
    """

    last_hidden_state: Tensor | None = None
    image_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None


@dataclass
class MeterVisualQuestionAnsweringOutput(ModelOutput):
    """What ``MeterForVisualQuestionAnswering`` returns.

    Attributes:
        loss: scalar, where labels came.
        logits: [B, num_labels].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class MeterPreTrainedModel(PreTrainedModel):
    """What METER's models share: their config, fresh weights, saving and loading."""

    config_class = MeterConfig
    base_model_prefix = "meter"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ("MeterFusionLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings", "RobertaLayer")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MeterModel) and module.classifier_token is not None:
            init.normal_(module.classifier_token, std=self.config.initializer_range)


class MeterModel(MeterPreTrainedModel):
    """METER without a head.

    Args:
        config: its settings.

    Source: "An Empirical Study of Training End-to-End Vision-and-Language Transformers", arXiv 2111.02387.
    """

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        width, layers = config.hidden_size, range(config.num_hidden_layers)
        self.text_transformer = RobertaModel(config.text_config, add_pooling_layer=False)
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.cross_modal_text_transform = nn.Linear(config.text_config.hidden_size, width)
        self.cross_modal_image_transform = nn.Linear(config.vision_config.hidden_size, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.classifier_token = nn.Parameter(torch.zeros(1, 1, width)) if config.classifier_token else None
        self.cross_modal_text_layers = nn.ModuleList(MeterFusionLayer(config, index) for index in layers)
        self.cross_modal_image_layers = nn.ModuleList(MeterFusionLayer(config, index) for index in layers)
        self.cross_modal_text_pooler = RobertaPooler(config)
        self.cross_modal_image_pooler = RobertaPooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text's word embeddings."""
        return self.text_transformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text's word embeddings."""
        self.text_transformer.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> MeterModelOutput:
        """Fuse a text and an image.

        Args:
            input_ids: [B, n].
            attention_mask: [B, n], 1 = real token; all are real when None.
            pixel_values: [B, 3, S, S], as CLIP's image processor gives them.

        Raises:
            ValueError: an input is missing or of a wrong shape, or the text is longer than the model has positions.
        """
        pixel_values = self._check_inputs(input_ids, pixel_values)
        text = self._text_features(input_ids, attention_mask)
        image = self._image_features(pixel_values)
        text_mask = create_bidirectional_mask(self.config, text, attention_mask)
        text_mask_for_image = create_bidirectional_mask(self.config, image, attention_mask, encoder_hidden_states=text)
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            text, image = (
                text_layer(text, image, text_mask, None),
                image_layer(image, text, None, text_mask_for_image),
            )
        pooled = torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], dim=-1)
        return MeterModelOutput(text, image, pooled)

    def _text_features(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """RoBERTa's features [B, n, d], projected, with their type."""
        encoded = self.text_transformer(input_ids, attention_mask, return_dict=True).last_hidden_state
        features = self.cross_modal_text_transform(encoded)
        if self.classifier_token is not None:
            first = self.classifier_token.expand(len(features), -1, -1).to(features.dtype)
            features = torch.cat([first, features[:, 1:]], dim=1)
        return features + self._type(TEXT_TYPE)

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        """CLIP's features of every token [B, m, d], normed, projected, with their type."""
        encoded = self.vision_model(pixel_values, return_dict=True).last_hidden_state
        features = self.cross_modal_image_transform(self.vision_model.post_layernorm(encoded))
        return features + self._type(IMAGE_TYPE)

    def _type(self, index: int) -> Tensor:
        """A type's embedding [d]."""
        (weight,) = read(self.token_type_embeddings, "weight")
        return weight[index]

    def _check_inputs(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """The pixels, if they and the text fit each other and the model."""
        text, vision = self.config.text_config, self.config.vision_config
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected shape [B, n], got {list(input_ids.shape)}")
        limit = text.max_position_embeddings - text.pad_token_id - 1
        if input_ids.shape[1] > limit:
            raise ValueError(f"input_ids: expected at most {limit} tokens, got {input_ids.shape[1]}")
        expected = [len(input_ids), vision.num_channels, vision.image_size, vision.image_size]
        if pixel_values is None or list(pixel_values.shape) != expected:
            got = None if pixel_values is None else list(pixel_values.shape)
            raise ValueError(
                f"pixel_values: expected shape {expected} (the text's batch, the config's image size), got {got}"
            )
        return pixel_values


class MeterForVisualQuestionAnswering(MeterPreTrainedModel):
    """METER with its head for VQA, a classifier over the ``config.num_labels`` answers.

    Args:
        config: its settings.
    """

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        width = 2 * config.hidden_size
        self.meter = MeterModel(config)
        self.vqa_classifier = nn.Sequential(
            nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, config.num_labels)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> MeterVisualQuestionAnsweringOutput:
        """Answer questions about images.

        Args:
            input_ids: [B, n].
            attention_mask: [B, n], 1 = real token; all are real when None.
            pixel_values: [B, 3, S, S], as CLIP's image processor gives them.
            labels: [B, num_labels], each answer's score in [0, 1]; the loss is the binary cross-entropy times the
                number of answers.

        Raises:
            ValueError: an input or the labels are of a wrong shape.
        """
        pooled = self.meter(input_ids, attention_mask, pixel_values, return_dict=True).pooler_output
        logits = self.vqa_classifier(pooled)
        if labels is None:
            return MeterVisualQuestionAnsweringOutput(logits=logits)
        if labels.shape != logits.shape:
            raise ValueError(f"labels: expected shape {list(logits.shape)}, got {list(labels.shape)}")
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return MeterVisualQuestionAnsweringOutput(loss * self.config.num_labels, logits)
