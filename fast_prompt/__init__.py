"""Fused kernels for prompts and adapters on frozen transformers, behind drop-in nn.Modules."""

from fast_prompt import ops, reference
from fast_prompt.backends import BackendError, use_backend
from fast_prompt.ops import explain

__version__ = "0.1.0"

__all__ = ["BackendError", "__version__", "explain", "ops", "reference", "use_backend"]
