"""The models whose cost is counted, by name or by their config."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers  # whose classes load when they are asked for, which takes seconds: never at the top of a module
from torch import Tensor, nn

from fast_prompt.models.architectures import ARCHITECTURES, Architecture, Counted
from fast_prompt.nn import checks

# By the ``model_type`` of a config, which is also the name on the command line.
COUNTED = {each.model_type: each for each in ARCHITECTURES if each.counted is not None}


def _class(name: str) -> Any:
    """A class of transformers, or of our METER; None where there is none of that name."""
    module = importlib.import_module("fast_prompt.models.meter") if name.startswith("Meter") else transformers
    return getattr(module, name, None)


@dataclass(frozen=True)
class Subject:
    """A model to count, and the size of what it gets.

    Attributes:
        name: as it was asked for.
        architecture: one of ``COUNTED``.
        config: its own config, of the image size asked for.
        text_length: tokens of a text.
        image_size: side of an image, None where it takes none.
        batch: B.
    """

    name: str
    architecture: Architecture
    config: Any
    text_length: int
    image_size: int | None
    batch: int

    @property
    def counted(self) -> Counted:
        """What counting takes."""
        return _counted(self.architecture)

    @property
    def attentions(self) -> list[str] | None:
        """The ``target_modules`` of its attentions, where they go by name; None where they are known by class."""
        return list(self.architecture.named_attentions) or None

    def model(self) -> nn.Module:
        """A new one: frozen, in eval mode."""
        named = next(iter(self.config.architectures or []), "")
        model = (_class(named) or _class(self.counted.model))(self.config)
        if self.counted.prepare is not None:
            self.counted.prepare(model)
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
    """The model called `name`: a key of `COUNTED` for its usual size, or a directory with a `config.json`.

    Args:
        name: what to count.
        image_size: side of an image, that of the config when None.
        text_length: tokens of a text, the usual number when None.
        batch: B; what all samples share is divided among them.

    Raises:
        ValueError: the model is unknown, or cannot take these sizes; the message says which it can.
    """
    architecture, config = _find(name)
    counted = _counted(architecture)
    length = counted.text_length if text_length is None else text_length
    checks.check_count("text_length", length, counted.positions(config))
    checks.check_count("batch", batch)
    return Subject(name, architecture, config, length, _resize(name, counted, config, image_size), batch)


def _counted(architecture: Architecture) -> Counted:
    assert architecture.counted is not None
    return architecture.counted


def _find(name: str) -> tuple[Architecture, Any]:
    if name in COUNTED:
        counted = _counted(COUNTED[name])
        return COUNTED[name], _class(counted.config)(**counted.settings)
    path = Path(name) / "config.json"
    if not Path(name).is_dir():
        raise ValueError(f"model: expected {', '.join(COUNTED)} or a directory with a config.json, got {name!r}")
    if not path.is_file():
        raise ValueError(f"model: there is no config.json in {name}")
    try:
        kind = json.loads(path.read_bytes()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"model: {path} is no config of transformers ({error})") from error
    if kind not in COUNTED:
        raise ValueError(f"model: {path}: expected the model_type {', '.join(COUNTED)}, got {kind!r}")
    return COUNTED[kind], _class(_counted(COUNTED[kind]).config).from_pretrained(name)


def _resize(name: str, counted: Counted, config: Any, image_size: int | None) -> int | None:
    """Set the config's image size, and give it back."""
    if counted.vision is None:
        if image_size is not None:
            raise ValueError(f"image_size: {name} takes no images")
        return None
    vision = counted.vision(config)
    if image_size is not None:
        checks.check_count("image_size", image_size)
        if image_size % vision.patch_size:
            raise ValueError(f"image_size: expected a multiple of the patch size {vision.patch_size}, got {image_size}")
        vision.image_size = image_size
    return int(vision.image_size)
