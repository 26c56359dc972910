"""The parity cases of ``skip_adapter``: one line each in ``CASES``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fast_prompt import reference
from fast_prompt.parity import arrangements
from fast_prompt.parity.problem import Problem
from fast_prompt.reference.skip_adapter import NORMS, Adapter, adapt, apart, dropout

PARAMETERS = Adapter._fields
ARGUMENTS = ("x", *PARAMETERS, "gates", "kept")
DROPOUT_SEED = 2**40 + 17  # both of its 32-bit words count

# How near zero a hidden element may not come, in shares of its usual size: there ReLU's derivative would depend on how
# the norm of a row, and the rows within a run, were rounded.
KINK_MARGINS = {torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """One call of ``skip_adapter``.

    Attributes:
        name: what a person reads in the table.
        rows: the leading dimensions of x.
        width: d; hidden: w.
        adapters: A, or 0 for weights without that dimension.
        norm, activation, residual, dropout_p: the op's options.
        without: parameters that are not given.
        experts, groups: E and G of the mixture; 0 experts for no gates.
        route: each sample's adapter, -1 for one in ``kept``; None for no route.
        arrangement: how the tensors lie in memory; a key of ``ARRANGEMENTS``.
        wide_weights: parameters in float32 beside half-precision activations, as under autocast.
        trained: the arguments that need a gradient, of those given.
    """

    name: str
    rows: tuple[int, ...] = (2, 13)
    width: int = 48
    hidden: int = 16
    adapters: int = 0
    norm: str = "layer"
    activation: str = "relu"
    residual: str = "input"
    dropout_p: float = 0.0
    without: tuple[str, ...] = ()
    experts: int = 0
    groups: int = 1
    route: tuple[int, ...] | None = None
    arrangement: str = "plain"
    wide_weights: bool = False
    trained: tuple[str, ...] = ARGUMENTS

    def applies_to(self, dtype: torch.dtype) -> bool:
        """False where the case would only repeat another."""
        return not (self.wide_weights and dtype == torch.float32)


CASES = (
    Case("plain", (2, 16), 64, 32),
    Case("ragged", (3, 13), 50, 7),
    Case("hidden width 1", (2, 5), 32, 1),
    Case("width 1", (2, 5), 1, 3, norm="none"),
    Case("model width", (2, 19), 768, 96),
    Case("wide hidden", (1, 21), 96, 288),
    Case("hidden wider than rows", (1, 5), 24, 600),
    Case("LLaMA's width", (1, 3), 4096, 16, norm="rms", residual="normed"),
    Case("one row", (), 40, 12),
    Case("four dimensions", (2, 3, 5), 40, 12),
    Case("many rows", (1, 613), 32, 8),
    Case("no norm", norm="none"),
    Case("no bias", without=("down_bias", "up_bias", "norm_bias", "scale")),
    Case("no norm, no bias", norm="none", without=("down_bias", "up_bias", "scale")),
    Case("norm after", norm="layer_after"),
    Case("norm after, no residual", (3, 7), 36, 21, norm="layer_after", residual="none", dropout_p=0.25),
    Case("RMS norm", norm="rms"),
    Case("LLaMA's form", norm="rms", residual="normed"),
    Case("LLaMA's form, layer norm", (3, 7), 36, 21, residual="normed", activation="silu"),
    Case("no residual", residual="none"),
    Case("no norm, no residual", (3, 7), 36, 21, norm="none", residual="none"),
    Case("SiLU", activation="silu"),
    Case("GELU", activation="gelu"),
    Case("GELU, no norm", (3, 7), 36, 21, norm="none", activation="gelu"),
    Case("dropout", dropout_p=0.25),
    Case("dropout, GELU", (3, 7), 36, 21, activation="gelu", dropout_p=0.5),
    Case("fp32 weights", (3, 13), 50, 7, wide_weights=True),
    Case("fp32 weights, run", (2, 9), 40, 12, 2, dropout_p=0.25, wide_weights=True),
    Case("run of one", (2, 9), 40, 12, 1),
    Case("run of two, ragged", (3, 13), 50, 7, 2),
    Case("run of three", (2, 16), 64, 32, 3),
    Case("run of three, dropout", (2, 9), 40, 12, 3, dropout_p=0.25),
    Case("run of three, model width", (1, 17), 384, 48, 3),
    Case("run, RMS norm", (2, 9), 40, 12, 2, norm="rms", activation="silu", residual="normed"),
    Case("run, norm after", (2, 9), 40, 12, 2, norm="layer_after", activation="gelu"),
    Case("run, no norm, no residual", (2, 9), 40, 12, 2, norm="none", residual="none"),
    Case("run, bare", (2, 9), 40, 12, 3, without=("down_bias", "up_bias", "norm_bias", "scale")),
    Case("mixture", (3, 9), 40, 12, experts=2),
    Case("mixture, grouped", (3, 9), 40, 12, experts=2, groups=2),
    Case("mixture, LLaMA's", (2, 9), 64, 32, norm="rms", experts=2, groups=2, without=("norm_bias", "scale")),
    Case("mixture, three experts", (2, 17), 36, 18, experts=3, groups=3, activation="silu", dropout_p=0.25),
    Case("mixture, norm after", (2, 9), 40, 12, norm="layer_after", experts=2, groups=4),
    Case("route", (5, 13), 50, 7, 3, route=(1, -1, 0, 2, 1)),
    Case("route, one adapter", (4, 9), 40, 12, route=(-1, 0, -1, 0)),
    Case("route, unused adapter", (3, 9), 40, 12, 3, route=(2, 2, 0)),
    Case("route, none skips", (2, 9), 40, 12, 2, route=(-1, -1)),
    Case("route, dropout", (5, 9), 40, 12, 2, dropout_p=0.25, route=(0, -1, 1, 1, -1)),
    Case("route, norm after", (3, 9), 40, 12, 2, norm="layer_after", route=(0, -1, 1)),
    Case("rows sliced", arrangement="rows sliced"),
    Case("columns sliced", arrangement="columns sliced"),
    Case("batch second", arrangement="batch second"),
    Case("batch second, route", (3, 9), 40, 12, 2, route=(0, -1, 1), arrangement="batch second"),
    Case("columns first", arrangement="columns first"),
    Case("expanded inputs", arrangement="expanded inputs"),
    Case("expanded gradient", arrangement="expanded gradient"),
    Case("weights strided", arrangement="weights strided"),
    Case("weights strided, run", (2, 9), 40, 12, 2, arrangement="weights strided"),
    Case("weights frozen", trained=("x",)),
    Case("x frozen", trained=PARAMETERS),
    Case("weights only", trained=("down_weight", "up_weight")),
    Case("scale only", trained=("scale",)),
    Case("norm only, run", (2, 9), 40, 12, 2, trained=("norm_weight", "norm_bias")),
    Case("gates only", (3, 9), 40, 12, experts=2, groups=2, trained=("gates",)),
    Case("no samples", (0, 13)),
    Case("no tokens", (2, 0)),
    Case("no tokens, run", (2, 0), adapters=2),
)


def build(case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    """The case's arguments: the same numbers on every device."""
    problem = draw(case, dtype)
    tensors = ARRANGEMENTS[case.arrangement](
        {name: tensor.to(device) for name, tensor in {"grad": problem.grad, **problem.tensors}.items()}
    )
    given = {name: tensors[name] for name in problem.tensors}
    # A LayerNorm behind it undoes any scale, whose gradient is then only the rounding of a sum to 0.
    untrained = ("scale",) if case.norm == "layer_after" else ()
    trained = tuple(name for name in case.trained if name in given and name not in untrained)
    return Problem(given, tensors["grad"], problem.options, trained)


def draw(case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Random arguments on the CPU, scaled so that an error in any part of the op shows in its results.

    Rows have a mean, norms and scales are not 1, the adapter's part is as large as x, and no hidden element is so near
    zero that its sign is not sure.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    width, hidden, count = case.width, case.hidden, (case.adapters,) if case.adapters else ()
    up_shape = (width, case.experts * hidden // case.groups) if case.experts else (*count, width, hidden)
    weight_dtype = torch.float32 if case.wide_weights else dtype
    parameters = {
        "down_weight": normal(*count, hidden, width) / width**0.5,
        "up_weight": normal(*up_shape) * (2 / up_shape[-1]) ** 0.5,
        "down_bias": normal(*count, hidden) / 4,
        "up_bias": normal(*((case.experts,) if case.experts else count), width) / 4,
        "norm_weight": 1 + normal(*count, width) / 4,
        "norm_bias": normal(*count, width) / 4,
    }
    tensors = {"x": (normal(*case.rows, width) + 0.5).to(dtype)}
    tensors |= {name: value.to(weight_dtype) for name, value in parameters.items()}
    tensors["scale"] = 0.8 + normal(*count).abs() / 4
    if case.experts:
        tensors["gates"] = normal(case.rows[0], case.experts).softmax(-1)
    if case.route is not None and -1 in case.route:
        tensors["kept"] = normal(case.route.count(-1), *case.rows[1:], width).to(dtype)
    tensors = {name: value for name, value in tensors.items() if name not in _missing(case)}
    options: dict[str, Any] = {"norm": case.norm, "activation": case.activation, "residual": case.residual}
    options |= {"dropout_p": case.dropout_p} | ({"seed": DROPOUT_SEED} if case.dropout_p > 0 else {})
    options |= {"route": case.route} if case.route is not None else {}
    if case.activation == "relu":
        _leave_kinks(tensors, options, KINK_MARGINS[dtype] * max(1, case.adapters), generator)
    grad = normal(*case.rows, width)
    if case.norm != "layer_after":  # which takes out of the gradient what is along the result
        # The gradients of scale and gates, sums over everything, are then no small differences of large terms.
        wide: dict[str, Any] = {name: tensor.float() for name, tensor in tensors.items()}
        grad += reference.skip_adapter(**wide, **options) / 2
    return Problem(tensors, grad.to(dtype), options, ARGUMENTS)


def _missing(case: Case) -> tuple[str, ...]:
    """Parameters that the case, or its norm, goes without."""
    if case.norm == "none":
        return (*case.without, "norm_weight", "norm_bias")
    return (*case.without, "norm_bias") if case.norm == "rms" else case.without


def _leave_kinks(
    tensors: dict[str, Tensor], options: dict[str, Any], margin: float, generator: torch.Generator
) -> None:
    """Draws anew each row of x with a hidden element too near zero for its sign to be sure."""
    rows = tensors["x"]
    while rows.numel():
        unsure = _nearest_kink(tensors, **options) <= margin
        if not unsure.any():
            return
        fresh = torch.randn((int(unsure.sum()), rows.shape[-1]), generator=generator) + 0.5
        rows[unsure] = fresh.to(rows.dtype)


def _nearest_kink(
    tensors: dict[str, Tensor],
    norm: str,
    activation: str,
    residual: str,
    dropout_p: float,
    seed: int | None = None,
    route: Sequence[int] | None = None,
) -> Tensor:
    """For each row the least hidden element there is, in shares of what it would be for a random row."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    x, down_weight = wide["x"], wide["down_weight"]
    adapters = apart(Adapter(*map(wide.get, PARAMETERS)))  # type: ignore[arg-type]
    count = 1 if route is not None else len(adapters)
    keeps = dropout(x, down_weight, count, dropout_p, seed)
    nearest = x.new_full(x.shape[:-1], torch.inf)
    rows = x
    for index, adapter in enumerate(adapters):
        weight, bias = adapter.down_weight, adapter.down_bias
        normed = NORMS[norm](rows, adapter.norm_weight, adapter.norm_bias, 1e-5)
        size = normed.norm(dim=-1, keepdim=True) * weight.norm(dim=-1) / weight.shape[-1] ** 0.5
        nearest = torch.minimum(nearest, (linear(normed, weight, bias).abs() / size).amin(-1))
        if route is None:
            rows = adapt(rows, adapter, wide.get("gates"), keeps[index], norm, activation, residual, eps=1e-5)
    return nearest


Tensors = dict[str, Tensor]


def _activations(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """Changes x, kept and the incoming gradient; leaves the weights alone."""
    return lambda tensors: tensors | {name: change(tensors[name]) for name in ("x", "kept", "grad") if name in tensors}


def _expanded_inputs(tensors: Tensors) -> Tensors:
    """One sample for the whole batch, stride 0."""
    return tensors | {"x": tensors["x"][:1].expand_as(tensors["x"])}


def _weights_strided(tensors: Tensors) -> Tensors:
    """The down projection every second row of a bank, the up projection the transpose of its own."""
    up_weight = tensors["up_weight"].transpose(-1, -2).contiguous().transpose(-1, -2)
    between = {
        name: arrangements.between_nans(tensors[name], tensors[name].dim() - 1)
        for name in ("down_bias", "up_bias", "norm_weight", "norm_bias")
    }
    return tensors | between | {"up_weight": up_weight, "down_weight": arrangements.rows_sliced(tensors["down_weight"])}


ARRANGEMENTS: dict[str, Callable[[Tensors], Tensors]] = {
    "plain": lambda tensors: tensors,
    "rows sliced": _activations(arrangements.rows_sliced),
    "columns sliced": _activations(arrangements.columns_sliced),
    "batch second": _activations(arrangements.batch_second),
    "columns first": _activations(arrangements.columns_first),
    "expanded inputs": _expanded_inputs,
    "expanded gradient": lambda tensors: tensors | {"grad": arrangements.expanded_number(tensors["grad"])},
    "weights strided": _weights_strided,
}
