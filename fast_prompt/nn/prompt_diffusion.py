"""Approximated prompt tuning's learned part of one attention, as a module."""

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from fast_prompt.nn import checks
from fast_prompt.ops.checks import check_rows
from fast_prompt.ops.prompt_diffusion import MAX_PROMPTS, prompt_diffusion
from fast_prompt.reference.autocast import without_autocast
from fast_prompt.reference.prompt_diffusion import ACTIVATIONS, ROW_WEIGHTS


class PromptDiffusion(nn.Module):
    """Adds the diffusion of ``num_prompts`` learned prompts to an attention's output.

    ``forward`` computes ``exp(log_scale) * (hidden + w * (R @ prompts))`` with ``R = activation(source @ keys.T)`` and
    ``keys = prompts + (prompts @ key_down.T) @ key_up.T``: see ``fast_prompt.ops.prompt_diffusion``. In training mode
    ``R`` is dropped out; the mask's seed comes from torch's generator, so that gradient checkpointing repeats it.

    Args:
        dim: d, the width of ``hidden`` and ``source``.
        num_prompts: p, from 1 to 1,024.
        rank: r, the rank of the keys' offset from the prompts, at least 1.
        activation: ``"relu"`` or ``"softmax"`` (over the prompts).
        row_weight: ``"max"`` (each row weighted by its largest activation) or ``"none"``.
        dropout: probability in [0, 1) that an element of ``R`` is dropped in training.
        learn_scale: whether ``log_scale`` trains; when False it stays 0.
        device: where the parameters live.
        dtype: the parameters' dtype; that of the activations, or float32.

    Attributes:
        prompts: [p, d], drawn from N(0, 0.02).
        key_down: [r, d], drawn from N(0, 1).
        key_up: [d, r], zero, so that the keys start as the prompts.
        log_scale: scalar, zero.

    Raises:
        ValueError: a setting is out of range; the message names it.

    Source: "Approximated Prompt Tuning for Vision-Language Pre-trained Models", arXiv 2306.15706, section 3.
    """

    # To ``fast_prompt.tuning.parameter_groups``: the output is quadratic in the scores, and these two move all of them.
    learning_rate_scales: ClassVar[dict[str, float]] = {"key_up": 0.1, "log_scale": 0.1}

    def __init__(
        self,
        dim: int,
        num_prompts: int,
        rank: int = 4,
        *,
        activation: str = "relu",
        row_weight: str = "max",
        dropout: float = 0.0,
        learn_scale: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_count("dim", dim)
        checks.check_count("num_prompts", num_prompts, MAX_PROMPTS)
        checks.check_count("rank", rank)
        checks.check_choice("activation", activation, ACTIVATIONS)
        checks.check_choice("row_weight", row_weight, ROW_WEIGHTS)
        checks.check_probability("dropout", dropout)
        checks.check_bool("learn_scale", learn_scale)
        self.activation = activation
        self.row_weight = row_weight
        self.dropout = dropout
        self.learn_scale = learn_scale
        self.prompts = nn.Parameter(torch.empty(num_prompts, dim, device=device, dtype=dtype))
        self.key_down = nn.Parameter(torch.empty(rank, dim, device=device, dtype=dtype))
        self.key_up = nn.Parameter(torch.empty(dim, rank, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty((), device=device, dtype=dtype), requires_grad=learn_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as the paper's authors do."""
        nn.init.normal_(self.prompts, std=0.02)
        nn.init.normal_(self.key_down)
        nn.init.zeros_(self.key_up)
        nn.init.zeros_(self.log_scale)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let the parameters train or not; ``log_scale`` never trains when ``learn_scale`` is False."""
        super().requires_grad_(requires_grad)
        self.log_scale.requires_grad_(requires_grad and self.learn_scale)
        return self

    def keys(self) -> Tensor:
        """The prompts' keys [p, d], in the parameters' own dtype under autocast too."""
        with without_autocast(self.prompts.device):
            return self.prompts + (self.prompts @ self.key_down.t()) @ self.key_up.t()

    def forward(self, hidden: Tensor, source: Tensor, *, inplace: bool = False) -> Tensor:
        """Diffuse the prompts into ``hidden``.

        Args:
            hidden: [..., n, d]; the attention's output projection with its bias, before dropout and residual.
            source: [..., n, d], dtype of ``hidden``; what the attention's queries are projected from.
            inplace: whether the result may be written over ``hidden``, which must then have no other use.

        Returns:
            [..., n, d], dtype of ``hidden`` (the autocast dtype under autocast).

        Raises:
            TypeError, ValueError: an argument is no tensor that fits; the message names it.
        """
        check_rows("hidden", hidden, self.prompts.shape[1])
        return prompt_diffusion(
            hidden,
            source,
            self.prompts,
            self.keys(),
            self.log_scale,
            activation=self.activation,
            row_weight=self.row_weight,
            dropout_p=self.dropout if self.training else 0.0,
            inplace=inplace,
        )

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        (num_prompts, dim), rank = self.prompts.shape, self.key_down.shape[0]
        settings = f"activation={self.activation!r}, row_weight={self.row_weight!r}, dropout={self.dropout}"
        return f"{dim}, num_prompts={num_prompts}, rank={rank}, {settings}, learn_scale={self.learn_scale}"
