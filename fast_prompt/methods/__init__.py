"""The methods, a folder and a line each: a config that says where in a model it acts, its cost and its search."""

from fast_prompt.methods.apt import APTConfig
from fast_prompt.methods.das import DASConfig, set_skipped, skipped_now
from fast_prompt.methods.dvp import DVPConfig
from fast_prompt.methods.named import named_methods

__all__ = ["APTConfig", "DASConfig", "DVPConfig", "named_methods", "set_skipped", "skipped_now"]
