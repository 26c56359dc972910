"""What the runs on digits-VQA share: the questions, methods trained on them, and a row of figures for each."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fast_prompt import __version__
from fast_prompt.cost.counting import count_macs
from fast_prompt.demo.costs import Contender, median_ms
from fast_prompt.demo.report import Reload, Row
from fast_prompt.demo.training import accuracy, batches_by_length, fit, progress, train_step, trained_parameters
from fast_prompt.demo.vqa import language, vision
from fast_prompt.demo.vqa.answering import frozen
from fast_prompt.demo.vqa.data import Splits, load_splits
from fast_prompt.demo.vqa.inputs import Encoding, Inputs, batch_loss, lengths, scores, take
from fast_prompt.demo.vqa.methods import Method
from fast_prompt.demo.vqa.settings import Settings
from fast_prompt.demo.vqa.vocabulary import Vocabulary
from fast_prompt.models.visual import VisualEncoder

STANDSTILL = 0.0  # a learning rate at which a step does its work and the weights stay


@dataclass(frozen=True)
class Trained:
    """A method's model, and how it did on the validation questions."""

    method: Method
    model: Any
    validation_accuracy: float


@dataclass(frozen=True)
class Data:
    """The questions of every split, and what the models get of them."""

    splits: Splits
    encoding: Encoding
    train: Inputs
    validation: Inputs
    test: Inputs


def prepare(output: Path, settings: Settings, seed: int) -> tuple[VisualEncoder, Data]:
    """The frozen encoder, pretrained or the last run's, and the questions.

    Raises:
        ModuleNotFoundError: the language model is not installed; nothing has been done then.
    """
    language.directory()
    output.mkdir(parents=True, exist_ok=True)
    with progress("pretraining the ViT", settings.vision_steps) as bar:
        encoder = frozen(vision.pretrained(output, settings, seed, bar.update))
    return encoder, load(encoder, settings, seed)


def load(encoder: nn.Module, settings: Settings, seed: int) -> Data:
    """The questions of a seed, their images encoded."""
    splits = load_splits(settings, seed)
    encoding = Encoding(encoder, language.Reader(), Vocabulary(splits.train.answers))
    return Data(splits, encoding, *map(encoding, splits))


def train(method: Method, data: Data, settings: Settings, seed: int) -> Trained:
    """A method's model, trained, and its accuracy on the validation questions."""
    torch.manual_seed(seed)
    model = method.build(settings, len(data.encoding.vocabulary), seed)
    questions = len(data.splits.train)
    steps = math.ceil(method.epochs(settings) * questions / settings.batch_size)
    with progress(method.name, steps) as bar:
        batches = batches_by_length(lengths(data.train), settings.batch_size, seed)
        loss = partial(batch_loss, model, data.train)
        fit(model, method.optimizer(model, settings), loss, steps, batches, bar.update)
        validation = accuracy(scores(model, data.validation), data.validation["labels"])
        bar.set_postfix_str(f"validation {validation:.1%}")
    return Trained(method, model, validation)


class Examples:
    """Training questions one by one, as a search takes them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs["labels"])

    def __getitem__(self, index: int) -> Inputs:
        return take(self.inputs, torch.tensor(index))


def rows(trained: list[Trained], tested: dict[str, Tensor], data: Data, settings: Settings) -> list[Row]:
    """One row a method; the first is what the others' multiply-adds are added to."""
    batch = take(data.test, slice(settings.batch_size))
    step_ms, infer_ms = _timings(trained, data, settings)
    macs = {each.method.name: count_macs(each.model, **_questions(batch)) for each in trained}
    labels = data.test["labels"]
    return [
        Row(
            name,
            accuracy(tested[name], labels),
            trained_parameters(each.model),
            step_ms[name],
            infer_ms[name] / settings.batch_size,
            macs[name] - macs[trained[0].method.name],
        )
        for each in trained
        for name in [each.method.name]
    ]


def reloaded(name: str, before: Tensor, after: Tensor) -> Reload:
    """How the predictions [n, answers] of a method compare with those of its saved and loaded adapter."""
    equal = int((before.argmax(-1) == after.argmax(-1)).sum())
    return Reload(name, len(before), equal, (before - after).abs().max().item())


def facts(trained: list[Trained], settings: Settings, seed: int, **others: object) -> dict[str, object]:
    """Under which conditions the rows came about."""
    return {
        "seed": seed,
        "settings": asdict(settings),
        **others,
        "validation": {each.method.name: each.validation_accuracy for each in trained},
        "language_model": language.DISTRIBUTION,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fast_prompt": __version__,
    }


def _timings(trained: list[Trained], data: Data, settings: Settings) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of each method's training step, and of inference on a batch of as many questions."""
    positions = torch.arange(settings.batch_size)
    batch = take(data.train, positions)
    still = replace(settings, rate=STANDSTILL, full_rate=STANDSTILL, head_rate=STANDSTILL)
    steps, inferences = [], []
    for each in trained:
        optimizer = each.method.optimizer(each.model, still)
        step = partial(train_step, optimizer, partial(batch_loss, each.model, data.train, positions))
        steps.append(Contender(each.method.name, partial(_training, each.model), step))
        inferences.append(Contender(each.method.name, nullcontext, partial(scores, each.model, batch)))
    with progress("timing, in turn", 2 * settings.timing_rounds) as bar:
        return (
            median_ms(steps, settings.timing_rounds, bar.update),
            median_ms(inferences, settings.timing_rounds, bar.update),
        )


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    model.train()
    yield
    model.eval()


def _questions(inputs: Inputs) -> Inputs:
    return {name: values for name, values in inputs.items() if name != "labels"}
