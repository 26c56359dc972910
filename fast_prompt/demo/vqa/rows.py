"""What the runs on digits-VQA share: the questions, methods trained on them, and a row of figures for each."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fast_prompt.cost.counting import count_macs
from fast_prompt.demo.costs import Contender, median_ms
from fast_prompt.demo.report import Row
from fast_prompt.demo.training import accuracy, batches_by_length, fit, progress, train_step, trained_parameters
from fast_prompt.demo.vqa import language
from fast_prompt.demo.vqa.data import Splits, load_splits
from fast_prompt.demo.vqa.inputs import Encoding, Inputs, batch_loss, lengths, scores, take
from fast_prompt.demo.vqa.methods import Method
from fast_prompt.demo.vqa.settings import Settings
from fast_prompt.demo.vqa.vocabulary import Vocabulary

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
    steps = method.epochs(settings) * -(-questions // settings.batch_size)
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
