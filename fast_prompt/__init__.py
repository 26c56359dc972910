"""Fused kernels for prompts and adapters on frozen transformers, behind drop-in nn.Modules."""

from fast_prompt import ops, reference
from fast_prompt.backends import BackendError, use_backend
from fast_prompt.methods import APTConfig, DASConfig, DVPConfig, set_skipped, skipped_now
from fast_prompt.models import VisualEncoder
from fast_prompt.ops import explain
from fast_prompt.search import DVPSearch
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "APTConfig",
    "BackendError",
    "DASConfig",
    "DVPConfig",
    "DVPSearch",
    "FastPromptModel",
    "VisualEncoder",
    "__version__",
    "explain",
    "get_fast_prompt_model",
    "ops",
    "parameter_groups",
    "reference",
    "set_skipped",
    "skipped_now",
    "use_backend",
]
