"""The key-value cache of ``transformers``: in a forward's arguments, and with visual prompts in it."""

from collections.abc import Mapping
from typing import Any

# What the argument is called: the first from transformers 5.24 on, the second before, and as a deprecated name after.
CACHE_NAMES = ("cache", "past_key_values")


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache that came with a forward's arguments, under whichever name; None where none came."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


class TextLength:
    """What a block's part of a cache answers for its length once its first tokens are prompts: that of the text.

    ``generate`` cuts off as many tokens of the text as the cache says it holds, and masks are made as long. It is kept
    on the part itself, and goes with it through ``copy.deepcopy`` and pickle.
    """

    def __init__(self, part: Any, prompts: int) -> None:
        self.part, self.prompts = part, prompts

    def __call__(self) -> Any:
        """The number of text tokens."""
        return type(self.part).get_seq_length(self.part) - self.prompts


def self_attention(cache: Any) -> Any:
    """The cache of the self-attentions, out of one that also holds those of cross-attentions."""
    return getattr(cache, "self_attention_cache", cache)


def _part(cache: Any, layer: int) -> Any:
    """The part of the block ``layer``; None where the cache has none yet."""
    parts = getattr(self_attention(cache), "layers", ())
    return parts[layer] if layer < len(parts) else None


def prompts_in(cache: Any, layer: int) -> int:
    """How many prompts come before the text in the part of the block ``layer``."""
    length = getattr(_part(cache, layer), "get_seq_length", None)
    return length.prompts if isinstance(length, TextLength) else 0


def tokens_in(cache: Any, layer: int) -> Any:
    """How many tokens the part of the block ``layer`` holds, prompts included."""
    return self_attention(cache).get_seq_length(layer) + prompts_in(cache, layer)


def mark_prompts(cache: Any, layer: int, number: int) -> None:
    """The first ``number`` tokens in the part of the block ``layer`` are prompts."""
    part = _part(cache, layer)
    part.get_seq_length = TextLength(part, number)


def drop_prompts(cache: Any, layers: int) -> None:
    """Take the prompts out of a cache that holds no text any more."""
    for layer in range(layers):
        if prompts_in(cache, layer):
            part = _part(cache, layer)
            del part.get_seq_length
            part.crop(-part.get_seq_length())
