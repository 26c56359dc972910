"""The methods by the names that the commands and their files have for them."""

from fast_prompt.tuning.combination import CombinedConfig
from fast_prompt.tuning.config import METHODS, MethodConfig


def named_methods() -> dict[str, type[MethodConfig]]:
    """Every method's config class, one's own included once its module is imported; a combination is no method."""
    return {name.lower(): config for name, config in METHODS.items() if config is not CombinedConfig}
