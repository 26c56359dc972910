"""The architectures whose blocks can be skipped: one row each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fast_prompt.models.attention import RESIDUAL_CHILD, normed_output_forward
from fast_prompt.models.blocks import forwards
from fast_prompt.models.blocks.skip import SKIP_CHILD
from fast_prompt.models.contract import check_forwards, refuse
from fast_prompt.models.proof import prove_equal
from fast_prompt.tuning.classes import Replacement, base_class
from fast_prompt.tuning.site import Site

# What computes a block from its forward's arguments, given by keyword after the block.
Sublayers = Callable[..., Any]


@dataclass(frozen=True)
class Place:
    """One adapter of a block, skipped or kept.

    Attributes:
        path: of its host, within the block; "" is the block itself.
        child: of the host, where it is kept.
        forward: what replaces the host's forward.
        norm: its norm, as in ``SkipAdapter``; None where a config may choose.
        residual: what it adds, as in ``SkipAdapter``.
    """

    path: str
    child: str
    forward: Replacement
    norm: str | None = None
    residual: str = "input"


@dataclass(frozen=True)
class BlockFamily:
    """What skipping must know of an architecture.

    Attributes:
        name: what it is called in messages.
        blocks: class names of its blocks.
        norm: the block's first norm, as a path in it; as wide as the block.
        skip: the adapter in the place of a skipped block.
        kept: the parallel adapters of a kept block; those whose host a block lacks are left out.
        sublayers: what computes a kept block in place of its own forward; None where that runs.
        alone: whether blocks of other families in the same model stay as they are.
    """

    name: str
    blocks: tuple[str, ...]
    norm: str
    skip: Place
    kept: tuple[Place, ...]
    sublayers: Sublayers | None = None
    alone: bool = False


def _pre_norm(forward: Replacement, sublayers: Sublayers) -> tuple[Place, tuple[Place, ...], Sublayers]:
    """The places of a pre-LN block whose forward is replaced whole, and what computes it then."""
    children = (forwards.ATTENTION_CHILD, forwards.MLP_CHILD)
    return Place("", SKIP_CHILD, forward), tuple(Place("", child, forward) for child in children), sublayers


# BERT's post-LN sublayers; the adapter of an attention lies within its LayerNorm, that of the second half outside it.
_POST_NORM = (
    Place("attention.output", RESIDUAL_CHILD, normed_output_forward),
    Place("crossattention.output", RESIDUAL_CHILD, normed_output_forward),
    Place("output", forwards.PARALLEL_CHILD, forwards.parallel_forward, residual="none"),
)
_BERT_SKIP = Place("", SKIP_CHILD, forwards.skippable_forward)

FAMILIES = (
    BlockFamily("METER", ("MeterFusionLayer",), "attention.output.LayerNorm", _BERT_SKIP, _POST_NORM, alone=True),
    BlockFamily("BERT", ("BertLayer", "RobertaLayer"), "attention.output.LayerNorm", _BERT_SKIP, _POST_NORM),
    BlockFamily("ViLT", ("ViltLayer",), "layernorm_before", *_pre_norm(forwards.vilt_forward, forwards.vilt_sublayers)),
    BlockFamily("ViT", ("ViTLayer",), "layernorm_before", *_pre_norm(forwards.vit_forward, forwards.vit_sublayers)),
    BlockFamily(
        "CLIP", ("CLIPEncoderLayer",), "layer_norm1", *_pre_norm(forwards.clip_forward, forwards.clip_sublayers)
    ),
    BlockFamily(
        "LLaMA",
        ("LlamaDecoderLayer",),
        "input_layernorm",
        Place("", SKIP_CHILD, forwards.skippable_forward, "rms", "normed"),
        (
            Place("input_layernorm", forwards.AFTER_CHILD, forwards.after_forward, "none"),
            Place("post_attention_layernorm", forwards.AFTER_CHILD, forwards.after_forward, "none"),
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class BlockSite(Site):
    """A place in a block for an adapter.

    Attributes:
        block: the block.
        place: which of its places.
    """

    block: "Block"
    place: Place

    @property
    def skips(self) -> bool:
        """Whether the adapter takes the block's place."""
        return self.place is self.block.family.skip


@dataclass(frozen=True)
class Block:
    """One block of a model.

    Attributes:
        path: of the module.
        family: its architecture.
        width: d.
    """

    path: str
    family: BlockFamily
    width: int

    @property
    def number(self) -> int:
        """Its place in its stack, from 0."""
        return int(self.path.rpartition(".")[2])

    def skip_site(self, model: nn.Module) -> BlockSite:
        """Where the adapter goes that takes its place; ValueError where another tool has replaced the forward."""
        return self._site(model, self.family.skip)

    def kept_sites(self, model: nn.Module) -> list[BlockSite]:
        """Where its parallel adapters go; ValueError where a forward is another tool's, or not what it was."""
        block = model.get_submodule(self.path)
        if self.family.sublayers is not None:
            verdict = prove_equal(block, self.family.sublayers, self.width)
            if verdict.holds is False:
                refuse(f"{self.path}: {base_class(block).__name__} is not what it was: {verdict.reason}")
        names = {name for name, _ in block.named_modules()}
        return [self._site(model, place) for place in self.family.kept if place.path in names]

    def _site(self, model: nn.Module, place: Place) -> BlockSite:
        host = f"{self.path}.{place.path}" if place.path else self.path
        check_forwards(model, [self.path], replaced=False)
        check_forwards(model, [host])
        return BlockSite(
            name=host,
            host=host,
            forward=place.forward,
            width=self.width,
            child=place.child,
            inmost=not place.path,
            block=self,
            place=place,
        )


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of ``model`` that can be skipped, in the model's order.

    Raises:
        ValueError: there are none; the message lists the classes known.
    """
    found = [
        (path, module, family)
        for path, module in model.named_modules()
        for family in FAMILIES
        if type(module).__name__ in family.blocks
    ]
    if not found:
        known = "; ".join(f"{family.name} ({', '.join(family.blocks)})" for family in FAMILIES)
        raise ValueError(f"{type(model).__name__}: none of its blocks is known to be skippable; known: {known}")
    alone = [each for each in found if each[2].alone]
    return [Block(path, family, _width(module, family)) for path, module, family in alone or found]


def _width(block: nn.Module, family: BlockFamily) -> int:
    """d, of the first norm or, where ``compact`` has dropped that, of an adapter."""
    weight = getattr(block.get_submodule(family.norm), "weight", None)
    if weight is not None:
        return len(weight)
    adapters = block.get_submodule(SKIP_CHILD)
    return next(each for each in adapters.modules() if isinstance(each, nn.Linear)).in_features


def resolve(blocks: Sequence[Block], names: Sequence[str | int], field: str) -> list[Block]:
    """The blocks that ``names`` tells by path or by number among ``blocks``, in the model's order.

    Raises:
        ValueError: a name is no block's, or two name the same; the message names the ``field``.
    """
    paths = [block.path for block in blocks]
    numbers = [paths.index(name) if name in paths else name for name in names]
    for number, name in zip(numbers, names, strict=True):
        if not isinstance(number, int) or not 0 <= number < len(paths):
            raise ValueError(
                f"{field}: expected blocks, by number from 0 to {len(paths) - 1} or by path ({paths[0]} to "
                f"{paths[-1]}), got {name!r}"
            )
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{field}: expected different blocks, got {list(names)!r}")
    return [block for number, block in enumerate(blocks) if number in numbers]
