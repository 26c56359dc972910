"""Every op in plain PyTorch: what the backends must reproduce."""

from fast_prompt.reference.prompt_compress import prompt_compress
from fast_prompt.reference.prompt_diffusion import prompt_diffusion
from fast_prompt.reference.skip_adapter import skip_adapter

__all__ = ["prompt_compress", "prompt_diffusion", "skip_adapter"]
