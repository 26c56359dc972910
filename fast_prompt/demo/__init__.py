"""Whole runs on real data, end to end: `TASKS` by name, each a module with `run(output, seed) -> report.Results`."""

import importlib
import importlib.util
from pathlib import Path

from fast_prompt.demo.report import Results

# Name of a task -> the module that runs it.
TASKS = {"digits-transfer": "fast_prompt.demo.transfer"}

# Module -> the distribution that carries it.
REQUIREMENTS = {
    "matplotlib": "matplotlib",
    "peft": "peft",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
    "transformers": "transformers",
}


def run(task: str, output: Path, seed: int = 0) -> Results:
    """Runs one task.

    Args:
        task: a name in `TASKS`.
        output: directory for all that the run writes; made if missing.
        seed: of everything that is drawn.

    Raises:
        ModuleNotFoundError: packages are missing; `name` holds them.
    """
    missing = [package for module, package in REQUIREMENTS.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        raise ModuleNotFoundError(f'missing: {names}; pip install "fast-prompt[demo]"', name=names)
    return importlib.import_module(TASKS[task]).run(output, seed)
