"""The arms of a search over layers: one adapted model, and a prompter for each layer to put into it."""

import dataclasses
from typing import Any, Self

from torch import nn

from fast_prompt.methods import DVPConfig
from fast_prompt.models.visual.forward import visual_forward
from fast_prompt.tuning import get_fast_prompt_model, parameter_groups
from fast_prompt.tuning.adapters import SiteAdapters

NAME = "search"


class Arms:
    """A prompter for each layer, of which one at a time is in the model; everything else that trains, all share.

    A context, after which the model is what it was before.

    Args:
        model: without adapters.
        config: the adapter's settings, but for its layer.
        layers: how many there are.

    Attributes:
        model: the adapted model.
        prompters: the layers' own parameters, in order.
    """

    def __init__(self, model: nn.Module, config: DVPConfig, layers: int) -> None:
        first = dataclasses.replace(config, layer=0)
        (site,) = (site for site in first.find_sites(model) if site.forward is visual_forward)
        self.model: Any = get_fast_prompt_model(model, first, NAME)
        self._place: SiteAdapters = getattr(self.model.get_submodule(site.host), site.child)
        others = [dataclasses.replace(config, layer=layer).build(model, site) for layer in range(1, layers)]
        self.prompters = nn.ModuleList([self._place[NAME], *others])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.use(0)
        self.model.revert()

    def use(self, layer: int) -> None:
        """Put the prompter of ``layer`` into the model."""
        self._place[NAME] = self.prompters[layer].train(self.model.training)

    def parameter_groups(self, learning_rate: float, head_rate: float | None) -> list[dict[str, Any]]:
        """An optimizer's, of all that trains: each layer's own in a group for itself, and what they share."""
        groups = parameter_groups(self.model, learning_rate, head_rate)
        own = [{"params": list(prompter.parameters()), "lr": learning_rate} for prompter in self.prompters[1:]]
        return groups + own

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that trains, by a name that does not depend on the prompter in place."""
        own = {f"{NAME}.{name}": value for name, value in self.prompters.named_parameters()}
        known = {id(value) for value in own.values()}
        shared = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return own | {name: value for name, value in shared.items() if id(value) not in known}
