"""Giving one instance another class that looks like its own.

Adapted modules keep their identity, children and names; only their class becomes a subclass of itself with some
methods more. Unlike a bound method stored on the instance, that survives ``copy.deepcopy`` and the replicas of
``nn.DataParallel``, and ``torch.compile`` guards on it.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

# What answers in place of a module's forward: called with the module, the forward it stands before (which takes the
# module as well), and then the call's own arguments. They come as the caller gave them; but where all that the
# replacement names is keyword-only, they come by name, those that were given by position too.
Replacement = Callable[..., Any]

# Class attributes of a look-alike: the class it stands for, the classes it is made of, the forwards it has besides.
BASE_CLASS = "_fast_prompt_base_class"
BASES = "_fast_prompt_bases"
REPLACEMENTS = "_fast_prompt_replacements"

# Attribute of a replacement: what stands before other methods together with it, by their names.
METHODS = "_fast_prompt_methods"

# Accelerate's hooks put their own ``forward`` on an instance and keep the class's, bound, under this name.
_HOOKED_FORWARD = "_old_forward"


@functools.cache
def look_alike(bases: tuple[type, ...], replacements: tuple[Replacement, ...] = ()) -> type:
    """A subclass of ``bases`` that has the last one's name, and the ``replacements`` before its forward, first inmost.

    The name is the same because ``transformers`` finds a model's output recorders, and ``Trainer`` its labels, by it.
    """
    base = bases[-1]
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        BASE_CLASS: getattr(base, BASE_CLASS, base),
        BASES: bases,
        REPLACEMENTS: replacements,
    }
    if replacements:
        members["forward"] = functools.reduce(_stand_before, replacements, base.forward)  # type: ignore[attr-defined]
    for replacement in replacements:
        for name, method in getattr(replacement, METHODS, {}).items():
            if hasattr(base, name):
                members[name] = _stand_before(getattr(base, name), method)
    return type(base.__name__, bases, members)


def with_methods(**methods: Replacement) -> Callable[[Replacement], Replacement]:
    """Let ``methods`` stand before those of their names wherever a replacement does, in classes that have them."""

    def mark(replacement: Replacement) -> Replacement:
        setattr(replacement, METHODS, methods)
        return replacement

    return mark


def _stand_before(forward: Callable[..., Any], replacement: Replacement) -> Callable[..., Any]:
    """``replacement`` with ``forward`` at hand; its signature is the old one and its own keyword-only parameters."""
    names = _positional(forward)[1:] if _wants_names(replacement) else []

    @functools.wraps(forward)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, forward, *args[len(names) :], **dict(zip(names, args, strict=False)), **kwargs)

    replaced.__signature__ = _joined(inspect.signature(forward), inspect.signature(replacement))  # type: ignore[attr-defined]
    return replaced


def _wants_names(replacement: Replacement) -> bool:
    takes_more = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(replacement).parameters.values())
    return not takes_more and len(_positional(replacement)) == len(("self", "forward"))


def _positional(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that may be given by position."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _joined(old: inspect.Signature, new: inspect.Signature) -> inspect.Signature:
    added = [p for name, p in new.parameters.items() if p.kind is p.KEYWORD_ONLY and name not in old.parameters]
    parameters = sorted([*old.parameters.values(), *added], key=lambda parameter: parameter.kind)
    return old.replace(parameters=parameters)


def base_class(module: nn.Module) -> Any:
    """The class that the module had before it was given a look-alike; its own if it has none."""
    return getattr(type(module), BASE_CLASS, type(module))


def replace_forward(module: nn.Module, replacement: Replacement, inmost: bool = False) -> None:
    """Let ``replacement(self, forward, ...)`` answer for this one module, with its forward until now at hand.

    With ``inmost`` it stands right before the class's own forward, and replacements that are there already before it.
    """
    others = _replacements(module)
    _dress(module, (replacement, *others) if inmost else (*others, replacement))


def restore_forward(module: nn.Module, replacement: Replacement) -> None:
    """Undo ``replace_forward``; other replacements stay."""
    _dress(module, tuple(each for each in _replacements(module) if each is not replacement))


def _replacements(module: nn.Module) -> tuple[Replacement, ...]:
    return getattr(type(module), REPLACEMENTS, ())


def _dress(module: nn.Module, replacements: tuple[Replacement, ...]) -> None:
    bases = getattr(type(module), BASES, (type(module),))
    module.__class__ = look_alike(bases, replacements) if replacements or len(bases) > 1 else bases[0]
    if _HOOKED_FORWARD in module.__dict__:
        module.__dict__[_HOOKED_FORWARD] = MethodType(type(module).forward, module)


def is_replaceable(module: nn.Module) -> bool:
    """Whether the module's class decides on its ``forward``, and no other tool that has put one on the instance."""
    forward = module.__dict__.get(_HOOKED_FORWARD, module.__dict__.get("forward"))
    return forward is None or getattr(forward, "__func__", None) is type(module).forward
