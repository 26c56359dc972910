"""Copies of the base model's modules and parameters, for an adapter to train in their place."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from fast_prompt.nn.offload import is_offloaded
from fast_prompt.tuning.adapters import is_within
from fast_prompt.tuning.precision import check_castable, trained_dtype, widen


def trainable_copies(model: nn.Module, paths: list[str]) -> dict[str, nn.Module]:
    """Copies of the modules at ``paths`` whose floating parameters all train, those of half precision in float32.

    What the modules share, their copies share.

    Raises:
        ValueError: a parameter in them is tied to one outside, accelerate keeps their weights elsewhere, or a forward
            cannot be replaced by one that casts.
    """
    check_ties(model, paths)
    memo: dict[int, Any] = {}
    _check_holders(model, (path for path, _ in model.named_modules() if is_within(path, paths)))
    copies = {path: copy.deepcopy(model.get_submodule(path), memo) for path in paths}
    duplicates = nn.ModuleList(copies.values())
    widen(duplicates)
    for parameter in duplicates.parameters():
        parameter.requires_grad_(parameter.dtype.is_floating_point or parameter.dtype.is_complex)
    return copies


def _check_holders(model: nn.Module, paths: Iterable[str]) -> None:
    """The modules at ``paths`` can take other parameters, and cast them; ValueError names one that cannot."""
    for path in paths:
        if is_offloaded(model, path):
            raise ValueError(
                f"{path}: accelerate keeps its weights elsewhere and puts them back at every call, so that no copy can "
                "train in their place; keep the module on a device (device_map), or train nothing of it"
            )
        check_castable(model.get_submodule(path), path)


def check_ties(model: nn.Module, paths: list[str]) -> None:
    """Raise a ValueError if a parameter of the modules at ``paths`` is also one of a module elsewhere."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        inside = [name for name in tied if is_within(name, paths)]
        outside = [name for name in tied if name not in inside]
        if inside and outside:
            raise ValueError(
                f"modules_to_save: {inside[0]!r} is tied to {', '.join(outside)}: one parameter, of which a copy would "
                "leave the others behind. Name all of their modules, which then train as one; or untie them before "
                "you adapt the model: give each a Parameter of its own, and set config.tie_word_embeddings to False"
            )


def trainable_parameters(model: nn.Module, names: list[str], saved: list[str]) -> dict[str, nn.Parameter]:
    """Trainable copies of the model's parameters ``names``, but for those in modules of which all is ``saved``.

    Those of half precision are copied in float32.
    """
    chosen = {name: model.get_parameter(name) for name in names if not is_within(name, saved)}
    _check_holders(model, (name.rpartition(".")[0] for name in chosen))
    return {name: nn.Parameter(own.detach().to(trained_dtype(own.dtype), copy=True)) for name, own in chosen.items()}
