"""What the searches share: train what is drawn, measure rewards on examples set aside, let them teach a bandit."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fast_prompt.search.bandit import Bandit
from fast_prompt.search.checkpoint import check_like, under
from fast_prompt.search.plot import plot_preferences
from fast_prompt.search.retraining import train_anew
from fast_prompt.search.settings import SearchSettings, TrainingSettings
from fast_prompt.search.training import Batch, Collate, Examples, Training
from fast_prompt.tuning.config import MethodConfig

Reward = Callable[[Any, Batch], float]
Draw = tuple[int, ...]


class Search(Training, ABC):
    """A search over the parts of a model, which it leaves as it was.

    Each step trains one draw of the arms; now and then the rewards of other draws, measured without gradients on
    examples that are never trained on, move the arms' preferences. Under ``torch.distributed`` the ranks share every
    batch, their gradients and rewards are averaged, and all draw the same arms; ``model`` must not be wrapped and must
    hold the same weights on every rank. A reward that is not finite is counted in ``bandit.skipped`` and teaches
    nothing.

    Args:
        model: what ``get_fast_prompt_model`` takes, without adapters.
        config: the settings to search with, less what is searched for. The output must have a ``loss``.
        examples: training data, map-style; an item is what ``collate`` takes. Never the data to be tested on.
        settings: how the search goes.
        bandit: one arm for each part.
        collate: makes a list of items the keyword arguments of ``model``.
        reward: the worth of a model's output for a batch; the more the better.
        directory: for checkpoints, made if missing; ``run()`` goes on from the one in there, if any. None: no
            checkpoints.

    Attributes:
        bandit: the preferences, and the draws.
        history: the preferences after every step so far, float64 [steps, arms].

    Raises:
        ValueError: too few examples; the message says how many.
    """

    name = "search"
    arm = "arm"

    settings_class: ClassVar[type[SearchSettings]] = SearchSettings
    sought: ClassVar[dict[str, Any]] = {}  # the config's settings that it finds, and what stands there till then
    takes_others: ClassVar[bool] = False  # whether the adapter searched for may hold other methods too

    settings: SearchSettings

    def __init__(
        self,
        model: nn.Module,
        config: MethodConfig,
        examples: Examples,
        settings: SearchSettings,
        bandit: Bandit,
        collate: Collate,
        reward: Reward,
        directory: Path | str | None,
    ) -> None:
        super().__init__(model, examples, settings, collate, directory)
        self.config: Any = config
        self.bandit = bandit
        self.reward = reward
        self.history = torch.empty(0, len(bandit.preferences), dtype=torch.float64)
        aside = int(settings.reward_share * len(examples))
        if aside < settings.reward_batch or len(examples) - aside < settings.batch_size:
            raise ValueError(
                f"examples: {len(examples)} give {aside} for rewards and {len(examples) - aside} to train on, fewer "
                f"than a batch ({settings.reward_batch} and {settings.batch_size})"
            )
        shuffled = torch.randperm(len(examples), generator=self.generator("split"))
        self._rewarding, self._training = shuffled.split([aside, len(examples) - aside])

    # What a search of its own says

    @property
    def arm_names(self) -> list[str]:
        """What each arm is called: its number, unless it has a name."""
        return [str(arm) for arm in range(len(self.bandit.preferences))]

    @property
    def chosen(self) -> list[str]:
        """Of ``arm_names``, those that lead."""
        return [str(self.bandit.best()[0])]

    @abstractmethod
    def run(self) -> MethodConfig:
        """Search, or go on with a search that was interrupted, which then ends as it would have without that."""

    @abstractmethod
    def trained_draw(self, step: int) -> Draw:
        """The arms that this step trains."""

    @abstractmethod
    def rewarded_draws(self) -> Sequence[Draw]:
        """The draws whose rewards are compared."""

    @abstractmethod
    def use(self, draw: Draw) -> None:
        """Puts a draw into the model."""

    # What all share

    def plot(self, path: Path | str) -> None:
        """Draw the preferences over time into ``path`` (PNG, PDF or SVG); needs matplotlib."""
        plot_preferences(self.history, path, self.arm)

    def train_anew(self, settings: TrainingSettings | None = None) -> Any:
        """Adapt the model with what was found, and train it on all examples, those set aside for rewards included.

        It can be interrupted and called again like ``run()``, which must be through.

        Args:
            settings: of the training; the search's own when None.

        Returns:
            the model, adapted, in evaluation mode.

        Raises:
            RuntimeError: the search is not through.
        """
        if self.done < self.settings.steps:
            raise RuntimeError(
                f"train_anew: {self.done} of {self.settings.steps} steps were searched; call run() first"
            )
        plan, collate, directory = settings or self.settings, self.collate, self.directory
        return train_anew(self.model, self.found(), self.examples, plan, collate=collate, directory=directory)

    @abstractmethod
    def found(self) -> MethodConfig:
        """The config with what leads so far."""

    def before_step(self, step: int) -> None:
        """Draws what trains."""
        self.use(self.trained_draw(step))

    def after_step(self, step: int) -> None:
        """Measures rewards where it is time to."""
        if self.settings.measures(step):
            self._measure(step)
        self.history = torch.cat([self.history, self.bandit.preferences[None]])

    @torch.no_grad()
    def _measure(self, step: int) -> None:
        """Rewards of some draws on the same examples, and what they teach."""
        draws = self.rewarded_draws()
        chosen = torch.randperm(len(self._rewarding), generator=self.generator("reward", step))
        batch = self.batch(self._rewarding[chosen[: self.settings.reward_batch]])
        self.model.eval()
        rewards = {}
        for draw in dict.fromkeys(draws):
            self.use(draw)
            rewards[draw] = self.reward(self.model(**batch), batch)
        self.bandit.update(draws, [rewards[draw] for draw in draws])

    def state(self) -> dict[str, Tensor]:
        """The bandit and its history."""
        return {"history": self.history} | {f"bandit.{name}": value for name, value in self.bandit.state_dict().items()}

    def load_state(self, state: dict[str, Tensor], done: int) -> None:
        """Goes on from what ``state`` gave after ``done`` steps; ValueError if it cannot be that, unchanged then."""
        arms = len(self.bandit.preferences)
        check_like(state, self.state() | {"history": torch.empty(done, arms, dtype=torch.float64)})
        if not torch.equal(state["history"][-1], state["bandit.preferences"]):
            raise ValueError("history: its last row is not the bandit's preferences")
        self.bandit.load_state_dict(under("bandit.", state))
        self.history = state["history"]

    def identity(self) -> dict[str, Any]:
        """Settings, config, arms and the size of the data."""
        own = {"config": self.config.to_dict(), "arms": len(self.bandit.preferences)}
        return super().identity() | own


def accuracy(output: Any, batch: Batch) -> float:
    """100 times the share of ``labels`` that are the largest of ``output.logits`` [B, answers]."""
    return 100 * (output.logits.argmax(-1) == batch["labels"]).float().mean().item()
