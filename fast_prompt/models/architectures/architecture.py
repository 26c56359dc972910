"""What is known of an architecture, and how: one row, of which sites and costs are views."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fast_prompt.tuning.classes import Replacement

# Computes a block from its forward's arguments, given by keyword after the block.
Sublayers = Callable[..., Any]


@dataclass(frozen=True)
class Place:
    """One adapter of a block, skipped or kept.

    Attributes:
        path: its host's path within the block; "" is the block itself.
        child: the host's child that keeps it.
        forward: what replaces the host's forward.
        norm: its norm, as in ``SkipAdapter``; None where a config may choose.
        residual: what it adds, as in ``SkipAdapter``.
    """

    path: str
    child: str
    forward: Replacement
    norm: str | None = None
    residual: str = "input"


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The transformer blocks of an architecture, which adapters can take the place of.

    Attributes:
        classes: class names.
        norm: path of a block's first norm, which is as wide as the block.
        outputs: paths of the modules that give a sublayer's output; a block may lack some.
        skip: the adapter in the place of a skipped block.
        kept: the parallel adapters of a kept block; those whose host a block lacks are left out.
        sublayers: what computes a kept block in place of its own forward; None where that runs.
    """

    classes: tuple[str, ...]
    norm: str
    outputs: tuple[str, ...]
    skip: Place
    kept: tuple[Place, ...]
    sublayers: Sublayers | None = None


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What counting a model's cost takes.

    Attributes:
        config: class of its config, whose defaults but for ``settings`` are the usual size.
        model: class that is built where a config names none.
        text_length: tokens of a text, unless told otherwise.
        positions: the most tokens that a text may have, by the config.
        settings: of the config of the usual size.
        vision: the part of a config that holds ``image_size`` and ``patch_size``; None of a model for text alone.
        adapter_widths: of DAS's adapters, of a kept block and in the place of a skipped one, as published.
        compressor: settings of DVP's attention, where it is narrower than the model.
        prepare: changes a new model so that it can be counted on tensors without memory.
    """

    config: str
    model: str
    text_length: int
    positions: Callable[[Any], int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    vision: Callable[[Any], Any] | None = None
    adapter_widths: tuple[int, int] = (96, 192)
    compressor: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] | None = None


def as_given(_: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, unchanged."""
    return inputs


@dataclass(frozen=True, kw_only=True)
class Visual:
    """Language models that visual prompts can enter.

    Attributes:
        stacks: class names of the modules that hold their blocks.
        backbones: class names of the models that have no head.
        blocks: the stack's child that is the list of blocks.
        sublayers: where adapters sit, as paths in a block.
        adapt: what replaces those modules' forward.
        pooling: how the query is made by default, a name in ``models.visual.prompter.POOLINGS``.
        type_embedding: whether text and prompts get a type embedding by default.
        prepare: completes a call's ``VisualPrompts`` and the forward's other arguments.
        block_forward: what replaces a block's forward.
        read_out: what the answer head reads: (last hidden state, mask) to [B, d].
        answer_inputs: completes the forward's arguments where the answer head follows.
        decodes: whether the prompts enter a decoder beside which there is an encoder.
        causal: whether every token sees those before it alone, whatever the config's ``is_decoder`` says.
        drop_visual: what replaces the forward of such an encoder.
    """

    stacks: tuple[str, ...]
    backbones: tuple[str, ...]
    blocks: str
    sublayers: tuple[str, ...]
    adapt: Replacement
    pooling: str
    type_embedding: bool
    prepare: Callable[[Any, Any, dict[str, Any]], None]
    block_forward: Replacement
    read_out: Callable[[Tensor, Tensor | None], Tensor]
    answer_inputs: Callable[[Any, dict[str, Any]], dict[str, Any]] = as_given
    decodes: bool = False
    causal: bool = False
    drop_visual: Replacement | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture.

    Attributes:
        name: what messages call it.
        model_type: what its configs and the command line call it.
        forwards: by class, the parameters after ``self`` of the forwards that our code was written for, the key-value
            cache under the first of its names.
        attentions: classes of attentions that are adapted without being named: their query projection reads X and their
            output projection gives H, as the tests show and a trial call confirms.
        named_attentions: names of its other attentions, which ``target_modules`` must give.
        fused: by an attention's class, the child whose forward is replaced while the model is folded, and by what.
        blocks: its blocks, where they can be skipped.
        joins_towers: whether its blocks join two encoders, which are then left as they are.
        visual: its language models, where visual prompts can enter them.
        counted: what counting its cost takes; None where it is not counted.
    """

    name: str
    model_type: str
    forwards: Mapping[str, tuple[str, ...]]
    attentions: tuple[str, ...] = ()
    named_attentions: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, Replacement]] = field(default_factory=dict)
    blocks: Blocks | None = None
    joins_towers: bool = False
    visual: Visual | None = None
    counted: Counted | None = None
