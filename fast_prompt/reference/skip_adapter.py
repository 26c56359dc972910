"""What ``skip_adapter`` computes, in plain PyTorch."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, relu, rms_norm, silu

from fast_prompt.reference.autocast import without_autocast
from fast_prompt.reference.philox import dropout_mask


def skip_adapter(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    scale: Tensor | None = None,
    gates: Tensor | None = None,
    kept: Tensor | None = None,
    *,
    norm: str = "none",
    activation: str = "relu",
    residual: str = "input",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    route: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """A bottleneck adapter in the place of a transformer block: ``x + scale * up(dropout(act(down(norm(x)))))``.

    Weights with a leading dimension A are A adapters: applied one after the other (a *run* of skipped blocks), or,
    where ``route`` names one for each sample, that one alone. With ``gates``, a single adapter's up projection is a
    mixture of E experts.
    This is the definition: arithmetic in float32 (float64 for float64 inputs), rounded once to ``x.dtype``.

    Args:
        x: [..., n, d] floating point; [B, n, d] where ``gates`` or ``route`` is given.
        down_weight: [w, d], or [A, w, d]; dtype of ``x`` or float32.
        up_weight: [d, w], or [A, d, w]; with gates [d, E * w / G]: expert after expert, an output column of group g
            reading the hidden columns of group g alone. Dtype of ``down_weight``, as all parameters but the scale.
        down_bias: [w] or [A, w], or None.
        up_bias: [d] or [A, d]; with gates [E, d]; or None.
        norm_weight: [d] or [A, d]; needed exactly where ``norm`` is not ``"none"``.
        norm_bias: as ``norm_weight``, or None; None for ``"rms"``.
        scale: one element, for A adapters [A]; any floating dtype; None for 1.
        gates: [B, E], any floating dtype: each sample's weights of the experts. Of a single adapter, without a route.
        kept: [K, n, d], dtype of ``x``: the results, in order, of the K samples whose route is -1.
        norm: ``"none"``; ``"layer"`` or ``"rms"`` of x before the down projection; ``"layer_after"`` of the scaled
            result of the up projection.
        activation: ``"relu"``, ``"silu"`` or ``"gelu"`` (exact).
        residual: what is added: ``"input"``, x; ``"normed"``, x and its norm (LLaMA's form, with a norm before);
            ``"none"``, nothing.
        eps: of the norm.
        dropout_p: probability in [0, 1) that a hidden element is dropped; the others are divided by ``1 - dropout_p``.
        seed: int64; needed when ``dropout_p > 0``. Element (row, column) of the a-th adapter of a run uses Philox
            counter ``(a * rows + row) * w + column``, the rows of all samples counted in order; a = 0 with a route.
        route: for each sample the index of its adapter, or -1 for a sample that is in ``kept``.

    Returns:
        [..., n, d], dtype of ``x``.

    Source: "Parameter and Computation Efficient Transfer Learning for Vision-Language Pre-trained Models",
    arXiv 2309.01479, section 3.3; the mixture is that of LaVIN, arXiv 2305.15023.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = None if scale is None else scale.reshape(down_weight.shape[:-2])
    parameters = Adapter(down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, scale)
    adapters = apart(parameters.each(lambda parameter: parameter.to(wide)))
    keeps = dropout(x, down_weight, 1 if route is not None else len(adapters), dropout_p, seed)
    options: dict[str, Any] = {"norm": norm, "activation": activation, "residual": residual, "eps": eps}
    with without_autocast(x.device):
        rows = x.to(wide)
        expert_gates = None if gates is None else gates.to(wide)
        if route is not None:
            return _routed(rows, adapters, kept, keeps[0], route, options).to(x.dtype)
        for adapter, keep in zip(adapters, keeps, strict=True):
            rows = adapt(rows, adapter, expert_gates, keep, **options)
        return rows.to(x.dtype)


class Adapter(NamedTuple):
    """The parameters of one adapter, named and shaped as in ``skip_adapter``."""

    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    scale: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Adapter":
        """The adapter with ``change`` applied to all that it has."""
        return Adapter(*(None if value is None else change(value) for value in self))  # type: ignore[arg-type]


def apart(parameters: Adapter) -> list[Adapter]:
    """Each adapter of a stack [A, ...], or the one there is."""
    if parameters.down_weight.dim() == 2:
        return [parameters]
    return [parameters.each(itemgetter(index)) for index in range(len(parameters.down_weight))]


def dropout(
    x: Tensor, down_weight: Tensor, count: int, dropout_p: float, seed: int | Tensor | None
) -> Sequence[Tensor | float]:
    """What the hidden elements of each of ``count`` adapters are multiplied by."""
    if dropout_p == 0:
        return [1.0] * count
    rows, width = x[..., 0].numel(), down_weight.shape[-2]
    mask = dropout_mask(torch.as_tensor(seed), count * rows, width, dropout_p, x.device)
    return list(mask.view(count, *x.shape[:-1], width) / (1 - dropout_p))


def adapt(
    x: Tensor,
    adapter: Adapter,
    gates: Tensor | None,
    keep: Tensor | float,
    norm: str,
    activation: str,
    residual: str,
    eps: float,
) -> Tensor:
    """One adapter's result for rows [..., n, d]; ``keep`` [..., n, w] or a number scales its hidden elements."""
    normed = NORMS[norm](x, adapter.norm_weight, adapter.norm_bias, eps)
    hidden = ACTIVATIONS[activation](linear(normed, adapter.down_weight, adapter.down_bias)) * keep
    if gates is None:
        result = linear(hidden, adapter.up_weight, adapter.up_bias)
    else:
        result = _mix(hidden, adapter.up_weight, adapter.up_bias, gates)
    result = result if adapter.scale is None else adapter.scale * result
    if norm == "layer_after":
        result = layer_norm(result, result.shape[-1:], adapter.norm_weight, adapter.norm_bias, eps)
    return RESIDUALS[residual](x, normed, result)


def _mix(hidden: Tensor, up_weight: Tensor, up_bias: Tensor | None, gates: Tensor) -> Tensor:
    """The experts' up projections of ``hidden`` [B, n, w], each weighted by its gate; every group by itself."""
    experts, width = gates.shape[1], hidden.shape[-1]
    groups = experts * width // up_weight.shape[1]
    weight = up_weight.view(groups, -1, experts, width // groups)
    mixed = torch.einsum("bngj,be,goej->bngo", hidden.unflatten(-1, (groups, -1)), gates, weight).flatten(2)
    return mixed if up_bias is None else mixed + (gates @ up_bias)[:, None]


def _routed(
    x: Tensor,
    adapters: list[Adapter],
    kept: Tensor | None,
    keep: Tensor | float,
    route: Sequence[int] | Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Each sample through its own adapter, or from ``kept``."""
    chosen = torch.as_tensor(route, device=x.device)
    output = torch.zeros_like(x)
    if kept is not None:
        output = output.index_copy(0, (chosen < 0).nonzero()[:, 0], kept.to(x.dtype))
    for index, adapter in enumerate(adapters):
        samples = (chosen == index).nonzero()[:, 0]
        own_keep = keep[samples] if isinstance(keep, Tensor) else keep
        output = output.index_copy(0, samples, adapt(x[samples], adapter, None, own_keep, **options))
    return output


NORMS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x, weight, bias, eps: x,
    "layer": lambda x, weight, bias, eps: layer_norm(x, x.shape[-1:], weight, bias, eps),
    "rms": lambda x, weight, bias, eps: rms_norm(x, x.shape[-1:], weight, eps),
    "layer_after": lambda x, weight, bias, eps: x,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "silu": silu, "gelu": gelu}
RESIDUALS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "input": lambda x, normed, result: x + result,
    "normed": lambda x, normed, result: x + normed + result,
    "none": lambda x, normed, result: result,
}
