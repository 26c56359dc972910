"""The key-value cache of ``transformers`` in a forward's arguments."""

from collections.abc import Mapping
from typing import Any

# What the argument is called: the first from transformers 5.24 on, the second before, and as a deprecated name after.
CACHE_NAMES = ("cache", "past_key_values")


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache that came with a forward's arguments, under whichever name; None where none came."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
