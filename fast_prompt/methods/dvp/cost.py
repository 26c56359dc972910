"""What DVP is counted by."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fast_prompt.methods.dvp.config import DVPConfig
from fast_prompt.methods.variant import Settings, Variant
from fast_prompt.models.subject import Subject
from fast_prompt.nn import checks
from fast_prompt.tuning import get_fast_prompt_model


def refuses(subject: Subject) -> str | None:
    """Why the model cannot be counted with it, if it cannot."""
    if subject.counted.vision is None:
        return None
    return f"{subject.name} takes images itself; DVP is for models of text alone"


def variants(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Dynamic visual prompting, after what it replaces: all visual tokens before the text."""
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
