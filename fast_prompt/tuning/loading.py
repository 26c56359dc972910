"""A saved adapter on its way into a model: all that can be refused is, before there is memory for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fast_prompt.tuning.config import MethodConfig, naming
from fast_prompt.tuning.state import (
    Draft,
    Parts,
    Plan,
    base_in,
    check_finite,
    check_fit,
    check_kinds,
    copy_into,
    tensors_of,
)
from fast_prompt.tuning.storage import StoredAdapter, open_adapter


@dataclass(frozen=True)
class Loader:
    """Puts one saved adapter's values into modules.

    Attributes:
        stored: the adapter's open files.
        config: its settings.
        allow_nonfinite: whether NaN and infinity may be among its values.
    """

    stored: StoredAdapter
    config: MethodConfig
    allow_nonfinite: bool

    def build(self, model: nn.Module, config: MethodConfig) -> Draft:
        """As ``Draft.build``, with the saved values; ValueErrors name the file."""
        with naming(self.stored.origin):
            plan = Plan.of(model, config)
            outline = plan.outline(model)
        self._check_fit(outline)
        with naming(self.stored.origin):
            draft = plan.build(model)
        self.fill(draft.parts())
        return draft

    def fill(self, parts: Parts) -> None:
        """Check the values against ``parts``, and only then copy them there; ValueErrors name the file."""
        self._check_fit(parts)
        own, tensors, origin = tensors_of(parts), self.stored.weights.read(), str(self.stored.weights.path)
        check_kinds(own, tensors, origin)
        if not self.allow_nonfinite:
            check_finite(own, tensors, origin, hint="; allow_nonfinite=True loads it nonetheless")
        copy_into(parts, tensors)

    def _check_fit(self, parts: Parts) -> None:
        weights, made_for = self.stored.weights, base_in(self.stored.settings, self.stored.origin)
        check_fit(parts, weights.entries, str(weights.path), made_for)


@contextmanager
def open_loader(directory: Path, allow_nonfinite: bool) -> Iterator[Loader]:
    """A context with what loads the adapter in ``directory``; FileNotFoundError or ValueError name the file."""
    with open_adapter(directory) as stored:
        yield Loader(stored, MethodConfig.from_dict(stored.settings, stored.origin), allow_nonfinite)
