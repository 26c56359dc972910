"""Reading and writing files: never a pickle, never half a file."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, where no open file can be renamed or removed
    fcntl = None  # type: ignore[assignment]

# No file that is ours comes near; far below what Python's own recursion bears.
MAX_DEPTH = 100


def write_atomically(contents: dict[Path, bytes]) -> None:
    """Write every file whole or none: each to a new file beside its place, then renamed over it.

    A failure before the first rename leaves all the old files; a later one puts the old files back.
    """
    for directory in {path.parent for path in contents}:
        directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        _replace_all({path: stack.enter_context(_beside(path, data)) for path, data in contents.items()})


@contextmanager
def _beside(path: Path, data: bytes) -> Iterator[Path]:
    """A new file next to ``path`` that holds ``data``: locked while its writer lives, gone where it was not renamed."""
    temporary, file = _open_beside(path)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()
            yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _open_beside(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        file = temporary.open("xb")
        _lock(file, wait=True)
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()  # taken for a leftover in the moment before it was locked


def remove_leftovers(path: Path) -> None:
    """Remove what writers of ``path`` that were killed have left beside it; a living writer's file is locked."""
    for leftover in path.parent.glob(f".{path.name}.{'[0-9a-f]' * 32}"):
        with suppress(OSError), leftover.open("r+b") as file:
            if _lock(file, wait=False):
                leftover.unlink()


def _lock(file: BinaryIO, *, wait: bool) -> bool:
    """Lock ``file`` until it is closed; False where another has it, or where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


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
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: bytes | str, origin: str) -> dict[str, Any]:
    """The dictionary that ``text`` holds; a ValueError names its ``origin``."""
    try:
        values = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{origin}: expected a JSON object, got {type(values).__name__}")
    if _is_deeper(values, MAX_DEPTH):
        raise ValueError(f"{origin}: not valid JSON here (nested more than {MAX_DEPTH} deep)")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


def _is_deeper(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [inner for outer in level for inner in _within(outer)]
    return bool(level)


def _within(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    """The tensors in the safetensors format."""
    # Clones, because the format refuses tensors that share memory.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    return save(copies, {"format": "pt"})


def with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with further metadata, in this order (safetensors itself writes several in a random one)."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] |= metadata
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[end:]])


class Entry(NamedTuple):
    """What a safetensors file's header says of a tensor."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file, open; its header has been read, and none of its tensors.

    Attributes:
        path: its name.
        file: itself, so that header and tensors are one file's even if another is renamed over it.
        metadata: text by name.
        entries: the tensors' shapes, by name.
    """

    path: Path
    file: BinaryIO
    metadata: dict[str, str]
    entries: dict[str, Entry]

    def read(self) -> dict[str, Tensor]:
        """The tensors, on the CPU; a ValueError names the file if it is not a whole one."""
        self.file.seek(0)
        try:
            return load(self.file.read())
        except (SafetensorError, KeyError) as error:  # the latter for a dtype that torch does not have
            raise ValueError(f"{self.path}: not a whole safetensors file ({error})") from error


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """A context with the safetensors file at ``path``; FileNotFoundError or ValueError name the file."""
    _check_exists(path)
    with path.open("rb") as file:
        try:
            metadata, entries = _read_header(file)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
        yield TensorFile(path, file, metadata, entries)


def _read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Entry]]:
    """The header's metadata and entries, once it is known that the file is as long as they say."""
    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if 8 + length > size:
        raise ValueError(f"its header should end at {8 + length}, the file does at {size}")
    header = parse_json(file.read(length), "header")
    metadata = header.pop("__metadata__", {})
    entries = {name: Entry(tuple(entry["shape"])) for name, entry in header.items()}
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ValueError(f"its tensors should end at {end}, the file does at {size}")
    return {str(name): str(text) for name, text in metadata.items()}, entries


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; FileNotFoundError or ValueError name the file."""
    with open_tensors(path) as file:
        return file.read()


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a directory saved by save_pretrained")
