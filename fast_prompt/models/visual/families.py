"""The architectures that visual prompts can enter: one row each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fast_prompt.models.visual import bert, llama, t5
from fast_prompt.models.visual.call import VisualPrompts
from fast_prompt.tuning.classes import Replacement


def adapt_after(self: Any, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The forward of a module whose output is a sublayer's: the adapter comes after it."""
    return self.fast_prompt(forward(self, x))


def adapt_before(self: Any, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The forward of the dropout that a sublayer's output goes through: the adapter comes before it."""
    return forward(self, self.fast_prompt(x))


def as_given(_: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, unchanged."""
    return inputs


@dataclass(frozen=True)
class Family:
    """What visual prompting must know of an architecture.

    Attributes:
        name: what it is called in messages.
        stacks: class names of the modules that hold its blocks.
        backbones: class names of its models that have no head.
        blocks: the stack's child that is the list of blocks.
        pooling: how the query is made by default, a name in ``prompter.POOLINGS``.
        type_embedding: whether text and prompts get a type embedding by default.
        prepare: completes a call's ``VisualPrompts`` and the forward's other arguments.
        block_forward: what replaces a block's forward.
        sublayers: where adapters sit, as paths in a block.
        adapt: what replaces those modules' forward.
        read_out: what the answer head reads: (last hidden state, mask) to [B, d].
        decodes: whether the prompts enter a decoder beside which there is an encoder.
        causal: whether every token sees those before it alone, whatever the config's ``is_decoder`` says.
        drop_visual: what replaces the forward of such an encoder.
        answer_inputs: completes the forward's arguments where the answer head follows.
    """

    name: str
    stacks: tuple[str, ...]
    backbones: tuple[str, ...]
    blocks: str
    pooling: str
    type_embedding: bool
    prepare: Callable[[Any, VisualPrompts, dict[str, Any]], None]
    block_forward: Replacement
    sublayers: tuple[str, ...]
    adapt: Replacement
    read_out: Callable[[Tensor, Tensor | None], Tensor]
    decodes: bool = False
    causal: bool = False
    drop_visual: Replacement | None = None
    answer_inputs: Callable[[Any, dict[str, Any]], dict[str, Any]] = as_given


FAMILIES = (
    Family(
        name="BERT",
        stacks=("BertEncoder", "RobertaEncoder"),
        backbones=("BertModel", "RobertaModel"),
        blocks="layer",
        pooling="first",
        type_embedding=True,
        prepare=bert.prepare,
        block_forward=bert.block_forward,
        sublayers=("attention.output.dropout", "output.dropout"),
        adapt=adapt_after,
        read_out=bert.read_out,
    ),
    Family(
        name="T5",
        stacks=("T5Stack",),
        backbones=("T5Model",),
        blocks="block",
        pooling="mean",
        type_embedding=True,
        prepare=t5.prepare,
        block_forward=t5.block_forward,
        sublayers=("layer.0.dropout", "layer.1.dropout", "layer.2.dropout"),
        adapt=adapt_before,
        read_out=t5.read_out,
        decodes=True,
        drop_visual=t5.encoder_forward,
        answer_inputs=t5.answer_inputs,
    ),
    Family(
        name="LLaMA",
        stacks=("LlamaModel",),
        backbones=("LlamaModel",),
        blocks="layers",
        pooling="last",
        type_embedding=False,
        prepare=llama.prepare,
        block_forward=llama.block_forward,
        sublayers=("self_attn.o_proj", "mlp.down_proj"),
        adapt=adapt_after,
        read_out=llama.read_out,
        causal=True,
    ),
)


@dataclass(frozen=True)
class Target:
    """Where visual prompts enter a model.

    Attributes:
        family: its architecture.
        stack: path of the module whose blocks they enter.
        width: d.
        num_heads: of its self-attention.
        blocks: paths of those blocks.
        encoder: path of the encoder beside it, or None.
        adapted: paths of the modules where a sublayer's adapter sits, those of the encoder included.
    """

    family: Family
    stack: str
    width: int
    num_heads: int
    blocks: list[str]
    encoder: str | None
    adapted: list[str] = field(default_factory=list)


def family_called(name: str) -> Family:
    """The family of this name."""
    return next(family for family in FAMILIES if family.name == name)


def find_target(model: nn.Module) -> Target:
    """Where visual prompts enter ``model``.

    Raises:
        ValueError: the architecture is unknown, or not one that prompts can enter; the message lists those known.
    """
    found = [
        (path, module, family)
        for path, module in model.named_modules()
        for family in FAMILIES
        if type(module).__name__ in family.stacks
    ]
    into = [each for each in found if _can_enter(each[1], each[2])]
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise ValueError(f"{type(model).__name__}: expected a model that takes one text for an image, not several")
    if len(into) != 1:
        known = "; ".join(f"{each.name} ({', '.join(each.stacks)})" for each in FAMILIES)
        raise ValueError(
            f"{type(model).__name__}: expected one stack of blocks that visual prompts can enter, found {len(into)}; "
            f"known: {known}, as an encoder, T5's decoder, a causal model"
        )
    ((path, stack, family),) = into
    encoder = next((each for each, module, _ in found if module is not stack), None)
    stacks = [path] if encoder is None else [encoder, path]
    adapted = [
        f"{block}.{sublayer}"
        for each in stacks
        for block in _blocks(model, each, family)
        for sublayer in family.sublayers
        if _exists(model.get_submodule(block), sublayer)
    ]
    config: Any = stack.config
    blocks = _blocks(model, path, family)
    return Target(family, path, config.hidden_size, config.num_attention_heads, blocks, encoder, adapted)


def _can_enter(stack: nn.Module, family: Family) -> bool:
    """Whether this is the kind of stack that prompts of its family enter."""
    return family.causal or bool(getattr(stack.config, "is_decoder", False)) == family.decodes


def _blocks(model: nn.Module, stack: str, family: Family) -> list[str]:
    path = f"{stack}.{family.blocks}" if stack else family.blocks
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return [f"{path}.{index}" for index in range(len(blocks))]


def _exists(block: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in block.named_modules())
