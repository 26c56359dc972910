"""What the replaced forwards were written for, checked before a model is changed.

A replaced forward reads arguments by name, and a class is known by its name. ``transformers`` renames both from time to
time, and an argument that slips past is a wrong result without a word. So the parameters of a class's own forward are
compared with those that our code was written for; a class that differs is refused, by name.
"""

import inspect
import os
import re
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from fast_prompt.models.architectures import ARCHITECTURES
from fast_prompt.models.cache import CACHE_NAMES
from fast_prompt.tuning.classes import base_class, is_replaceable

# The oldest and the newest ``transformers`` that the tests ran on.
OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = "5.17.0", "5.24.0"

# What happens to a forward that our code was not written for: "refuse" (the default), or "warn" and go on.
SETTING = "FAST_PROMPT_UNKNOWN_FORWARDS"
SETTINGS = ("refuse", "warn")

# By class: its forward's parameters after ``self``, the key-value cache under the first of its names.
FORWARDS = {name: parameters for each in ARCHITECTURES for name, parameters in each.forwards.items()}


def check_forwards(model: nn.Module, paths: Sequence[str], *, replaced: bool = True) -> None:
    """The modules at ``paths`` have the forwards that our code was written for.

    Args:
        model: is left as it is.
        paths: of modules; a class that is not in ``FORWARDS`` may have any forward.
        replaced: whether their forwards are to be replaced, so that nothing else may have done so.

    Raises:
        ValueError: a forward has other parameters than its class had in the versions known, or another tool has put its
            own on the instance; the message names the module.
    """
    for path in paths:
        module = model.get_submodule(path)
        if replaced and not is_replaceable(module):
            raise ValueError(
                f"{path or type(module).__name__}: its forward was already replaced by something else; undo that first"
            )
        name = base_class(module).__name__
        known, found = FORWARDS.get(name), parameters_of(module)
        if known is not None and found != known:
            differences = {
                "missing": [each for each in known if each not in found],
                "new": [each for each in found if each not in known],
            }
            listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in differences.items() if names)
            refuse(
                f"{path}: {name}.forward takes ({', '.join(found)}), where fast_prompt knows ({', '.join(known)}); "
                f"{listed or 'another order'}"
            )


def check_model_forward(model: nn.Module) -> None:
    """The model's own forward takes a mask, and hands keywords that it does not know down to its blocks.

    Raises:
        ValueError: it does not.
    """
    parameters = inspect.signature(base_class(model).forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if "attention_mask" not in parameters_of(model) or not takes_any:
        refuse(
            f"{type(model).__name__}.forward takes ({', '.join(parameters_of(model))}), where fast_prompt needs "
            "attention_mask, and keywords that it hands on to the blocks"
        )


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module's own forward after ``self``, the key-value cache under the first of its names."""
    _, *names = inspect.signature(base_class(module).forward).parameters
    return tuple(CACHE_NAMES[0] if name in CACHE_NAMES else name for name in names)


def refuse(problem: str) -> None:
    """Raise a ValueError that says what does not fit our code; with ``FAST_PROMPT_UNKNOWN_FORWARDS=warn`` only warn."""
    setting = os.environ.get(SETTING, SETTINGS[0])
    if setting not in SETTINGS:
        raise ValueError(f"{SETTING}: expected {' or '.join(SETTINGS)}, got {setting!r}")
    message = (
        f"{problem} (transformers {installed_transformers() or 'is not installed'}; "
        f"known: {OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS})"
    )
    if setting == "refuse":
        raise ValueError(f"{message}. {SETTING}=warn goes on nevertheless, with results that nobody has checked")
    warnings.warn(message, stacklevel=2)


def describe_range() -> dict[str, Any]:
    """Whether the installed ``transformers`` is one that the tests ran on, and what to know if it is not."""
    oldest, newest, installed = OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS, installed_transformers()
    tested = installed is None or _release(oldest) <= _release(installed) <= _release(newest)
    note = "" if tested else f"transformers {installed} lies outside the range that was tested, {oldest} to {newest}"
    return {"installed": installed, "oldest": oldest, "newest": newest, "tested": tested, "note": note}


def _release(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (5, 24, 0) of 5.24.0.dev1."""
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", text)[0].split(".")))  # type: ignore[index]


def installed_transformers() -> str | None:
    """The version of ``transformers`` that is installed; None where it is not."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None
