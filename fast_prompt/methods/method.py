"""The registry of methods: what the commands know of each."""

import dataclasses
from dataclasses import dataclass

from fast_prompt.tuning.config import MethodConfig


@dataclass(frozen=True)
class Method:
    """What a method says of itself.

    Attributes:
        name: what the commands and their files call it.
        config: its config, which finds its sites and builds what goes there.
        cost: the module that says what it is counted by, imported when it is counted: ``variants(subject, settings)``
            gives ``Variant``s, ``refuses(subject)``, if it has that, says which models it does not fit. None: counted
            with the config's defaults.
        search: the module of its search, imported when it is searched for: ``SETTINGS``, the class of its settings;
            ``DEFAULTS`` of the config; ``start(model, configs, examples, settings, output)``. None: there is no search.
    """

    name: str
    config: type[MethodConfig]
    cost: str | None = None
    search: str | None = None


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry.

    Raises:
        ValueError: its name is taken, or it names no cost and its config has settings without a default.
    """
    if method.name in METHODS:
        raise ValueError(f"name: expected one that is not taken ({', '.join(METHODS)}), got {method.name!r}")
    required = [each.name for each in dataclasses.fields(method.config) if _is_required(each)]
    if method.cost is None and required:
        raise ValueError(
            f"cost: expected a module, since {method.config.__name__} needs {', '.join(required)}, got None"
        )
    METHODS[method.name] = method
    return method


def _is_required(field: "dataclasses.Field[object]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
