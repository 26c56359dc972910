"""The methods that are counted: what ours stand against, here, and every registered one."""

from collections import ChainMap
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, cast

from torch import Tensor, nn

from fast_prompt.cost.counting import without_memory
from fast_prompt.cost.prompts import FORMS
from fast_prompt.methods import METHODS
from fast_prompt.methods.variant import Settings, Variant
from fast_prompt.models import find_attention_sites
from fast_prompt.models.blocks import find_blocks
from fast_prompt.models.subject import Subject
from fast_prompt.nn.adapter import BottleneckAdapter
from fast_prompt.tuning import get_fast_prompt_model


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


BASELINES: dict[str, Callable[[Subject, Settings], Iterator[Variant]]] = {
    "full": full,
    "deep_prompts": deep_prompts,
    "lora": lora,
    "adapters": adapters,
}
# Baselines first, then the registered methods, those registered later included.
COUNTED_METHODS: ChainMap[str, Any] = ChainMap(cast(dict[str, Any], METHODS), cast(dict[str, Any], BASELINES))


def methods_for(subject: Subject) -> list[str]:
    """The names of the methods that fit the model."""
    with without_memory():
        return [name for name in COUNTED_METHODS if refuses(name, subject) is None]


def refuses(name: str, subject: Subject) -> str | None:
    """Why a method cannot be counted in the model, if it cannot; what names no cost is asked for its sites."""
    method = METHODS.get(name)
    if method is None:
        return None
    if method.cost is not None:
        refusal = getattr(import_module(method.cost), "refuses", None)
        return None if refusal is None else refusal(subject)
    try:
        method.config().find_sites(subject.model())
    except ValueError as error:
        return str(error)
    return None


def variants_of(name: str, subject: Subject, settings: Settings) -> Iterator[Variant]:
    """What a method is counted by; the defaults of its config where it names no cost.

    Raises:
        ValueError: it does not fit the model.
    """
    refusal = refuses(name, subject)
    if refusal is not None:
        raise ValueError(f"method {name}: {refusal}")
    if name not in METHODS:
        yield from BASELINES[name](subject, settings)
        return
    method = METHODS[name]
    if method.cost is not None:
        yield from import_module(method.cost).variants(subject, settings)
        return
    yield Variant(name, {}, get_fast_prompt_model(subject.model(), method.config()), subject.inputs())
