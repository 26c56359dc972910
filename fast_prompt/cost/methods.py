"""The methods that are counted: each puts itself into a frozen model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from fast_prompt.cost.prompts import FORMS
from fast_prompt.cost.subject import Subject
from fast_prompt.methods import APTConfig, DASConfig, DVPConfig
from fast_prompt.models import find_attention_sites
from fast_prompt.models.blocks import find_blocks
from fast_prompt.nn import checks
from fast_prompt.nn.adapter import BottleneckAdapter
from fast_prompt.tuning import get_fast_prompt_model


@dataclass(frozen=True)
class Settings:
    """What the methods are told; widths that are None are those published for the architecture.

    Attributes:
        prompts: p, of APT and of deep prompt tuning, an attention or block.
        num_skipped: k, blocks that DAS skips.
        width: of adapters, DAS's of kept blocks included.
        skip_width: of DAS's adapters in the place of skipped blocks.
        rank: r of LoRA.
        layer: K, the block before which DVP's prompt enters; the first costs most.
        visual_tokens: of an image, for DVP.
        visual_width: their width.

    Raises:
        ValueError: a setting is out of range.
    """

    prompts: int = 200
    num_skipped: int = 4
    width: int | None = None
    skip_width: int | None = None
    rank: int = 8
    layer: int = 0
    visual_tokens: int = 197
    visual_width: int = 768

    def __post_init__(self) -> None:
        for name in ("prompts", "num_skipped", "width", "skip_width", "rank", "visual_tokens", "visual_width"):
            if getattr(self, name) is not None:
                checks.check_count(name, getattr(self, name))

    def adapter_widths(self, subject: Subject) -> tuple[int, int]:
        """The widths of a kept block's adapters, and of the one in the place of a skipped block."""
        kept, skipped = subject.counted.adapter_widths
        return self.width or kept, self.skip_width or skipped


@dataclass(frozen=True)
class Variant:
    """A method in a model, to be counted.

    Attributes:
        method: what it is called.
        settings: its own.
        model: with the method in it.
        inputs: what it gets.
    """

    method: str
    settings: dict[str, Any]
    model: nn.Module
    inputs: dict[str, Tensor] = field(repr=False)


def full(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Fine-tuning of everything."""
    yield Variant("full", {}, subject.model().requires_grad_(True), subject.inputs())


def apt(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Approximated prompt tuning."""
    config = APTConfig(num_prompts=settings.prompts, target_modules=_attentions(subject))
    model = get_fast_prompt_model(subject.model(), config)
    yield Variant("apt", {"prompts": settings.prompts, "rank": config.rank}, model, subject.inputs())


def deep_prompts(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Deep prompt tuning, once for each convention of what a prompt takes part in."""
    for form, put_into in FORMS.items():
        model = subject.model()
        put_into(model, settings.prompts, _attentions(subject))
        yield Variant("deep_prompts", {"prompts": settings.prompts, "form": form}, model, subject.inputs())


def dvp(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Dynamic visual prompting, after what it replaces: all visual tokens before the text."""
    if subject.counted.vision is not None:
        raise ValueError(f"method dvp: {subject.name} takes images itself; DVP is for models of text alone")
    sizes = {"visual_tokens": settings.visual_tokens, "visual_width": settings.visual_width}
    yield _concatenated(subject, settings, sizes)
    config = DVPConfig(
        layer=settings.layer,
        visual_width=settings.visual_width,
        train_base="none",
        dropout=0.0,
        **subject.counted.compressor,
    )
    model = get_fast_prompt_model(subject.model(), config)
    visual = torch.zeros(subject.batch, settings.visual_tokens, settings.visual_width)
    inputs = subject.inputs() | {"visual_embeds": visual}
    yield Variant("dvp", sizes | {"layer": settings.layer}, model, inputs)


def _concatenated(subject: Subject, settings: Settings, sizes: dict[str, Any]) -> Variant:
    """The model on visual tokens and text, the former projected where they are of another width."""
    length = settings.visual_tokens + subject.text_length
    checks.check_count("visual_tokens + text_length", length, subject.counted.positions(subject.config))
    width = subject.config.hidden_size
    bridge = nn.Identity() if settings.visual_width == width else nn.Linear(settings.visual_width, width)
    visual = torch.zeros(subject.batch, settings.visual_tokens, settings.visual_width)
    text = torch.zeros(subject.batch, subject.text_length, width)
    model = _Concatenated(subject.model(), bridge)
    return Variant("visual_tokens", sizes, model, {"visual": visual, "text": text})


class _Concatenated(nn.Module):
    def __init__(self, model: nn.Module, bridge: nn.Module) -> None:
        super().__init__()
        self.model, self.bridge = model, bridge

    def forward(self, visual: Tensor, text: Tensor) -> Any:
        return self.model(inputs_embeds=torch.cat([self.bridge(visual), text], dim=1))


def das(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Dynamic architecture skipping; the skipped blocks' weights are dropped."""
    width, skip_width = settings.adapter_widths(subject)
    model = subject.model()
    config = DASConfig(num_skipped=settings.num_skipped, width=width, skip_width=skip_width)
    skipped = spread(config.candidates_of(model), settings.num_skipped)
    config = DASConfig(skipped=skipped, width=width, skip_width=skip_width)
    model = get_fast_prompt_model(model, config)
    model.compact()
    own = {"num_skipped": settings.num_skipped, "width": width, "skip_width": skip_width}
    yield Variant("das", own, model, subject.inputs())


def spread(candidates: list[str], number: int) -> list[str]:
    """`number` of the candidates, evenly out of the model's stacks, of each the last."""
    stacks: dict[str, list[str]] = {}
    for path in candidates:
        stacks.setdefault(path.rpartition(".")[0], []).append(path)
    turns = zip_longest(*(reversed(stack) for stack in reversed(stacks.values())))
    return [path for path in chain.from_iterable(turns) if path is not None][:number]


def lora(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Low-rank updates of the queries' and values' projections, not merged."""
    model = subject.model()
    layouts = [(site.name, site.projections) for site in find_attention_sites(model, _attentions(subject))]
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


def _attentions(subject: Subject) -> list[str] | None:
    return list(subject.architecture.named_attentions) or None


METHODS: dict[str, Callable[[Subject, Settings], Iterator[Variant]]] = {
    "full": full,
    "deep_prompts": deep_prompts,
    "lora": lora,
    "adapters": adapters,
    "apt": apt,
    "dvp": dvp,
    "das": das,
}


def methods_for(subject: Subject) -> list[str]:
    """The names of the methods that fit the model."""
    return [name for name in METHODS if name != "dvp" or subject.counted.vision is None]
