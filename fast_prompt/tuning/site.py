"""A place in a model where a method adds something."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

# Accelerate's hooks put their own ``forward`` on a module and keep the module's here.
_HOOKED_FORWARD = "_old_forward"


@dataclass(frozen=True)
class Site:
    """A place that a method adapts; paths are those of ``nn.Module.get_submodule``.

    Attributes:
        name: path of the adapted module; adapters' weights are saved under it.
        host: path of the module whose ``forward`` is replaced, and which the adapters become a child of.
        forward: the function that replaces it; called with the host as ``self``.
        width: d, the width of the activations there.
    """

    name: str
    host: str
    forward: Callable[..., Any]
    width: int


@dataclass
class FoldedSite:
    """A site's adapter merged into the frozen weights around it.

    Attributes:
        module: holds the merged weights; becomes a child of the site's adapters while the model is folded.
        forwards: for each path in the model, the method of ``module`` that takes over that module's ``forward``.
    """

    module: nn.Module
    forwards: dict[str, Callable[..., Any]]


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let ``forward`` answer for this one module, under accelerate's hooks if it has them."""
    slot = _HOOKED_FORWARD if _HOOKED_FORWARD in module.__dict__ else "forward"
    module.__dict__[slot] = forward


def restore_forward(module: nn.Module) -> None:
    """Undo ``replace_forward``: the module's class answers again."""
    if _HOOKED_FORWARD in module.__dict__:
        module.__dict__[_HOOKED_FORWARD] = MethodType(type(module).forward, module)
    else:
        module.__dict__.pop("forward", None)


def is_replaceable(module: nn.Module, replacement: Callable[..., Any]) -> bool:
    """Whether the module's ``forward`` is its class's own, or already ``replacement``; accelerate's hooks aside."""
    forward = module.__dict__.get(_HOOKED_FORWARD, module.__dict__.get("forward"))
    return forward is None or getattr(forward, "__func__", None) in (type(module).forward, replacement)
