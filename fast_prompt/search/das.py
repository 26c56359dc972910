"""Dynamic architecture skipping: the blocks a task needs least, found by gates (arXiv 2309.01479, section 3.2).

Every candidate block is an arm with a gate of its own. What the published code does otherwise: its update for METER
leaves out the learning rate, drawing sets until they differ never ends where there are too few, and its ranks never
agree on a set or on the gates.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import default_collate

from fast_prompt.methods.das import DASConfig, set_skipped
from fast_prompt.nn.checks import check_bool
from fast_prompt.search.bandit import Bandit
from fast_prompt.search.plot import plot_gates
from fast_prompt.search.retraining import Adapted
from fast_prompt.search.search import Draw, Reward, Search
from fast_prompt.search.settings import Check, SearchSettings
from fast_prompt.search.training import Batch, Collate, Examples, seeded
from fast_prompt.tuning import get_fast_prompt_model
from fast_prompt.tuning.combination import CombinedConfig, as_config
from fast_prompt.tuning.config import MethodConfig

NAME = "search"


@dataclass(frozen=True, kw_only=True)
class DASSettings(SearchSettings):
    """``SearchSettings`` with the defaults of dynamic architecture skipping, whose search lasts three epochs.

    Attributes:
        ramp: whether the number of blocks that a training step skips rises from 1 to k over the first half of the
            warm-up, as for LLaMA.
    """

    draws: int = 3
    preference_rate: float = 1.0
    reward_from: float = 1 / 3
    reward_every: int = 10
    ramp: bool = False

    CHECKS: ClassVar[dict[str, Check]] = SearchSettings.CHECKS | {"ramp": check_bool}


def exponential_of_loss(output: Any, batch: Batch) -> float:
    """The paper's reward: ``exp(-loss)``; not a number where the loss is infinite, so that it counts for nothing."""
    loss = float(output.loss)
    return math.exp(-loss) if math.isfinite(loss) else math.nan


class DASSearch(Search):
    """Finds the ``num_skipped`` blocks of ``DASConfig`` that adapters replace at the least cost.

    Each step draws k candidates without replacement, by their gates' sigmoids, skips them, and trains the adapters of
    that sub-network. From ``reward_from`` on, every ``reward_every`` steps, it measures ``exp(-loss)`` of ``draws``
    different sets (as many as there are) on examples set aside, and moves the gates of their blocks. After ``run()``
    the model is what it was before, bit for bit; ``train_anew()`` adapts it with what was found and trains that. See
    ``Search`` for ranks and resuming.

    Args:
        model: a model without adapters.
        config: the settings to search with, ``skipped=None``; or several methods' that make one adapter, one of them
            such a ``DASConfig``. The model's output must have a ``loss``.
        examples: training data, map-style; an item is what ``collate`` takes. Never the data to be tested on.
        settings: how the search goes; ``DASSettings`` has the paper's.
        collate: makes a list of items the keyword arguments of ``model``.
        reward: the worth of a model's output for a batch.
        directory: for checkpoints, made if missing; ``run()`` goes on from the one in there. None: no checkpoints.

    Attributes:
        candidates: the paths of the blocks that are the arms, in order.

    Raises:
        ValueError: too few examples, no ``DASConfig`` to search for, or k does not fit the candidates.
    """

    arm = "block"
    settings_class = DASSettings
    takes_others = True

    settings: DASSettings

    def __init__(
        self,
        model: nn.Module,
        config: DASConfig | Sequence[MethodConfig],
        examples: Examples,
        settings: DASSettings,
        *,
        collate: Collate = default_collate,
        reward: Reward = exponential_of_loss,
        directory: Path | str | None = None,
    ) -> None:
        whole = as_config(config)
        self._das = skipping_part(whole)
        if self._das.skipped is not None:
            raise ValueError(f"config: expected skipped=None, which is what a search finds, got {self._das.skipped}")
        self.candidates = self._das.candidates_of(model)
        bandit = Bandit(len(self.candidates), "sigmoid", settings.preference_rate, settings.seed)
        super().__init__(model, whole, examples, settings, bandit, collate, reward, directory)

    @property
    def skipped(self) -> list[str]:
        """The blocks of the highest gates so far, in the model's order."""
        return self._named(sorted(self.bandit.best(self._das.num_skipped)))

    def run(self) -> MethodConfig:
        """Search, or go on with a search that was interrupted, which then ends as it would have without that.

        Returns:
            the config, with ``skipped`` the blocks found.

        Raises:
            ValueError: the checkpoint in ``directory`` is another search's, or damaged.
            FloatingPointError: a loss, a gradient or a preference is not finite.
            RuntimeError: this search was interrupted, and there is no checkpoint to go on from.
        """
        with seeded(self.seed("arms")):
            adapted = get_fast_prompt_model(self.model, self.config, NAME)
        try:
            self.train(Adapted(adapted))
        finally:
            adapted.revert()
        return self.found()

    def found(self) -> MethodConfig:
        """The config with the blocks that lead so far."""
        das = dataclasses.replace(self._das, skipped=self.skipped)
        if isinstance(self.config, CombinedConfig):
            parts = [das if part is self._das else part for part in self.config.configs]
            return dataclasses.replace(self.config, configs=parts)
        return das

    @property
    def arm_names(self) -> list[str]:
        """The candidates."""
        return self.candidates

    @property
    def chosen(self) -> list[str]:
        """The blocks that lead."""
        return self.skipped

    def status(self) -> str:
        """Which blocks lead."""
        return f"skipping {', '.join(path.rpartition('.')[2] for path in self.skipped)}"

    def plot(self, path: Path | str) -> None:
        """Draw the gates over time into ``path`` (PNG, PDF or SVG) as a heat map; needs matplotlib."""
        plot_gates(self.history, path, self.candidates, self.skipped)

    def trained_draw(self, step: int) -> Draw:
        """k blocks by their gates; fewer while the number still rises."""
        return self.bandit.draw_set(self._size(step))

    def rewarded_draws(self) -> list[Draw]:
        """Different sets of k blocks."""
        return self.bandit.draw_sets(self._das.num_skipped, self.settings.draws)

    def use(self, draw: Draw) -> None:
        """Skips a set of blocks."""
        set_skipped(self.model, self._named(draw))

    def identity(self) -> dict[str, Any]:
        """The candidates as well."""
        return super().identity() | {"candidates": self.candidates}

    def _size(self, step: int) -> int:
        last, rising = self._das.num_skipped, max(1, self.settings.rising_steps // 2)
        return min(last, 1 + step * last // rising) if self.settings.ramp else last

    def _named(self, arms: Sequence[int]) -> list[str]:
        return [self.candidates[arm] for arm in arms]


def skipping_part(config: MethodConfig) -> DASConfig:
    """The ``DASConfig`` that ``config`` is or holds; ValueError where there is none."""
    parts = config.configs if isinstance(config, CombinedConfig) else [config]
    found = [part for part in parts if isinstance(part, DASConfig)]
    if not found:
        raise ValueError(f"config: expected a DASConfig to search for, got {', '.join(part.method for part in parts)}")
    return found[0]
