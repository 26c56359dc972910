"""What an adapted model remembers, and an adapter that is not yet part of one."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fast_prompt.tuning.adapters import find_saved_modules
from fast_prompt.tuning.classes import Replacement
from fast_prompt.tuning.config import MethodConfig
from fast_prompt.tuning.copies import trainable_copies, trainable_parameters
from fast_prompt.tuning.files import Entry
from fast_prompt.tuning.site import Site

# What an adapter consists of, by the prefix of its tensors' names in a file.
Parts = Mapping[str, nn.Module | nn.Parameter]

# What modules make their parameters and buffers with.
FACTORIES = (torch.empty, torch.full, torch.ones, torch.zeros)

# Dtypes whose values can be loaded into each other; those of any other are loaded into the same alone.
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

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


@dataclass(frozen=True)
class Plan:
    """What a new adapter will consist of, before any of it is made.

    Attributes:
        config: its settings.
        sites: where its modules go.
        saved: paths of the modules that train in full.
        parameters: names of the base model's further parameters that train.
    """

    config: MethodConfig
    sites: Sequence[Site]
    saved: list[str]
    parameters: list[str]

    @classmethod
    def of(cls, model: nn.Module, config: MethodConfig) -> "Plan":
        """What ``config`` asks for; ValueError if it does not fit the model."""
        sites = config.find_sites(model)
        _check_apart(sites)
        paths = find_saved_modules(model, config.modules_to_save, [site.name for site in sites])
        return cls(config, sites, paths, config.trained_parameters(model))

    def outline(self, model: nn.Module) -> Parts:
        """Parts with the names and shapes that the adapter's will have, for which no memory is allocated.

        Raises:
            ValueError: a size is beyond what any tensor can have.
        """
        try:
            with WithoutMemory():
                modules = {site.prefix: self.config.build(model, site) for site in self.sites}
        except (RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(f"no tensor can be as large as these settings ask for ({error})") from error
        saved = {path: model.get_submodule(path) for path in self.saved}
        return modules | saved | {name: model.get_parameter(name) for name in self.parameters}

    def build(self, model: nn.Module) -> "Draft":
        """Make it, newly initialised; the model is left as it was."""
        saved = trainable_copies(model, self.saved)
        parameters = trainable_parameters(model, self.parameters, self.saved)
        modules = [(site, self.config.build(model, site)) for site in self.sites]
        return Draft(self.config, modules, saved, parameters)


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
        return Plan.of(model, config).build(model)

    def parts(self) -> Parts:
        """Everything of the adapter, under the prefix of its tensors' names in a file."""
        return {site.prefix: module for site, module in self.sites} | self.saved | self.parameters


class WithoutMemory(TorchFunctionMode):
    """A context in which new modules' tensors are on the meta device, whichever they were told."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``function``, with another device if it makes a tensor out of nothing."""
        return function(*args, **(kwargs or {}) | ({"device": "meta"} if function in FACTORIES else {}))


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


def check_fit(parts: Parts, tensors: Mapping[str, Tensor | Entry], origin: str, made_for: str) -> None:
    """Raise a ValueError that names what differs unless ``tensors`` has exactly the names and shapes of ``parts``.

    Args:
        parts: what to load into.
        tensors: a file's contents, or what its header says of them.
        origin: the file's name.
        made_for: the base model that the file says it was made for.
    """
    problem = mismatch(tensors, tensors_of(parts), "this model")
    if problem:
        raise ValueError(f"{origin}: the adapter (made for {made_for}) does not fit this model; {problem}")


def mismatch(tensors: Mapping[str, Tensor | Entry], expected: Mapping[str, Tensor], model: str) -> str:
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


def check_kinds(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise a ValueError that names what would be cast from one kind of dtype to another.

    Args:
        own: what to load into.
        tensors: a file's contents, of the same names.
        origin: the file's name.
    """
    alien = [
        f"{name} {value.dtype} in the file, {own[name].dtype} here"
        for name, value in tensors.items()
        if value.dtype != own[name].dtype and not {value.dtype, own[name].dtype} <= set(FLOATING)
    ]
    if alien:
        kinds = ", ".join(map(str, FLOATING))
        raise ValueError(f"{origin}: of another kind of dtype: {listing(alien)}; only {kinds} stand for each other")


def check_finite(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str, hint: str = "") -> None:
    """Raise a ValueError, with a ``hint``, that names what is not finite; arguments as those of ``check_kinds``."""
    broken = [name for name, value in tensors.items() if not value.to(own[name].dtype).isfinite().all()]
    if broken:
        raise ValueError(f"{origin}: NaN or infinity, in the dtype here, in {listing(broken)}{hint}")


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


def base_in(settings: Mapping[str, object], origin: str) -> str:
    """The base that an adapter's config names; ``origin`` is its file."""
    return str(settings.get("base_model_class") or f"a base that {origin} does not name")
