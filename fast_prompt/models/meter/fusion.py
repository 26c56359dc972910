"""METER's co-attention: a stream's own attention, attention to the other stream, feed-forward."""

from typing import Any

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.roberta.modeling_roberta import RobertaAttention, RobertaIntermediate, RobertaOutput


class MeterFusionLayer(GradientCheckpointingLayer):
    """One layer of one stream, all of it post-norm; children are named as BERT's.

    Args:
        config: a ``MeterConfig``.
        layer_idx: the layer's index in its stream.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.attention = RobertaAttention(config, layer_idx=layer_idx)
        self.crossattention = RobertaAttention(config, layer_idx=layer_idx, is_cross_attention=True)
        self.intermediate = RobertaIntermediate(config)
        self.output = RobertaOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """One step of one stream.

        Args:
            hidden_states: [B, n, d], this stream.
            encoder_hidden_states: [B, m, d], the other stream as it was before its own step.
            attention_mask: of this stream's keys, in the form that ``transformers``' attentions take, or None.
            encoder_attention_mask: of the other stream's keys, likewise.

        Returns:
            [B, n, d].
        """
        hidden_states, _ = self.attention(hidden_states, attention_mask)
        hidden_states, _ = self.crossattention(
            hidden_states, encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask
        )
        return self.output(self.intermediate(hidden_states), hidden_states)
