"""A small METER, with an input."""

import torch

from fast_prompt.models.meter import MeterConfig

HEADS, LAYERS, WIDTH, LABELS = 4, 2, 32, 7
TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": 56,
    "image_size": 32,
    "patch_size": 8,
}


def tiny_config(**settings):
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 48}
    defaults = {"num_labels": LABELS, "initializer_range": 0.2}
    return MeterConfig(text_config=dict(TEXT), vision_config=dict(VISION), **{**sizes, **defaults, **settings})


def inputs(image_size=32, dtype=torch.float32):
    """Two questions of 7 and 4 tokens, two images."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 49, (2, 7), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.long)
    ids[1, 4:], mask[1, 4:] = 1, 0
    pixels = torch.randn(2, 3, image_size, image_size, generator=generator).to(dtype)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
