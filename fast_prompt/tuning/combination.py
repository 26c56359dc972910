"""One adapter of several methods."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from fast_prompt.tuning.config import MethodConfig
from fast_prompt.tuning.site import FoldedSite, Site


@dataclasses.dataclass(kw_only=True)
class CombinedConfig(MethodConfig):
    """Several methods' configs that make one adapter: switched, saved and loaded together.

    ``get_fast_prompt_model(model, [first, second])`` makes one.

    Attributes:
        configs: two or more configs, no two of one method; dictionaries that ``to_dict`` gave will do.
        modules_to_save: modules to train in full, beside those that the configs name.

    Raises:
        ValueError: there are fewer than two configs, or two of one method.
    """

    method: ClassVar[str] = "COMBINED"

    configs: list[MethodConfig]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.configs, (list, tuple)):
            raise ValueError(f"configs: expected a list of methods' configs, got {self.configs!r}")
        self.configs = [_config_of(each) for each in self.configs]
        methods = [config.method for config in self.configs]
        if len(methods) < 2 or len(set(methods)) < len(methods) or self.method in methods:
            raise ValueError(f"configs: expected two or more different methods, got {', '.join(methods) or 'none'}")
        named = [name for config in self.configs for name in config.modules_to_save or []]
        self.modules_to_save = list(dict.fromkeys([*(self.modules_to_save or []), *named])) or None

    def find_sites(self, model: nn.Module) -> list[Site]:
        """The sites of every method, in the configs' order, but for those within what a method keeps from running."""
        idle = tuple(f"{path}." for path in self.idle_modules(model))
        return [
            dataclasses.replace(site, owner=owner)
            for owner, config in enumerate(self.configs)
            for site in config.find_sites(model)
            if not site.host.startswith(idle)
        ]

    def build(self, model: nn.Module, site: Site) -> nn.Module:
        """What the site's own method puts there."""
        return self.configs[site.owner].build(model, site)

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """The base model's parameters that any of the methods trains, but for those that are never used."""
        idle = tuple(f"{path}." for path in self.idle_modules(model))
        names = dict.fromkeys(name for config in self.configs for name in config.trained_parameters(model))
        return [name for name in names if not name.startswith(idle)]

    def idle_modules(self, model: nn.Module) -> list[str]:
        """What any of the methods keeps from running."""
        return list(dict.fromkeys(path for config in self.configs for path in config.idle_modules(model)))

    def fold(self, model: nn.Module, site: Site, adapter: nn.Module) -> FoldedSite | None:
        """As the site's own method folds."""
        return self.configs[site.owner].fold(model, site, adapter)

    def to_dict(self) -> dict[str, Any]:
        """As ``MethodConfig.to_dict``, with the configs as dictionaries too."""
        return super().to_dict() | {"configs": [config.to_dict() for config in self.configs]}


def _config_of(part: object) -> MethodConfig:
    """One of a combination's configs, which is none itself; ValueError names the field otherwise."""
    is_combination = isinstance(part, dict) and part.get("method") == CombinedConfig.method
    if isinstance(part, dict) and not is_combination:
        return MethodConfig.from_dict(part, origin="configs")
    if not isinstance(part, MethodConfig):
        raise ValueError(f"configs: expected a config of one method, got {part!r}")
    return part


def check_config(config: object) -> MethodConfig:
    """``config``, if it is a method's; TypeError otherwise."""
    if not isinstance(config, MethodConfig):
        raise TypeError(f"config: expected a method's config such as APTConfig, got {type(config).__name__}")
    return config


def as_config(config: MethodConfig | Sequence[MethodConfig]) -> MethodConfig:
    """One config of what is one config, or a sequence of them."""
    if isinstance(config, (list, tuple)):
        configs = [check_config(each) for each in config]
        return configs[0] if len(configs) == 1 else CombinedConfig(configs=configs)
    return check_config(config)
