"""BERT."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fast_prompt.models.architectures.architecture import Architecture, Blocks, Counted, Place, Visual
from fast_prompt.models.architectures.forwards import (
    RESIDUAL_CHILD,
    adapt_after,
    normed_output_forward,
    skippable_forward,
)
from fast_prompt.models.architectures.parameters import HIDDEN, MEMORY, RESIDUAL
from fast_prompt.models.skip import SKIP_CHILD
from fast_prompt.models.visual import bert as visual_bert
from fast_prompt.tuning.site import CHILD

# The child of a block's second ``output`` that keeps the parallel adapter of the second half.
PARALLEL_CHILD = f"{CHILD}_parallel"


def parallel_forward(self: Any, forward: Callable[..., Tensor], hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """The forward of a block's second ``output``: beside it the adapter of the first half's result."""
    output, adapter = forward(self, hidden_states, input_tensor), getattr(self, PARALLEL_CHILD).in_use()
    return output if adapter is None else output + adapter(input_tensor)


def post_norm_blocks(block: str) -> Blocks:
    """Blocks of the class ``block``; an attention's adapter lies within its LayerNorm, the second half's outside it."""
    return Blocks(
        classes=(block,),
        norm="attention.output.LayerNorm",
        outputs=("attention.output.dense", "crossattention.output.dense", "output.dense"),
        skip=Place("", SKIP_CHILD, skippable_forward),
        kept=(
            Place("attention.output", RESIDUAL_CHILD, normed_output_forward),
            Place("crossattention.output", RESIDUAL_CHILD, normed_output_forward),
            Place("output", PARALLEL_CHILD, parallel_forward, residual="none"),
        ),
    )


def forwards(prefix: str) -> dict[str, tuple[str, ...]]:
    """The forwards of the classes whose names begin with ``prefix``."""
    layer = (*HIDDEN, "attention_mask", *MEMORY, "cache", "kwargs")
    return {
        f"{prefix}Attention": layer,
        f"{prefix}Encoder": (*layer[:-1], "use_cache", "kwargs"),
        f"{prefix}Layer": layer,
        f"{prefix}Output": RESIDUAL,
        f"{prefix}SelfOutput": RESIDUAL,
    }


def visual(prefix: str) -> Visual:
    """Visual prompts in the encoder of the classes whose names begin with ``prefix``."""
    return Visual(
        stacks=(f"{prefix}Encoder",),
        backbones=(f"{prefix}Model",),
        blocks="layer",
        sublayers=("attention.output.dropout", "output.dropout"),
        adapt=adapt_after,
        pooling="first",
        type_embedding=True,
        prepare=visual_bert.prepare,
        block_forward=visual_bert.block_forward,
        read_out=visual_bert.read_out,
    )


BERT = Architecture(
    name="BERT",
    model_type="bert",
    forwards=forwards("Bert"),
    attentions=("BertAttention",),
    blocks=post_norm_blocks("BertLayer"),
    visual=visual("Bert"),
    counted=Counted(
        config="BertConfig",
        model="BertModel",
        text_length=16,
        positions=lambda config: config.max_position_embeddings,
    ),
)
