"""A place in a model where a method adds something."""

from dataclasses import dataclass, field

from torch import nn

from fast_prompt.tuning.classes import Replacement

# The child under which a site's host keeps its adapters, unless the site names another.
CHILD = "fast_prompt"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place that a method adapts; paths are those of ``nn.Module.get_submodule``.

    Attributes:
        name: path of the adapted module; adapters' weights are saved under it.
        host: path of the module which the adapters become a child of, and whose forward is replaced.
        forward: what replaces it.
        width: d, the width of the activations there.
        child: name of the host's child that keeps the adapters; where two sites share a host, theirs differ.
        patches: paths of further modules that must play along, each with what replaces its forward.
        inmost: whether the replacement stands inside those of other sites, whichever came first.
        owner: which config of a combination the site belongs to.
    """

    name: str
    host: str
    forward: Replacement
    width: int
    child: str = CHILD
    patches: dict[str, Replacement] = field(default_factory=dict)
    inmost: bool = False
    owner: int = 0

    @property
    def prefix(self) -> str:
        """What the site's tensors are named by in an adapter's file; it does not hold the adapter's name."""
        return f"{self.name}.{self.child}" if self.name else self.child

    @property
    def forwards(self) -> list[tuple[str, Replacement]]:
        """Every path whose forward is replaced, with the replacement."""
        return [(self.host, self.forward), *self.patches.items()]


@dataclass
class FoldedSite:
    """A site's adapter merged into the frozen weights around it.

    Attributes:
        module: holds the merged weights; while the model is folded it is the child ``fast_prompt_folded`` of every
            module whose forward it takes over.
        forwards: for each path in the model, what replaces that module's forward.
    """

    module: nn.Module
    forwards: dict[str, Replacement]
