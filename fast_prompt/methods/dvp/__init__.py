"""DVP, dynamic visual prompting."""

from fast_prompt.methods.dvp.config import DVPConfig

__all__ = ["DVPConfig"]
