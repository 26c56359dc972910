"""The bottleneck adapter that takes a transformer block's place, or stands beside its sublayers, as a module."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fast_prompt.nn import checks
from fast_prompt.nn.offload import read
from fast_prompt.ops.autocast import activation_dtype
from fast_prompt.ops.checks import check_rows
from fast_prompt.ops.skip_adapter import skip_adapter
from fast_prompt.reference.skip_adapter import ACTIVATIONS, RESIDUALS, Adapter


def _init_normal(module: "SkipAdapter") -> None:
    """All weights from N(0, 0.02), as the paper's authors draw them."""
    for linear in module.linears():
        nn.init.normal_(linear.weight, std=0.02)


def _init_lora(module: "SkipAdapter") -> None:
    """LoRA's: the adapter starts as its residual alone."""
    _init_normal(module)
    nn.init.kaiming_uniform_(module.down_proj.weight, a=math.sqrt(5))
    nn.init.zeros_(module.up_proj.weight)


INITS: dict[str, Callable[["SkipAdapter"], None]] = {"normal": _init_normal, "lora": _init_lora}

NORM_CLASSES: dict[str, Callable[..., nn.Module] | None] = {
    "none": None,
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "layer_after": nn.LayerNorm,
}


class SkipAdapter(nn.Module):
    """``x + scale * up(dropout(activation(down(norm(x)))))``, each row by itself.

    See ``fast_prompt.ops.skip_adapter``, which computes it in one pass. With experts the up projection is a mixture,
    weighted for each sample by ``softmax(expert_gate(z) / temperature)``, z being its first token's normed row. In
    training mode hidden elements are dropped out; the mask's seed comes from torch's generator, so that gradient
    checkpointing repeats it.

    Args:
        dim: d, the width of x.
        width: w, the bottleneck's width.
        norm: ``"layer"`` or ``"rms"`` of x before the down projection, ``"layer_after"`` of the scaled result of the
            up projection, or ``"none"``.
        activation: ``"relu"``, ``"silu"`` or ``"gelu"``.
        residual: what is added: ``"input"``, x; ``"normed"``, x and its norm (for ``"layer"`` and ``"rms"``);
            ``"none"``, nothing.
        dropout: probability in [0, 1) that a hidden element is dropped in training.
        scale: what the result of the up projection is multiplied by.
        learn_scale: whether the scale trains.
        init: ``"normal"``, all weights from N(0, 0.02); or ``"lora"``, the down projection as LoRA draws it and the up
            projection zero. Biases are zero.
        num_experts: E, how many up projections are mixed; 0 for a single one without gates.
        num_groups: G, groups of hidden and of output elements that the experts' up projections keep apart; it must
            divide both widths. 1 without experts.
        temperature: of the experts' softmax, above 0.
        eps: of the norm.
        bias: whether the projections have one.
        device: where the parameters live.
        dtype: the parameters' dtype; that of the activations, or float32.

    Attributes:
        norm: LayerNorm or RMSNorm, or None.
        down_proj: linear, d to w.
        up_proj: linear, w to d; with experts weight [d, E * w / G] and bias [E, d].
        expert_gate: linear, d to E, or None.
        scale: scalar tensor; None where it stays 1.

    Raises:
        ValueError: a setting is out of range; the message names it.

    Source: "Parameter and Computation Efficient Transfer Learning for Vision-Language Pre-trained Models",
    arXiv 2309.01479, section 3.3; the mixture is that of LaVIN, arXiv 2305.15023.
    """

    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        norm: str = "layer",
        activation: str = "relu",
        residual: str = "input",
        dropout: float = 0.0,
        scale: float = 1.0,
        learn_scale: bool = False,
        init: str = "normal",
        num_experts: int = 0,
        num_groups: int = 1,
        temperature: float = 10.0,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(norm, activation, dropout, scale, learn_scale, init, temperature)
        check_experts(num_experts, num_groups)
        checks.check_count("dim", dim)
        checks.check_count("width", width)
        checks.check_choice("residual", residual, RESIDUALS)
        checks.check_positive("eps", eps)
        checks.check_bool("bias", bias)
        if residual == "normed" and norm not in ("layer", "rms"):
            raise ValueError(f"residual: expected a norm before the adapter for 'normed', got norm={norm!r}")
        if dim % num_groups or width % num_groups:
            raise ValueError(f"num_groups: expected a divisor of {dim} and of {width}, got {num_groups}")
        self.norm_form, self.activation, self.residual, self.eps = norm, activation, residual, eps
        self.dropout, self.init, self.temperature = dropout, init, temperature
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_class = NORM_CLASSES[norm]
        self.norm = None if norm_class is None else norm_class(dim, eps=eps, **place)
        self.down_proj = nn.Linear(dim, width, bias, **place)
        up_width = max(num_experts, 1) * width // num_groups
        self.up_proj = nn.Linear(up_width, dim, bias, **place)
        if bias and num_experts:
            self.up_proj.bias = nn.Parameter(torch.empty(num_experts, dim, **place))
        self.expert_gate = nn.Linear(dim, num_experts, **place) if num_experts else None
        if learn_scale:
            self.scale = nn.Parameter(torch.full((), float(scale), **place))
        else:
            fixed = None if scale == 1 else torch.full((), float(scale), **place)
            self.register_buffer("scale", fixed, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew; the norm and the scale stay."""
        INITS[self.init](self)
        for linear in self.linears():
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def linears(self) -> list[nn.Linear]:
        """Its linear layers."""
        return [linear for linear in (self.down_proj, self.up_proj, self.expert_gate) if linear is not None]

    def gates(self, x: Tensor, first: Tensor | None = None) -> Tensor | None:
        """The experts' weights [B, E] for ``x`` [B, n, d], from each sample's first token; None without experts.

        Where padding comes before that, ``first`` [B] says where it is.
        """
        if self.expert_gate is None:
            return None
        rows = x[:, 0] if first is None else x[torch.arange(x.shape[0], device=x.device), first]
        rows = rows.to(self.expert_gate.weight.dtype)
        if self.norm is not None and self.norm_form != "layer_after":
            rows = self.norm(rows)
        return torch.softmax(self.expert_gate(rows) / self.temperature, -1)

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """Adapt rows.

        Args:
            x: [..., n, d]; [B, n, d] with experts.
            gates: [B, E], where the experts' weights were computed before; otherwise those of ``self.gates(x)``.

        Returns:
            as ``x``, dtype of ``x``. Under autocast the adapter computes in its dtype, and the residual stays as wide
            as it came; without a residual the result has the autocast dtype.

        Raises:
            TypeError, ValueError: an argument is no tensor that fits; the message names it.
        """
        check_rows("x", x, self.down_proj.in_features, 3 if self.expert_gate else None)
        gates = self.gates(x) if gates is None else gates
        options = self.options()
        if self.residual == "none" or activation_dtype(x) == x.dtype:
            return skip_adapter(x, *self.tensors(), gates, **options)
        result = skip_adapter(x, *self.tensors(), gates, **options | {"residual": "none"})
        normed = self.norm(x) if self.residual == "normed" and self.norm is not None else x
        return RESIDUALS[self.residual](x, normed, result)

    def tensors(self) -> Adapter:
        """What ``fast_prompt.ops.skip_adapter`` takes after x: the parameters and the scale."""
        norm_weight, norm_bias = read(self.norm, "weight", "bias")
        down_weight, down_bias = read(self.down_proj, "weight", "bias")
        up_weight, up_bias = read(self.up_proj, "weight", "bias")
        (scale,) = read(self, "scale")
        return Adapter(down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, scale)

    def options(self) -> dict[str, Any]:
        """The op's options for a call now: dropout in training mode alone."""
        return {
            "norm": self.norm_form,
            "activation": self.activation,
            "residual": self.residual,
            "eps": self.eps,
            "dropout_p": self.dropout if self.training else 0.0,
        }

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        settings = f"activation={self.activation!r}, residual={self.residual!r}, dropout={self.dropout}"
        return f"norm={self.norm_form!r}, {settings}"


def check_options(
    norm: str, activation: str, dropout: float, scale: float, learn_scale: bool, init: str, temperature: float
) -> None:
    """Raise a ValueError that names the first option of ``SkipAdapter`` that is out of range."""
    checks.check_choice("norm", norm, NORM_CLASSES)
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_probability("dropout", dropout)
    checks.check_finite("scale", scale)
    checks.check_bool("learn_scale", learn_scale)
    checks.check_choice("init", init, INITS)
    checks.check_positive("temperature", temperature)


def check_experts(num_experts: int, num_groups: int) -> None:
    """Raise a ValueError unless there are no experts, or some, in a number of groups."""
    checks.check_index("num_experts", num_experts)
    checks.check_count("num_groups", num_groups)
    if num_groups > 1 and not num_experts:
        raise ValueError(f"num_groups: expected 1 without experts, got {num_groups}")
