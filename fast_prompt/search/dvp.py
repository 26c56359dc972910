"""KAB-APP: the layer at which dynamic visual prompts do most good, found by a bandit (arXiv 2306.00409, section 3.3).

Every layer is an arm that owns a cross-attention and a type embedding; adapters, LayerNorms and head belong to all. The
published code rewards on the test set, and its ranks never agree on the preferences; this rewards on training questions
that are set aside, and every rank takes the same step.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import default_collate

from fast_prompt.methods import DVPConfig
from fast_prompt.models.visual.target import find_target
from fast_prompt.search.arms import Arms
from fast_prompt.search.bandit import Bandit
from fast_prompt.search.search import Draw, Reward, Search, accuracy
from fast_prompt.search.settings import SearchSettings
from fast_prompt.search.training import Collate, Examples, seeded
from fast_prompt.tuning.combination import as_config


class DVPSearch(Search):
    """Finds the layer for ``DVPConfig``: trains all of them in turn, and learns from rewards which is worth most.

    Each step draws one layer uniformly and takes an ordinary step with it; then it measures the rewards of ``draws``
    layers, drawn by the softmax of their preferences, on examples set aside, and moves those preferences. After
    ``run()`` the model is what it was before, bit for bit, for training anew at the layer found; ``train_anew()`` does
    that. See ``Search`` for ranks, arguments and errors.

    Args:
        model: a language model without adapters.
        config: the settings to search with; its ``layer`` is not looked at. Its output must have ``loss`` and
            ``logits``, as with ``num_answers`` set.
        examples: training data, map-style; an item is what ``collate`` takes. Never the data to be tested on.
        settings: how the search goes.
        collate: makes a list of items the keyword arguments of ``model``.
        reward: the worth of a model's output for a batch; the paper's, its accuracy, by default.
        directory: for checkpoints, made if missing; ``run()`` goes on from the one in there. None: no checkpoints.
    """

    arm = "layer"
    sought: ClassVar[dict[str, Any]] = {"layer": 0}

    config: DVPConfig

    def __init__(
        self,
        model: nn.Module,
        config: DVPConfig | Sequence[DVPConfig],
        examples: Examples,
        settings: SearchSettings,
        *,
        collate: Collate = default_collate,
        reward: Reward = accuracy,
        directory: Path | str | None = None,
    ) -> None:
        own = as_config(config)
        if not isinstance(own, DVPConfig):
            raise ValueError(f"config: expected a DVPConfig alone, whose layer is searched for, got {own.method}")
        layers = len(find_target(model).blocks)
        bandit = Bandit(layers, "softmax", settings.preference_rate, settings.seed)
        super().__init__(model, own, examples, settings, bandit, collate, reward, directory)
        self._arms: Arms | None = None

    @property
    def layer(self) -> int:
        """The layer of the largest preference so far."""
        return self.bandit.best()[0]

    def run(self) -> DVPConfig:
        """Search, or go on with a search that was interrupted, which then ends as it would have without that.

        Returns:
            the config, with ``layer`` the one found.

        Raises:
            ValueError: the checkpoint in ``directory`` is another search's, or damaged.
            FloatingPointError: a loss, a gradient or a preference is not finite.
            RuntimeError: this search was interrupted, and there is no checkpoint to go on from.
        """
        with seeded(self.seed("arms")):
            self._arms = Arms(self.model, self.config, len(self.bandit.preferences))
        with self._arms:
            self.train(self._arms)
        return self.found()

    def found(self) -> DVPConfig:
        """The config with the layer that leads so far."""
        return dataclasses.replace(self.config, layer=self.layer)

    def status(self) -> str:
        """Which layer leads."""
        return f"layer {self.layer} leads"

    def trained_draw(self, step: int) -> Draw:
        """One layer, every one equally likely."""
        return (self.bandit.draw_uniform(),)

    def rewarded_draws(self) -> list[Draw]:
        """Layers by the softmax of their preferences, with replacement."""
        return [(layer,) for layer in self.bandit.draw(self.settings.draws)]

    def use(self, draw: Draw) -> None:
        """Puts a layer's prompter into the model."""
        assert self._arms is not None
        self._arms.use(draw[0])
