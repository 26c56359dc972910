"""Training steps that can be interrupted: the same batches, the same dropout and the same result on every rank."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fast_prompt.search import ranks
from fast_prompt.search.settings import TrainingSettings
from fast_prompt.tuning.files import read_json, read_tensors, tensor_bytes, write_atomically

BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01

Batch = Mapping[str, Tensor]
Collate = Callable[[list[Any]], Batch]


class Examples(Protocol):
    """A data set of the kind that ``torch.utils.data`` calls map-style."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Trainable(Protocol):
    """What trains: an adapted model, and its trainable parameters by names that stay the same."""

    model: Any

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that trains, by name."""

    def parameter_groups(self, learning_rate: float, head_rate: float | None) -> list[dict[str, Any]]:
        """An optimizer's."""


class Training:
    """A seeded run of training steps, taken up again from its last checkpoint.

    What a run does around each step, and what it keeps besides the parameters, its subclasses say: ``before_step``,
    ``after_step``, ``state``, ``load_state`` and ``identity``.

    Args:
        model: the base model; what it computes has a ``loss``.
        examples: training data, map-style; an item is what ``collate`` takes.
        settings: how it goes.
        collate: makes a list of items the keyword arguments of ``model``.
        directory: for checkpoints, made if missing; None: no checkpoints.

    Attributes:
        done: steps taken so far.
        skipped_steps: those whose gradients were not finite, and so changed nothing.
    """

    name = "training"

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        settings: TrainingSettings,
        collate: Collate,
        directory: Path | str | None,
    ) -> None:
        self.model: Any = model
        self.examples = examples
        self.settings = settings
        self.collate = collate
        self.directory = None if directory is None else Path(directory)
        self.done = 0
        self.skipped_steps = 0
        self._shared_seed = ranks.from_first(settings.seed)
        self._training = torch.arange(len(examples))

    def before_step(self, step: int) -> None:
        """Called before every training step."""

    def after_step(self, step: int) -> None:
        """Called after every training step."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides parameters and optimizer."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from what ``state`` gave."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run that goes on from it."""
        return {"settings": dataclasses.asdict(self.settings), "examples": len(self.examples)}

    def status(self) -> str:
        """A few words beside the progress bar."""
        return ""

    def train(self, trainable: Trainable) -> None:
        """Takes the steps that are left.

        Raises:
            ValueError: the checkpoint in ``directory`` is another run's.
        """
        optimizer = self._optimizer(trainable)
        self._resume(trainable, optimizer)
        steps = self.settings.steps
        with _progress(self.name, self.done, steps) as bar:
            for step in range(self.done, steps):
                self.before_step(step)
                self._train_step(step, optimizer)
                self.after_step(step)
                self.done = step + 1
                if self.done % self.settings.save_every == 0 or self.done == steps:
                    self._save(trainable, optimizer)
                bar.set_postfix_str(self.status(), refresh=False)
                bar.update()

    def seed(self, *purpose: object) -> int:
        """Independent for every purpose, so that a run taken up again needs no generator's state."""
        digest = hashlib.sha256(repr((self._shared_seed, *purpose)).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def generator(self, *purpose: object) -> torch.Generator:
        """Seeded by that."""
        return torch.Generator().manual_seed(self.seed(*purpose))

    def batch(self, positions: Tensor) -> Batch:
        """This rank's share of the examples at ``positions``, on the model's device."""
        own = positions[ranks.number() :: ranks.count()].tolist()
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in self.collate([self.examples[i] for i in own]).items()}

    # A step

    def _optimizer(self, trainable: Trainable) -> torch.optim.Optimizer:
        groups = trainable.parameter_groups(self.settings.learning_rate, self.settings.head_rate)
        for group in groups:
            group["peak"] = group["lr"]
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def _train_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.model.train()
        with seeded(self.seed("dropout", step, ranks.number())):
            self.model(**self.batch(self._positions(step))).loss.backward()
        norms = []
        for group in optimizer.param_groups:
            ranks.average_gradients(group["params"])
            norms.append(nn.utils.clip_grad_norm_(group["params"], self.settings.max_grad_norm))
            group["lr"] = group["peak"] * self.settings.decay(step)
        if all(norm.isfinite() for norm in norms):  # the same on every rank, as the gradients are
            optimizer.step()
        else:
            self.skipped_steps += 1
        optimizer.zero_grad()

    def _positions(self, step: int) -> Tensor:
        """The positions of a step's batch: each epoch goes through the training part once, in an order of its own."""
        epoch, index = divmod(step, len(self._training) // self.settings.batch_size)
        order = torch.randperm(len(self._training), generator=self.generator("epoch", epoch))
        return self._training[order[index * self.settings.batch_size :][: self.settings.batch_size]]

    # Checkpoints

    def _paths(self, directory: Path) -> tuple[Path, Path]:
        return directory / f"{self.name}.json", directory / f"{self.name}.safetensors"

    def _save(self, trainable: Trainable, optimizer: torch.optim.Optimizer) -> None:
        """Everything that decides what comes next, by the first rank."""
        if self.directory is None or ranks.number() != 0:
            return
        tensors = {"done": torch.tensor(self.done), "skipped_steps": torch.tensor(self.skipped_steps)}
        tensors |= {f"state.{name}": value for name, value in self.state().items()}
        for name, parameter in trainable.parameters().items():
            tensors[f"parameter.{name}"] = parameter
            tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        identity, contents = self._paths(self.directory)
        write_atomically(
            {
                contents: tensor_bytes(tensors),
                identity: (json.dumps(self.identity(), indent=2) + "\n").encode(),
            }
        )

    def _resume(self, trainable: Trainable, optimizer: torch.optim.Optimizer) -> None:
        """Goes on from the checkpoint in the directory, if there is one."""
        if self.directory is None or not self._paths(self.directory)[1].exists():
            return
        identity, contents = self._paths(self.directory)
        self._check_same(read_json(identity))
        tensors, parameters = read_tensors(contents), trainable.parameters()
        self.done, self.skipped_steps = int(tensors["done"]), int(tensors["skipped_steps"])
        self.load_state(_under("state.", tensors))
        with torch.no_grad():
            for name, value in _under("parameter.", tensors).items():
                parameters[name].copy_(value)
        for name, value in _under("optimizer.", tensors).items():
            key, _, parameter = name.partition(".")
            owner = parameters[parameter]
            optimizer.state[owner][key] = value if key == "step" else value.to(owner.device)

    def _check_same(self, there: dict[str, Any]) -> None:
        here = json.loads(json.dumps(self.identity()))
        different = [name for name in here if here[name] != there.get(name)]
        if different:
            found = "; ".join(f"{name} {there.get(name)} there, {here[name]} here" for name in different)
            raise ValueError(f"directory: {self.directory} holds another {self.name}'s checkpoint: {found}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which torch draws from ``seed``; afterwards its generators are where they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _progress(name: str, done: int, steps: int) -> "tqdm[Any]":
    """A progress bar on stderr; none where that is no terminal."""
    return tqdm(desc=name, initial=done, total=steps, unit="step", file=sys.stderr, disable=None)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
