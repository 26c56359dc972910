"""Giving one instance another class that looks like its own.

Adapted modules keep their identity, children and names; only their class becomes a subclass of itself with some
methods more. Unlike a bound method stored on the instance, that survives ``copy.deepcopy`` and the replicas of
``nn.DataParallel``, and ``torch.compile`` guards on it.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

# The class attribute that says what a look-alike stands for.
BASE_CLASS = "_fast_prompt_base_class"

# Accelerate's hooks put their own ``forward`` on an instance and keep the class's, bound, under this name.
_HOOKED_FORWARD = "_old_forward"


@functools.cache
def look_alike(bases: tuple[type, ...], forward: Callable[..., Any] | None = None) -> type:
    """A subclass of ``bases`` that has the last one's name and, if given, another ``forward``.

    The name is the same because ``transformers`` finds a model's output recorders, and ``Trainer`` its labels, by it.
    """
    base = bases[-1]
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if forward is not None:
        members["forward"] = forward
    return type(base.__name__, bases, {**members, BASE_CLASS: base})


def base_class(module: nn.Module) -> Any:
    """The class that the module had before it was given a look-alike; its own if it has none."""
    return getattr(type(module), BASE_CLASS, type(module))


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let ``forward(self, ...)`` answer for this one module; ``base_class(self).forward`` is the old one."""
    module.__class__ = look_alike((base_class(module),), forward)
    _rebind(module)


def restore_forward(module: nn.Module) -> None:
    """Undo ``replace_forward``."""
    module.__class__ = base_class(module)
    _rebind(module)


def _rebind(module: nn.Module) -> None:
    if _HOOKED_FORWARD in module.__dict__:
        module.__dict__[_HOOKED_FORWARD] = MethodType(type(module).forward, module)


def is_replaceable(module: nn.Module) -> bool:
    """Whether the module's class decides on its ``forward``, and no other tool that has put one on the instance."""
    forward = module.__dict__.get(_HOOKED_FORWARD, module.__dict__.get("forward"))
    return forward is None or getattr(forward, "__func__", None) is type(module).forward
