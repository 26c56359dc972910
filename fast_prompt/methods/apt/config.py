"""APT, approximated prompt tuning (arXiv 2306.15706): prompts diffused into every attention's output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fast_prompt.models import AttentionSite, find_attention_sites
from fast_prompt.models.architectures import ARCHITECTURES
from fast_prompt.models.contract import check_forwards
from fast_prompt.models.pattern import check_pattern
from fast_prompt.nn import FoldedPromptDiffusion, PromptDiffusion, checks
from fast_prompt.ops.prompt_diffusion import MAX_PROMPTS
from fast_prompt.reference.prompt_diffusion import ACTIVATIONS, ROW_WEIGHTS
from fast_prompt.tuning.config import MethodConfig, check_names
from fast_prompt.tuning.placement import placement
from fast_prompt.tuning.precision import as_it_computes
from fast_prompt.tuning.site import FoldedSite, Site


@dataclass(kw_only=True)
class APTConfig(MethodConfig):
    """Settings of APT; see ``fast_prompt.nn.PromptDiffusion`` for what it computes.

    Attributes:
        num_prompts: p, prompts per attention, from 1 to 1,024.
        rank: r, the rank of the keys' offset from the prompts, at least 1.
        activation: ``"relu"`` or ``"softmax"`` over the prompts.
        row_weight: ``"max"`` (each row weighted by its largest activation) or ``"none"``.
        dropout: probability in [0, 1) that an activation is dropped in training.
        learn_scale: whether the output's scale trains.
        target_modules: names of the attention modules to adapt, in place of those known for the architecture: a list
            of module names or their endings, or one regular expression that must match the whole name. (It is tried
            in a process of its own, for ten seconds at most: a file's may be one that takes for ever.)
        modules_to_save: names (or their endings) of modules to train and save in full. A task head that the base model
            did not come with trained belongs here, as in PEFT: ``["classifier"]``.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    method: ClassVar[str] = "APT"
    cost: ClassVar[str | None] = "fast_prompt.methods.apt.cost"

    target_modules: list[str] | str | None = None
    num_prompts: int = 200
    rank: int = 4
    activation: str = "relu"
    row_weight: str = "max"
    dropout: float = 0.0
    learn_scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, str):
            check_pattern("target_modules", self.target_modules)
        elif self.target_modules is not None:
            self.target_modules = check_names("target_modules", self.target_modules)
        checks.check_count("num_prompts", self.num_prompts, MAX_PROMPTS)
        checks.check_count("rank", self.rank)
        checks.check_choice("activation", self.activation, ACTIVATIONS)
        checks.check_choice("row_weight", self.row_weight, ROW_WEIGHTS)
        checks.check_probability("dropout", self.dropout)
        checks.check_bool("learn_scale", self.learn_scale)

    def find_sites(self, model: nn.Module) -> list[AttentionSite]:
        """Every attention that ``target_modules`` names, or that is known."""
        return find_attention_sites(model, self.target_modules)

    def build(self, model: nn.Module, site: Site) -> PromptDiffusion:
        """A new ``PromptDiffusion`` where the site computes; float32, or float64 in a float64 model."""
        return PromptDiffusion(
            site.width,
            self.num_prompts,
            self.rank,
            activation=self.activation,
            row_weight=self.row_weight,
            dropout=self.dropout,
            learn_scale=self.learn_scale,
            **placement(model, site.name),
        )

    def fold(self, model: nn.Module, site: Site, adapter: nn.Module) -> FoldedSite:
        """One attention's adapter merged into its projections.

        Raises:
            ValueError: its projections are not known to read X and give H, they are not plain linear layers, or a
                forward to replace is another tool's or not what it was.
        """
        assert isinstance(site, AttentionSite) and isinstance(adapter, PromptDiffusion)
        attention = model.get_submodule(site.name)
        projections = site.projections
        if site.unproven or projections is None:
            raise ValueError(f"{site.name}: cannot fold {type(attention).__name__}: {site.unproven}")
        memory = () if site.is_cross else projections.memory
        query, *others = (
            _plain_linear(model, f"{site.name}.{path}") for path in (projections.query, *memory, projections.output)
        )
        folded = FoldedPromptDiffusion(adapter, query, others[:-1], others[-1])
        forwards = {projections.query: query_forward, projections.output: output_forward}
        forwards |= dict(zip(memory, (key_forward, value_forward), strict=False))
        forwards |= dict([_FUSED[type(attention).__name__]] if type(attention).__name__ in _FUSED else [])
        replaced = {f"{site.name}.{path}": forward for path, forward in forwards.items()}
        check_forwards(model, list(replaced))
        return FoldedSite(folded, replaced)


# By an attention's class: the child whose forward is replaced as well while it is folded, and by what.
_FUSED = {name: fused for architecture in ARCHITECTURES for name, fused in architecture.fused.items()}


def _plain_linear(model: nn.Module, path: str) -> nn.Linear:
    linear = as_it_computes(model.get_submodule(path))
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise ValueError(f"{path}: cannot fold {type(linear).__name__}, only a plain nn.Linear")
    return linear


def query_forward(self: Any, _: Callable[..., Any], source: Tensor) -> Tensor:
    """A folded query projection's forward."""
    return self.fast_prompt_folded.project_query(source)


def key_forward(self: Any, _: Callable[..., Any], source: Tensor) -> Tensor:
    """A folded key projection's forward."""
    return self.fast_prompt_folded.project_key(source)


def value_forward(self: Any, _: Callable[..., Any], source: Tensor) -> Tensor:
    """A folded value projection's forward."""
    return self.fast_prompt_folded.project_value(source)


def output_forward(self: Any, _: Callable[..., Any], heads: Tensor) -> Tensor:
    """A folded output projection's forward."""
    return self.fast_prompt_folded.project_output(heads)
