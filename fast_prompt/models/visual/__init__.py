"""Visual prompts inside language models: where they enter, what each architecture needs, where features come from."""

from fast_prompt.models.visual.encoder import VisualEncoder

__all__ = ["VisualEncoder"]
