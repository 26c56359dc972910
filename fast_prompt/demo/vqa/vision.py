"""The image encoder: a small vision transformer, pretrained here on the training digits and then frozen.

It learns to tell the digit in each third of the image from every patch there, and all three from CLS. It never sees
a question.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from fast_prompt.demo import digits
from fast_prompt.demo.base import is_whole, save
from fast_prompt.demo.training import build_optimizer, fit
from fast_prompt.demo.vqa.data import IMAGE_HEIGHT, IMAGE_WIDTH, SLOTS, digit_splits, draw_triples, side_by_side
from fast_prompt.demo.vqa.settings import Settings


class Reader(nn.Module):
    """The encoder with the heads it is pretrained under; they are thrown away afterwards."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder = encoder
        self.patch = nn.Linear(width, SLOTS * digits.CLASSES)
        self.classifier = nn.Linear(width, SLOTS * digits.CLASSES)

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """The loss on pixels [B, 1, 8, 24] with the digits `labels` [B, 3].

        Every patch tells its third and the digit there, one of 30 classes, so that a prompt can look for a third;
        CLS tells all three digits.
        """
        tokens = self.encoder(pixel_values=pixels).last_hidden_state
        patch = self.encoder.config.patch_size
        grid = tokens[:, 1:].unflatten(1, (IMAGE_HEIGHT // patch, SLOTS, -1))  # rows, thirds, columns of a third
        here = labels + digits.CLASSES * torch.arange(SLOTS)
        here = here[:, None, :, None].expand(grid.shape[:-1])
        of_all = self.classifier(tokens[:, 0]).unflatten(1, (SLOTS, -1))
        return F.cross_entropy(self.patch(grid).flatten(0, -2), here.flatten()) + F.cross_entropy(
            of_all.flatten(0, 1), labels.flatten()
        )


def pretrained(directory: Path, settings: Settings, seed: int, on_step: Callable[[], object]) -> Any:
    """The encoder, pretrained into `directory` (which exists), or what an earlier run of the same settings left."""
    path = directory / f"vision-{_fingerprint(settings, seed)}.safetensors"
    torch.manual_seed(seed)
    encoder = new_encoder(settings)
    if not is_whole(path):
        pretrain(encoder, settings, seed, on_step)
        save(encoder, path)
    encoder.load_state_dict(load_file(path))
    return encoder.requires_grad_(False).eval()


def pretrain(encoder: Any, settings: Settings, seed: int, on_step: Callable[[], object]) -> None:
    """Teaches it the digits of images that are drawn from the training digits as they are needed."""
    images, reader = digit_splits(settings, seed).train, Reader(encoder)
    examples = settings.vision_steps * settings.vision_batch
    triples = draw_triples(images, examples, torch.Generator().manual_seed(seed))

    def loss(batch: Tensor) -> Tensor:
        chosen = triples[batch]
        return reader.loss(side_by_side(images.pixels[chosen]), images.labels[chosen])

    optimizer = build_optimizer(reader, settings.vision_rate, settings.vision_rate)
    batches = torch.arange(examples).split(settings.vision_batch)
    fit(reader, optimizer, loss, settings.vision_steps, iter(batches), on_step)


def new_encoder(settings: Settings) -> Any:
    """A `transformers` ViTModel for [B, 1, 8, 24] pixels, with random weights."""
    config = ViTConfig(
        hidden_size=settings.vision_width,
        num_hidden_layers=settings.vision_layers,
        num_attention_heads=settings.vision_heads,
        intermediate_size=4 * settings.vision_width,
        image_size=(IMAGE_HEIGHT, IMAGE_WIDTH),
        patch_size=settings.patch_size,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTModel(config, add_pooling_layer=False)


def _fingerprint(settings: Settings, seed: int) -> str:
    """A digest of all that decides the pretrained weights."""
    decisive = {name: value for name, value in asdict(settings).items() if name.startswith("vision_")}
    decided = (decisive, settings.patch_size, settings.train_per_class, settings.validation_per_class, seed)
    return hashlib.sha256(repr((decided, torch.__version__)).encode()).hexdigest()[:12]
