"""``skip_adapter``: what it is, its declaration and its checks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fast_prompt import reference
from fast_prompt.backends import Call, Kernels, cuda
from fast_prompt.ops import checks
from fast_prompt.ops.declaration import Op, activation, choice, index, number, scalars, weight
from fast_prompt.ops.routes import route_tensors
from fast_prompt.ops.rows import three_dimensional
from fast_prompt.ops.seeds import seed_tensor
from fast_prompt.reference.skip_adapter import ACTIVATIONS, NORMS, RESIDUALS

LARGEST_EPS = torch.finfo(torch.float32).max


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

    One read of ``x`` and one write of the result. Weights with a leading dimension A are A adapters: applied one after
    the other while the rows stay on chip (a *run* of skipped blocks), or, where ``route`` names one for each sample,
    that one alone, the samples of ``kept`` being put between. With ``gates``, a single adapter's up projection is a
    mixture of E experts. Kept for the backward pass are ``x`` and the hidden layer before its activation. Arithmetic is
    float32 whatever the storage; where half precision is multiplied as such (``fast_prompt.tolerances``), the hidden
    layer ends where its dtype ends. Under autocast the activations are cast to its dtype; parameters may stay float32.

    Args:
        x: [..., n, d] float32, bfloat16, float16 or float64; [B, n, d] where ``gates`` or ``route`` is given. Any
            strides.
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
        seed: int64 number or one-element tensor that fixes the dropout mask; drawn from torch's generator when None.
        route: for each sample the index of its adapter, or -1 for a sample that is in ``kept``. Whole numbers, in a
            sequence or a tensor on the CPU (on another device it is waited for).

    Returns:
        [..., n, d], dtype of ``x`` (the autocast dtype under autocast), contiguous. An empty batch gives an empty
        result and zero gradients.

    Raises:
        TypeError: an argument is not a tensor, or dtypes do not go together.
        ValueError: a shape, device, route or option does not fit; the message names it.
        fast_prompt.BackendError: a backend was forced that cannot take the call.

    Source: "Parameter and Computation Efficient Transfer Learning for Vision-Language Pre-trained Models",
    arXiv 2309.01479, section 3.3; the mixture is that of LaVIN, arXiv 2305.15023.
    """
    tensors = (x, down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, scale, gates, kept)
    plan = SKIP_ADAPTER.plan(*tensors, norm, activation, residual, eps, dropout_p)
    chosen = _checked_route(x, down_weight, gates, kept, route)
    seed = seed_tensor(seed, dropout_p, x.device)
    if plan.form == "reference":
        return plan.define(*tensors, seed=seed, route=chosen)
    routing = (None, None) if chosen is None else route_tensors(chosen, x.device)
    if x.dim() == 3:
        return plan.run(*tensors, *routing, seed)
    return plan.run(three_dimensional(x), *tensors[1:], *routing, seed).view(x.shape)


def _check_options(norm: str, residual: str, eps: float, dropout_p: float) -> None:
    checks.check_probability("dropout_p", dropout_p)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps <= LARGEST_EPS:
        raise ValueError(f"eps: expected a number from 0, got {eps!r}")
    if residual == "normed" and norm not in ("layer", "rms"):
        raise ValueError(f"residual: expected a norm before the adapter for 'normed', got norm={norm!r}")


def _check(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    gates: Tensor | None,
    kept: Tensor | None,
    norm: str,
    activation: str,
    residual: str,
    eps: float,
    dropout_p: float,
) -> None:
    _check_options(norm, residual, eps, dropout_p)
    checks.check_tensor("x", x, minimum_rank=1)
    d = x.shape[-1]
    if down_weight.dim() not in (2, 3) or down_weight.shape[-1] != d or 0 in (d, *down_weight.shape):
        raise ValueError(
            f"down_weight: expected shape [w, {d}] or [adapters, w, {d}] with every size at least 1 (d is that of x), "
            f"got {tuple(down_weight.shape)}"
        )
    *count, width = down_weight.shape[:-1]
    if (norm == "none") != (norm_weight is None):
        expected = "None" if norm == "none" else "a tensor"
        raise ValueError(f"norm_weight: expected {expected} with norm={norm!r}, got {type(norm_weight).__name__}")
    if norm_bias is not None and norm in ("none", "rms"):
        raise ValueError(f"norm_bias: expected None with norm={norm!r}, got a tensor")
    up_shape, up_bias_shape = [(*count, d, width)], (*count, d)
    if gates is not None:
        _check_gates(x, down_weight, gates)
        experts = gates.shape[1]
        groups = [g for g in range(1, width + 1) if width % g == 0 and d % g == 0]
        up_shape, up_bias_shape = [(d, experts * width // g) for g in groups], (experts, d)
    if tuple(up_weight.shape) not in up_shape:
        expected = " or ".join(map(str, up_shape))
        raise ValueError(
            f"up_weight: expected shape {expected} (from x, down_weight and gates), got {tuple(up_weight.shape)}"
        )
    optional = {
        "down_bias": (down_bias, (*count, width)),
        "up_bias": (up_bias, up_bias_shape),
        "norm_weight": (norm_weight, (*count, d)),
        "norm_bias": (norm_bias, (*count, d)),
    }
    for name, (value, shape) in optional.items():
        if value is not None:
            checks.check_shape(name, value, shape, "from x, down_weight and gates")
    if scale is not None:
        if count:
            checks.check_shape("scale", scale, tuple(count), "one element an adapter of down_weight")
        elif scale.numel() != 1:
            raise ValueError(f"scale: expected one element an adapter, got shape {tuple(scale.shape)}")


def _check_gates(x: Tensor, down_weight: Tensor, gates: Tensor) -> None:
    if down_weight.dim() == 3:
        raise ValueError(
            f"gates: expected None with several adapters (down_weight of shape {tuple(down_weight.shape)}), "
            f"got shape {tuple(gates.shape)}"
        )
    if x.dim() != 3 or gates.dim() != 2 or gates.shape[0] != x.shape[0] or gates.shape[1] == 0:
        raise ValueError(
            f"gates: expected shape [B, experts] for x [B, n, d], got {tuple(gates.shape)} for x {tuple(x.shape)}"
        )


def checked_route(x: Tensor, route: Sequence[int] | Tensor, adapters: int) -> list[int]:
    """The route as plain numbers, so that torch.compile can burn it in where it came as such.

    Raises:
        TypeError: it is not of whole numbers.
        ValueError: its length is not that of x [B, n, d], or it names an adapter beyond those there are.
    """
    if isinstance(route, Tensor):
        checks.check_dense("route", route)
        checks.check_has_values("route", route)
        route = route.tolist()
    whole = isinstance(route, Sequence) and all(isinstance(each, int) and not isinstance(each, bool) for each in route)
    if not whole:
        raise TypeError(f"route: expected whole numbers, got {route!r}")
    chosen = list(route)
    if x.dim() != 3 or len(chosen) != x.shape[0]:
        raise ValueError(
            f"route: expected one number for each sample of x [B, n, d], got {len(chosen)} for x {tuple(x.shape)}"
        )
    outside = [number for number in chosen if not -1 <= number < adapters]
    if outside:
        raise ValueError(f"route: expected adapters from 0 to {adapters - 1}, or -1 for none, got {outside[0]}")
    return chosen


def _check_kept(x: Tensor, route: list[int], gates: Tensor | None, kept: Tensor | None) -> None:
    if gates is not None:
        raise ValueError("route: expected None with gates, got a route")
    number_kept = route.count(-1)
    if kept is None:
        if number_kept:
            raise ValueError(f"kept: expected the results of the {number_kept} samples of route -1, got None")
        return
    checks.check_shape("kept", kept, (number_kept, *x.shape[1:]), "the samples of route -1, and x")


def _checked_route(
    x: Tensor,
    down_weight: Tensor,
    gates: Tensor | None,
    kept: Tensor | None,
    route: Sequence[int] | Tensor | None,
) -> list[int] | None:
    """The route, once it and what is kept are seen to go together."""
    if route is None:
        if kept is not None:
            raise ValueError("kept: expected None without a route, got a tensor")
        return None
    chosen = checked_route(x, route, down_weight.shape[0] if down_weight.dim() == 3 else 1)
    _check_kept(x, chosen, gates, kept)
    return chosen


def _sizes(x: Tensor, down_weight: Tensor, gates: Tensor | None, **_: Any) -> dict[str, int]:
    """``width``: d; ``adapter_width``: w; ``num_adapters``: A; ``num_experts``: E, or 0 without gates."""
    return {
        "width": x.shape[-1],
        "adapter_width": down_weight.shape[-2],
        "num_adapters": down_weight.shape[0] if down_weight.dim() == 3 else 1,
        "num_experts": 0 if gates is None else gates.shape[1],
    }


def _results(
    x: Tensor, down_weight: Tensor, route: Tensor | None, keep: Sequence[bool], backend: str, **_: Any
) -> list[Tensor]:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not keep[0]:
        return [output]
    adapters = down_weight.shape[0] if down_weight.dim() == 3 and route is None else 1
    batch = x.shape[:-1] if x.dim() == 3 else (1, *x.shape[:-1])
    # On the CPU float16 is multiplied as float32, and what is kept need not end where float16 does.
    wide = x.dtype == torch.float16 and x.device.type == "cpu" and backend in ("cpu", "cuda")
    hidden = x.new_empty((adapters, *batch, down_weight.shape[-2]), dtype=torch.float32 if wide else None)
    return [output, hidden]


def _flops(
    x: Sequence[int],
    down_weight: Sequence[int],
    up_weight: Sequence[int],
    kept: Sequence[int] | None,
    route: Sequence[int] | None,
    **_: Any,
) -> int:
    """Down and up, for every adapter that a row goes through."""
    down, up = _products(x, down_weight, up_weight, 0 if kept is None else kept[0])
    return (down + up) * _adapters(down_weight, route)


def _flops_backward(
    x: Sequence[int],
    down_weight: Sequence[int],
    up_weight: Sequence[int],
    route: Sequence[int] | None,
    kept_samples: Sequence[int] | None,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    """A product for each of the hidden layer, the normed rows and both weights; in a run its rows again."""
    down, up = _products(x, down_weight, up_weight, 0 if kept_samples is None else kept_samples[0])
    adapters = _adapters(down_weight, route)
    need_x, need_down, need_up, need_down_bias, _bias, need_norm, need_norm_bias, need_scale, need_gates, _kept = needs
    need_rows = need_x or need_norm or need_norm_bias
    need_hidden = need_rows or need_down or need_down_bias or need_scale or need_gates
    own = adapters * (up * (need_hidden + need_up) + down * need_down)
    # Between the adapters of a run, rows are computed again and their gradients handed on.
    return own + down * (adapters if need_rows else adapters - 1) + up * (adapters - 1)


def _adapters(down_weight: Sequence[int], route: Sequence[int] | None) -> int:
    """That a row goes through."""
    return 1 if route is not None or len(down_weight) == 2 else down_weight[0]


def _products(
    x: Sequence[int], down_weight: Sequence[int], up_weight: Sequence[int], samples_kept: int
) -> tuple[int, int]:
    """FLOPs of the products of every row that is not kept with one adapter's down and up projection."""
    rows = math.prod(x[:-1]) if len(x) < 3 else (x[0] - samples_kept) * x[1]
    return 2 * rows * math.prod(down_weight[-2:]), 2 * rows * math.prod(up_weight[-2:])


# ---- What backends have no kernels for ----

# CUDA: a row's hidden layer, once for each expert, stays on chip; in bytes, and where there is little shared memory.
_MOST_HIDDEN_BYTES, _MOST_HIDDEN_BYTES_SMALL = 6144, 2560
_MOST_WIDTH = 768  # Triton: a row's hidden layer stays on chip
_MOST_ITEMS = 65535  # of a launch grid's second or third dimension; CUDA takes two gradients of each adapter at once


def _refuses_items(call: Call, most: int) -> str | None:
    items = max(call.sizes["num_adapters"], call.sizes["num_experts"])
    return f"takes up to {most} adapters or experts, not {items}" if items > most else None


def _cuda_refuses(call: Call) -> str | None:
    columns = call.sizes["adapter_width"] * max(1, call.sizes["num_experts"])
    small = cuda.has_little_shared_memory(call.device)
    most = (_MOST_HIDDEN_BYTES_SMALL if small else _MOST_HIDDEN_BYTES) // call.dtype.itemsize
    if columns > most:
        return f"takes adapters up to {most} columns wide, over all experts, not {columns}"
    return _refuses_items(call, _MOST_ITEMS // 2)


def _triton_refuses(call: Call) -> str | None:
    width, adapter_width = call.sizes["width"], call.sizes["adapter_width"]
    if adapter_width > _MOST_WIDTH:
        return f"takes hidden layers of up to {_MOST_WIDTH}, not {adapter_width}"
    if max(call.sizes["num_experts"], 1) * adapter_width * width >= 2**31:
        return f"takes an adapter's weights of fewer than 2**31 elements, not width {width}"
    return _refuses_items(call, _MOST_ITEMS)


SKIP_ADAPTER = Op(
    skip_adapter,
    reference.skip_adapter,
    tensors=(
        activation("x"),
        weight("down_weight"),
        weight("up_weight"),
        weight("down_bias", optional=True),
        weight("up_bias", optional=True),
        weight("norm_weight", optional=True),
        weight("norm_bias", optional=True),
        scalars("scale", optional=True),
        scalars("gates", optional=True),
        activation(
            "kept",
            optional=True,
            gradient_shape=lambda grad, kept_samples, **_: (kept_samples.shape[0], *grad.shape[1:]),
        ),
        index("route", planned=False),
        index("kept_samples", planned=False),
        index("seed", planned=False),
    ),
    options=(
        choice("norm", tuple(NORMS)),
        choice("activation", tuple(ACTIVATIONS)),
        choice("residual", tuple(RESIDUALS)),
        number("eps"),
        number("dropout_p"),
    ),
    check=_check,
    sizes=_sizes,
    results=_results,
    kernels={
        "cpu": Kernels(),
        "cuda": Kernels(_cuda_refuses),
        "triton": Kernels(
            _triton_refuses, "fast_prompt_kernels.skip_adapter", "fast_prompt_kernels.skip_adapter_backward"
        ),
    },
    kept=("hidden",),
    flops=_flops,
    flops_backward=_flops_backward,
    cases="fast_prompt.parity.skip_adapter",
)
