"""Tensors and a few facts about them in one safetensors file, which shows whether anything in it has changed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fast_prompt.tuning.files import tensor_bytes, with_metadata, write_atomically

FACTS, SEAL = "facts", "sha256"


def write_sealed(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write both in one step: who is killed or reads meanwhile leaves or finds the old file or the new one, whole."""
    contents, said = tensor_bytes(tensors), json.dumps(facts, sort_keys=True)
    write_atomically({path: with_metadata(contents, {FACTS: said, SEAL: _seal(load(contents), said)})})


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the facts that ``write_sealed`` wrote.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is no file, not whole, not written by ``write_sealed``, or has changed since; the message says
            which.
    """
    if path.exists() and not path.is_file():
        raise ValueError("expected a file, got a directory or a special file")
    contents = path.read_bytes()
    try:
        tensors = load(contents)
    except (SafetensorError, KeyError) as error:  # the latter for a dtype that torch does not have
        raise ValueError(f"not a whole safetensors file ({error})") from error
    header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
    metadata = header.get("__metadata__") or {}
    if not metadata.keys() >= {FACTS, SEAL}:
        raise ValueError(f"expected {FACTS} and {SEAL} in its metadata, got {', '.join(metadata) or 'none'}")
    if metadata[SEAL] != _seal(tensors, metadata[FACTS]):
        raise ValueError("its contents have changed since they were written")
    return tensors, json.loads(metadata[FACTS])


def digest(tensor: Tensor) -> bytes:
    """A hash of a tensor's dtype, shape and values, bit for bit."""
    hashed: Any = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.digest()


def _seal(tensors: dict[str, Tensor], facts: str) -> str:
    hashed = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        hashed.update(f"{len(name)} {name} ".encode() + digest(tensors[name]))
    return hashed.hexdigest()
