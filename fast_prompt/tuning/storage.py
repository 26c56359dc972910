"""An adapter's directory: replaced in one step, and read as one save has left it.

An adapter is a weights file and a config file, and nothing renames two files at once. So the weights file decides: its
metadata hold the config's whole text, and what replaces an adapter is to rename that one file into its place. The
config file is a copy, for people and other tools, which follows. Both hold the ``save_id`` of their save. Where it is
the same, the config file counts, so that its settings can be edited by hand. Where it is not, a save was killed or is
going on, and the config within the weights counts, with a warning if it says something else. Weights without a config
of their own, by earlier versions or rewritten by other tools, belong to the config file beside them.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fast_prompt.tuning.files import (
    TensorFile,
    open_tensors,
    parse_json,
    read_json,
    remove_leftovers,
    tensor_bytes,
    with_metadata,
    write_atomically,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# What ties the two files together: a key of the config, and the key of its text in the weights' metadata.
SAVE_ID = "save_id"
CONFIG_KEY = "fast_prompt_config"


def save_adapter(
    directory: Path, settings: dict[str, Any], tensors: dict[str, Tensor], second_name: str | None = None
) -> None:
    """Replace the adapter in ``directory``, which is made if missing; at any moment the old one or the new is there.

    Args:
        directory: where to save.
        settings: what the config file shall hold.
        tensors: what the weights file shall hold.
        second_name: another name that the weights file shall have: a link, or a copy where there are no links.
    """
    data = _weights(settings, tensors)
    directory.mkdir(parents=True, exist_ok=True)
    for name in filter(None, (WEIGHTS_NAME, CONFIG_NAME, second_name)):
        remove_leftovers(directory / name)
    is_linked = second_name is None or _link(directory / second_name)
    write_atomically({directory / WEIGHTS_NAME: data})
    _let_copies_follow(directory, None if is_linked else second_name)


def _weights(settings: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """The weights file, the config's text within; the same bytes for the same adapter."""
    data = tensor_bytes(tensors)
    digest = hashlib.sha256(_config(settings))
    digest.update(data)
    return with_metadata(data, {CONFIG_KEY: _config(settings | {SAVE_ID: digest.hexdigest()}).decode()})


def _config(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()


def _link(path: Path) -> bool:
    """Let ``path`` be a link to the weights file's name, which may be yet to come; without links, let it be gone."""
    temporary = path.with_name(f".{path.name}")
    try:
        # Every saver makes the same link, so it does not matter whose comes first.
        with suppress(FileExistsError):
            temporary.symlink_to(WEIGHTS_NAME)
        with suppress(FileNotFoundError):
            temporary.replace(path)
    except OSError:
        path.unlink(missing_ok=True)
        return False
    return True


def _let_copies_follow(directory: Path, second_name: str | None) -> None:
    """Write what repeats the weights file until it does, whichever of several savers wrote that last."""
    weights, followed = directory / WEIGHTS_NAME, None
    while (text := _text_in(weights)) not in (followed, None):
        copies = {directory / CONFIG_NAME: text.encode()}
        if second_name is not None:
            copies[directory / second_name] = weights.read_bytes()
        write_atomically(copies)
        followed = text


def _text_in(weights: Path) -> str | None:
    with open_tensors(weights) as file:
        return file.metadata.get(CONFIG_KEY)


def save_config(directory: Path, settings: dict[str, Any]) -> None:
    """Write a config file: that of the weights in ``directory``, where there are any."""
    text = _text_in(directory / WEIGHTS_NAME) if (directory / WEIGHTS_NAME).exists() else None
    owner = {} if text is None else {SAVE_ID: parse_json(text, WEIGHTS_NAME).get(SAVE_ID)}
    write_atomically({directory / CONFIG_NAME: _config(settings | owner)})


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's files, of one save.

    Attributes:
        settings: its config.
        origin: names the file that the config is from.
        weights: the open weights file.
    """

    settings: dict[str, Any]
    origin: str
    weights: TensorFile


@contextmanager
def open_adapter(directory: Path) -> Iterator[StoredAdapter]:
    """A context with the adapter in ``directory``; FileNotFoundError or ValueError name the file."""
    config = _read_config(directory)  # before the weights, which it follows: it is never newer than they are
    with open_tensors(directory / WEIGHTS_NAME) as weights:
        yield StoredAdapter(*_settings(directory / CONFIG_NAME, config, weights), weights)


def read_settings(directory: Path) -> tuple[dict[str, Any], str]:
    """The config in ``directory``, with weights or without, and the name of its file; errors as ``open_adapter``."""
    if (directory / WEIGHTS_NAME).exists():
        with open_adapter(directory) as stored:
            return stored.settings, stored.origin
    return read_json(directory / CONFIG_NAME), str(directory / CONFIG_NAME)


def _read_config(directory: Path) -> dict[str, Any] | None:
    path = directory / CONFIG_NAME
    return read_json(path) if path.exists() else None


def _settings(path: Path, config: dict[str, Any] | None, weights: TensorFile) -> tuple[dict[str, Any], str]:
    """Which counts of the ``config`` in the file ``path`` (None where that is missing) and the one in ``weights``."""
    text = weights.metadata.get(CONFIG_KEY)
    if text is None:
        return read_json(path) if config is None else config, str(path)
    own = parse_json(text, f"{weights.path}: {CONFIG_KEY}")
    if config is not None and config.get(SAVE_ID) == own.get(SAVE_ID):
        return config, str(path)
    if config is not None and config | {SAVE_ID: None} != own | {SAVE_ID: None}:
        warnings.warn(
            f"{path}: of another save than the weights beside it, whose own config is used; to use this one, give it "
            f"their {SAVE_ID}, {own.get(SAVE_ID)}",
            stacklevel=2,
        )
    return own, str(weights.path)
