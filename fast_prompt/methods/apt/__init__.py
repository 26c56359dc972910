"""APT, approximated prompt tuning."""

from fast_prompt.methods.apt.config import APTConfig

__all__ = ["APTConfig"]
