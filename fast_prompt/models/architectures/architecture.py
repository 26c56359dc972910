"""What is known of an architecture, and how: one row, of which attention sites, block sites and costs are views."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

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
    counted: Counted | None = None
