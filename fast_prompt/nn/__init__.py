"""Drop-in modules over the ops. None of them needs ``transformers``."""

from fast_prompt.nn.folded import FoldedPromptDiffusion
from fast_prompt.nn.prompt_compressor import PromptCompressor
from fast_prompt.nn.prompt_diffusion import PromptDiffusion

__all__ = ["FoldedPromptDiffusion", "PromptCompressor", "PromptDiffusion"]
