"""What decides a model's output, as one hash: its weights, its config, and what its modules are."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

WORDS: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ROW = 1024
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype)


def fingerprint(model: nn.Module, *facts: Any) -> str:
    """A hash of a model and of ``facts``, made anew at each call.

    It sees what a version counter does not: edits through ``p.data`` and other views that share a weight's memory. For
    that every call reads all the weights, where they are, and brings only sums of them to the host: of their bits in
    rows of 1,024, along the rows and across them, exact in int64. Of the modules it sees the classes, the plain
    attributes and the functions set on them, and nothing of their hooks.

    Args:
        model: of ``transformers``.
        facts: what else decides the output; by their ``str``.

    Raises:
        ValueError: a weight has no data, as on the meta device.
    """
    config: Any = model.config
    attention = getattr(config, "_attn_implementation", None)
    modules = [[name, *_described(module)] for name, module in model.named_modules()]
    weights = dict(_weights(model))
    kinds = [[name, str(value.dtype), list(value.shape)] for name, value in weights.items()]
    words = [config.to_dict(), attention, modules, kinds, facts]
    hashed: Any = hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode())
    if weights:
        hashed.update(_together([_sums(name, value) for name, value in weights.items()]).numpy())
    return hashed.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)  # those that no state_dict holds as well


def _sums(name: str, value: Tensor) -> Tensor:
    if value.is_meta:
        raise ValueError(f"model: {name} has no data (it is on the meta device), so its features cannot be kept")
    value = torch.view_as_real(value) if value.is_complex() else value
    bits = value.detach().contiguous().view(-1).view(WORDS[value.element_size()])
    rows, rest = bits[: bits.numel() // ROW * ROW].view(-1, ROW), bits[bits.numel() // ROW * ROW :]
    return torch.cat([rows.sum(0), rows.sum(1), rest.long()])


def _together(sums: list[Tensor]) -> Tensor:
    """In one tensor on the host, by one transfer where all are on one device."""
    return torch.cat([each.to(sums[0].device) for each in sums]).cpu()


def _described(module: nn.Module) -> list[Any]:
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return [_named(type(module)), {name: _word(value) for name, value in attributes.items()}]


def _word(value: Any) -> Any:
    """A value that JSON can hold, the same in every process; of an object that has no such form, its class."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return [_word(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _word(each) for key, each in value.items()}
    if isinstance(value, partial):
        return [_word(value.func), _word(value.args), _word(value.keywords)]
    code = getattr(value, "__code__", None)
    return [_named(value), _instructions(code)] if isinstance(code, CodeType) else _named(value)


def _named(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _instructions(code: CodeType) -> list[Any]:
    """Of a function, which may have no name of its own, what it does."""
    constants = [_instructions(each) if isinstance(each, CodeType) else _word(each) for each in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]
