"""The frozen base: a small vision transformer that has only ever seen the digits 0 to 4.

Five easy classes alone teach a network little that helps with other digits. So it learns to tell both the digit and
which of the square's eight symmetries was applied to the image (as in arXiv 1803.07728, where rotations are told
apart): forty classes out of the same images.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from fast_prompt.demo.digits import IMAGE_SIZE, Images, load_splits
from fast_prompt.demo.settings import Settings
from fast_prompt.demo.training import HEAD, accuracy, build_optimizer, fit, image_loss, logits, shuffled_batches

OLD_DIGITS = (0, 1, 2, 3, 4)
TRAIN_PER_CLASS = 140
BATCH_SIZE = 64
SYMMETRIES = 8


@dataclass(frozen=True)
class Base:
    """The pretrained weights' file, and the share of unseen upright images of the old digits that they get right."""

    path: Path
    accuracy: float
    was_cached: bool


def pretrained(directory: Path, settings: Settings, seed: int, on_step: Callable[[], object]) -> Base:
    """Pretrains the base into `directory`, which exists, or takes the one there of the same settings and seed."""
    path = directory / f"base-{_fingerprint(settings, seed)}.safetensors"
    old = load_splits(OLD_DIGITS, TRAIN_PER_CLASS, 0, seed)
    was_cached = is_whole(path)
    if not was_cached:
        torch.manual_seed(seed)
        model = new_vit(settings, len(OLD_DIGITS) * SYMMETRIES)
        images = in_all_symmetries(old.train)
        optimizer = build_optimizer(model, settings.pretraining_rate, settings.pretraining_rate)
        batches = shuffled_batches(len(images), BATCH_SIZE, seed)
        fit(model, optimizer, partial(image_loss, model, images), settings.pretraining_steps, batches, on_step)
        save(model, path)
    scores = logits(load(path, settings), old.test.pixels)
    upright = scores[:, : len(OLD_DIGITS)]  # symmetry 0 leaves an image as it is
    return Base(path, accuracy(upright, old.test.labels), was_cached)


def in_all_symmetries(images: Images) -> Images:
    """Every image under the square's eight symmetries; symmetry s of digit i of n is the class n*s + i."""
    classes = int(images.labels.max()) + 1
    turned = [torch.rot90(images.pixels, quarter, (-2, -1)) for quarter in range(4)]
    flipped = [pixels.flip(-1) for pixels in turned]
    labels = [images.labels + classes * symmetry for symmetry in range(SYMMETRIES)]
    return Images(torch.cat(turned + flipped), torch.cat(labels), images.positions.repeat(SYMMETRIES))


def new_vit(settings: Settings, num_labels: int) -> Any:
    """A `transformers` ViTForImageClassification for [B, 1, 8, 8] pixels, with random weights."""
    config = ViTConfig(
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.width,
        image_size=IMAGE_SIZE,
        patch_size=settings.patch_size,
        num_channels=1,
        num_labels=num_labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def load(path: Path, settings: Settings) -> Any:
    """The pretrained model as it was saved, its forty classes included."""
    model = new_vit(settings, len(OLD_DIGITS) * SYMMETRIES)
    model.load_state_dict(load_file(path))
    return model.eval()


def frozen_base(path: Path, settings: Settings, num_labels: int, seed: int) -> Any:
    """The pretrained model with a new classifier of `num_labels`, drawn from `seed`, for its own; nothing trains."""
    model = load(path, settings)
    torch.manual_seed(seed)
    setattr(model, HEAD, nn.Linear(settings.width, num_labels))
    model.config.num_labels = model.num_labels = num_labels
    return model.requires_grad_(False)


def save(model: nn.Module, path: Path) -> None:
    """Written beside its place and then moved there, so that a run cut short leaves no broken file."""
    unfinished = path.with_suffix(".unfinished")
    save_file(model.state_dict(), unfinished)
    unfinished.replace(path)


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there and complete."""
    try:
        return bool(load_file(path))
    except (FileNotFoundError, SafetensorError):
        return False


def _fingerprint(settings: Settings, seed: int) -> str:
    """A digest of all that decides the pretrained weights."""
    model = (settings.width, settings.layers, settings.heads, settings.patch_size)
    pretraining = (settings.pretraining_steps, settings.pretraining_rate, TRAIN_PER_CLASS, BATCH_SIZE, seed)
    return hashlib.sha256(repr((model, pretraining, torch.__version__)).encode()).hexdigest()[:12]
