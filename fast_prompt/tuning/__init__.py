"""Adapters by name inside a model: put in, switched, saved, loaded, folded, taken out."""

from fast_prompt.tuning.groups import parameter_groups
from fast_prompt.tuning.model import FastPromptModel, get_fast_prompt_model

__all__ = ["FastPromptModel", "get_fast_prompt_model", "parameter_groups"]
