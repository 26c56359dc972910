"""Where visual prompts enter a model."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fast_prompt.models.architectures import ARCHITECTURES, Architecture, Visual


@dataclass(frozen=True)
class Target:
    """Where visual prompts enter a model.

    Attributes:
        architecture, visual: what is known of the model, and of visual prompts in it.
        stack: path of the module whose blocks they enter.
        width: d.
        num_heads: of its self-attention.
        blocks: paths of those blocks.
        encoder: path of the encoder beside it, or None.
        adapted: paths of the modules where a sublayer's adapter sits, those of the encoder included.
    """

    architecture: Architecture
    visual: Visual
    stack: str
    width: int
    num_heads: int
    blocks: list[str]
    encoder: str | None
    adapted: list[str] = field(default_factory=list)


_BY_CLASS = {name: (each, each.visual) for each in ARCHITECTURES if each.visual for name in each.visual.stacks}


def visual_of(name: str) -> Visual:
    """What is known of visual prompts in the architecture called ``name``."""
    return next(each.visual for each in ARCHITECTURES if each.visual and each.name == name)


def find_target(model: nn.Module) -> Target:
    """Where visual prompts enter ``model``.

    Raises:
        ValueError: the architecture is unknown, or not one that prompts can enter; the message lists those known.
    """
    found = [
        (path, module, *_BY_CLASS[name])
        for path, module in model.named_modules()
        if (name := type(module).__name__) in _BY_CLASS
    ]
    into = [each for each in found if _can_enter(each[1], each[3])]
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise ValueError(f"{type(model).__name__}: expected a model that takes one text for an image, not several")
    if len(into) != 1:
        known = "; ".join(f"{each.name} ({', '.join(each.visual.stacks)})" for each in ARCHITECTURES if each.visual)
        raise ValueError(
            f"{type(model).__name__}: expected one stack of blocks that visual prompts can enter, found {len(into)}; "
            f"known: {known}, as an encoder, T5's decoder, a causal model"
        )
    ((path, stack, architecture, visual),) = into
    encoder = next((each for each, module, *_ in found if module is not stack), None)
    stacks = [path] if encoder is None else [encoder, path]
    adapted = [
        f"{block}.{sublayer}"
        for each in stacks
        for block in _blocks(model, each, visual)
        for sublayer in visual.sublayers
        if _exists(model.get_submodule(block), sublayer)
    ]
    config: Any = stack.config
    blocks = _blocks(model, path, visual)
    return Target(architecture, visual, path, config.hidden_size, config.num_attention_heads, blocks, encoder, adapted)


def _can_enter(stack: nn.Module, visual: Visual) -> bool:
    """Whether this is the kind of stack that prompts of its architecture enter."""
    return visual.causal or bool(getattr(stack.config, "is_decoder", False)) == visual.decodes


def _blocks(model: nn.Module, stack: str, visual: Visual) -> list[str]:
    path = f"{stack}.{visual.blocks}" if stack else visual.blocks
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return [f"{path}.{index}" for index in range(len(blocks))]


def _exists(block: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in block.named_modules())
