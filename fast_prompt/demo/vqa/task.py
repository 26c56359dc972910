"""The run of `digits-vqa`: encoder, methods, table, adapter saved and loaded, and the search for the layer."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fast_prompt import __version__
from fast_prompt.demo.costs import Contender, count_macs, median_ms
from fast_prompt.demo.report import Reload, Results, Row
from fast_prompt.demo.training import accuracy, fit, progress, shuffled_batches, train_step, trained_parameters
from fast_prompt.demo.vqa import language, pictures, vision
from fast_prompt.demo.vqa.answering import Answerer, frozen, write_image
from fast_prompt.demo.vqa.data import Splits, load_splits
from fast_prompt.demo.vqa.inputs import Encoding, Inputs, batch_loss, scores, take
from fast_prompt.demo.vqa.methods import ADAPTERS, METHODS, QUESTION_ONLY, Method, adapters
from fast_prompt.demo.vqa.settings import Settings
from fast_prompt.demo.vqa.vocabulary import Vocabulary
from fast_prompt.search import DVPSearch, SearchSettings

NAME = "digits-vqa"
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


def run(output: Path, seed: int = 0, search: bool = False, settings: Settings | None = None) -> Results:
    """Pretrains the encoder (or takes the last run's), trains every method, tests, times, and writes the results.

    Args:
        output: directory for `results.json`, the pictures, the encoder, the adapter and a few images to ask about; made
            if missing.
        seed: of the splits, the weights and the order of the batches.
        search: whether to look for the layer as well, after the rows.
        settings: the size of the run; the defaults when None.

    Returns:
        what `results.json` holds.

    Raises:
        ModuleNotFoundError: the language model is not installed; nothing has been done then.
    """
    settings = settings or Settings()
    language.directory()
    output.mkdir(parents=True, exist_ok=True)
    with progress("pretraining the ViT", settings.vision_steps) as bar:
        encoder = frozen(vision.pretrained(output, settings, seed, bar.update))
    data = _load(encoder, settings, seed)
    trained = [_train(method, data, settings, seed) for method in METHODS]
    tested = {each.method.name: scores(each.model, data.test) for each in trained}
    rows = _rows(trained, tested, data, settings)

    chosen = next(each for each in trained if each.method is ADAPTERS)
    answerer = Answerer(chosen.model, encoder, data.encoding.reader, data.encoding.vocabulary)
    reload = _save_and_reload(answerer, output, data, tested[ADAPTERS.name], settings)
    facts = _facts(trained, data, settings, seed)
    note = (
        f"Rows that train the language model in full saw the questions {settings.full_epochs}x, the others "
        f"{settings.epochs}x."
    )
    results = Results(NAME, rows, reload, ("question", "question"), facts, (note,), ("chart.png", "answers.png"))
    if search:
        results = _search(results, data, settings, seed, output)
    results.write(output / "results.json")
    pictures.draw_chart(results, settings, output / "chart.png")
    return results


def _load(encoder: nn.Module, settings: Settings, seed: int) -> Data:
    splits = load_splits(settings, seed)
    encoding = Encoding(encoder, language.Reader(), Vocabulary(splits.train.answers))
    return Data(splits, encoding, *map(encoding, splits))


def _train(method: Method, data: Data, settings: Settings, seed: int) -> Trained:
    torch.manual_seed(seed)
    model = method.build(settings, len(data.encoding.vocabulary), seed)
    questions = len(data.splits.train)
    steps = method.epochs(settings) * -(-questions // settings.batch_size)
    with progress(method.name, steps) as bar:
        batches = shuffled_batches(questions, settings.batch_size, seed)
        loss = partial(batch_loss, model, data.train)
        fit(model, method.optimizer(model, settings), loss, steps, batches, bar.update)
        validation = accuracy(scores(model, data.validation), data.validation["labels"])
        bar.set_postfix_str(f"validation {validation:.1%}")
    return Trained(method, model, validation)


def _save_and_reload(answerer: Answerer, output: Path, data: Data, before: Tensor, settings: Settings) -> Reload:
    """Saves the adapter, loads it into a fresh base, compares all predictions, and lets it answer a few questions."""
    answerer.save(output / "adapter")
    loaded = Answerer.load(output / "adapter")
    after = scores(loaded.model, data.test)
    shown = data.splits.test.part(0, settings.shown)
    answers = [
        loaded.probabilities(pixels, question) for pixels, question in zip(shown.pixels, shown.questions, strict=True)
    ]
    pictures.draw_answers(shown, answers, output / "answers.png")
    (output / "images").mkdir(exist_ok=True)
    for number, pixels in enumerate(shown.pixels):
        write_image(pixels, output / "images" / f"{number}.png")
    equal = int((before.argmax(-1) == after.argmax(-1)).sum())
    return Reload(ADAPTERS.name, len(before), equal, (before - after).abs().max().item())


def _rows(trained: list[Trained], tested: dict[str, Tensor], data: Data, settings: Settings) -> list[Row]:
    """One row a method."""
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
            macs[name] - macs[QUESTION_ONLY.name],
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


class _Examples:
    """Training questions one by one, as a search takes them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs["labels"])

    def __getitem__(self, index: int) -> Inputs:
        return take(self.inputs, torch.tensor(index))


def _search(results: Results, data: Data, settings: Settings, seed: int, output: Path) -> Results:
    """Looks for the layer with the training questions alone; a row more where it is not the one of the other rows."""
    layers = DVPSearch(
        language.pretrained(),
        adapters(settings, len(data.encoding.vocabulary)),
        _Examples(data.train),
        SearchSettings(
            steps=settings.search_steps,
            batch_size=settings.batch_size,
            reward_share=settings.reward_share,
            reward_batch=settings.reward_batch,
            preference_rate=settings.preference_rate,
            learning_rate=settings.rate,
            head_rate=settings.head_rate,
            seed=seed,
        ),
    )
    found = layers.run()
    layers.plot(output / "search.png")
    note = f"The search found layer {found.layer}; the rows above are of layer {settings.layer}."
    preferences = [round(value, 4) for value in layers.bandit.preferences.tolist()]
    return replace(
        results,
        facts=results.facts | {"search": {"layer": found.layer, "preferences": preferences}},
        notes=(*results.notes, note),
        pictures=(*results.pictures, "search.png"),
    )


def _facts(trained: list[Trained], data: Data, settings: Settings, seed: int) -> dict[str, object]:
    """Under which conditions the rows came about."""
    return {
        "seed": seed,
        "settings": asdict(settings),
        "questions": {name: len(asked) for name, asked in data.splits._asdict().items()},
        "validation": {each.method.name: each.validation_accuracy for each in trained},
        "language_model": language.DISTRIBUTION,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fast_prompt": __version__,
    }
