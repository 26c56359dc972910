"""Whole runs on real data, end to end: `TASKS` by name, each a module with `run(output, seed) -> report.Results`.

Those in `SEARCHES` also take `search=True`.
"""

import importlib
import importlib.util
from pathlib import Path

from fast_prompt.demo.report import Results

# Name of a task -> the module that runs it.
TASKS = {
    "digits-vqa": "fast_prompt.demo.vqa.task",
    "digits-skip": "fast_prompt.demo.vqa.skipping",
    "digits-transfer": "fast_prompt.demo.transfer",
}

# Tasks that can look for the layer their prompts do best at.
SEARCHES = ("digits-vqa",)

# The largest image that is decoded, unless one asks for more: three bytes a pixel in memory, and a second or two.
MOST_PIXELS = 50_000_000

# Module -> the distribution that carries it.
REQUIREMENTS = {
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "peft": "peft",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
    "transformers": "transformers",
}


def run(task: str, output: Path, seed: int = 0, **options: bool) -> Results:
    """Runs one task.

    Args:
        task: a name in `TASKS`.
        output: directory for all that the run writes; made if missing.
        seed: of everything that is drawn.
        options: `search`, for a task that has it.

    Raises:
        ModuleNotFoundError: packages are missing; `name` holds them.
    """
    _check_requirements()
    return importlib.import_module(TASKS[task]).run(output, seed, **options)


def answer(adapter: Path, image: Path, question: str, max_pixels: int = MOST_PIXELS) -> dict[str, float]:
    """Asks an adapter that the task `digits-vqa` saved one question about one image.

    Args:
        adapter: the directory.
        image: the image's file.
        question: in English.
        max_pixels: a larger image is refused before it is decoded; up to 178,956,970.

    Returns:
        every answer's probability, the likeliest first.

    Raises:
        ModuleNotFoundError: packages are missing; `name` holds them.
        FileNotFoundError, ValueError: the adapter, the image or the question cannot be used; the message says why.
    """
    _check_requirements()
    return importlib.import_module("fast_prompt.demo.vqa.answering").answer(adapter, image, question, max_pixels)


def _check_requirements() -> None:
    missing = [package for module, package in REQUIREMENTS.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        raise ModuleNotFoundError(f'missing: {names}; pip install "fast-prompt[demo]"', name=names)
