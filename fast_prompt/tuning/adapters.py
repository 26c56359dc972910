"""Where named adapters live inside a model: at each site, and in place of the modules that train in full."""

from typing import Any

from torch import Tensor, nn

# The child that folded modules ask for their share of the merged weights.
FOLDED_CHILD = "fast_prompt_folded"

# The model's children that keep modules_to_save, and parameters that train, out of use.
SAVED = "fast_prompt_modules"
SAVED_PARAMETERS = "fast_prompt_parameters"


class SiteAdapters(nn.ModuleDict):
    """The adapters of one site by name; ``forward`` runs the active one, or hands ``hidden`` on when none is.

    Args:
        host: the module that they become a child of.

    Attributes:
        active: name of the adapter in use, or None.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.active: str | None = None
        self.train(host.training)
        if isinstance(host, nn.MultiheadAttention):
            self.register_forward_hook(_no_op)

    def activate(self, name: str | None) -> None:
        """Use the adapter ``name``; none when it is None or has nothing at this site."""
        self.active = name if name is not None and name in self else None

    def in_use(self) -> nn.Module | None:
        """The active adapter's module; None when there is none."""
        return None if self.active is None else self[self.active]

    def forward(self, hidden: Tensor, *context: Tensor, **options: Any) -> Tensor:
        """``hidden`` [..., n, d], and whatever else the adapter is given, to [..., n, d]."""
        if self.active is None:
            return hidden
        return self[self.active](hidden, *context, **options)


def at_site(module: nn.Module, child: str, hidden: Tensor, *context: Tensor) -> Tensor:
    """``hidden`` through the active one of the adapters that ``module`` keeps as ``child``; unchanged without one."""
    adapters = getattr(module, child, None)
    return hidden if adapters is None else adapters(hidden, *context)


def _no_op(*_: object) -> None:
    """In inference, torch's TransformerEncoderLayer skips its attention's forward unless some child has a hook."""


class SavedModules(nn.Module):
    """The modules that adapters train in full: originals and copies, but for the one of each now in its place.

    Each adapter owns a copy of every module it names. The copy in use sits in the module's own place, so that the
    model's parameter names stay what they were; the others rest here, where ``.to()`` and ``.eval()`` reach them.

    Attributes:
        resting: the modules not in their place.
        placed: for each path, the adapter whose copy is in its place, or None for the model's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.resting = nn.ModuleDict()
        self.placed: dict[str, str | None] = {}

    def add(self, adapter: str, path: str, module: nn.Module) -> None:
        """Keep ``module`` as the adapter's copy of the one at ``path``."""
        self.placed.setdefault(path, None)
        self.resting[resting_key(adapter, path)] = module

    def remove(self, adapter: str) -> None:
        """Forget the adapter's copies; none of them may be in its place."""
        for key in [resting_key(adapter, path) for path in self.placed]:
            if key in self.resting:
                del self.resting[key]

    def of(self, model: nn.Module, adapter: str) -> dict[str, nn.Module]:
        """The adapter's copies, wherever they are, by the path of their place."""
        resting = {
            path: self.resting[resting_key(adapter, path)]
            for path in self.placed
            if resting_key(adapter, path) in self.resting
        }
        return {p: model.get_submodule(p) for p, owner in self.placed.items() if owner == adapter} | resting

    def place(self, model: nn.Module, adapter: str | None) -> None:
        """Put the adapter's copies in their places, and the model's own modules where it has none."""
        for path, current in self.placed.items():
            wanted = adapter if current == adapter or resting_key(adapter, path) in self.resting else None
            if wanted != current:
                self.resting[resting_key(current, path)] = model.get_submodule(path)
                model.set_submodule(path, self.resting.pop(resting_key(wanted, path)))
                self.placed[path] = wanted


def resting_key(adapter: str | None, path: str) -> str:
    """A child's name: dots are not allowed, no adapter's name holds ``=``, and any file's may (of weights on disk)."""
    return f"{adapter or ''}={path.replace('.', '=')}"


def find_saved_modules(model: nn.Module, names: list[str] | None, site_names: list[str]) -> list[str]:
    """Paths of the modules that ``names`` end, outermost ones only.

    Raises:
        ValueError: a name fits no module, or one that holds an adapted module or is held by one.
    """
    paths: list[str] = []
    everywhere = (path for path, _ in model.named_modules(remove_duplicate=False))
    own = [path for path in everywhere if not is_within(path, [SAVED])]
    for name in names or []:
        found = [path for path in own if path == name or path.endswith(f".{name}")]
        if not found:
            raise ValueError(f"modules_to_save: {type(model).__name__} has no module named {name!r}")
        paths += found
    outermost = [path for path in dict.fromkeys(paths) if not any(_inside(path, other) for other in paths)]
    for path in outermost:
        clash = next((site for site in site_names if is_within(site, [path]) or _inside(path, site)), None)
        if clash is not None:
            raise ValueError(f"modules_to_save: {path!r} and the adapted {clash!r} lie one within the other")
    return outermost


def _inside(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


def is_within(path: str, others: list[str]) -> bool:
    """Whether ``path`` is one of ``others`` or lies inside one."""
    return any(path == other or _inside(path, other) for other in others)


def check_adapter_name(name: object) -> None:
    """A name that can be a child module's: letters, digits, ``_`` and ``-``, and no attribute of ``nn.ModuleDict``."""
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum() or hasattr(SiteAdapters, name):
        raise ValueError(f"adapter_name: expected letters, digits, _ and - (and no method's name), got {name!r}")
