"""A search as a file says it: which model, which data, which method, how it goes."""

import dataclasses
import importlib
import pkgutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fast_prompt.methods import named_methods
from fast_prompt.models.foreign_code import check_attention
from fast_prompt.search.search import Search
from fast_prompt.search.settings import SearchSettings, TrainingSettings
from fast_prompt.tuning.config import MethodConfig
from fast_prompt.tuning.files import read_json, read_tensors

PATHS = ("model", "examples", "output")


class Columns:
    """A data set of tensors [N, ...] by the names of a model's keyword arguments.

    Args:
        tensors: at least one, all of the same N.
        origin: the file's name, for errors.

    Raises:
        ValueError: there is none, or their lengths differ.
    """

    def __init__(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        lengths = {name: len(tensor) if tensor.dim() else None for name, tensor in tensors.items()}
        if not lengths or None in lengths.values() or len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())) or "none"
            raise ValueError(f"{origin}: expected tensors that agree in their first dimension, got {found}")
        self.tensors = dict(tensors)
        self._length = len(next(iter(tensors.values())))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Plan:
    """One search.

    Attributes:
        model: directory of a ``transformers`` model.
        model_class: a class of ``transformers``, or None for the architecture that the model's config names.
        examples: safetensors file of the model's keyword arguments, labels included, one row an example.
        output: directory for checkpoints, the picture and what was found.
        search_class: the search of one of the methods.
        configs: the methods' settings, that method's first.
        search: how the search goes.
        training: how to train anew with what was found; None to leave that.
    """

    model: Path
    model_class: str | None
    examples: Path
    output: Path
    search_class: type[Search]
    configs: list[MethodConfig]
    search: SearchSettings
    training: TrainingSettings | None

    @classmethod
    def read(cls, path: Path | str) -> "Plan":
        """The plan in a TOML file; its relative paths are relative to it.

        Raises:
            FileNotFoundError: the file is not there.
            ValueError: it is no TOML, or says something that cannot be; the message names the file and the key.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text())
            return cls._of(values, path.parent)
        except (ValueError, TypeError, RecursionError) as error:  # tomllib's errors are ValueErrors
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, values: dict[str, Any], base: Path) -> "Plan":
        methods = named_methods()
        tables = ("search", "training", *methods)
        keys = (*PATHS, "model_class", *tables)
        unknown = [key for key in values if key not in keys]
        missing = [key for key in (*PATHS, "search") if key not in values]
        if unknown or missing:
            problem = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
            raise ValueError(f"expected the keys {', '.join(keys)}: {problem}")
        for name in tables:
            if not isinstance(values.get(name, {}), dict):
                raise ValueError(f"{name}: expected a table [{name}], got {values[name]!r}")
        searched, search_class = _searched(methods, values)
        tables_of_configs = {searched: search_class.sought | values[searched]}
        tables_of_configs |= {name: values[name] for name in methods if name in values and name != searched}
        return cls(
            model=base / _text("model", values["model"]),
            model_class=_text("model_class", values["model_class"]) if "model_class" in values else None,
            examples=base / _text("examples", values["examples"]),
            output=base / _text("output", values["output"]),
            search_class=search_class,
            configs=[_build(name, methods[name], table) for name, table in tables_of_configs.items()],
            search=_build("search", search_class.settings_class, values["search"]),
            training=_build("training", TrainingSettings, values["training"]) if "training" in values else None,
        )

    def prepare(self) -> Search:
        """Reads model and data, and makes the search, which goes on from a checkpoint in ``output`` if there is one.

        Raises:
            FileNotFoundError, ValueError: model or data cannot be used, or the settings do not fit them.
        """
        for name, path in (("examples", self.examples), ("model", self.model / "config.json")):
            if not path.is_file():
                raise FileNotFoundError(f"{name}: there is no file {path}")
        examples = Columns(read_tensors(self.examples), str(self.examples))
        model = load_model(self.model, self.model_class)
        search: Any = self.search_class  # whose constructor each search has for itself
        found: Search = search(model, self.configs, examples, self.search, directory=self.output)
        return found


def load_model(directory: Path, class_name: str | None) -> nn.Module:
    """A ``transformers`` model from a directory, in evaluation mode.

    Raises:
        FileNotFoundError: the directory holds no config.
        ValueError: ``transformers`` has no model of that name, or the config asks for code from elsewhere.
    """
    path = directory / "config.json"
    config = read_json(path)
    check_attention(config, str(path))
    named = config.get("architectures")
    name = class_name or (named[0] if isinstance(named, list) and named else named)
    transformers: Any = importlib.import_module("transformers")
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not is_model:
        raise ValueError(f"model_class: expected a model class of transformers, got {name!r}")
    return found.from_pretrained(directory, local_files_only=True).eval()


def _searched(methods: Mapping[str, type[MethodConfig]], values: Mapping[str, Any]) -> tuple[str, type[Search]]:
    """The method that is searched for, and its search; of several, the one whose search takes the others."""
    searches = {name: config.search for name, config in methods.items() if config.search is not None}
    asked = {name: pkgutil.resolve_name(path) for name, path in searches.items() if name in values}
    if not asked:
        raise ValueError(f"expected a table [{'] or ['.join(searches)}], the method to search for")
    return max(asked.items(), key=lambda each: each[1].takes_others)


def _build(name: str, kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass of a table; ValueError names the table and what is wrong."""
    known = [each.name for each in dataclasses.fields(kind)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"[{name}]: unknown {', '.join(unknown)}; it may hold {', '.join(known)}")
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"[{name}]: {error}") from error


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}: expected some text, got {value!r}")
    return value
