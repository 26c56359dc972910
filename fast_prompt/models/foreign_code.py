"""What a model's config may not say: where else code for it is to be had."""

from collections.abc import Iterator
from typing import Any

# Attention that transformers itself brings. Every other name may send it to a hub for a kernel.
LOCAL_ATTENTION = ("eager", "sdpa", "flex_attention")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def check_attention(config: dict[str, Any], origin: str) -> None:
    """Refuse a config, or a part of one, whose attention is none that ``transformers`` itself brings.

    Raises:
        ValueError: the message names the source, ``origin``, and the key.
    """
    for part in _parts(config):
        for key in ATTENTION_KEYS:
            for name in _parts_named(part.get(key)):
                if name is not None and name not in LOCAL_ATTENTION:
                    raise ValueError(f"{origin}: {key}: expected one of {', '.join(LOCAL_ATTENTION)}, got {name!r}")


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _parts_named(attention: Any) -> list[Any]:
    """One for each part of a model, where a config names several."""
    return list(attention.values()) if isinstance(attention, dict) else [attention]
