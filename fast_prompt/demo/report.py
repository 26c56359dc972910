"""What a demo found: rows of figures, as JSON for programs and as lines for people."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One method in one form. A merged or folded row shares its method's training, and has its own inference.

    Attributes:
        accuracy: share of the tests passed, from 0 to 1.
        trainable_params: number of elements trained, the classifier's included.
        step_ms: median milliseconds of a training step.
        infer_ms: median milliseconds of inference: of a batch of images, or of a question.
        added_macs: multiply-adds an image or question, in inference, beyond those of the model with its classifier.
    """

    method: str
    accuracy: float
    trainable_params: int
    step_ms: float
    infer_ms: float
    added_macs: int


@dataclass(frozen=True)
class Reload:
    """How the predictions of a method's adapter, saved and loaded into a fresh base, compare with those before.

    Attributes:
        method: the row whose adapter it is.
        tests: how many predictions were compared.
    """

    method: str
    tests: int
    equal_predictions: int
    max_logit_difference: float

    @property
    def exact(self) -> bool:
        """Whether every logit came back bit for bit."""
        return self.max_logit_difference == 0.0


@dataclass(frozen=True)
class Results:
    """All that a run found.

    Attributes:
        units: what `Row.infer_ms` and `Row.added_macs` are counted by, in a word each.
        facts: under which conditions the rows came about, for the record.
        notes: what else there is to tell, in sentences.
        pictures: names of the files drawn.
    """

    task: str
    rows: list[Row]
    reload: Reload
    units: tuple[str, str]
    facts: dict[str, object]
    notes: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ("chart.png",)

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


def standard_error(accuracy: float, tests: int) -> float:
    """How far chance alone moves an accuracy measured on so many tests (one standard deviation, as a share)."""
    return math.sqrt(accuracy * (1 - accuracy) / tests)


def headers(results: Results) -> tuple[str, ...]:
    """The headers of the table's columns."""
    inference, count = results.units
    return (
        "method",
        "test accuracy",
        "trained parameters",
        "ms/training step",
        f"ms/{inference}",
        f"added MACs/{count}",
    )


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as text under `headers`."""
    return [
        [
            row.method,
            f"{row.accuracy:.1%}",
            f"{row.trainable_params:,}",
            f"{row.step_ms:.1f}",
            f"{row.infer_ms:.3g}",
            f"{row.added_macs:,}",
        ]
        for row in rows
    ]
