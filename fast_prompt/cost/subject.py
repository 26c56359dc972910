"""The models whose cost is counted, by name or by their config."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers  # whose classes load when they are asked for, which takes seconds: never at the top of a module
from torch import Tensor, nn

from fast_prompt.nn import checks

VQA_ANSWERS = 3129


@dataclass(frozen=True)
class Family:
    """What counting must know of an architecture.

    Attributes:
        config: class of its config, whose defaults but for `settings` are the usual size.
        model: class that is built where a config names none.
        text_length: tokens of a text, unless told otherwise.
        positions: the most tokens that a text may have, by the config.
        vision: the part of a config that holds `image_size` and `patch_size`; None of a model for text alone.
        adapter_widths: of DAS's adapters, of a kept block and in the place of a skipped one, as published.
        settings: of the config of the usual size.
        attentions: names of its attentions where they are not known to be such.
    """

    config: str
    model: str
    text_length: int
    positions: Callable[[Any], int]
    vision: Callable[[Any], Any] | None = None
    adapter_widths: tuple[int, int] = (96, 192)
    settings: Mapping[str, Any] = field(default_factory=dict)
    attentions: tuple[str, ...] | None = None


def _positions(config: Any) -> int:
    return config.max_position_embeddings


def _roberta_positions(config: Any) -> int:
    """RoBERTa counts its positions from behind that of the padding."""
    return config.max_position_embeddings - config.pad_token_id - 1


def _itself(config: Any) -> Any:
    return config


def _vision_part(config: Any) -> Any:
    return config.vision_config


# By the ``model_type`` of a config, which is also the name on the command line.
FAMILIES = {
    "meter": Family(
        "MeterConfig",
        "MeterForVisualQuestionAnswering",
        text_length=40,
        positions=lambda config: _roberta_positions(config.text_config),
        vision=_vision_part,
        adapter_widths=(96, 288),
    ),
    "vilt": Family(
        "ViltConfig",
        "ViltForQuestionAnswering",
        text_length=40,
        positions=_positions,
        vision=_itself,
        settings={"num_labels": VQA_ANSWERS},
    ),
    "bert": Family("BertConfig", "BertModel", text_length=16, positions=_positions),
    "roberta": Family(
        "RobertaConfig",
        "RobertaModel",
        text_length=16,
        positions=_roberta_positions,
        settings={"max_position_embeddings": 514},
    ),
    "clip": Family(
        "CLIPConfig",
        "CLIPModel",
        text_length=77,
        positions=lambda config: _positions(config.text_config),
        vision=_vision_part,
        settings={"vision_config": {"patch_size": 16}},
    ),
    "llama": Family(
        "LlamaConfig",
        "LlamaForCausalLM",
        text_length=512,
        positions=_positions,
        adapter_widths=(64, 256),
        attentions=("self_attn",),
    ),
}


def _class(name: str) -> Any:
    """A class of transformers, or of our METER; None where there is none of that name."""
    module = importlib.import_module("fast_prompt.models.meter") if name.startswith("Meter") else transformers
    return getattr(module, name, None)


@dataclass(frozen=True)
class Subject:
    """A model to count, and the size of what it gets.

    Attributes:
        name: as it was asked for.
        family: its architecture.
        config: its own config, of the image size asked for.
        text_length: tokens of a text.
        image_size: side of an image, None where it takes none.
        batch: B.
    """

    name: str
    family: Family
    config: Any
    text_length: int
    image_size: int | None
    batch: int

    def model(self) -> nn.Module:
        """A new one: frozen, in eval mode."""
        named = next(iter(self.config.architectures or []), "")
        model = (_class(named) or _class(self.family.model))(self.config)
        if self.config.model_type == "vilt":
            _take_every_patch(model)
        return model.requires_grad_(False).eval()

    def inputs(self) -> dict[str, Tensor]:
        """Texts, and images if it takes them."""
        given = {"input_ids": torch.zeros(self.batch, self.text_length, dtype=torch.long)}
        if self.image_size is not None:
            given["pixel_values"] = torch.zeros(self.batch, 3, self.image_size, self.image_size)
        return given


def find_subject(
    name: str, *, image_size: int | None = None, text_length: int | None = None, batch: int = 1
) -> Subject:
    """The model called `name`: a key of `FAMILIES` for its usual size, or a directory with a `config.json`.

    Args:
        name: what to count.
        image_size: side of an image, that of the config when None.
        text_length: tokens of a text, the usual number when None.
        batch: B; what all samples share is divided among them.

    Raises:
        ValueError: the model is unknown, or cannot take these sizes; the message says which it can.
    """
    family, config = _find(name)
    length = family.text_length if text_length is None else text_length
    checks.check_count("text_length", length, family.positions(config))
    checks.check_count("batch", batch)
    return Subject(name, family, config, length, _resize(name, family, config, image_size), batch)


def _find(name: str) -> tuple[Family, Any]:
    if name in FAMILIES:
        family = FAMILIES[name]
        return family, _class(family.config)(**family.settings)
    path = Path(name) / "config.json"
    if not Path(name).is_dir():
        raise ValueError(f"model: expected {', '.join(FAMILIES)} or a directory with a config.json, got {name!r}")
    if not path.is_file():
        raise ValueError(f"model: there is no config.json in {name}")
    try:
        kind = json.loads(path.read_bytes()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"model: {path} is no config of transformers ({error})") from error
    if kind not in FAMILIES:
        raise ValueError(f"model: {path}: expected the model_type {', '.join(FAMILIES)}, got {kind!r}")
    return FAMILIES[kind], _class(FAMILIES[kind].config).from_pretrained(name)


def _resize(name: str, family: Family, config: Any, image_size: int | None) -> int | None:
    """Set the config's image size, and give it back."""
    if family.vision is None:
        if image_size is not None:
            raise ValueError(f"image_size: {name} takes no images")
        return None
    vision = family.vision(config)
    if image_size is not None:
        checks.check_count("image_size", image_size)
        if image_size % vision.patch_size:
            raise ValueError(f"image_size: expected a multiple of the patch size {vision.patch_size}, got {image_size}")
        vision.image_size = image_size
    return int(vision.image_size)


def _take_every_patch(model: nn.Module) -> None:
    """Let a ViLT embed square images without looking at their pixels: the patches of all, in order.

    Its own forward draws the patches' order and drops those that a mask hides, for which it must know their values.
    """
    for module in model.modules():
        if hasattr(module, "visual_embed"):
            module.visual_embed = partial(_embed_every_patch, module)  # type: ignore[assignment]


def _embed_every_patch(self: Any, pixel_values: Tensor, pixel_mask: Tensor, max_image_length: int) -> Any:
    patches = self.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
    tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.position_embeddings
    return tokens, tokens.new_ones(tokens.shape[:2]), None
