"""APT, approximated prompt tuning (arXiv 2306.15706): prompts diffused into every attention's output."""

from dataclasses import dataclass
from types import MethodType
from typing import ClassVar

import torch
from torch import nn

from fast_prompt.models import PROVEN, AttentionSite, find_attention_sites
from fast_prompt.models.sdpa import FUSED
from fast_prompt.nn import FoldedPromptDiffusion, PromptDiffusion, checks
from fast_prompt.nn.prompt_diffusion import MAX_PROMPTS
from fast_prompt.reference.prompt_diffusion import ACTIVATIONS, ROW_WEIGHTS
from fast_prompt.tuning.config import MethodConfig
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
            of module names or their endings, or one regular expression that must match the whole name.
        modules_to_save: names (or their endings) of modules to train and save in full. A task head that the base model
            did not come with trained belongs here, as in PEFT: ``["classifier"]``.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    method: ClassVar[str] = "APT"

    num_prompts: int = 200
    rank: int = 4
    activation: str = "relu"
    row_weight: str = "max"
    dropout: float = 0.0
    learn_scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
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
        """A new ``PromptDiffusion`` on the device of the site's weights; float32, or float64 in a float64 model."""
        weight = next(model.get_submodule(site.name).parameters())
        return PromptDiffusion(
            site.width,
            self.num_prompts,
            self.rank,
            activation=self.activation,
            row_weight=self.row_weight,
            dropout=self.dropout,
            learn_scale=self.learn_scale,
            device=weight.device,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
        )

    def fold(self, model: nn.Module, site: Site, adapter: nn.Module) -> FoldedSite:
        """One attention's adapter merged into its projections.

        Raises:
            ValueError: the attention is not of a class whose projections are known to read X and give H, or they are
                not plain linear layers.
        """
        assert isinstance(site, AttentionSite) and isinstance(adapter, PromptDiffusion)
        attention = model.get_submodule(site.name)
        projections = site.projections
        if not site.proven or projections is None:
            raise ValueError(
                f"{site.name}: cannot fold {type(attention).__name__}, only {', '.join(PROVEN)}: what its projections "
                "read and give is not known"
            )
        memory = () if site.is_cross else projections.memory
        linears = [attention.get_submodule(path) for path in (projections.query, *memory, projections.output)]
        try:
            folded = FoldedPromptDiffusion(adapter, linears[0], linears[1:-1], linears[-1])
        except TypeError as error:
            raise ValueError(f"{site.name}: cannot fold its projections: {error}") from error
        forwards = (folded.project_key, folded.project_value) if memory else ()
        paths = dict(zip(memory, forwards, strict=True))
        paths |= {projections.query: folded.project_query, projections.output: folded.project_output}
        if type(attention).__name__ in FUSED:
            child, forward = FUSED[type(attention).__name__]
            paths[child] = MethodType(forward, attention.get_submodule(child))
        return FoldedSite(folded, {f"{site.name}.{path}": forward for path, forward in paths.items()})
