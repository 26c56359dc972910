"""Fused kernels for prompts and adapters on frozen transformers, behind drop-in nn.Modules."""

from fast_prompt import ops, reference
from fast_prompt.backends import BackendError, use_backend
from fast_prompt.methods import APTConfig
from fast_prompt.ops import explain
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model

__version__ = "0.1.0"

__all__ = [
    "APTConfig",
    "BackendError",
    "FastPromptModel",
    "__version__",
    "explain",
    "get_fast_prompt_model",
    "ops",
    "reference",
    "use_backend",
]
