"""What a demo found: rows of figures, as JSON for programs and as lines for people."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HEADERS = (
    "method",
    "test accuracy",
    "trained parameters",
    "ms/training step",
    "ms/inference batch",
    "added MACs/image",
)


@dataclass(frozen=True)
class Row:
    """One method in one form. A merged or folded row shares its method's training, and has its own inference.

    Attributes:
        accuracy: share of the test images, from 0 to 1.
        trainable_params: number of elements trained, the classifier's included.
        step_ms: median milliseconds of a training step.
        infer_ms: median milliseconds of an inference batch.
        added_macs: multiply-adds an image, in inference, beyond those of the frozen model with its classifier.
    """

    method: str
    accuracy: float
    trainable_params: int
    step_ms: float
    infer_ms: float
    added_macs: int


@dataclass(frozen=True)
class Reload:
    """How the predictions of APT's adapter, saved and loaded into a fresh base, compare with those before."""

    images: int
    equal_predictions: int
    max_logit_difference: float

    @property
    def exact(self) -> bool:
        """Whether every logit came back bit for bit."""
        return self.max_logit_difference == 0.0


@dataclass(frozen=True)
class Results:
    """All that a run found; `facts` says under which conditions, for the record."""

    task: str
    rows: list[Row]
    reload: Reload
    facts: dict[str, object]

    def to_dict(self) -> dict[str, object]:
        """What `results.json` holds."""
        return {
            "task": self.task,
            "rows": [asdict(row) for row in self.rows],
            "reload": asdict(self.reload) | {"exact": self.reload.exact},
            "facts": self.facts,
        }

    def write(self, path: Path) -> None:
        """Writes `results.json`."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def standard_error(accuracy: float, images: int) -> float:
    """How far chance alone moves an accuracy measured on so many images (one standard deviation, as a share)."""
    return math.sqrt(accuracy * (1 - accuracy) / images)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as text under `HEADERS`."""
    return [
        [
            row.method,
            f"{row.accuracy:.1%}",
            f"{row.trainable_params:,}",
            f"{row.step_ms:.1f}",
            f"{row.infer_ms:.1f}",
            f"{row.added_macs:,}",
        ]
        for row in rows
    ]
