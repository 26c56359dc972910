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
from fast_prompt.search.checkpoint import (
    OPTIMIZER,
    PARAMETER,
    STATE,
    check_counters,
    check_like,
    check_same,
    not_finite,
    under,
)
from fast_prompt.search.settings import TrainingSettings
from fast_prompt.tuning.files import remove_leftovers
from fast_prompt.tuning.sealed import read_sealed, write_sealed

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
        self._begun = False
        self._shared_seed = ranks.from_first(settings.seed)
        self._training = torch.arange(len(examples))

    def before_step(self, step: int) -> None:
        """Called before every training step."""

    def after_step(self, step: int) -> None:
        """Called after every training step."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides parameters and optimizer."""
        return {}

    def load_state(self, state: dict[str, Tensor], done: int) -> None:
        """Goes on from what ``state`` gave after ``done`` steps; ValueError if it cannot be that, unchanged then."""
        check_like(state, {})

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run that goes on from it."""
        return {"settings": dataclasses.asdict(self.settings), "examples": len(self.examples)}

    def status(self) -> str:
        """A few words beside the progress bar."""
        return ""

    def train(self, trainable: Trainable) -> None:
        """Takes the steps that are left.

        Raises:
            ValueError: the checkpoint in ``directory`` is another run's, or cannot be used; nothing has changed then.
            FloatingPointError: a loss, a gradient or what would be saved is not finite; the last checkpoint stays.
            RuntimeError: it was interrupted before, and there is no checkpoint to go on from.
        """
        steps = self.settings.steps
        optimizer = self._optimizer(trainable)
        resumed = self._resume(trainable, optimizer)
        if self._begun and not resumed and self.done < steps:
            raise RuntimeError(
                f"the {self.name} was interrupted, and what it had trained is in no checkpoint: make it anew"
            )
        self._begun = True
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
        optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY)
        # AdamW makes these when a gradient first comes. Here all are there from the start: a checkpoint then holds the
        # same tensors whatever has been drawn, so that one that is missing is seen.
        for parameter in (each for group in groups for each in group["params"]):
            zeros = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **zeros}
        return optimizer

    def _train_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.model.train()
        with seeded(self.seed("dropout", step, ranks.number())):
            loss = self.model(**self.batch(self._positions(step))).loss
            loss.backward()
        norms = []
        for group in optimizer.param_groups:
            ranks.average_gradients(group["params"])
            norms.append(nn.utils.clip_grad_norm_(group["params"], self.settings.max_grad_norm))
            group["lr"] = group["peak"] * self.settings.decay(step)
        # The same on every rank, as the averaged loss and gradients are.
        if not ranks.mean(loss.detach()).isfinite():
            raise self._diverged(step, "the loss")
        if not all(norm.isfinite() for norm in norms):
            raise self._diverged(step, "a gradient")
        optimizer.step()
        optimizer.zero_grad()

    def _diverged(self, step: int, what: str) -> FloatingPointError:
        rate = self.settings.learning_rate
        return FloatingPointError(
            f"step {step + 1} of {self.settings.steps}: {what} is not finite, so the {self.name} stops; the examples "
            f"of that step may be at fault, or the learning rate ({rate})"
        )

    def _positions(self, step: int) -> Tensor:
        """The positions of a step's batch: each epoch goes through the training part once, in an order of its own."""
        epoch, index = divmod(step, len(self._training) // self.settings.batch_size)
        order = torch.randperm(len(self._training), generator=self.generator("epoch", epoch))
        return self._training[order[index * self.settings.batch_size :][: self.settings.batch_size]]

    # Checkpoints

    def _contents(self, trainable: Trainable, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Everything that decides what comes next: the state copied, parameters and optimizer themselves."""
        tensors = {"done": torch.tensor(self.done)}
        tensors |= {f"{STATE}{name}": value for name, value in self.state().items()}
        for name, parameter in trainable.parameters().items():
            tensors[f"{PARAMETER}{name}"] = parameter
            tensors |= {f"{OPTIMIZER}{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        return tensors

    def _save(self, trainable: Trainable, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint, by the first rank; without a directory only the check that all is finite."""
        tensors = self._contents(trainable, optimizer)
        spoilt = not_finite(tensors)
        if spoilt:
            raise self._diverged(self.done - 1, spoilt[0])
        if self.directory is not None and ranks.number() == 0:
            path = self._path(self.directory)
            write_sealed(path, tensors, self.identity())
            remove_leftovers(path)

    def _resume(self, trainable: Trainable, optimizer: torch.optim.Optimizer) -> bool:
        """Goes on from the checkpoint in the directory; whether there is one."""
        if self.directory is None or not self._path(self.directory).exists():
            return False
        path = self._path(self.directory)
        try:
            self._go_on_from(*read_sealed(path), self._contents(trainable, optimizer))
        except ValueError as error:
            raise ValueError(
                f"{path}: the {self.name} cannot go on from here: {error}. Without that file it starts anew"
            ) from error
        return True

    def _go_on_from(self, found: dict[str, Tensor], identity: dict[str, Any], own: dict[str, Tensor]) -> None:
        """Takes the tensors ``found`` over into this run's ``own``, if they are all that they must be."""
        check_same(identity, json.loads(json.dumps(self.identity())), self.name)
        state = {name: value for name, value in found.items() if name.startswith(STATE)}
        found = {name: value for name, value in found.items() if name not in state}
        own = {name: value for name, value in own.items() if not name.startswith(STATE)}
        check_like(found, own)
        check_counters(found, self.settings.steps)
        done = int(found["done"])
        self.load_state(under(STATE, state), done)
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(found[name])
        self.done = done

    def _path(self, directory: Path) -> Path:
        return directory / f"{self.name}.safetensors"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which torch draws from ``seed``; afterwards its generators are where they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _progress(name: str, done: int, steps: int) -> "tqdm[Any]":
    """A progress bar on stderr; none where that is no terminal."""
    return tqdm(desc=name, initial=done, total=steps, unit="step", file=sys.stderr, disable=None)
