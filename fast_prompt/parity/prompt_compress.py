"""The parity cases of ``prompt_compress``: one line each in ``CASES``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fast_prompt.parity import arrangements
from fast_prompt.parity.problem import Problem

ARGUMENTS = ("query", "visual", "key_weight", "value_weight", "key_bias", "value_bias")
# The key bias has no part in the result: its gradient is 0, and the reference's only the rounding of a sum to 0.
TRAINED = ("query", "visual", "key_weight", "value_weight", "value_bias")
DROPOUT_SEED = 2**40 + 17  # both of its 32-bit words count


@dataclass(frozen=True)
class Case:
    """One call of ``prompt_compress``.

    Attributes:
        name: what a person reads in the table.
        batch: B; queries: m; tokens: n; heads: h; head_dim: d_h; visual_width: d_v.
        dropout_p, form: the op's options.
        padding: for each sample in turn, how many of its last tokens are padding; None for no mask.
        arrangement: how the tensors lie in memory, or what is special about them; a key of ``ARRANGEMENTS``.
        bias: whether key_bias and value_bias are given.
        wide_weights: projections in float32 beside half-precision activations, as under autocast.
        trained: the arguments that need a gradient.
    """

    name: str
    batch: int = 2
    queries: int = 1
    tokens: int = 13
    heads: int = 3
    head_dim: int = 16
    visual_width: int = 40
    dropout_p: float = 0.0
    form: str = "absorbed"
    padding: tuple[int, ...] | None = None
    arrangement: str = "plain"
    bias: bool = True
    wide_weights: bool = False
    trained: tuple[str, ...] = TRAINED

    def applies_to(self, dtype: torch.dtype) -> bool:
        """False where the case would only repeat another, or asks for more than the dtype has."""
        if dtype == torch.float32:
            return not self.wide_weights
        return self.arrangement != "large scores"  # their rounding would decide between tokens


CASES = (
    Case("plain", 2, 1, 32, 4, 16, 64),
    Case("ragged", 3, 2, 13, 3, 10, 50),
    Case("one of each", 1, 1, 1, 1, 1, 1),
    Case("one head", 2, 3, 17, 1, 24, 32),
    Case("model width", 1, 1, 20, 12, 64, 768),
    Case("many tokens", 1, 1, 700, 2, 16, 48),
    Case("four queries", 2, 4, 37, 12, 8, 96),
    Case("many queries", 2, 20, 29, 4, 16, 64),
    Case("many samples", 37, 1, 5, 2, 8, 24),
    Case("wide tokens", 2, 1, 9, 2, 8, 1100),
    Case("wide heads", 2, 1, 9, 2, 130, 24),
    Case("no bias", bias=False),
    Case("dropout", dropout_p=0.25),
    Case("dropout, no bias", 2, 3, 21, 2, 12, 36, 0.5, bias=False),
    Case("padding", 3, 2, padding=(0, 5, 12)),
    Case("padding alone", 3, padding=(2, 13, 0)),
    Case("padding, dropout", 3, 2, 70, dropout_p=0.25, padding=(40, 70, 3)),
    Case("NaN in padding", 3, 2, padding=(0, 5, 13), arrangement="NaN in padding"),
    Case("fp32 weights", 3, 1, 13, 3, 10, 50, wide_weights=True),
    Case("fp32 weights, dropout", 2, 1, 32, 4, 16, 64, 0.25, wide_weights=True),
    Case("projected", 3, 2, 13, 3, 10, 50, form="projected", padding=(0, 5, 13)),
    Case("projected, dropout", 3, 2, 13, 3, 10, 50, 0.25, form="projected"),
    Case("rows sliced", queries=2, arrangement="rows sliced"),
    Case("columns sliced", queries=2, arrangement="columns sliced"),
    Case("batch second", queries=2, arrangement="batch second"),
    Case("columns first", queries=2, arrangement="columns first"),
    Case("expanded inputs", 3, 2, arrangement="expanded inputs"),
    Case("expanded gradient", 3, 2, arrangement="expanded gradient"),
    Case("weights strided", arrangement="weights strided"),
    Case("large scores", arrangement="large scores"),
    Case("tokens frozen", trained=("query", "key_weight", "value_weight", "value_bias")),
    Case("weights only", trained=("key_weight", "value_weight", "value_bias")),
    Case("query only", trained=("query",)),
    Case("tokens only", queries=2, trained=("visual",)),
    Case("no samples", 0),
    Case("no queries", queries=0),
    Case("no tokens", tokens=0, padding=(0, 0)),
)


def build(case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    """The case's arguments: the same numbers on every device."""
    sizes = (case.batch, case.queries, case.tokens, case.heads, case.head_dim, case.visual_width)
    weight_dtype = torch.float32 if case.wide_weights else dtype
    problem = draw(*sizes, dtype, weight_dtype)
    tensors = {"grad": problem.grad, **problem.tensors}
    options = problem.options | {"dropout_p": case.dropout_p, "form": case.form}
    if case.padding is not None:
        real = case.tokens - torch.tensor(case.padding)
        options["key_padding_mask"] = (torch.arange(case.tokens) >= real[:, None]).to(device)
        tensors["padding"] = options["key_padding_mask"]
    if case.dropout_p > 0:
        options["seed"] = DROPOUT_SEED
    tensors = ARRANGEMENTS[case.arrangement]({name: tensor.to(device) for name, tensor in tensors.items()})
    given = ARGUMENTS if case.bias else ARGUMENTS[:4]
    trained = tuple(name for name in case.trained if name in given)
    return Problem({name: tensors[name] for name in given}, tensors["grad"], options, trained)


def draw(
    batch: int,
    queries: int,
    tokens: int,
    heads: int,
    head_dim: int,
    visual_width: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    seed: int = 0,
) -> Problem:
    """Random arguments on the CPU, scaled so that an error in any part of the op shows in its results.

    Scores have a standard deviation of 2: some tokens count for much, many for something.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    width = heads * head_dim
    query = (2 * normal(batch, queries, width)).to(dtype)
    visual = normal(batch, tokens, visual_width).to(dtype)
    weights = [(normal(width, visual_width) / visual_width**0.5).to(weight_dtype) for _ in range(2)]
    biases = [normal(width).to(weight_dtype) for _ in range(2)]
    tensors = dict(zip(ARGUMENTS, (query, visual, *weights, *biases), strict=True))
    return Problem(tensors, normal(batch, queries, width).to(dtype), {"num_heads": heads}, TRAINED)


Tensors = dict[str, Tensor]
ACTIVATIONS = ("query", "visual", "grad")


def _activations(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name]) for name in ACTIVATIONS}


def _expanded_inputs(tensors: Tensors) -> Tensors:
    """One image and one query for the whole batch, stride 0."""
    return tensors | {name: tensors[name][:1].expand_as(tensors[name]) for name in ("query", "visual")}


def _weights_strided(tensors: Tensors) -> Tensors:
    """Key projection as every second row of a bank, value projection as the transpose of a [d_v, E] matrix."""
    keys, values, bias = (tensors[name] for name in ("key_weight", "value_weight", "value_bias"))
    return tensors | {
        "key_weight": arrangements.between_nans(keys, 1),
        "value_weight": values.T.contiguous().T,
        "value_bias": arrangements.between_nans(bias, 1),
    }


def _nan_in_padding(tensors: Tensors) -> Tensors:
    return tensors | {"visual": tensors["visual"].masked_fill(tensors["padding"].unsqueeze(-1), torch.nan)}


def _large_scores(tensors: Tensors) -> Tensors:
    """Beyond what exp() takes without the row's maximum: one token gets nearly all the weight."""
    return tensors | {"query": 32 * tensors["query"]}


ARRANGEMENTS: dict[str, Callable[[Tensors], Tensors]] = {
    "plain": lambda tensors: tensors,
    "rows sliced": _activations(arrangements.rows_sliced),
    "columns sliced": _activations(arrangements.columns_sliced),
    "batch second": _activations(arrangements.batch_second),
    "columns first": _activations(arrangements.columns_first),
    "expanded inputs": _expanded_inputs,
    "expanded gradient": lambda tensors: tensors | {"grad": arrangements.expanded_number(tensors["grad"])},
    "weights strided": _weights_strided,
    "NaN in padding": _nan_in_padding,
    "large scores": _large_scores,
}
