"""The image encoder's two files: nothing is built of them until the config is known and fits the weights."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTModel
from transformers.activations import ACT2FN

from fast_prompt.models.foreign_code import check_attention
from fast_prompt.nn.checks import check_bool, check_choice, check_count, check_positive, check_probability
from fast_prompt.tuning.files import open_tensors, read_json, read_tensors, tensor_bytes

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LISTED = 4  # differences that an error names


def _check_sides(name: str, value: object) -> None:
    """A count, or two: height and width."""
    for side in value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]:
        check_count(name, side)


# What a config may say of the model, and how that is checked.
_check_activation = partial(check_choice, choices=tuple(ACT2FN))
SETTINGS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), check_count),
    **dict.fromkeys(("num_channels", "encoder_stride", "pooler_output_size"), check_count),
    **dict.fromkeys(("image_size", "patch_size"), _check_sides),
    **dict.fromkeys(("hidden_act", "pooler_act"), _check_activation),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), check_probability),
    **dict.fromkeys(("initializer_range", "layer_norm_eps"), check_positive),
    "qkv_bias": check_bool,
    "attn_implementation": lambda name, value: None,  # `check_attention` has
}
# What it may say besides, which decides nothing here.
REMARKS = ("model_type", "transformers_version", "architectures", "dtype", "id2label", "label2id", "problem_type")


def file_contents(vision: Any) -> dict[str, bytes]:
    """Both files' contents, by name."""
    return {CONFIG: vision.config.to_json_string().encode(), WEIGHTS: tensor_bytes(vision.state_dict())}


def load(directory: Path) -> Any:
    """The ViTModel that `file_contents` is of.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, the config says what it may not, or the weights are not that model's; the message
            names the file.
    """
    weights = directory / WEIGHTS
    config = _config(directory / CONFIG)
    _check_fit(config, weights)
    vision = ViTModel(config, add_pooling_layer=False)
    vision.load_state_dict(read_tensors(weights))
    if not all(value.isfinite().all() for value in vision.parameters()):
        raise ValueError(f"{weights}: expected finite numbers, got NaN or infinity")
    return vision


def _config(path: Path) -> ViTConfig:
    values = read_json(path)
    check_attention(values, str(path))
    unknown = [name for name in values if name not in SETTINGS and name not in REMARKS]
    if unknown:
        raise ValueError(f"{path}: expected the settings of a ViT, got {', '.join(unknown)} as well")
    if values.get("model_type", ViTConfig.model_type) != ViTConfig.model_type:
        raise ValueError(f"{path}: model_type: expected {ViTConfig.model_type!r}, got {values['model_type']!r}")
    settings = {name: value for name, value in values.items() if name in SETTINGS}
    try:
        for name, value in settings.items():
            SETTINGS[name](name, value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return ViTConfig(**settings)


def _check_fit(config: Any, weights: Path) -> None:
    """Compare the weights' names and shapes, out of the file's header, with a model that has no memory."""
    with open_tensors(weights) as file:
        found = {name: list(entry.shape) for name, entry in file.entries.items()}
    if config.num_hidden_layers > len(found):
        raise ValueError(f"{weights}: {len(found)} tensors are too few for {config.num_hidden_layers} layers")
    try:
        with torch.device("meta"):
            expected = ViTModel(config, add_pooling_layer=False).state_dict()
    except Exception as error:  # sizes that do not go together end in errors of many kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{weights.parent / CONFIG}: no ViT can be built of it ({reason})") from error
    shapes = {name: list(value.shape) for name, value in expected.items()}
    names = [name for name in shapes | found if shapes.get(name) != found.get(name)]
    if names:
        listed = "; ".join(f"{name}: expected {shapes.get(name)}, got {found.get(name)}" for name in names[:LISTED])
        raise ValueError(f"{weights}: does not fit the {CONFIG} beside it: {listed}")
