"""A bandit over the parts of a model: which of its arms is worth most, learned from rewards of draws.

Two published searches use it: KAB-APP draws one layer at a time by softmax (arXiv 2306.00409, section 3.3), dynamic
architecture skipping draws sets of blocks by gates (arXiv 2309.01479, section 3.2).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_prompt.nn.checks import check_choice, check_count, check_positive
from fast_prompt.search import ranks
from fast_prompt.search.settings import check_seed

# The logarithm of each arm's weight, by the name of the form.
LOG_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda preferences: F.log_softmax(preferences, 0),
    "sigmoid": F.logsigmoid,
}

# Tries for each set that `draw_sets` is asked for.
TRIES = 32


class Bandit:
    """Arms with a preference each, from which draws are taken and which their rewards move.

    Everything is float64 and on the CPU: it is a few numbers. Under ``torch.distributed`` every rank takes the same
    draws, because the first one's seed counts, and keeps the same preferences, because rewards are averaged.

    Args:
        arms: n, how many there are; at least 1.
        form: ``"softmax"`` (the probabilities sum to 1) or ``"sigmoid"`` (each arm has a gate of its own).
        learning_rate: of the preferences; more than 0.
        seed: of the draws.

    Attributes:
        preferences: float64 [n]; 0 at first.
        skipped: rewards that were not finite, and so taught nothing.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    def __init__(self, arms: int, form: str, learning_rate: float, seed: int = 0) -> None:
        check_count("arms", arms)
        check_choice("form", form, LOG_WEIGHTS)
        check_positive("learning_rate", learning_rate)
        check_seed("seed", seed)
        self.form = form
        self.learning_rate = learning_rate
        self.preferences = torch.zeros(arms, dtype=torch.float64)
        self.skipped = 0
        self.generator = torch.Generator().manual_seed(ranks.from_first(seed))

    @property
    def probabilities(self) -> Tensor:
        """The probability of each arm: float64 [n]."""
        return self._log_weights().exp()

    def best(self, count: int = 1) -> list[int]:
        """The ``count`` arms of the largest preferences, the best first; of equal ones, the earlier."""
        self._check_count(count)
        return self.preferences.argsort(descending=True, stable=True)[:count].tolist()

    def draw_uniform(self) -> int:
        """An arm, every one equally likely."""
        return int(torch.randint(len(self.preferences), (), generator=self.generator))

    def draw(self, count: int) -> list[int]:
        """``count`` arms, with replacement, by their probabilities."""
        return torch.multinomial(self.probabilities, count, replacement=True, generator=self.generator).tolist()

    def draw_set(self, size: int) -> tuple[int, ...]:
        """``size`` different arms in ascending order: one after the other, each by its share of what is left."""
        self._check_count(size)
        # A race of exponential clocks, the arms' probabilities being their rates, finishes in just that order. In
        # logarithms it also works for arms whose probability is too small for a float.
        clocks = torch.empty_like(self.preferences).exponential_(generator=self.generator)
        winners = (clocks.log() - self._log_weights()).argsort()[:size]
        return tuple(sorted(winners.tolist()))

    def draw_sets(self, size: int, count: int) -> list[tuple[int, ...]]:
        """``count`` different sets of ``size`` arms, or as many as there are or turn up in ``32 * count`` tries."""
        self._check_count(size)
        wanted = min(count, math.comb(len(self.preferences), size))
        sets: dict[tuple[int, ...], None] = {}
        for _ in range(TRIES * count):
            if len(sets) >= wanted:
                break
            sets[self.draw_set(size)] = None
        return list(sets)

    def update(self, draws: Sequence[Sequence[int]], rewards: Sequence[float]) -> None:
        """Let the rewards of some draws move the preferences of their arms.

        For every arm of every draw, ``preference += learning_rate * (reward - mean reward) * p * (1 - p)``, with p
        from before. Draws whose reward is not finite are counted in ``skipped`` and left out, of the mean as well.

        Args:
            draws: the arms of each draw.
            rewards: one number a draw, on this rank.

        Raises:
            ValueError: the lengths differ, or an arm does not exist.
            FloatingPointError: a preference would no longer be finite; nothing has changed then.
        """
        if len(draws) != len(rewards):
            raise ValueError(f"rewards: expected one for each of {len(draws)} draws, got {len(rewards)}")
        if any(not 0 <= arm < len(self.preferences) for draw in draws for arm in draw):
            raise ValueError(f"draws: expected arms from 0 to {len(self.preferences) - 1}, got {list(draws)}")
        averaged = ranks.mean_of_finite(torch.tensor(rewards, dtype=torch.float64))
        finite = averaged.isfinite()
        advantages = (averaged - averaged[finite].mean()).where(finite, averaged.new_zeros(()))
        probabilities = self.probabilities
        steps = self.learning_rate * probabilities * (1 - probabilities)
        moved = self.preferences.clone()
        for draw, advantage in zip(draws, advantages, strict=True):
            chosen = list(draw)
            moved[chosen] += steps[chosen] * advantage
        if not moved.isfinite().all():
            rate = self.learning_rate
            raise FloatingPointError(f"a preference is no longer finite; lower the preferences' learning rate ({rate})")
        self.skipped += int((~finite).sum())
        self.preferences = moved

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that decides what comes next, the generator's state included, as tensors."""
        return {
            "preferences": self.preferences.clone(),
            "skipped": torch.tensor(self.skipped),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from where ``state_dict`` was taken.

        Raises:
            ValueError: a tensor is missing or of another shape or dtype, a preference is not finite, ``skipped`` is
                below 0, or the generator's state is none. Nothing has changed then.
        """
        expected = self.state_dict()
        missing = expected.keys() - state.keys()
        if missing:
            raise ValueError(f"state: {', '.join(sorted(missing))} missing")
        preferences, skipped = state["preferences"], state["skipped"]
        if preferences.shape != self.preferences.shape:
            raise ValueError(f"state: expected {len(self.preferences)} arms, got {list(preferences.shape)}")
        for name, value in expected.items():
            if (state[name].shape, state[name].dtype) != (value.shape, value.dtype):
                found = f"{state[name].dtype} {list(state[name].shape)}"
                raise ValueError(f"state: {name}: expected {value.dtype} {list(value.shape)}, got {found}")
        if not preferences.isfinite().all() or skipped < 0:
            raise ValueError(f"state: expected finite preferences and skipped from 0, got {preferences}, {skipped}")
        try:
            generator = torch.Generator().set_state(state["generator"])
        except RuntimeError as error:
            raise ValueError(f"state: generator: {error}") from error
        self.generator = generator
        self.preferences.copy_(preferences)
        self.skipped = int(skipped)

    def _log_weights(self) -> Tensor:
        return LOG_WEIGHTS[self.form](self.preferences)

    def _check_count(self, count: int) -> None:
        if not 1 <= count <= len(self.preferences):
            raise ValueError(f"expected from 1 to {len(self.preferences)} arms, got {count}")
