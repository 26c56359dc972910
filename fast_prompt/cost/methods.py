"""The methods that are counted: what ours stand against, here, and every one that has a config."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

from torch import Tensor, nn

from fast_prompt.cost.counting import without_memory
from fast_prompt.cost.prompts import FORMS
from fast_prompt.methods import named_methods
from fast_prompt.methods.variant import Settings, Variant
from fast_prompt.models import find_attention_sites
from fast_prompt.models.blocks import find_blocks
from fast_prompt.models.subject import Subject
from fast_prompt.nn.adapter import BottleneckAdapter
from fast_prompt.tuning import get_fast_prompt_model
from fast_prompt.tuning.config import MethodConfig


def full(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Fine-tuning of everything."""
    yield Variant("full", {}, subject.model().requires_grad_(True), subject.inputs())


def deep_prompts(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Deep prompt tuning, once for each convention of what a prompt takes part in."""
    for form, put_into in FORMS.items():
        model = subject.model()
        put_into(model, settings.prompts, subject.attentions)
        yield Variant("deep_prompts", {"prompts": settings.prompts, "form": form}, model, subject.inputs())


def lora(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Low-rank updates of the queries' and values' projections, not merged."""
    model = subject.model()
    layouts = [(site.name, site.projections) for site in find_attention_sites(model, subject.attentions)]
    for path in [f"{name}.{path}" for name, layout in layouts if layout for path in (layout.query, layout.memory[1])]:
        model.set_submodule(path, _LowRank(model.get_submodule(path), settings.rank))
    yield Variant("lora", {"rank": settings.rank}, model, subject.inputs())


class _LowRank(nn.Module):
    """A linear layer and a trained update of rank r; PEFT's own does not take tensors without memory."""

    def __init__(self, linear: nn.Module, rank: int) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def adapters(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """A bottleneck adapter after every sublayer."""
    width, _ = settings.adapter_widths(subject)
    model = subject.model()
    for block in find_blocks(model):
        module = model.get_submodule(block.path)
        inside = {name for name, _ in module.named_modules()}
        for path in (path for path in block.kind.outputs if path in inside):
            adapter = BottleneckAdapter(block.width, width)
            module.set_submodule(path, nn.Sequential(module.get_submodule(path), adapter))
    yield Variant("adapters", {"width": width}, model, subject.inputs())


Variants = Callable[[Subject, Settings], Iterator[Variant]]

BASELINES: dict[str, Variants] = {"full": full, "deep_prompts": deep_prompts, "lora": lora, "adapters": adapters}


def counted_methods() -> dict[str, Variants]:
    """What each method is counted by: the baselines first, then every config's own, or its defaults."""
    own = {name: _variants_of(name, config) for name, config in named_methods().items()}
    return BASELINES | {name: variants for name, variants in own.items() if variants is not None}


def _variants_of(name: str, config: type[MethodConfig]) -> Variants | None:
    if config.cost is not None:
        variants: Variants = import_module(config.cost).variants
        return variants
    required = [each for each in dataclasses.fields(config) if _is_required(each)]
    return None if required else partial(_with_defaults, name, config)


def _is_required(field: "dataclasses.Field[object]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _with_defaults(name: str, config: type[MethodConfig], subject: Subject, settings: Settings) -> Iterator[Variant]:
    yield Variant(name, {}, get_fast_prompt_model(subject.model(), config()), subject.inputs())


def methods_for(subject: Subject) -> list[str]:
    """The names of the methods that fit the model."""
    with without_memory():
        return [name for name in counted_methods() if refuses(name, subject) is None]


def refuses(name: str, subject: Subject) -> str | None:
    """Why a method cannot be counted in the model, if it cannot; a method without a cost is asked for its sites."""
    config = named_methods().get(name)
    if config is None:
        return None
    if config.cost is not None:
        refusal = getattr(import_module(config.cost), "refuses", None)
        return None if refusal is None else refusal(subject)
    try:
        config().find_sites(subject.model())
    except ValueError as error:
        return str(error)
    return None


def variants_of(name: str, subject: Subject, settings: Settings) -> Iterator[Variant]:
    """What a method is counted by.

    Raises:
        ValueError: it does not fit the model.
    """
    refusal = refuses(name, subject)
    if refusal is not None:
        raise ValueError(f"method {name}: {refusal}")
    yield from counted_methods()[name](subject, settings)
