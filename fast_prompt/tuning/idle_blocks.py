"""Letting go of the weights that no adapter runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fast_prompt.tuning.adapters import SiteAdapters
from fast_prompt.tuning.config import MethodConfig


class DroppedModule(nn.Module):
    """Stands where a module was whose weights were dropped, and says so when called.

    Args:
        name: what it was.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *_: Any, **__: Any) -> None:
        """Raise a RuntimeError."""
        raise RuntimeError(f"the weights of this {self.name} were dropped by compact()")

    def extra_repr(self) -> str:
        """What it was, for ``print(model)``."""
        return self.name


def idle_in_all(model: nn.Module, configs: Mapping[str, MethodConfig]) -> list[str]:
    """Paths of the modules that none of the adapters runs, in the model's order.

    Raises:
        ValueError: there are none; the message says what each adapter leaves out.
    """
    idle = {name: config.idle_modules(model) for name, config in configs.items()}
    first, *others = idle.values()
    common = [path for path in first if all(path in other for other in others)]
    if not common:
        found = "; ".join(f"{name!r} skips {', '.join(paths) or 'none for good'}" for name, paths in idle.items())
        raise ValueError(f"compact: no block is skipped by every adapter ({found})")
    return common


def drop_weights(module: nn.Module) -> None:
    """Replace everything within ``module`` that has weights of its own; adapters stay, and so does what holds both."""
    for name, child in list(module.named_children()):
        own = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
        if own:
            setattr(module, name, DroppedModule(type(child).__name__))
        elif not isinstance(child, SiteAdapters):
            drop_weights(child)


def check_skips(config: MethodConfig, model: nn.Module, dropped: Sequence[str]) -> None:
    """ValueError unless ``config`` leaves out all that was ``dropped``."""
    needed = [path for path in dropped if path not in config.idle_modules(model)] if dropped else []
    if needed:
        raise ValueError(
            f"config: expected one that skips {', '.join(needed)} too: compact() has dropped those weights; load the "
            "model anew for an adapter that runs them"
        )
