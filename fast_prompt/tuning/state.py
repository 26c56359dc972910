"""What an adapted model remembers, and an adapter that is not yet part of one."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fast_prompt.tuning.adapters import find_saved_modules
from fast_prompt.tuning.classes import Replacement
from fast_prompt.tuning.config import MethodConfig
from fast_prompt.tuning.copies import trainable_copies, trainable_parameters
from fast_prompt.tuning.site import Site

# What an adapter consists of, by the prefix of its tensors' names in a file.
Parts = Mapping[str, nn.Module | nn.Parameter]

# Names listed in full before an error says how many more there are.
LISTED = 4


@dataclass
class AdapterState:
    """The book-keeping of an adapted model; holds names and settings, never modules or tensors of its own.

    Attributes:
        requires_grad: each parameter's flag before the first adapter came, by name.
        training: each module's mode before the first adapter came, by name.
        configs: each adapter's config, by name.
        sites: each adapter's sites, by name.
        active: the adapter in use while adapters are enabled.
        enabled: False inside ``disable_adapter()`` and after ``disable_adapters()``.
        lets_gradients_in: whether the embeddings' output was made to want a gradient, for ``revert`` to undo.
        own_attributes: names of plain attributes set on the model, for ``revert`` to delete.
        folded: the paths whose forward is replaced while the model is folded, with what replaces it; empty otherwise.
        dropped: paths of the modules whose weights ``compact`` has dropped.
    """

    requires_grad: dict[str, bool]
    training: dict[str, bool]
    active: str
    configs: dict[str, MethodConfig] = field(default_factory=dict)
    sites: dict[str, list[Site]] = field(default_factory=dict)
    enabled: bool = True
    lets_gradients_in: bool = False
    own_attributes: list[str] = field(default_factory=list)
    folded: dict[str, Replacement] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    def forwards(self) -> Counter[tuple[str, Replacement]]:
        """Every replaced forward by path and replacement: how many sites need it."""
        return Counter(each for sites in self.sites.values() for site in sites for each in site.forwards)


@dataclass
class Draft:
    """A new adapter, built for a model and checked against it, that is not in the model yet.

    Attributes:
        config: its settings.
        sites: where its modules go, with the modules.
        saved: paths of the modules that train in full, with their copies.
        parameters: names of the base model's further parameters that train, with their copies.
    """

    config: MethodConfig
    sites: list[tuple[Site, nn.Module]]
    saved: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]

    @classmethod
    def build(cls, model: nn.Module, config: MethodConfig) -> "Draft":
        """Build what ``config`` asks for; ValueError if it does not fit the model, which is left as it was."""
        sites = config.find_sites(model)
        _check_apart(sites)
        paths = find_saved_modules(model, config.modules_to_save, [site.name for site in sites])
        saved = trainable_copies(model, paths)
        parameters = trainable_parameters(model, config.trained_parameters(model), paths)
        return cls(config, [(site, config.build(model, site)) for site in sites], saved, parameters)

    def parts(self) -> Parts:
        """Everything of the adapter, under the prefix of its tensors' names in a file."""
        return {site.prefix: module for site, module in self.sites} | self.saved | self.parameters


def _check_apart(sites: Sequence[Site]) -> None:
    """Two sites of one adapter keep their modules apart."""
    for (host, child), number in Counter((site.host, site.child) for site in sites).items():
        if number > 1:
            raise ValueError(f"config: two methods add to {host!r} as {child!r}; use one of them only")


def tensors_in(prefix: str, part: nn.Module | nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one part of an adapter (the very ones that train), named as in its file."""
    if isinstance(part, nn.Parameter):
        yield prefix, part
    else:
        yield from ((f"{prefix}.{name}", value) for name, value in part.state_dict(keep_vars=True).items())


def tensors_of(parts: Parts) -> dict[str, Tensor]:
    """The tensors of an adapter's parts, named as in its file."""
    return {name: value for prefix, part in parts.items() for name, value in tensors_in(prefix, part)}


def check_fit(parts: Parts, tensors: dict[str, Tensor], origin: str, made_for: str) -> None:
    """Raise a ValueError that names what differs unless ``tensors`` has exactly the names and shapes of ``parts``.

    Args:
        parts: what to load into.
        tensors: a file's contents.
        origin: the file's name.
        made_for: the base model that the file says it was made for.
    """
    problem = mismatch(tensors, tensors_of(parts), "this model")
    if problem:
        raise ValueError(f"{origin}: the adapter (made for {made_for}) does not fit this model; {problem}")


def mismatch(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: str) -> str:
    """What differs between a file's tensors and those ``expected`` in ``model``, by name and shape; else nothing."""
    shapes = [
        f"{name} {list(tensors[name].shape)} in the file, {list(value.shape)} here"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    problems = {
        "missing from the file": [name for name in expected if name not in tensors],
        f"not in {model}": [name for name in tensors if name not in expected],
        "of another shape": shapes,
    }
    return "; ".join(f"{problem}: {listing(names)}" for problem, names in problems.items() if names)


def listing(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def copy_into(parts: Parts, tensors: dict[str, Tensor]) -> None:
    """Copy checked ``tensors`` into the parts' own, in place, so that optimizers keep their parameters.

    Raises:
        ValueError: a part is on the meta device, where values are lost; nothing has been copied then.
    """
    own = tensors_of(parts)
    absent = [name for name, value in own.items() if value.is_meta]
    if absent:
        raise ValueError(
            f"{listing(absent)}: on the meta device, where an adapter's values would be lost; load the base's weights "
            "first, or take accelerate's hooks off (accelerate.hooks.remove_hook_from_submodules)"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def describe_base(model_class: type, config: object) -> dict[str, str | None]:
    """What an adapter's config file says of its base."""
    return {
        "base_model_class": model_class.__name__,
        "base_model_type": getattr(config, "model_type", None),
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
    }


def base_in(values: dict[str, object], path: Path) -> str:
    """The base named in an adapter's config file."""
    return str(values.get("base_model_class") or f"a base that {path} does not name")
