"""The run of `digits-skip`: the blocks of the language model that the questions do not need, and what that saves."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fast_prompt.demo.report import Reload, Results
from fast_prompt.demo.vqa import language, pictures
from fast_prompt.demo.vqa.inputs import scores
from fast_prompt.demo.vqa.methods import Method, visual_config
from fast_prompt.demo.vqa.rows import Data, Examples, Trained, facts, prepare, reloaded, rows, train
from fast_prompt.demo.vqa.settings import Settings
from fast_prompt.methods import APTConfig, DASConfig
from fast_prompt.search import DASSearch, DASSettings
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model
from fast_prompt.tuning.config import MethodConfig

NAME = "digits-skip"
NOTHING_SKIPPED = "None skipped"


@dataclass(frozen=True)
class SkipSettings(Settings):
    """The size of a run of `digits-skip`.

    Attributes:
        num_skipped: k, of the language model's six blocks.
        skip_width: of the adapter in a skipped block's place.
        gate_rate: of the search's gates.
        (The others are those of `digits-vqa`; a run of its own trains four rows.)
    """

    train_questions: int = 5600
    layer: int = 3
    search_steps: int = 400
    reward_from: float = 1 / 3
    reward_every: int = 5
    num_skipped: int = 2
    skip_width: int = 96
    gate_rate: float = 1.0


def run(output: Path, seed: int = 0, settings: SkipSettings | None = None) -> Results:
    """Searches for the blocks to skip, trains with them and with other sets, tests, times, and writes the results.

    Args:
        output: directory for `results.json`, the pictures, the encoder and the adapter; made if missing.
        seed: of the splits, the weights, the order of the batches and the random set.
        settings: the size of the run; the defaults when None.

    Returns:
        what `results.json` holds.

    Raises:
        ModuleNotFoundError: the language model is not installed; nothing has been done then.
    """
    settings = settings or SkipSettings()
    _, data = prepare(output, settings, seed)
    search = _search(data, settings, seed)
    search.run()
    search.plot(output / "search.png")
    sets = _sets(search.skipped, search.candidates, settings, seed)
    trained = [train(_method(name, skipped), data, settings, seed) for name, skipped in sets.items()]
    tested = {each.method.name: scores(each.model, data.test) for each in trained}
    table = rows(trained, tested, data, settings)
    found = trained[1]
    reload = _save_and_reload(found, output / "adapter", data, tested[found.method.name])
    before, after = _compact(found.model)
    conditions = facts(
        trained,
        settings,
        seed,
        skipped={name: [_number(path) for path in skipped] for name, skipped in sets.items()},
        gates=[round(value, 4) for value in search.bandit.preferences.tolist()],
        parameters={"whole": before, "compact": after},
    )
    notes = (
        "Every row has visual prompts, APT and adapters in one; added MACs are against the first.",
        f"Compacted, the model of {found.method.name} holds {after:,} parameters in place of {before:,}.",
    )
    results = Results(NAME, table, reload, ("question", "question"), conditions, notes, ("chart.png", "search.png"))
    results.write(output / "results.json")
    pictures.draw_skips(results, sets, search.candidates, settings, output / "chart.png")
    return results


def configs(settings: SkipSettings, answers: int, skipped: Sequence[str] | None) -> list[MethodConfig]:
    """Visual prompts, APT, and adapters: those of a set of skipped blocks, or, for a search, of every set."""
    chosen = None if skipped is None else list(skipped)
    das = DASConfig(
        skipped=chosen,
        num_skipped=settings.num_skipped,
        width=settings.adapter_width,
        skip_width=settings.skip_width,
    )
    return [visual_config(settings, answers), APTConfig(num_prompts=settings.num_prompts), das]


def unskipped_configs(settings: SkipSettings, answers: int) -> list[MethodConfig]:
    """The same with every block, which has its adapters."""
    visual = visual_config(settings, answers, adapter_width=settings.adapter_width)
    return [visual, APTConfig(num_prompts=settings.num_prompts)]


def _method(name: str, skipped: Sequence[str]) -> Method:
    return Method(name, partial(_build, tuple(skipped)))


def _build(skipped: Sequence[str], settings: Any, answers: int, seed: int) -> nn.Module:
    chosen = configs(settings, answers, skipped) if skipped else unskipped_configs(settings, answers)
    return get_fast_prompt_model(language.pretrained(), chosen)


def _search(data: Data, settings: SkipSettings, seed: int) -> DASSearch:
    return DASSearch(
        language.pretrained(),
        configs(settings, len(data.encoding.vocabulary), None),
        Examples(data.train),
        DASSettings(
            steps=settings.search_steps,
            batch_size=settings.batch_size,
            preference_rate=settings.gate_rate,
            reward_share=settings.reward_share,
            reward_batch=settings.reward_batch,
            reward_from=settings.reward_from,
            reward_every=settings.reward_every,
            learning_rate=settings.rate,
            head_rate=settings.head_rate,
            seed=seed,
        ),
    )


def _sets(found: list[str], candidates: list[str], settings: SkipSettings, seed: int) -> dict[str, list[str]]:
    """The sets to compare, by the names of their rows; one that is another's by chance is left out."""
    k = settings.num_skipped
    drawn = sorted(random.Random(seed).sample(range(len(candidates)), k))
    compared = {
        NOTHING_SKIPPED: [],
        "Found": found,
        "Random": [candidates[index] for index in drawn],
        "Last": candidates[-k:],
    }
    return {name: skipped for name, skipped in compared.items() if name == "Found" or skipped != found}


def _save_and_reload(trained: Trained, directory: Path, data: Data, before: Tensor) -> Reload:
    """Saves the adapter, loads it into a fresh base, and compares all predictions."""
    trained.model.save_pretrained(directory)
    after = scores(FastPromptModel.from_pretrained(language.pretrained(), directory).eval(), data.test)
    return reloaded(trained.method.name, before, after)


def _compact(model: Any) -> tuple[int, int]:
    """Numbers of the model's parameters before and after its skipped blocks' are dropped."""
    before = sum(parameter.numel() for parameter in model.parameters())
    model.compact()
    return before, sum(parameter.numel() for parameter in model.parameters())


def _number(path: str) -> int:
    """A block's number, from its path."""
    return int(path.rpartition(".")[2])
