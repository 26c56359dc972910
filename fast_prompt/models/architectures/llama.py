"""LLaMA."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fast_prompt.models.architectures.architecture import Architecture, Blocks, Counted, Place, Visual
from fast_prompt.models.architectures.forwards import adapt_after, skippable_forward
from fast_prompt.models.architectures.parameters import HIDDEN
from fast_prompt.models.skip import SKIP_CHILD
from fast_prompt.models.visual import llama as visual_llama
from fast_prompt.tuning.adapters import at_site
from fast_prompt.tuning.site import CHILD

# The child of a block's norms that keeps the adapters behind them.
AFTER_CHILD = f"{CHILD}_after"


def after_forward(self: Any, forward: Callable[..., Tensor], hidden_states: Tensor) -> Tensor:
    """The forward of the norm before a sublayer, which then reads what the adapter makes of it."""
    return at_site(self, AFTER_CHILD, forward(self, hidden_states))


LLAMA = Architecture(
    name="LLaMA",
    model_type="llama",
    forwards={
        "LlamaDecoderLayer": (
            *(*HIDDEN, "attention_mask", "position_ids", "cache", "use_cache"),
            *("position_embeddings", "kwargs"),
        ),
        "LlamaModel": ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds", "use_cache", "kwargs"),
        "LlamaRMSNorm": HIDDEN,
    },
    named_attentions=("self_attn",),
    blocks=Blocks(
        classes=("LlamaDecoderLayer",),
        norm="input_layernorm",
        outputs=("self_attn.o_proj", "mlp.down_proj"),
        skip=Place("", SKIP_CHILD, skippable_forward, "rms", "normed"),
        kept=(
            Place("input_layernorm", AFTER_CHILD, after_forward, "none"),
            Place("post_attention_layernorm", AFTER_CHILD, after_forward, "none"),
        ),
    ),
    visual=Visual(
        stacks=("LlamaModel",),
        backbones=("LlamaModel",),
        blocks="layers",
        sublayers=("self_attn.o_proj", "mlp.down_proj"),
        adapt=adapt_after,
        pooling="last",
        type_embedding=False,
        prepare=visual_llama.prepare,
        block_forward=visual_llama.block_forward,
        read_out=visual_llama.read_out,
        causal=True,
    ),
    counted=Counted(
        config="LlamaConfig",
        model="LlamaForCausalLM",
        text_length=512,
        positions=lambda config: config.max_position_embeddings,
        adapter_widths=(64, 256),
        compressor={"inner_width": 512, "num_heads": 16},
    ),
)
