"""Every op: plain functions that check the call, choose a backend and run it under autograd."""

from fast_prompt.ops.explain import Explanation, explain
from fast_prompt.ops.prompt_compress import prompt_compress
from fast_prompt.ops.prompt_diffusion import prompt_diffusion
from fast_prompt.ops.skip_adapter import skip_adapter

__all__ = ["Explanation", "explain", "prompt_compress", "prompt_diffusion", "skip_adapter"]
