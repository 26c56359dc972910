"""KAB-APP: the layer at which dynamic visual prompts do most good, found by a bandit (arXiv 2306.00409, section 3.3).

Every layer is an arm that owns a cross-attention and a type embedding; adapters, LayerNorms and head belong to all. The
published code rewards on the test set, and its ranks never agree on the preferences; this rewards on training questions
that are set aside, and every rank takes the same step.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from fast_prompt.methods import DVPConfig
from fast_prompt.models.visual.families import find_target
from fast_prompt.search import ranks
from fast_prompt.search.arms import Arms
from fast_prompt.search.bandit import Bandit
from fast_prompt.search.plot import plot_preferences
from fast_prompt.tuning.files import read_json, read_tensors, tensor_bytes, write_atomically

SETTINGS_NAME, STATE_NAME = "search.json", "search.safetensors"
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01

Batch = Mapping[str, Tensor]


class Examples(Protocol):
    """A data set of the kind that ``torch.utils.data`` calls map-style."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How a search goes; everything besides model and data that decides its result.

    Attributes:
        steps: training steps; the paper's are two epochs of the data.
        batch_size: examples in one, over all ranks.
        draws: n, arms whose reward each step measures, drawn with replacement.
        preference_rate: learning rate of the preferences.
        reward_share: share of the data set aside for rewards, above 0 and below 1.
        reward_batch: examples that a reward is measured on, over all ranks.
        learning_rate: the peak, of what the method adds; warmed up and then decayed linearly to 0.
        head_rate: the peak for the new head and ``modules_to_save``; ten times ``learning_rate`` when None.
        warmup: share of the steps that warm up.
        max_grad_norm: gradients are clipped to it.
        save_every: steps between two checkpoints.
        seed: of the arms, the batches and dropout.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    steps: int
    batch_size: int = 32
    draws: int = 5
    preference_rate: float = 0.005
    reward_share: float = 0.1
    reward_batch: int = 32
    learning_rate: float = 1e-4
    head_rate: float | None = None
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "draws", "reward_batch", "save_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a number from 1, got {value!r}")
        if not 0 < self.reward_share < 1:
            raise ValueError(f"reward_share: expected a share above 0 and below 1, got {self.reward_share!r}")


def accuracy(output: Any, batch: Batch) -> float:
    """The paper's reward: 100 times the share of ``labels`` that are the largest of ``output.logits`` [B, answers]."""
    return 100 * (output.logits.argmax(-1) == batch["labels"]).float().mean().item()


class DVPSearch:
    """Finds the layer for ``DVPConfig``: trains all of them in turn, and learns from rewards which is worth most.

    Each step draws one layer uniformly and takes an ordinary step with it; then it measures the rewards of ``draws``
    layers, drawn by the softmax of their preferences, on examples set aside, and moves those preferences. After
    ``run()`` the model is what it was before, bit for bit, for training anew at the layer found.

    Under ``torch.distributed`` the ranks share every batch, their gradients and rewards are averaged, and all draw the
    same layers; ``model`` must not be wrapped and must hold the same weights on every rank.

    Args:
        model: what ``get_fast_prompt_model`` takes, without adapters.
        config: the settings to search with; its ``layer`` is not looked at. Its output must have ``loss`` and
            ``logits``, as with ``num_answers`` set.
        examples: training data, map-style; an item is what ``collate`` takes. Never the data to be tested on.
        settings: how the search goes.
        collate: makes a list of items the keyword arguments of ``model``.
        reward: the worth of a model's output for a batch; the more the better. One that is not finite is skipped.
        directory: for checkpoints, made if missing; ``run()`` goes on from the one in there, if any. None: no
            checkpoints.

    Attributes:
        bandit: the preferences, and the draws.
        history: the preferences after every step so far, float64 [steps, layers].

    Raises:
        ValueError: too few examples; the message says how many.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DVPConfig,
        examples: Examples,
        settings: SearchSettings,
        *,
        collate: Callable[[list[Any]], Batch] = default_collate,
        reward: Callable[[Any, Batch], float] = accuracy,
        directory: Path | str | None = None,
    ) -> None:
        self.model: Any = model
        self.config = config
        self.examples = examples
        self.settings = settings
        self.collate = collate
        self.reward = reward
        self.directory = None if directory is None else Path(directory)
        layers = len(find_target(model).blocks)
        self.bandit = Bandit(layers, "softmax", settings.preference_rate, settings.seed)
        self.history = torch.empty(0, layers, dtype=torch.float64)
        self._shared_seed = ranks.from_first(settings.seed)
        aside = int(settings.reward_share * len(examples))
        if aside < settings.reward_batch or len(examples) - aside < settings.batch_size:
            raise ValueError(
                f"examples: {len(examples)} give {aside} for rewards and {len(examples) - aside} to train on, fewer "
                f"than a batch ({settings.reward_batch} and {settings.batch_size})"
            )
        shuffled = torch.randperm(len(examples), generator=self._generator("split"))
        self._rewarding, self._training = shuffled.split([aside, len(examples) - aside])

    @property
    def layer(self) -> int:
        """The layer of the largest preference so far."""
        return self.bandit.best()[0]

    def run(self) -> DVPConfig:
        """Search, or go on with a search that was interrupted, which then ends as it would have without that.

        Returns:
            the config, with ``layer`` the one found.

        Raises:
            ValueError: the checkpoint in ``directory`` is another search's.
        """
        with seeded(self._seed("arms")):
            arms = Arms(self.model, self.config, len(self.bandit.preferences))
        with arms:
            optimizer = self._optimizer(arms)
            self._resume(arms, optimizer)
            done, steps = len(self.history), self.settings.steps
            with _progress(done, steps) as bar:
                for step in range(done, steps):
                    self._train_step(step, arms, optimizer)
                    self._reward_step(step, arms)
                    self.history = torch.cat([self.history, self.bandit.preferences[None]])
                    if (step + 1) % self.settings.save_every == 0 or step + 1 == steps:
                        self._save(arms, optimizer)
                    bar.set_postfix_str(f"layer {self.layer} leads", refresh=False)
                    bar.update()
        return dataclasses.replace(self.config, layer=self.layer)

    def plot(self, path: Path | str) -> None:
        """Draw the preferences over time into ``path`` (PNG, PDF or SVG); needs matplotlib."""
        plot_preferences(self.history, path)

    # A step

    def _optimizer(self, arms: Arms) -> torch.optim.Optimizer:
        groups = arms.parameter_groups(self.settings.learning_rate, self.settings.head_rate)
        for group in groups:
            group["peak"] = group["lr"]
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def _train_step(self, step: int, arms: Arms, optimizer: torch.optim.Optimizer) -> None:
        """One ordinary update with one layer."""
        arms.use(self.bandit.draw_uniform())
        self.model.train()
        with seeded(self._seed("dropout", step, ranks.number())):
            self.model(**self._batch(self._positions(step))).loss.backward()
        for group in optimizer.param_groups:
            ranks.average_gradients(group["params"])
            nn.utils.clip_grad_norm_(group["params"], self.settings.max_grad_norm)
            group["lr"] = group["peak"] * self._decay(step)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def _reward_step(self, step: int, arms: Arms) -> None:
        """Rewards of some layers on the same examples, and what they teach."""
        drawn = self.bandit.draw(self.settings.draws)
        chosen = torch.randperm(len(self._rewarding), generator=self._generator("reward", step))
        batch = self._batch(self._rewarding[chosen[: self.settings.reward_batch]])
        self.model.eval()
        rewards = {}
        for layer in dict.fromkeys(drawn):
            arms.use(layer)
            rewards[layer] = self.reward(self.model(**batch), batch)
        self.bandit.update([[layer] for layer in drawn], [rewards[layer] for layer in drawn])

    def _batch(self, positions: Tensor) -> Batch:
        """This rank's share of the examples at ``positions``, on the model's device."""
        own = positions[ranks.number() :: ranks.count()].tolist()
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in self.collate([self.examples[i] for i in own]).items()}

    def _positions(self, step: int) -> Tensor:
        """Of a step's batch: each epoch goes through the training part once, in an order of its own."""
        epoch, index = divmod(step, len(self._training) // self.settings.batch_size)
        order = torch.randperm(len(self._training), generator=self._generator("epoch", epoch))
        return self._training[order[index * self.settings.batch_size :][: self.settings.batch_size]]

    def _decay(self, step: int) -> float:
        """Share of the peak learning rate: a linear rise, then a linear fall to almost 0."""
        rise = max(1, int(self.settings.warmup * self.settings.steps))
        return min((step + 1) / rise, (self.settings.steps - step) / (self.settings.steps - rise + 1))

    def _generator(self, *purpose: object) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(*purpose))

    def _seed(self, *purpose: object) -> int:
        """Independent for every purpose, so that a search taken up again needs no generator's state."""
        digest = hashlib.sha256(repr((self._shared_seed, *purpose)).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    # Checkpoints

    def _save(self, arms: Arms, optimizer: torch.optim.Optimizer) -> None:
        """Everything that decides what comes next, by the first rank."""
        if self.directory is None or ranks.number() != 0:
            return
        tensors = {"history": self.history}
        tensors |= {f"bandit.{name}": value for name, value in self.bandit.state_dict().items()}
        for name, parameter in arms.parameters().items():
            tensors[f"parameter.{name}"] = parameter
            tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        write_atomically(
            {
                self.directory / STATE_NAME: tensor_bytes(tensors),
                self.directory / SETTINGS_NAME: (json.dumps(self._identity(), indent=2) + "\n").encode(),
            }
        )

    def _resume(self, arms: Arms, optimizer: torch.optim.Optimizer) -> None:
        """Go on from the checkpoint in the directory, if there is one."""
        if self.directory is None or not (self.directory / STATE_NAME).exists():
            return
        self._check_same(read_json(self.directory / SETTINGS_NAME))
        tensors, parameters = read_tensors(self.directory / STATE_NAME), arms.parameters()
        self.history = tensors["history"]
        self.bandit.load_state_dict(_under("bandit.", tensors))
        with torch.no_grad():
            for name, value in _under("parameter.", tensors).items():
                parameters[name].copy_(value)
        for name, value in _under("optimizer.", tensors).items():
            key, _, parameter = name.partition(".")
            owner = parameters[parameter]
            optimizer.state[owner][key] = value if key == "step" else value.to(owner.device)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a search that goes on from it."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "config": self.config.to_dict(),
            "layers": len(self.bandit.preferences),
            "examples": len(self.examples),
        }

    def _check_same(self, there: dict[str, Any]) -> None:
        here = json.loads(json.dumps(self._identity()))
        different = [name for name in here if here[name] != there.get(name)]
        if different:
            found = "; ".join(f"{name} {there.get(name)} there, {here[name]} here" for name in different)
            raise ValueError(f"directory: {self.directory} holds another search's checkpoint: {found}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which torch draws from ``seed``; afterwards its generators are where they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _progress(done: int, steps: int) -> "tqdm[Any]":
    """A progress bar on stderr; none where that is no terminal."""
    return tqdm(desc="layer search", initial=done, total=steps, unit="step", file=sys.stderr, disable=None)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
