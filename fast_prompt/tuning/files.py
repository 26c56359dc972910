"""Reading and writing an adapter's two files: never a pickle, never half a file."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor


def write_atomically(contents: dict[Path, bytes]) -> None:
    """Write every file whole or none: each to a new file beside its place, then renamed over it.

    A failure before the first rename leaves all the old files; a later one puts the old files back.
    """
    for directory in {path.parent for path in contents}:
        directory.mkdir(parents=True, exist_ok=True)
    staged: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            staged[path] = _write_beside(path, data)
        _replace_all(staged)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _write_beside(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _replace_all(staged: dict[Path, Path]) -> None:
    old = {path: path.read_bytes() if path.exists() else None for path in staged}
    done: list[Path] = []
    try:
        for path, temporary in staged.items():
            temporary.replace(path)
            done.append(path)
    except BaseException:
        for path in done:
            data = old[path]
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's dictionary; FileNotFoundError or ValueError name the file."""
    _check_exists(path)
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    """The tensors in the safetensors format."""
    # Clones, because the format refuses tensors that share memory.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    return save(copies, {"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; FileNotFoundError or ValueError name the file."""
    _check_exists(path)
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a directory saved by save_pretrained")
