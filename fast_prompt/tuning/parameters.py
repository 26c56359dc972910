"""Parameters of the base model that an adapter trains: each adapter has its own copies of them."""

from torch import nn

from fast_prompt.nn.offload import is_offloaded
from fast_prompt.tuning.adapters import SAVED_PARAMETERS, resting_key
from fast_prompt.tuning.precision import cast_forward_to, restore_cast_forward


class SavedParameters(nn.Module):
    """Parameters that adapters train in the base model's place: originals and copies, but for those now in use.

    What a module's copy is to ``SavedModules``, a parameter's is here; so single norms can train inside an adapted
    block, and a parameter that several modules share stays shared.

    Attributes:
        resting: the parameters not in their place.
        placed: for each parameter's name, the adapter whose copy is in its place, or None for the model's own.
        places: for each parameter's name, all the names it has in the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.resting = nn.ParameterDict()
        self.placed: dict[str, str | None] = {}
        self.places: dict[str, list[str]] = {}

    def add(self, adapter: str, model: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Keep ``parameter`` as the adapter's copy of the model's parameter ``name``, which must be the model's own."""
        if name not in self.places:
            own = model.get_parameter(name)
            named = model.named_parameters(remove_duplicate=False)
            self.places[name] = [place for place, each in named if each is own]
            self.placed[name] = None
        self.resting[resting_key(adapter, name)] = parameter

    def remove(self, adapter: str) -> None:
        """Forget the adapter's copies; none of them may be in its place."""
        for key in [resting_key(adapter, name) for name in self.places]:
            if key in self.resting:
                del self.resting[key]

    def of(self, model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's copies, wherever they are, by name."""
        keys = {name: resting_key(adapter, name) for name in self.places}
        resting = {name: self.resting[key] for name, key in keys.items() if key in self.resting}
        return {name: model.get_parameter(name) for name, owner in self.placed.items() if owner == adapter} | resting

    def place(self, model: nn.Module, adapter: str | None) -> None:
        """Put the adapter's copies in their places, and the model's own parameters where it has none."""
        moves = {}
        for name, current in self.placed.items():
            wanted = adapter if current == adapter or resting_key(adapter, name) in self.resting else None
            if wanted != current:
                moves[name] = wanted
        for name, wanted in moves.items():
            self.resting[resting_key(self.placed[name], name)] = model.get_parameter(name)
            parameter = self.resting.pop(resting_key(wanted, name))
            for holder, leaf in self._holders(model, name):
                holder._parameters[leaf] = parameter
                restore_cast_forward(holder)
            self.placed[name] = wanted
        for name in (name for name, wanted in moves.items() if wanted is not None):
            own = self.resting[resting_key(None, name)]
            for holder, leaf in self._holders(model, name):
                if own.dtype != getattr(holder, leaf).dtype:
                    cast_forward_to(holder, own.dtype)

    def is_offloaded(self, model: nn.Module) -> bool:
        """Whether accelerate keeps some of what is in a place, or was there, elsewhere."""
        places = {place.rpartition(".")[0] for name in self.placed for place in self.places[name]}
        return any(is_offloaded(model, path) for path in (f"{SAVED_PARAMETERS}.resting", *places))

    def _holders(self, model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
        """The modules that hold a parameter, with its name in each."""
        places = [place.rpartition(".") for place in self.places[name]]
        return [(model.get_submodule(path), leaf) for path, _, leaf in places]
