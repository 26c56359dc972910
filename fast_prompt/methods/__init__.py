"""The methods, a folder and a line each: a config that says where in a model it acts, its cost and its search."""

from fast_prompt.methods.apt import APTConfig
from fast_prompt.methods.das import DASConfig, set_skipped, skipped_now
from fast_prompt.methods.dvp import DVPConfig
from fast_prompt.methods.method import METHODS, Method, register

register(Method("apt", APTConfig, cost="fast_prompt.methods.apt.cost"))
register(Method("dvp", DVPConfig, cost="fast_prompt.methods.dvp.cost", search="fast_prompt.search.dvp"))
register(Method("das", DASConfig, cost="fast_prompt.methods.das.cost", search="fast_prompt.search.das"))

__all__ = ["METHODS", "APTConfig", "DASConfig", "DVPConfig", "Method", "register", "set_skipped", "skipped_now"]
