"""The parity cases of ``prompt_diffusion``: one line each in ``CASES``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast_prompt import reference
from fast_prompt.parity import arrangements
from fast_prompt.parity.problem import Problem

ARGUMENTS = ("hidden", "source", "prompts", "keys", "log_scale")
DROPOUT_SEED = 2**40 + 17  # both of its 32-bit words count

# A score this near zero, relative to |x||k|, may take either sign in float32, which sums with an error of a few
# 1e-7 of it. ReLU's derivative is not defined there, so no two correct programs need agree: no case has one.
KINK_MARGIN = 1e-5


@dataclass(frozen=True)
class Case:
    """One call of ``prompt_diffusion``.

    Attributes:
        name: what a person reads in the table.
        rows: the leading dimensions of hidden and source.
        width: d.
        num_prompts: p.
        activation, row_weight, dropout_p: the op's options.
        arrangement: how the tensors lie in memory, or what is special about them; a key of ``ARRANGEMENTS``.
        wide_weights: prompts and keys in float32 beside half-precision activations, as under autocast.
        trained: the arguments that need a gradient.
    """

    name: str
    rows: tuple[int, ...] = (2, 13)
    width: int = 48
    num_prompts: int = 16
    activation: str = "relu"
    row_weight: str = "max"
    dropout_p: float = 0.0
    arrangement: str = "plain"
    wide_weights: bool = False
    trained: tuple[str, ...] = ARGUMENTS

    def applies_to(self, dtype: torch.dtype) -> bool:
        """False where the case would only repeat another."""
        return not (self.wide_weights and dtype == torch.float32)


CASES = (
    Case("plain", (2, 16), 64, 32),
    Case("ragged", (3, 13), 50, 7),
    Case("one prompt", (2, 5), 32, 1),
    Case("width 1", (2, 5), 1, 3),
    Case("model width", (2, 19), 768, 40),
    Case("many rows", (2, 145), 32, 8),
    Case("p 200", (1, 67), 96, 200),
    Case("p 1024", (1, 9), 64, 1024),
    Case("one row", (), 40, 12),
    Case("four dimensions", (2, 3, 5), 40, 12),
    Case("row weight none", row_weight="none"),
    Case("softmax", activation="softmax"),
    Case("softmax, none", (3, 7), 36, 21, "softmax", "none"),
    Case("dropout", dropout_p=0.25),
    Case("dropout, none", (3, 7), 36, 21, "relu", "none", 0.5),
    Case("dropout, softmax", (3, 7), 36, 21, "softmax", "max", 0.1),
    Case("fp32 weights", (3, 13), 50, 7, wide_weights=True),
    Case("fp32 weights, dropout", (2, 16), 64, 32, dropout_p=0.25, wide_weights=True),
    Case("rows sliced", arrangement="rows sliced"),
    Case("columns sliced", arrangement="columns sliced"),
    Case("batch second", arrangement="batch second"),
    Case("columns first", arrangement="columns first"),
    Case("expanded inputs", arrangement="expanded inputs"),
    Case("expanded gradient", arrangement="expanded gradient"),
    Case("weights strided", arrangement="weights strided"),
    Case("all scores negative", arrangement="negative scores"),
    Case("scale frozen", trained=("hidden", "source", "prompts", "keys")),
    Case("weights only", trained=("prompts", "keys", "log_scale")),
    Case("source only", trained=("source",)),
    Case("hidden only", trained=("hidden",)),
    Case("no samples", (0, 13)),
    Case("no tokens", (2, 0)),
)


def build(case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    """The case's arguments: the same numbers on every device."""
    weight_dtype = torch.float32 if case.wide_weights else dtype
    problem = draw(case.rows, case.width, case.num_prompts, dtype, weight_dtype, case.activation, case.row_weight)
    tensors = {"grad": problem.grad, **problem.tensors}
    tensors = ARRANGEMENTS[case.arrangement]({name: tensor.to(device) for name, tensor in tensors.items()})
    options = {"activation": case.activation, "row_weight": case.row_weight, "dropout_p": case.dropout_p}
    if case.dropout_p > 0:
        options["seed"] = DROPOUT_SEED
    return Problem({name: tensors[name] for name in ARGUMENTS}, tensors["grad"], options, case.trained)


def draw(
    rows: tuple[int, ...],
    width: int,
    num_prompts: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    activation: str = "relu",
    row_weight: str = "max",
    seed: int = 0,
) -> Problem:
    """Random arguments on the CPU, scaled so that an error in any part of the op shows in its results.

    Scores are of order 1 and the diffusion is as large as ``hidden``; with prompts as small as a model's own at
    its start, ``hidden`` would hide it. No score lies within ``KINK_MARGIN`` of ReLU's kink.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # Not around zero, and the gradient partly along it: the scale's gradient, one sum over everything, is then no small
    # difference of large terms.
    hidden = (normal(*rows, width) + 0.5).to(dtype)
    grad = (normal(*rows, width) + hidden / 2).to(dtype)
    keys = (normal(num_prompts, width) / width**0.5).to(weight_dtype)
    source = _away_from_kinks(normal(*rows, width).to(dtype), keys, generator)
    options: dict[str, Any] = {"activation": activation, "row_weight": row_weight}
    prompts, log_scale = normal(num_prompts, width), torch.tensor(0.3)
    prompts = (prompts / _diffusion_size(source, prompts, keys, options)).to(weight_dtype)
    tensors = dict(zip(ARGUMENTS, (hidden, source, prompts, keys, log_scale), strict=True))
    return Problem(tensors, grad, options, ARGUMENTS)


def _away_from_kinks(source: Tensor, keys: Tensor, generator: torch.Generator) -> Tensor:
    """Draws anew each row of ``source`` with a score too near zero for its sign to be sure."""
    rows, wide_keys = source.view(-1, source.shape[-1]), keys.double()
    limits = KINK_MARGIN * wide_keys.norm(dim=-1)
    while True:
        wide = rows.double()
        unsure = ((wide @ wide_keys.T).abs() <= limits * wide.norm(dim=-1, keepdim=True)).any(-1)
        if not unsure.any():
            return source
        rows[unsure] = torch.randn(int(unsure.sum()), rows.shape[-1], generator=generator).to(rows.dtype)


def _diffusion_size(source: Tensor, prompts: Tensor, keys: Tensor, options: dict[str, Any]) -> float:
    """Root mean square of ``w * (R @ prompts)``, or 1 where there is none."""
    x, p, k, zero = source.float(), prompts.float(), keys.float(), torch.tensor(0.0)
    diffusion = reference.prompt_diffusion(torch.zeros_like(x), x, p, k, zero, **options)
    return float(diffusion.square().mean().sqrt().nan_to_num()) or 1.0


Tensors = dict[str, Tensor]


def _activations(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """Changes hidden, source and the incoming gradient; leaves the weights alone."""
    return lambda tensors: tensors | {name: change(tensors[name]) for name in ("hidden", "source", "grad")}


def _expanded_inputs(tensors: Tensors) -> Tensors:
    """One sample for the whole batch, stride 0; hidden one row for all."""
    hidden, source = tensors["hidden"], tensors["source"]
    return tensors | {"hidden": hidden[:1, :1].expand_as(hidden), "source": source[:1].expand_as(source)}


def _expanded_gradient(tensors: Tensors) -> Tensors:
    return tensors | {"grad": arrangements.expanded_number(tensors["grad"])}


def _weights_strided(tensors: Tensors) -> Tensors:
    """Prompts as every second row of a bank, keys as the transpose of a [d, p] matrix."""
    prompts, keys = tensors["prompts"], tensors["keys"]
    return tensors | {"prompts": arrangements.between_nans(prompts, 1), "keys": keys.T.contiguous().T}


def _negative_scores(tensors: Tensors) -> Tensors:
    """ReLU passes nothing on: the output is the scaled hidden, and the weights get no gradient."""
    return tensors | {"source": tensors["source"].abs(), "keys": -tensors["keys"].abs()}


ARRANGEMENTS: dict[str, Callable[[Tensors], Tensors]] = {
    "plain": lambda tensors: tensors,
    "rows sliced": _activations(arrangements.rows_sliced),
    "columns sliced": _activations(arrangements.columns_sliced),
    "batch second": _activations(arrangements.batch_second),
    "columns first": _activations(arrangements.columns_first),
    "expanded inputs": _expanded_inputs,
    "expanded gradient": _expanded_gradient,
    "weights strided": _weights_strided,
    "negative scores": _negative_scores,
}
