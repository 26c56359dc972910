"""Every op at drawn calls against its definition in float64: forward and every gradient.

Shapes, strides, dtypes, options and the size of the numbers are drawn, 300 calls an op, on every instruction set by
turns. A result is right where each of its rows is within the tolerance of the row's own largest element; where the
definition does not bear rounding at these numbers (a softmax of large scores, ReLU at its edge, a norm of nearly equal
numbers), within a few times what rounding makes of it there (``Rounding``). Beyond its format a result is infinite, or
the format's largest; where float32 cannot hold what the definition computes on the way, nothing is asked.
"""

import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fast_prompt import ops, reference
from fast_prompt.backends import cpu, use_backend
from fast_prompt.ops.prompt_compress import cheaper_form
from fast_prompt.parity import Problem, arrangements, evaluate
from fast_prompt.tolerances import TOLERANCES

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.usefixtures("poisoned_memory", "cpu_restored"),
    pytest.mark.gate,
]
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16, F64]
BLOCKS, BLOCK = 6, 50  # calls of an op

# ---- Drawing ----


class Draw:
    """Sizes, options and tensors from a seed. ``kinds``: of numbers that a tensor may have."""

    def __init__(self, seed, dtype):
        self.random = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.kinds = list(NUMBERS)

    def integer(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def one_of(self, *choices):
        return choices[self.integer(0, len(choices) - 1)]

    def chance(self, probability):
        return float(torch.rand((), generator=self.random)) < probability

    def size(self, most):
        """From 1, which comes often."""
        return self.one_of(1, self.integer(1, 5), self.integer(1, most), self.integer(1, most))

    def normal(self, *shape):
        return torch.randn(shape, generator=self.random, dtype=F64)

    def weight_dtype(self):
        return self.dtype if self.dtype == F64 else self.one_of(self.dtype, self.dtype, F32)

    def tensor(self, *shape, dtype=None, size=1.0):
        dtype = dtype or self.dtype
        kind = self.one_of(*self.kinds) if self.chance(0.5) else "usual"
        most = torch.finfo(dtype).max
        values = (NUMBERS[kind](self, shape, dtype) * size).clamp(-most, most).to(dtype)
        return self.one_of(*ARRANGEMENTS)(values) if values.dim() > 1 and values.numel() else values

    def dropout(self):
        if self.chance(2 / 3):
            return {"dropout_p": 0.0}
        return {"dropout_p": 0.3, "seed": self.integer(-(2**60), 2**60)}


def row_numbers(draw, shape):
    return draw.normal(*shape[:-1], 1)


def tiny(draw, dtype):
    """Subnormal numbers, but for bfloat16, whose instructions take them for 0."""
    return 2.0**-60 if BF16 in (draw.dtype, dtype) else torch.finfo(dtype).tiny / 2


NUMBERS = {
    "usual": lambda draw, shape, dtype: draw.normal(*shape),
    "large": lambda draw, shape, dtype: draw.normal(*shape) * 2.0 ** draw.integer(1, 12),
    "huge": lambda draw, shape, dtype: draw.normal(*shape) * 2.0 ** (12 if dtype == F16 else draw.integer(20, 60)),
    "small": lambda draw, shape, dtype: draw.normal(*shape) * 2.0 ** -draw.integer(1, 20),
    "subnormal": lambda draw, shape, dtype: draw.normal(*shape) * tiny(draw, dtype),
    "wildly different rows": lambda draw, shape, dtype: (
        draw.normal(*shape) * 2.0 ** (6 * row_numbers(draw, shape)).round()
    ),
    "rows of one value": lambda draw, shape, dtype: 4 * row_numbers(draw, shape).expand(shape),
    "rows far from zero": lambda draw, shape, dtype: draw.normal(*shape) + 64 * row_numbers(draw, shape),
    "zeros": lambda draw, shape, dtype: torch.zeros(shape, dtype=F64),
}
# What a softmax takes: beyond, scores have no fraction left in float32, or its least weights count.
BOUNDED = [kind for kind in NUMBERS if kind != "huge"]


def offset(tensor):
    """Not aligned to anything."""
    storage = torch.full((tensor.numel() + 3,), torch.nan, dtype=tensor.dtype)
    return storage[3:].view(tensor.shape).copy_(tensor)


ARRANGEMENTS = [
    *[lambda tensor: tensor] * 4,
    arrangements.rows_sliced,
    arrangements.columns_sliced,
    arrangements.batch_second,
    arrangements.columns_first,
    lambda tensor: tensor[:1].expand_as(tensor),
    offset,
]


def prompt_diffusion(draw):
    activation = draw.one_of("relu", "softmax")
    draw.kinds = BOUNDED if activation == "softmax" else draw.kinds
    rows = draw.one_of((), (draw.size(60),), (draw.integer(0, 3), draw.size(40)), (2, draw.integer(1, 3), draw.size(9)))
    width, prompts, weight_dtype = draw.size(80), draw.size(40), draw.weight_dtype()
    tensors = {name: draw.tensor(*rows, width) for name in ("hidden", "source")}
    for name in ("prompts", "keys"):
        tensors[name] = draw.tensor(prompts, width, dtype=weight_dtype, size=width**-0.5)
    tensors["log_scale"] = (draw.normal() * draw.one_of(0.3, 2.0)).to(draw.one_of(F32, draw.dtype, F64))
    options = {"activation": activation, "row_weight": draw.one_of("max", "none"), **draw.dropout()}
    return Problem(tensors, draw.tensor(*rows, width), options, tuple(tensors))


def prompt_compress(draw):
    form = draw.one_of("absorbed", "absorbed", "auto", "projected")
    draw.kinds = BOUNDED if form == "absorbed" else ["usual"]  # the projected form is torch's, with torch's rounding
    batch, queries, tokens = draw.integer(0, 4), draw.size(8), draw.integer(0, 1) and draw.size(50)
    heads, head_width, width, weight_dtype = draw.integer(1, 4), draw.size(24), draw.size(70), draw.weight_dtype()
    inner = heads * head_width
    tensors = {"query": draw.tensor(batch, queries, inner), "visual": draw.tensor(batch, tokens, width)}
    for name in ("key_weight", "value_weight"):
        tensors[name] = draw.tensor(inner, width, dtype=weight_dtype, size=width**-0.5)
    for name in ("key_bias", "value_bias"):
        if draw.chance(0.7):
            tensors[name] = draw.tensor(inner, dtype=weight_dtype)
    options = {"num_heads": heads, "form": form, **draw.dropout()}
    if draw.chance(0.5):
        share = draw.one_of(0.3, 0.9, 1.0)
        options["key_padding_mask"] = torch.rand((batch, tokens), generator=draw.random) < share
    return Problem(tensors, draw.tensor(batch, queries, inner), options, tuple(tensors))


def skip_adapter(draw):
    kind = draw.one_of("one", "run", "route", "mixture")
    batch, tokens, experts = draw.integer(0, 4), draw.size(40), draw.integer(1, 3)
    rows = draw.one_of((), (tokens,), (batch, tokens), (2, 2, draw.size(9)))
    rows = (batch, tokens) if kind in ("route", "mixture") else rows
    groups = draw.one_of(1, 1, 2, 3) if kind == "mixture" else 1
    width, hidden = groups * draw.size(80 // groups), groups * draw.size(40 // groups)
    count, weight_dtype = (draw.integer(1, 3),) if kind in ("run", "route") else (), draw.weight_dtype()
    # The LayerNorm of a single element is its bias, and any gradient nothing but rounding.
    norm = draw.one_of("none", "rms", "layer", "layer_after") if width > 1 else draw.one_of("none", "rms")
    up_shape = (width, experts * hidden // groups) if kind == "mixture" else (*count, width, hidden)
    tensors = {
        "x": draw.tensor(*rows, width),
        "down_weight": draw.tensor(*count, hidden, width, dtype=weight_dtype, size=width**-0.5),
        "up_weight": draw.tensor(*up_shape, dtype=weight_dtype, size=up_shape[-1] ** -0.5),
    }
    biases = {"down_bias": (*count, hidden), "up_bias": (*((experts,) if kind == "mixture" else count), width)}
    biases |= {"norm_bias": (*count, width)} if norm.startswith("layer") else {}
    tensors |= {name: draw.tensor(*shape, dtype=weight_dtype) for name, shape in biases.items() if draw.chance(0.7)}
    if norm != "none":
        tensors["norm_weight"] = draw.tensor(*count, width, dtype=weight_dtype)
    if draw.chance(0.7):
        tensors["scale"] = (draw.normal(*count) * draw.one_of(1.0, 30.0)).to(draw.one_of(F32, draw.dtype))
    residuals = ("input", "normed", "none") if norm in ("layer", "rms") else ("input", "none")
    options = {"norm": norm, "activation": draw.one_of("relu", "silu", "gelu"), "residual": draw.one_of(*residuals)}
    options |= {"eps": draw.one_of(1e-5, 1e-2) if norm == "layer_after" else draw.one_of(1e-5, 1e-12), **draw.dropout()}
    if kind == "mixture":
        tensors["gates"] = draw.normal(batch, experts).softmax(-1).to(draw.one_of(F32, draw.dtype))
    if kind == "route":
        options["route"] = [draw.integer(-1, count[0] - 1) for _ in range(batch)]
        if -1 in options["route"]:
            tensors["kept"] = draw.tensor(options["route"].count(-1), tokens, width)
    # A LayerNorm behind them undoes a scale, and the gate of an only expert.
    undone = {"scale", *(["gates"] if experts == 1 else [])} if norm == "layer_after" else set()
    return Problem(tensors, draw.tensor(*rows, width), options, tuple(name for name in tensors if name not in undone))


OPS = {"prompt_diffusion": prompt_diffusion, "prompt_compress": prompt_compress, "skip_adapter": skip_adapter}

# ---- What rounding may do ----

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "silu_backward", "gelu_backward"}


class Rounding(TorchDispatchMode):
    """Arithmetic each of whose operands is off by at most a share of itself: ``unit``, ``product_unit`` in products.

    Within it the definition gives what an implementation may give that rounds as coarsely, in any order.
    """

    def __init__(self, unit, product_unit, seed):
        super().__init__()
        self.unit, self.product_unit = unit, product_unit
        self.random = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        schema = operation._schema
        if not any(argument.alias_info for argument in schema.arguments):  # else a view, or written to
            unit = self.product_unit if schema.name.removeprefix("aten::") in PRODUCTS else self.unit
            args = tree_map(lambda value: self.rounded(value, unit), args)
        return operation(*args, **(kwargs or {}))

    def rounded(self, value, unit):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        off = 2 * torch.rand(value.shape, generator=self.random, dtype=value.dtype) - 1
        return value * (1 + unit * off)


UNITS = {F64: 2.0**-52, F32: 2.0**-23, BF16: 2.0**-8, F16: 2.0**-11}
FLOORS = {F64: 1e-290, F32: 2.0**-90, BF16: 2.0**-90, F16: 2.0**-24}  # an error that is none beside other numbers


@dataclass
class Call:
    """One call of an op: what it should give, and how near."""

    op: str
    problem: Problem
    level: str

    @property
    def dtype(self):
        return self.problem.grad.dtype

    @property
    def projected(self):
        """Whether torch's own products and attention compute it."""
        options, tensors = self.problem.options, self.problem.tensors
        if self.op != "prompt_compress" or options["dropout_p"] > 0:
            return False
        (_, queries, inner), (_, tokens, width) = tensors["query"].shape, tensors["visual"].shape
        cheaper = cheaper_form(queries, tokens, inner, width, options["num_heads"])
        return (cheaper if options["form"] == "auto" else options["form"]) == "projected"

    @property
    def units(self):
        """Of all arithmetic, and of products: coarser where half precision is multiplied as such, or a hidden layer is
        kept in it."""
        unit = UNITS[F64 if self.dtype == F64 else F32]
        narrow = self.projected or (self.dtype == BF16 and (self.op == "skip_adapter" or self.level == "avx512_bf16"))
        return unit, UNITS[self.dtype] if narrow else unit

    def definition(self, seed=None):
        """In float64; with a seed, as rounding may leave it."""
        function = getattr(reference, self.op)
        if seed is None:
            return evaluate(function, self.problem.double())
        with Rounding(*self.units, seed):
            return evaluate(function, self.problem.double())

    def in_float32(self):
        """The definition in its own arithmetic, its results not rounded to half precision."""
        if self.dtype == F64:
            return self.definition()
        wide = {name: tensor.float() for name, tensor in self.problem.tensors.items()}
        return evaluate(
            getattr(reference, self.op), replace(self.problem, tensors=wide, grad=self.problem.grad.float())
        )

    def actual(self):
        with use_backend("reference" if self.dtype == F64 else "cpu"):
            return evaluate(getattr(ops, self.op), self.problem)


class Found(NamedTuple):
    """A result's largest error, in shares of what is allowed there; and its largest allowance, of its row's largest."""

    name: str
    error: float
    allowed: float


def row_maxima(tensor):
    return tensor.abs().amax(-1, keepdim=True) if tensor.dim() else tensor.abs()


SAMPLES, MOST_SAMPLES, FACTOR = 2, 60, 8


def compare(call, actual, most_samples=MOST_SAMPLES):
    """Every result of a call with the definition."""
    rights, singles = call.definition(), call.in_float32()
    samples = [call.definition(seed) for seed in range(SAMPLES)]
    shapes = {name: tensor.shape for name, tensor in actual.items()}
    assert shapes == {name: tensor.shape for name, tensor in rights.items()}
    rounded = output_rounding(call, rights["forward"])
    return [
        compare_result(
            call, name, actual[name], right, singles[name], samples, most_samples, rounded if name == "log_scale" else 0
        )
        for name, right in rights.items()
        if right.numel() and not (name == "log_scale" and rounded == torch.inf)
    ]


def output_rounding(call, output):
    """What the gradient of prompt_diffusion's log_scale, a sum over the output as it is stored, may be off by that."""
    if output.numel() == 0 or output.abs().max() > torch.finfo(call.dtype).max:
        return torch.inf
    return float(UNITS[call.dtype] * (call.problem.grad.double() * output).abs().sum())


def compare_result(call, name, actual, right, single, samples, most_samples, rounded=0):
    # A float64 scale of float32 rows is used, and has its gradient, in float32.
    stored = F32 if actual.dtype == F64 != call.dtype else actual.dtype
    tolerance = TOLERANCES[call.dtype if call.projected else stored]
    known = single.isfinite() & right.isfinite()
    most = torch.finfo(stored).max

    def in_format(values):
        return torch.where(known, values.double(), 0.0).clamp(-most, most)

    right = in_format(right)

    def off(values):
        return row_maxima(in_format(values) - right)

    floor = tolerance if call.projected else FLOORS[stored]
    allowed = tolerance * row_maxima(right) + floor + rounded
    noise = torch.stack([off(single), *(off(sample[name]) for sample in samples)]).amax(0)
    difference = torch.where(actual.isnan() & known, torch.inf, (in_format(actual) - right).abs())
    # Whether rounding decides the sign at ReLU's edge may take more than a few looks to see.
    for seed in range(SAMPLES, most_samples):
        if (difference <= allowed + FACTOR * noise).all():
            break
        noise = torch.maximum(noise, off(call.definition(seed)[name]))
    allowed = allowed + FACTOR * noise
    share = (allowed - floor) / (row_maxima(right) + floor)
    return Found(name, float((difference / allowed).max()), float(share.max()))


def drawn(op, number):
    """The op's call of that number, its instruction set selected."""
    levels = cpu.isa_levels()
    level, dtype = levels[number // len(DTYPES) % len(levels)], DTYPES[number % len(DTYPES)]
    cpu.select_isa(level)
    return Call(op, OPS[op](Draw(zlib.crc32(f"{op} {number}".encode()), dtype)), level)


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("op", OPS)
def test_drawn_calls_are_as_the_definition_has_them(op, block):
    wrong, allowed = {}, []
    for number in range(block * BLOCK, (block + 1) * BLOCK):
        call = drawn(op, number)
        found = compare(call, call.actual())
        allowed += [result.allowed for result in found]
        wrong |= {(number, result.name): result.error for result in found if not result.error <= 1}
    assert not wrong
    assert sum(share > 0.1 for share in allowed) < len(allowed) / 4  # what is compared can be told apart


@pytest.mark.parametrize("op", OPS)
def test_one_wrong_element_is_found(op):
    """A tenth off, in every result of ordinary size that can be told apart so well."""
    found = []
    for number in range(0, BLOCK, 2):
        call = drawn(op, number)
        spoilt = {name: result.clone(memory_format=torch.contiguous_format) for name, result in call.actual().items()}
        ordinary = {name for name, result in spoilt.items() if result.numel() and 1e-3 < result.abs().max() < 1e4}
        for name in ordinary:
            spoilt[name].view(-1)[spoilt[name].abs().argmax()] *= 0.9
        found += [
            result.error > 1
            for result in compare(call, spoilt, SAMPLES)
            if result.name in ordinary and result.allowed < 0.05
        ]
    assert sum(found) == len(found) > 20
