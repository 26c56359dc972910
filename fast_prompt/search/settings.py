"""How a training run, and a search within one, goes."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How training goes; everything besides model and data that decides its result.

    Attributes:
        steps: training steps.
        batch_size: examples in one, over all ranks.
        learning_rate: the peak, of what the method adds; warmed up and then decayed linearly to 0.
        head_rate: the peak for the new head and ``modules_to_save``; ten times ``learning_rate`` when None.
        warmup: share of the steps that warm up.
        max_grad_norm: gradients are clipped to it.
        save_every: steps between two checkpoints.
        seed: of what is drawn, the batches and dropout.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-4
    head_rate: float | None = None
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_counts("steps", "batch_size", "save_every")
        if not isinstance(self.learning_rate, (int, float)) or not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate!r}")

    def _check_counts(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a number from 1, got {value!r}")

    @property
    def rising_steps(self) -> int:
        """Steps of the warm-up."""
        return max(1, int(self.warmup * self.steps))

    def decay(self, step: int) -> float:
        """Share of the peak learning rate: a linear rise, then a linear fall to almost 0."""
        rise = self.rising_steps
        return min((step + 1) / rise, (self.steps - step) / (self.steps - rise + 1))


@dataclass(frozen=True, kw_only=True)
class SearchSettings(TrainingSettings):
    """How a search goes. The defaults are those of KAB-APP, the search of dynamic visual prompting.

    Attributes:
        draws: n, whose rewards each measurement compares.
        preference_rate: learning rate of the preferences.
        reward_share: share of the data set aside for rewards, above 0 and below 1.
        reward_batch: examples that a reward is measured on, over all ranks.
        reward_from: share of the steps that only train, before the first measurement; from 0 and below 1.
        reward_every: steps from one measurement to the next.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    draws: int = 5
    preference_rate: float = 0.005
    reward_share: float = 0.1
    reward_batch: int = 32
    reward_from: float = 0.0
    reward_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("draws", "reward_batch", "reward_every")
        if not 0 < self.reward_share < 1:
            raise ValueError(f"reward_share: expected a share above 0 and below 1, got {self.reward_share!r}")
        if not 0 <= self.reward_from < 1:
            raise ValueError(f"reward_from: expected a share from 0 and below 1, got {self.reward_from!r}")

    def measures(self, step: int) -> bool:
        """Whether rewards are measured after this step."""
        since = step - int(self.reward_from * self.steps)
        return since >= 0 and since % self.reward_every == 0
