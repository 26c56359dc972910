"""Images of three real handwritten digits side by side, and English questions about them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fast_prompt.demo import digits
from fast_prompt.demo.vqa.settings import Settings

SLOTS = 3
IMAGE_HEIGHT, IMAGE_WIDTH = digits.IMAGE_SIZE, SLOTS * digits.IMAGE_SIZE

# Every question, and its answer for the digits in an image from left to right.
QUESTIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "what is the left digit?": lambda shown: shown[0],
    "what is the middle digit?": lambda shown: shown[1],
    "what is the right digit?": lambda shown: shown[2],
    "which digit is the largest?": max,
    "which digit is the smallest?": min,
    "how many digits are greater than three?": lambda shown: sum(digit > 3 for digit in shown),
    "how many digits are greater than five?": lambda shown: sum(digit > 5 for digit in shown),
    "how many digits are greater than six?": lambda shown: sum(digit > 6 for digit in shown),
    "how many digits are even?": lambda shown: sum(digit % 2 == 0 for digit in shown),
    "how many digits are odd?": lambda shown: sum(digit % 2 == 1 for digit in shown),
}


@dataclass(frozen=True)
class Asked:
    """Some questions, each about an image of its own.

    Attributes:
        pixels: [n, 1, 8, 24] float32 in [-1, 1].
        questions: n English questions.
        answers: n answers, in words of the vocabulary.
        positions: [n, 3] int64, each digit's place in `load_digits`.
    """

    pixels: Tensor
    questions: list[str]
    answers: list[str]
    positions: Tensor

    def __len__(self) -> int:
        return len(self.questions)

    def part(self, start: int, stop: int) -> "Asked":
        """Those from `start` up to `stop`."""
        chosen = slice(start, stop)
        return Asked(self.pixels[chosen], self.questions[chosen], self.answers[chosen], self.positions[chosen])


class Splits(NamedTuple):
    """Questions about disjoint sets of digits."""

    train: Asked
    validation: Asked
    test: Asked


def digit_splits(settings: Settings, seed: int) -> digits.Splits:
    """Disjoint, class-balanced splits of the single digits."""
    classes = tuple(range(digits.CLASSES))
    return digits.load_splits(classes, settings.train_per_class, settings.validation_per_class, seed)


def load_splits(settings: Settings, seed: int) -> Splits:
    """Draws the questions of every split, and the digits they are about, from `seed`."""
    counts = (settings.train_questions, settings.validation_questions, settings.test_questions)
    generator = torch.Generator().manual_seed(seed)
    parts = digit_splits(settings, seed)
    return Splits(*(ask(part, count, generator) for part, count in zip(parts, counts, strict=True)))


def ask(images: digits.Images, count: int, generator: torch.Generator) -> Asked:
    """`count` questions about images of three of the digits each, all drawn uniformly."""
    chosen = draw_triples(images, count, generator)
    questions = [list(QUESTIONS)[index] for index in torch.randint(len(QUESTIONS), (count,), generator=generator)]
    shown = images.labels[chosen].tolist()
    answers = [str(QUESTIONS[question](triple)) for question, triple in zip(questions, shown, strict=True)]
    return Asked(side_by_side(images.pixels[chosen]), questions, answers, images.positions[chosen])


def draw_triples(images: digits.Images, count: int, generator: torch.Generator) -> Tensor:
    """`count` triples of digits, drawn with replacement: indices [count, 3] into `images`."""
    return torch.randint(len(images), (count, SLOTS), generator=generator)


def side_by_side(pixels: Tensor) -> Tensor:
    """Single digits [n, 3, 1, 8, 8] to images [n, 1, 8, 24], the first at the left."""
    return torch.cat(pixels.unbind(1), dim=-1)
