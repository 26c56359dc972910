"""Drop-in modules over the ops. None of them needs ``transformers``."""

from fast_prompt.nn.folded import FoldedPromptDiffusion
from fast_prompt.nn.prompt_compressor import PromptCompressor
from fast_prompt.nn.prompt_diffusion import PromptDiffusion
from fast_prompt.nn.skip_adapter import SkipAdapter
from fast_prompt.nn.skip_routing import route_block, run_adapters

__all__ = [
    "FoldedPromptDiffusion",
    "PromptCompressor",
    "PromptDiffusion",
    "SkipAdapter",
    "route_block",
    "run_adapters",
]
