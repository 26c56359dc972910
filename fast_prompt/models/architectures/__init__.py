"""The architectures that are known: a file and a row each. All else that is known of them is a view of these rows."""

from fast_prompt.models.architectures.architecture import Architecture, Blocks, Counted, Place, Sublayers, Visual
from fast_prompt.models.architectures.bert import BERT
from fast_prompt.models.architectures.clip import CLIP
from fast_prompt.models.architectures.llama import LLAMA
from fast_prompt.models.architectures.meter import METER
from fast_prompt.models.architectures.roberta import ROBERTA
from fast_prompt.models.architectures.t5 import T5
from fast_prompt.models.architectures.vilt import VILT
from fast_prompt.models.architectures.vit import VIT

__all__ = ["ARCHITECTURES", "Architecture", "Blocks", "Counted", "Place", "Sublayers", "Visual"]

ARCHITECTURES = (METER, BERT, ROBERTA, VILT, VIT, CLIP, LLAMA, T5)
