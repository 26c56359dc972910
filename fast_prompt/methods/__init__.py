"""The methods: one config each, saying where in a model it acts and what it adds there."""

from fast_prompt.methods.apt import APTConfig
from fast_prompt.methods.das import DASConfig, set_skipped, skipped_now
from fast_prompt.methods.dvp import DVPConfig

__all__ = ["APTConfig", "DASConfig", "DVPConfig", "set_skipped", "skipped_now"]
