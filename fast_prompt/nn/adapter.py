"""The bottleneck adapter, as a module."""

import torch
from torch import Tensor, nn

from fast_prompt.nn import checks
from fast_prompt.nn.offload import read
from fast_prompt.ops.checks import check_rows
from fast_prompt.ops.skip_adapter import skip_adapter


class BottleneckAdapter(nn.Module):
    """``y = x + W_up ReLU(W_down x)``, each row by itself.

    Args:
        dim: d, the width of x.
        width: the bottleneck's width.
        device: where the parameters live.
        dtype: the parameters' dtype; that of ``x``, or float32.

    Attributes:
        down_proj: linear, d to the bottleneck; weight from N(0, 0.01), bias 0.
        up_proj: linear, back to d; weight from N(0, 0.01), bias 0.

    Raises:
        ValueError: a width is out of range.

    Source: "Adapting Pre-trained Language Models to Vision-Language Tasks via Dynamic Visual Prompting",
    arXiv 2306.00409, section 4.
    """

    def __init__(
        self, dim: int, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        checks.check_count("dim", dim)
        checks.check_count("width", width)
        self.down_proj = nn.Linear(dim, width, device=device, dtype=dtype)
        self.up_proj = nn.Linear(width, dim, device=device, dtype=dtype)
        for linear in (self.down_proj, self.up_proj):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., d] to [..., d], dtype of ``x`` (the autocast dtype under autocast)."""
        check_rows("x", x, self.down_proj.in_features)
        down_weight, down_bias = read(self.down_proj, "weight", "bias")
        up_weight, up_bias = read(self.up_proj, "weight", "bias")
        return skip_adapter(x, down_weight, up_weight, down_bias, up_bias)
