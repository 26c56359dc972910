"""A place in a model where a method adds something."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


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
        module: holds the merged weights; while the model is folded it is the child ``fast_prompt_folded`` of every
            module whose forward it takes over.
        forwards: for each path in the model, the function that replaces that module's ``forward``.
    """

    module: nn.Module
    forwards: dict[str, Callable[..., Any]]
