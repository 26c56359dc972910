"""The result: one row for each method and form of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fast_prompt.cost.counting import count_macs, count_parameters, without_memory
from fast_prompt.cost.methods import Settings, Variant, variants_of
from fast_prompt.models.subject import Subject

# The settings of every row of one model: the sizes of its input.
SIZES = ("image_size", "text_length", "batch")


@dataclass(frozen=True)
class Row:
    """What one method costs.

    Attributes:
        model: as it was asked for.
        method: which; `visual_tokens` is what `dvp` replaces.
        settings: its own, and the sizes of the input.
        macs: multiply-adds of a forward pass, per sample.
        added_macs: of these, what the model alone does not have; negative where it has more.
        params: of the model with the method, what is no longer needed left out.
        trainable_params: of these, the method's own; a task's head is not counted.
    """

    model: str
    method: str
    settings: dict[str, Any]
    macs: int
    added_macs: int
    params: int
    trainable_params: int

    @property
    def sizes(self) -> str:
        """The sizes of the input, in words."""
        return _in_words({name: size for name, size in self.settings.items() if name in SIZES})

    @property
    def own_settings(self) -> str:
        """The method's own settings, in words."""
        return _in_words({name: value for name, value in self.settings.items() if name not in SIZES})

    @property
    def base_macs(self) -> int:
        """Multiply-adds of the model alone."""
        return self.macs - self.added_macs

    @property
    def share(self) -> float:
        """`added_macs` as a share of the model's own."""
        return self.added_macs / self.base_macs


def count(subject: Subject, methods: Iterable[str], settings: Settings) -> list[Row]:
    """The rows of `methods`, names in `fast_prompt.cost.counted_methods()`.

    Raises:
        ValueError: a method does not fit the model, or a setting does not fit it.
    """
    sizes = {name: size for name in SIZES if (size := getattr(subject, name)) is not None}
    with without_memory():
        base = count_macs(subject.model(), **subject.inputs())
        variants = (variant for name in methods for variant in variants_of(name, subject, settings))
        return [_row(subject.name, variant, sizes, base) for variant in variants]


def _row(model: str, variant: Variant, sizes: dict[str, Any], base: int) -> Row:
    macs = count_macs(variant.model, **variant.inputs)
    params, trainable = count_parameters(variant.model)
    return Row(model, variant.method, variant.settings | sizes, macs, macs - base, params, trainable)


def _in_words(settings: dict[str, Any]) -> str:
    return ", ".join(
        value if name == "form" else f"{name.replace('_', ' ')} {value}" for name, value in settings.items()
    )
