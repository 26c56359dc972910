"""What a step says of itself while it runs, and how it ends other than well."""

import json
from pathlib import Path
from typing import Any


class StepError(RuntimeError):
    """The step ran and found something wrong."""


class AbsentError(RuntimeError):
    """The step needs something that this machine does not have; the message says what."""


class Figures(dict[str, Any]):
    """What a step has found so far, on disk after each ``save``: a step that is cut off loses nothing it had.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def save(self, **found: Any) -> None:
        """Adds figures and writes all of them."""
        self.update(found)
        write_json(self.path, self)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file at once: whoever reads it finds all of the old or all of the new."""
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    fresh.replace(path)
