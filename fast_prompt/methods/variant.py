"""What counting a method's cost takes: the settings it is told, and the models it gives."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fast_prompt.models.subject import Subject
from fast_prompt.nn import checks


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
