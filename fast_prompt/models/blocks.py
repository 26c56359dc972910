"""Transformer blocks that adapters can take the place of: where they are, and where their adapters go."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fast_prompt.models.architectures import ARCHITECTURES, Architecture, Blocks, Place
from fast_prompt.models.contract import check_forwards, refuse
from fast_prompt.models.proof import prove_equal
from fast_prompt.models.skip import SKIP_CHILD
from fast_prompt.tuning.classes import base_class
from fast_prompt.tuning.site import Site


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
        return self.place is self.block.kind.skip


@dataclass(frozen=True)
class Block:
    """One block of a model.

    Attributes:
        path: of the module.
        architecture, kind: what is known of its model, and of the model's blocks.
        width: d.
    """

    path: str
    architecture: Architecture
    kind: Blocks
    width: int

    @property
    def number(self) -> int:
        """Its place in its stack, from 0."""
        return int(self.path.rpartition(".")[2])

    def skip_site(self, model: nn.Module) -> BlockSite:
        """Where the adapter goes that takes its place; ValueError where another tool has replaced the forward."""
        return self._site(model, self.kind.skip)

    def kept_sites(self, model: nn.Module) -> list[BlockSite]:
        """Where its parallel adapters go; ValueError where a forward is another tool's, or not what it was."""
        block = model.get_submodule(self.path)
        if self.kind.sublayers is not None:
            verdict = prove_equal(block, self.kind.sublayers, self.width)
            if verdict.holds is False:
                refuse(f"{self.path}: {base_class(block).__name__} is not what it was: {verdict.reason}")
        names = {name for name, _ in block.named_modules()}
        return [self._site(model, place) for place in self.kind.kept if place.path in names]

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
        Block(path, *_BY_CLASS[name], _width(module, _BY_CLASS[name][1]))
        for path, module in model.named_modules()
        if (name := type(module).__name__) in _BY_CLASS
    ]
    if not found:
        known = "; ".join(f"{each.name} ({', '.join(each.blocks.classes)})" for each in ARCHITECTURES if each.blocks)
        raise ValueError(f"{type(model).__name__}: none of its blocks is known to be skippable; known: {known}")
    return [block for block in found if block.architecture.joins_towers] or found


_BY_CLASS = {name: (each, each.blocks) for each in ARCHITECTURES if each.blocks for name in each.blocks.classes}


def _width(block: nn.Module, kind: Blocks) -> int:
    """d, of the first norm or, where ``compact`` has dropped that, of an adapter."""
    weight = getattr(block.get_submodule(kind.norm), "weight", None)
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
