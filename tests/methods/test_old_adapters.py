"""Adapters that version 0.1.0 saved load, and give the outputs they gave.

They lie in tests/adapters/0.1.0, one folder each, with the outputs beside the two files. Nothing makes them anew: what
wrote them is gone on purpose. Bases and adapters hold values that follow from their names alone, so no release of
transformers changes them.
"""

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MODELS, build, build_language_model

from fast_prompt import FastPromptModel
from fast_prompt.tolerances import TOLERANCES, relative_error

FOLDER = Path(__file__).parent / "adapters" / "0.1.0"

# By folder: the model that the adapter was made for.
ADAPTERS = {
    "apt": "vit",
    "apt_llama": "llama",
    "das": "roberta_classifier",
    "das_router": "vilt",
    "dvp": "bert",
    "dvp_adapters": "llama_generator",
    "dvp_apt": "t5_generator",
}


def base(name):
    """The model with values that its parameters' names decide, and an input with an image where it takes one."""
    model, inputs = build(name) if name in MODELS else build_language_model(name)
    fill(model.named_parameters())
    return model, inputs


@torch.no_grad()
def fill(named_parameters):
    for name, parameter in named_parameters:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + name.endswith("norm.weight"))


def features():
    return {"visual_embeds": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(6))}


@torch.no_grad()
def output(folder, model, inputs):
    torch.manual_seed(0)
    return model(**inputs, **(features() if folder.startswith("dvp") else {}))[0]


@pytest.mark.parametrize("folder", ADAPTERS)
def test_it_loads_and_gives_what_it_gave(folder):
    model, inputs = base(ADAPTERS[folder])
    alone = output("", model, inputs)
    adapted = FastPromptModel.from_pretrained(model, FOLDER / folder)
    given, expected = output(folder, adapted, inputs), load_file(FOLDER / folder / "outputs.safetensors")["output"]
    assert relative_error(given, expected) <= TOLERANCES[torch.float32]
    assert alone.shape != expected.shape or relative_error(alone, expected) > 100 * TOLERANCES[torch.float32]


def test_every_folder_is_tried():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(ADAPTERS)
