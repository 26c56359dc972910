"""How a training run, and a search within one, goes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from fast_prompt.nn.checks import check_count, check_positive

LARGEST_SEED = 2**63 - 1  # the ranks share it as an int64
LARGEST_RATE = 1e30  # beyond it AdamW's float32 overflows

Check = Callable[[str, object], None]


def check_seed(name: str, value: object) -> None:
    """A whole number from 0 to 2^63 - 1 (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_SEED:
        raise ValueError(f"{name}: expected a whole number from 0 to {LARGEST_SEED:,}, got {value!r}")


def _check_share(name: str, value: object, *, zero: bool, one: bool) -> None:
    """A number between 0 and 1, and whether it may be either."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):  # type: ignore[operator]
        opening, closing = "[" if zero else "(", "]" if one else ")"
        raise ValueError(f"{name}: expected a share in {opening}0, 1{closing}, got {value!r}")


def _check_rate(name: str, value: object) -> None:
    """A number above 0 and up to 1e30."""
    check_positive(name, value)
    if value > LARGEST_RATE:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number of at most {LARGEST_RATE:g}, got {value!r}")


def _check_rate_if_any(name: str, value: object) -> None:
    """None, or a rate."""
    if value is not None:
        _check_rate(name, value)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How training goes; everything besides model and data that decides its result.

    Attributes:
        steps: training steps.
        batch_size: examples in one, over all ranks.
        learning_rate: the peak, of what the method adds; warmed up and then decayed linearly to 0.
        head_rate: the peak for the new head and ``modules_to_save``; ``learning_rate`` when None.
        warmup: share of the steps that warm up, from 0 to 1.
        max_grad_norm: gradients are clipped to it.
        save_every: steps between two checkpoints.
        seed: of what is drawn, the batches and dropout; from 0.

    Raises:
        ValueError: a setting is of another kind, not finite or out of range; the message names it.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-4
    head_rate: float | None = None
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    save_every: int = 50
    seed: int = 0

    # What checks each setting; a subclass adds its own.
    CHECKS: ClassVar[dict[str, Check]] = {
        "steps": check_count,
        "batch_size": check_count,
        "learning_rate": _check_rate,
        "head_rate": _check_rate_if_any,
        "warmup": partial(_check_share, zero=True, one=True),
        "max_grad_norm": check_positive,
        "save_every": check_count,
        "seed": check_seed,
    }

    def __post_init__(self) -> None:
        for name, check in self.CHECKS.items():
            check(name, getattr(self, name))

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
        ValueError: a setting is of another kind, not finite or out of range; the message names it.
    """

    draws: int = 5
    preference_rate: float = 0.005
    reward_share: float = 0.1
    reward_batch: int = 32
    reward_from: float = 0.0
    reward_every: int = 1

    CHECKS: ClassVar[dict[str, Check]] = TrainingSettings.CHECKS | {
        "draws": check_count,
        "preference_rate": check_positive,
        "reward_share": partial(_check_share, zero=False, one=False),
        "reward_batch": check_count,
        "reward_from": partial(_check_share, zero=True, one=False),
        "reward_every": check_count,
    }

    def measures(self, step: int) -> bool:
        """Whether rewards are measured after this step."""
        since = step - int(self.reward_from * self.steps)
        return since >= 0 and since % self.reward_every == 0
