"""Plain PyTorch: exists everywhere, takes everything, differentiated by autograd itself."""

from fast_prompt.reference import prompt_compress, prompt_diffusion, skip_adapter

name = "reference"

__all__ = ["name", "prompt_compress", "prompt_diffusion", "refuses", "skip_adapter", "unavailable"]


def unavailable() -> str | None:
    """Plain PyTorch exists wherever torch does."""
    return None


def refuses(op: str, call: object) -> str | None:
    """Plain PyTorch takes every call that passed the op's checks."""
    return None
