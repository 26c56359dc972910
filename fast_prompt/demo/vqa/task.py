"""The run of `digits-vqa`: encoder, methods, table, adapter saved and loaded, and the search for the layer."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fast_prompt.demo.report import Reload, Results
from fast_prompt.demo.vqa import language, pictures
from fast_prompt.demo.vqa.answering import Answerer
from fast_prompt.demo.vqa.images import write_image
from fast_prompt.demo.vqa.inputs import scores
from fast_prompt.demo.vqa.methods import ADAPTERS, METHODS, adapters
from fast_prompt.demo.vqa.rows import Data, Examples, facts, prepare, reloaded, rows, train
from fast_prompt.demo.vqa.settings import Settings
from fast_prompt.search import DVPSearch, SearchSettings

NAME = "digits-vqa"


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
    encoder, data = prepare(output, settings, seed)
    trained = [train(method, data, settings, seed) for method in METHODS]
    tested = {each.method.name: scores(each.model, data.test) for each in trained}
    table = rows(trained, tested, data, settings)

    chosen = next(each for each in trained if each.method is ADAPTERS)
    answerer = Answerer(chosen.model, encoder, data.encoding.reader, data.encoding.vocabulary)
    reload = _save_and_reload(answerer, output, data, tested[ADAPTERS.name], settings)
    questions = {name: len(asked) for name, asked in data.splits._asdict().items()}
    note = (
        f"Rows that train the language model in full saw the questions {settings.full_epochs:g}x, the others "
        f"{settings.epochs:g}x; the first two leave its word embeddings as they are."
    )
    conditions = facts(trained, settings, seed, questions=questions)
    results = Results(NAME, table, reload, ("question", "question"), conditions, (note,), ("chart.png", "answers.png"))
    if search:
        results = _search(results, data, settings, seed, output)
    results.write(output / "results.json")
    pictures.draw_chart(results, settings, output / "chart.png")
    return results


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
    return reloaded(ADAPTERS.name, before, after)


def _search(results: Results, data: Data, settings: Settings, seed: int, output: Path) -> Results:
    """Looks for the layer with the training questions alone, and says so beside the rows."""
    layers = DVPSearch(
        language.pretrained(),
        adapters(settings, len(data.encoding.vocabulary)),
        Examples(data.train),
        SearchSettings(
            steps=settings.search_steps,
            batch_size=settings.batch_size,
            reward_share=settings.reward_share,
            reward_batch=settings.reward_batch,
            reward_from=settings.reward_from,
            reward_every=settings.reward_every,
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
