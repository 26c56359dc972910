"""Real handwritten digits: scikit-learn's `load_digits`, which its package carries (1,797 images of 8x8 pixels)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES = 10
IMAGE_SIZE = 8
BRIGHTEST = 16.0  # load_digits counts inked pixels in 4x4 cells, so its grey levels are 0..16


@dataclass(frozen=True)
class Images:
    """Some of the digits.

    Attributes:
        pixels: [n, 1, 8, 8] float32 in [-1, 1].
        labels: [n] int64, counted from 0 in the order of the classes that were asked for.
        positions: [n] int64, each image's place in `load_digits`.
    """

    pixels: Tensor
    labels: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Splits(NamedTuple):
    """Disjoint parts of the images of some classes: to train on, to choose settings by, and to test once."""

    train: Images
    validation: Images
    test: Images


def load_splits(classes: tuple[int, ...], train: int, validation: int, seed: int) -> Splits:
    """Draws disjoint, class-balanced splits of the digits.

    Args:
        classes: the digits to keep; label i is `classes[i]`.
        train, validation: images of each class in these two splits. All others are the test split.
        seed: of the draw.

    Raises:
        ValueError: a class has too few images to leave any for the test.
    """
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) / (BRIGHTEST / 2) - 1
    targets = torch.from_numpy(digits.target).long()
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for digit in classes:
        positions = (targets == digit).nonzero().flatten()
        if train + validation >= len(positions):
            raise ValueError(
                f"{train} + {validation} images of digit {digit} leave none of its {len(positions)} to test"
            )
        shuffled = positions[torch.randperm(len(positions), generator=generator)]
        sizes = [train, validation, len(positions) - train - validation]
        for part, drawn in zip(parts, shuffled.split(sizes), strict=True):
            part.append(drawn)

    label_of = torch.full((CLASSES,), -1)
    label_of[list(classes)] = torch.arange(len(classes))

    def images(part: list[Tensor]) -> Images:
        positions = torch.cat(part)
        return Images(pixels[positions], label_of[targets[positions]], positions)

    return Splits(*map(images, parts))
