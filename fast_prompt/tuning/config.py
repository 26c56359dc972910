"""What every method's config shares: its dictionary form and its file."""

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from fast_prompt.tuning.site import FoldedSite, Site
from fast_prompt.tuning.storage import SAVE_ID, read_settings, save_config

# Beside the method's own settings, the file says which base the adapter was made for, and in which save.
DESCRIBED = ("base_model_class", "base_model_type", "base_model_name_or_path", SAVE_ID)

# Every method by its ``method``: a config class is registered by being defined.
METHODS: dict[str, type["MethodConfig"]] = {}


@dataclasses.dataclass(kw_only=True)
class MethodConfig:
    """Base of the methods' configs: subclasses are dataclasses that set ``method`` and say how to adapt a model.

    Attributes:
        method: the method's name in a saved adapter's file; in lower case, what the commands call it.
        cost: the module that says what it is counted by, imported when it is: ``variants(subject, settings)`` gives
            ``fast_prompt.methods.variant.Variant``s; ``refuses(subject)``, if there is one, says why a model does not
            fit. None: it is counted with the config's defaults, if it has a default for everything.
        search: the class of its search, as ``"module:Class"``, imported when it is run; None: there is none.
        modules_to_save: names (or their endings) of modules to train and save in full, such as ``["classifier"]``.
    """

    method: ClassVar[str]
    cost: ClassVar[str | None] = None
    search: ClassVar[str | None] = None

    modules_to_save: list[str] | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        other = METHODS.setdefault(cls.method, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            owner = f"{other.__module__}.{other.__qualname__}"
            raise ValueError(f"method: {cls.method} is that of {owner} already, got it for {cls.__qualname__}")
        METHODS[cls.method] = cls

    def __post_init__(self) -> None:
        if self.modules_to_save is not None:
            self.modules_to_save = check_names("modules_to_save", self.modules_to_save)

    def find_sites(self, model: nn.Module) -> Sequence[Site]:
        """The places in ``model`` that this config adapts; ValueError when there are none."""
        raise NotImplementedError

    def build(self, model: nn.Module, site: Site) -> nn.Module:
        """A newly initialised module for ``site``, on its device."""
        raise NotImplementedError

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Names of the base model's own parameters that train, each adapter a copy of its own; none by default."""
        return []

    def idle_modules(self, model: nn.Module) -> list[str]:
        """Paths of the modules of the base that never run with this config, so that nothing in them need exist."""
        return []

    def fold(self, model: nn.Module, site: Site, adapter: nn.Module) -> FoldedSite | None:
        """``adapter`` merged with the frozen weights around it, for inference; None where it runs on as it is.

        Raises:
            ValueError: it should be merged, but that would not be exact.
        """
        return None

    def to_dict(self) -> dict[str, Any]:
        """The method's name under ``"method"``, and every setting."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"method": self.method, **copy.deepcopy(settings)}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``adapter_config.json`` into ``save_directory`` (made if missing), replacing an old one at once."""
        save_config(Path(save_directory), self.to_dict())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read the config of an adapter saved in ``directory``.

        Unknown keys (of a later version, or misspelt) are warned about and left out.

        Raises:
            FileNotFoundError: the directory holds no ``adapter_config.json``.
            ValueError: the file is not JSON, belongs to another method or library, or holds a bad setting.
        """
        return cls.from_dict(*read_settings(Path(directory)))

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "the config") -> Self:
        """The config whose ``to_dict`` gave ``values``; ``origin`` names their source in warnings and errors."""
        method = values.get("method")
        config_class = METHODS.get(method) if isinstance(method, str) else None
        if config_class is None or not issubclass(config_class, cls):
            known = ", ".join(name for name, each in METHODS.items() if issubclass(each, cls))
            found = method or values.get("peft_type")
            raise ValueError(f"{origin}: expected a fast_prompt adapter with method {known}, got method {found!r}")
        _check_described(values, origin)
        fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(config_class)}
        missing = [name for name, is_required in fields.items() if is_required and name not in values]
        if missing:
            raise ValueError(f"{origin}: {missing[0]}: expected a value, as {method} has none by default")
        unknown = sorted(values.keys() - fields.keys() - {"method", *DESCRIBED})
        if unknown:
            warnings.warn(f"{origin}: unknown keys are ignored: {', '.join(unknown)}", stacklevel=3)
        with naming(origin):
            return config_class(**{key: value for key, value in values.items() if key in fields})


@contextmanager
def naming(origin: str) -> Iterator[None]:
    """A context whose ValueErrors say where the settings came from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _check_described(values: dict[str, Any], origin: str) -> None:
    """What a config file says beside the settings is text, if it says it."""
    for key in DESCRIBED:
        if not isinstance(values.get(key), (str, type(None))):
            raise ValueError(f"{origin}: {key}: expected text, got {values[key]!r}")


def check_names(field: str, value: object) -> list[str]:
    """The list of module names that ``value`` is, each once; ValueError names the ``field`` otherwise."""
    if not isinstance(value, (list, tuple, set)) or not value or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{field}: expected a list of module names, got {value!r}")
    return sorted(value) if isinstance(value, set) else list(dict.fromkeys(value))
