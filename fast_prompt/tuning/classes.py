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

# A function's mark: it follows the class of the module that it is called with.
FOLLOWS_CLASS = "_fast_prompt_follows_class"


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
    look = type(base.__name__, bases, members)
    if replacements:
        forward = functools.reduce(_stand_before, replacements, base.forward)  # type: ignore[attr-defined]
        look.forward = _following(look, forward)  # type: ignore[attr-defined]
    for replacement in replacements:
        for name, method in getattr(replacement, METHODS, {}).items():
            if hasattr(base, name):
                setattr(look, name, _stand_before(getattr(base, name), method))
    return look


def _following(look: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` as the class ``look`` has it; for a module that has another class by now, that one's forward.

    Other tools (accelerate's mixed precision) wrap what they find and keep it, whatever becomes of the module's class.
    """

    @functools.wraps(forward)
    def following(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (forward if isinstance(self, look) else type(self).forward)(self, *args, **kwargs)

    setattr(following, FOLLOWS_CLASS, True)
    # Nobody shall unwrap it, as accelerate would, and find the forward that was replaced.
    following.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    del following.__wrapped__
    return following


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
    bases, old = getattr(type(module), BASES, (type(module),)), type(module).forward
    module.__class__ = look_alike(bases, replacements) if replacements or len(bases) > 1 else bases[0]
    for name in (_HOOKED_FORWARD, "forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is old:
            module.__dict__[name] = MethodType(type(module).forward, module)


def is_replaceable(module: nn.Module) -> bool:
    """Whether the module's class decides on its ``forward``, and no other tool that has put one on the instance."""
    forward = module.__dict__.get(_HOOKED_FORWARD, module.__dict__.get("forward"))
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return True
    return hasattr(inspect.unwrap(forward), FOLLOWS_CLASS)
