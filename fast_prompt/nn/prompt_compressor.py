"""Dynamic visual prompting's cross-attention, as a module."""

import torch
from torch import Tensor, nn

from fast_prompt.nn import checks
from fast_prompt.nn.offload import read
from fast_prompt.ops.autocast import activation_dtype
from fast_prompt.ops.checks import check_rows
from fast_prompt.ops.prompt_compress import prompt_compress
from fast_prompt.reference.prompt_compress import FORMS


class PromptCompressor(nn.Module):
    """Compresses a sample's visual tokens into one prompt for each query.

    ``forward`` computes multi-head cross-attention with projections, and neither LayerNorm nor residual: see
    ``fast_prompt.ops.prompt_compress``, which projects no visual token where the queries are few. In training mode the
    attention weights are dropped out; the mask's seed comes from torch's generator.

    Args:
        dim: d, the width of queries and prompts.
        num_heads: h; it must divide ``inner_dim``.
        visual_dim: d_v, the width of the visual tokens; ``dim`` when None.
        inner_dim: E, the width of all heads together; ``dim`` when None.
        bias: whether the projections have one.
        dropout: probability in [0, 1) that an attention weight is dropped in training.
        form: ``"absorbed"``, ``"projected"``, or ``"auto"`` for the one of fewer FLOPs.
        device: where the parameters live.
        dtype: the parameters' dtype; that of the activations, or float32.

    Attributes:
        q_proj: linear, d to E.
        k_proj: linear, d_v to E.
        v_proj: linear, d_v to E.
        out_proj: linear, E to d.

    Raises:
        ValueError: a setting is out of range; the message names it.

    Source: "Adapting Pre-trained Language Models to Vision-Language Tasks via Dynamic Visual Prompting",
    arXiv 2306.00409, section 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        visual_dim: int | None = None,
        *,
        inner_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        form: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        visual_dim = dim if visual_dim is None else visual_dim
        inner_dim = dim if inner_dim is None else inner_dim
        counts = {"dim": dim, "num_heads": num_heads, "visual_dim": visual_dim, "inner_dim": inner_dim}
        for name, count in counts.items():
            checks.check_count(name, count)
        if inner_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of the inner width {inner_dim}, got {num_heads}")
        checks.check_bool("bias", bias)
        checks.check_probability("dropout", dropout)
        checks.check_choice("form", form, FORMS)
        self.num_heads = num_heads
        self.dropout = dropout
        self.form = form
        self.q_proj = nn.Linear(dim, inner_dim, bias, device, dtype)
        self.k_proj = nn.Linear(visual_dim, inner_dim, bias, device, dtype)
        self.v_proj = nn.Linear(visual_dim, inner_dim, bias, device, dtype)
        self.out_proj = nn.Linear(inner_dim, dim, bias, device, dtype)

    def forward(self, query: Tensor, visual: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Compress the visual tokens.

        Args:
            query: [B, m, d].
            visual: [B, n, d_v], dtype of ``query``.
            key_padding_mask: bool [B, n], True where a token is padding, or None.

        Returns:
            [B, m, d], dtype of ``query`` (the autocast dtype under autocast); 0 where a sample is padding alone.

        Raises:
            TypeError, ValueError: an argument is no tensor that fits; the message names it.
        """
        check_rows("query", query, self.q_proj.in_features, 3)
        check_rows("visual", visual, self.k_proj.in_features, 3)
        key_weight, key_bias = read(self.k_proj, "weight", "bias")
        value_weight, value_bias = read(self.v_proj, "weight", "bias")
        compressed = prompt_compress(
            _project(self.q_proj, query, activation_dtype(query)),
            visual,
            key_weight,
            value_weight,
            key_bias,
            value_bias,
            num_heads=self.num_heads,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            form=self.form,
        )
        prompts = _project(self.out_proj, compressed, compressed.dtype)
        return prompts if key_padding_mask is None else prompts.masked_fill(key_padding_mask.all(-1)[:, None, None], 0)

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        return f"num_heads={self.num_heads}, dropout={self.dropout}, form={self.form!r}"


def _project(linear: nn.Linear, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Through a layer whose parameters may be float32 beside activations that are not."""
    return linear(rows.to(linear.weight.dtype)).to(dtype)
