"""The task `digits-transfer`: a frozen model that knows the digits 0 to 4 learns 5 to 9 by one method after another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_prompt import __version__
from fast_prompt.cost.counting import count_macs
from fast_prompt.demo import base, chart
from fast_prompt.demo.adaptations import APT, DEEP_PROMPTS, LINEAR_PROBE, LORA, Adaptation
from fast_prompt.demo.costs import Contender, median_ms
from fast_prompt.demo.digits import Splits, load_splits
from fast_prompt.demo.report import Reload, Results, Row
from fast_prompt.demo.settings import Settings
from fast_prompt.demo.training import (
    accuracy,
    build_optimizer,
    fit,
    image_loss,
    logits,
    progress,
    shuffled_batches,
    train_step,
    trained_parameters,
)
from fast_prompt.tuning import FastPromptModel

NAME = "digits-transfer"
NEW_DIGITS = (5, 6, 7, 8, 9)

NewBase = Callable[[], Any]


@dataclass(frozen=True)
class Trained:
    """A method's model, trained at the learning rate that did best on the validation images."""

    adaptation: Adaptation
    model: Any
    rate: float
    validation_accuracy: float
    validation_loss: float

    @property
    def trainable_params(self) -> int:
        """Number of elements that train."""
        return trained_parameters(self.model)


def run(output: Path, seed: int = 0, settings: Settings | None = None) -> Results:
    """Pretrains (or takes the last run's base), adapts by every method, tests, times, and writes the results.

    Args:
        output: directory for `results.json`, `chart.png`, the base's weights and APT's adapter; made if missing.
        seed: of the splits, the weights and the order of the batches.
        settings: the size of the run; the defaults when None.

    Returns:
        what `results.json` holds.
    """
    settings = settings or Settings()
    output.mkdir(parents=True, exist_ok=True)
    with progress("pretraining on 0-4", settings.pretraining_steps) as bar:
        pretrained = base.pretrained(output, settings, seed, bar.update)
    splits = load_splits(NEW_DIGITS, settings.train_per_class, settings.validation_per_class, seed)
    new_base = partial(base.frozen_base, pretrained.path, settings, len(NEW_DIGITS), seed)

    train = partial(_train, new_base=new_base, splits=splits, settings=settings, seed=seed)
    probe = train(LINEAR_PROBE, head_rate=None)
    # Every method's classifier learns at the rate that was best for a classifier alone.
    trained = [probe, *(train(method, head_rate=probe.rate) for method in (DEEP_PROMPTS, LORA, APT))]

    test = splits.test
    scores = {form: _scores(each, form, test.pixels) for each in trained for form in each.adaptation.forms}
    reload = _save_and_reload(trained[-1].model, output / "adapter", new_base, test.pixels)
    accuracies = {form: accuracy(score, test.labels) for form, score in scores.items()}
    rows = _rows(trained, accuracies, new_base(), splits, settings)
    facts = _facts(trained, pretrained, splits, settings, seed)
    results = Results(NAME, rows, reload, ("inference batch", "image"), facts)
    results.write(output / "results.json")
    predictions = {form: score.argmax(-1) for form, score in scores.items()}
    chart.draw(results, splits, predictions, NEW_DIGITS, settings, output / "chart.png")
    return results


def _train(
    adaptation: Adaptation,
    new_base: NewBase,
    splits: Splits,
    settings: Settings,
    seed: int,
    head_rate: float | None,
) -> Trained:
    """Trains once at every learning rate; the best on the validation images, then the surest, is kept.

    `head_rate` is the classifier's own learning rate, if it has one.
    """
    steps = settings.epochs * -(-len(splits.train) // settings.batch_size)
    candidates = []
    with progress(adaptation.name, steps * len(settings.learning_rates)) as bar:
        for rate in settings.learning_rates:
            model = adaptation.adapt(new_base(), settings)
            optimizer = build_optimizer(model, rate, head_rate or rate)
            batches = shuffled_batches(len(splits.train), settings.batch_size, seed)
            fit(model, optimizer, partial(image_loss, model, splits.train), steps, batches, bar.update)
            scores, labels = logits(model, splits.validation.pixels), splits.validation.labels
            loss = F.cross_entropy(scores, labels).item()
            candidates.append(Trained(adaptation, model, rate, accuracy(scores, labels), loss))
        best = max(candidates, key=lambda trained: (trained.validation_accuracy, -trained.validation_loss))
        bar.set_postfix_str(f"validation {best.validation_accuracy:.1%} at rate {best.rate:g}")
    return best


def _scores(trained: Trained, form: str, pixels: Tensor) -> Tensor:
    """Logits [n, classes] of the model in one of its forms."""
    with trained.adaptation.forms[form](trained.model):
        return logits(trained.model, pixels)


def _save_and_reload(model: Any, directory: Path, new_base: NewBase, pixels: Tensor) -> Reload:
    """Saves APT's adapter, loads it into a fresh base, and compares their predictions for `pixels`."""
    before = logits(model, pixels)
    model.save_pretrained(directory)
    after = logits(FastPromptModel.from_pretrained(new_base(), directory), pixels)
    equal = (before.argmax(-1) == after.argmax(-1)).sum().item()
    return Reload(APT.name, len(pixels), int(equal), (before - after).abs().max().item())


def _rows(trained: list[Trained], test: dict[str, float], plain: Any, splits: Splits, settings: Settings) -> list[Row]:
    """One row a form, each method's forms together."""
    batch = splits.test.pixels[: settings.inference_batch]
    plain_macs = count_macs(plain, pixel_values=batch)
    step_ms, infer_ms = _timings(trained, splits, settings)
    rows = []
    for each in trained:
        for form, ready in each.adaptation.forms.items():
            with ready(each.model):
                added_macs = count_macs(each.model, pixel_values=batch) - plain_macs
            rows.append(
                Row(form, test[form], each.trainable_params, step_ms[each.adaptation.name], infer_ms[form], added_macs)
            )
    return rows


def _timings(trained: list[Trained], splits: Splits, settings: Settings) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of each method's training step and of each form's inference batch."""
    train, pixels = splits.train, splits.test.pixels[: settings.inference_batch]
    batch = torch.arange(settings.batch_size)
    steps, inferences = [], []
    for each in trained:
        model = each.model
        optimizer = build_optimizer(model, 0.0, 0.0)  # the same work as any step, and the weights stay
        step = partial(train_step, optimizer, partial(image_loss, model, train, batch))
        steps.append(Contender(each.adaptation.name, partial(_training, model), step))
        for form, ready in each.adaptation.forms.items():
            inferences.append(Contender(form, partial(ready, model), partial(logits, model, pixels)))
    with progress("timing, in turn", 2 * settings.timing_rounds) as bar:
        return (
            median_ms(steps, settings.timing_rounds, bar.update),
            median_ms(inferences, settings.timing_rounds, bar.update),
        )


@contextmanager
def _training(model: Any) -> Iterator[None]:
    model.train()
    yield
    model.eval()


def _facts(
    trained: list[Trained], pretrained: base.Base, splits: Splits, settings: Settings, seed: int
) -> dict[str, object]:
    """Under which conditions the rows came about."""
    return {
        "seed": seed,
        "settings": asdict(settings),
        "images": {name: len(images) for name, images in splits._asdict().items()},
        "base_accuracy": pretrained.accuracy,
        "validation": {
            each.adaptation.name: {"accuracy": each.validation_accuracy, "learning_rate": each.rate} for each in trained
        },
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fast_prompt": __version__,
    }
