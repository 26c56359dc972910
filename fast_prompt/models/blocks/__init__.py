"""Transformer blocks that adapters can take the place of: where they are, and what answers for them then."""

from fast_prompt.models.blocks.families import FAMILIES, Block, BlockSite, find_blocks, resolve
from fast_prompt.models.blocks.skip import BlockSkip

__all__ = ["FAMILIES", "Block", "BlockSite", "BlockSkip", "find_blocks", "resolve"]
