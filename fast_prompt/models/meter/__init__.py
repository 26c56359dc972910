"""METER, which ``transformers`` lacks: a vision-language model built from its modules; needs ``transformers``.

"An Empirical Study of Training End-to-End Vision-and-Language Transformers", arXiv 2111.02387.
"""

from fast_prompt.models.meter.checkpoint import load_published
from fast_prompt.models.meter.config import MeterConfig
from fast_prompt.models.meter.fusion import MeterFusionLayer
from fast_prompt.models.meter.model import (
    MeterForVisualQuestionAnswering,
    MeterModel,
    MeterModelOutput,
    MeterPreTrainedModel,
    MeterVisualQuestionAnsweringOutput,
)

__all__ = [
    "MeterConfig",
    "MeterForVisualQuestionAnswering",
    "MeterFusionLayer",
    "MeterModel",
    "MeterModelOutput",
    "MeterPreTrainedModel",
    "MeterVisualQuestionAnsweringOutput",
    "load_published",
]
