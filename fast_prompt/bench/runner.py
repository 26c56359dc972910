"""Runs a benchmark; knows nothing of any particular op."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fast_prompt.bench import (
    apt_model,
    das_model,
    machine,
    prompt_compress,
    prompt_diffusion,
    route_block,
    skip_adapter,
    skip_adapter_run,
)
from fast_prompt.bench.contender import Contender
from fast_prompt.bench.memory import saved_bytes
from fast_prompt.bench.probes import Rates, probes, rates
from fast_prompt.bench.timing import Timing, interleave, rotation, stopwatch_for
from fast_prompt.parity import DTYPES, Problem, compare, evaluate
from fast_prompt.tolerances import TOLERANCES

# Each module has SHAPE_KEYS, LARGEST, DEFAULT_SHAPES, PASSES and PARAMETERS, and the functions problem, products,
# flops, traffic and contenders. GPU_SHAPES, where it is, is what a GPU is filled with; ONE_ROW makes a shape one row.
OPS: dict[str, ModuleType] = {
    "prompt_diffusion": prompt_diffusion,
    "prompt_compress": prompt_compress,
    "skip_adapter": skip_adapter,
    "skip_adapter_run": skip_adapter_run,
    "route_block": route_block,
    "apt_model": apt_model,
    "das_model": das_model,
}
PASSES = ("fwd", "fwdbwd")

FEWEST_COLD_COPIES = 2
FEWEST_COLD_CALLS = 10  # in a rotation, so that what one replay costs by itself does not count

Shape = Mapping[str, int]
Progress = Callable[[range], Iterator[int]]


@dataclass(frozen=True)
class Row:
    """One contender at one shape, dtype and pass.

    Attributes:
        ms: median milliseconds a call; spread: interquartile range over it.
        speedup: the best baseline's ms over this one's; None when parity fails.
        floor_ms: what the machine's best measured rates would allow.
        gemm_share: the rate reached over the machine's best matrix product.
        saved_bytes: what is kept for the backward besides parameters; None for a forward alone.
        failure: which results are too far from float64; empty when none is.
    """

    op: str
    shape: str
    dtype: str
    pass_name: str
    contender: str
    kind: str
    ms: float
    spread: float
    speedup: float | None
    floor_ms: float
    gemm_share: float
    saved_bytes: int | None
    failure: str = ""

    def as_json(self, with_saved_bytes: bool = False) -> dict[str, Any]:
        """The row under its documented keys."""
        row = asdict(self)
        row["pass"] = row.pop("pass_name")
        keys = ("op", "shape", "dtype", "pass", "contender", "kind", "ms", "spread", "speedup", "floor_ms")
        return {key: row[key] for key in keys + ("saved_bytes",) * with_saved_bytes}


class Raised(NamedTuple):
    """A contender that raised instead of computing: it is not timed."""

    contender: str
    kind: str
    setting: str
    message: str


@dataclass
class Report:
    """All rows, the machine they hold for, and the contenders that raised instead of computing."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    raised: list["Raised"] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every contender of ours computes the op."""
        failed = [row.kind for row in self.rows if row.failure] + [entry.kind for entry in self.raised]
        return "ours" not in failed


@dataclass(frozen=True)
class Setting:
    """What one group of contenders computes."""

    op: str
    shape: Shape
    dtype: str
    pass_name: str

    @property
    def backward(self) -> bool:
        """Whether gradients are computed too."""
        return self.pass_name == "fwdbwd"

    def __str__(self) -> str:
        return f"{self.op} {format_shape(self.shape)} {self.dtype} {self.pass_name}"


def check_shape(op: str, shape: Shape) -> Shape:
    """The sizes in the op's own order; ValueError where one is missing, unknown or too large."""
    keys, largest = OPS[op].SHAPE_KEYS, OPS[op].LARGEST
    if set(shape) != set(keys):
        raise ValueError(f"{op} has the sizes {','.join(keys)}, got {','.join(shape)}")
    for key, limit in largest.items():
        if shape[key] > limit:
            raise ValueError(f"{key}: expected at most {limit}, got {shape[key]}")
    return {key: shape[key] for key in keys}


def format_shape(shape: Shape) -> str:
    """``B=8,n=237,d=768,p=200``."""
    return ",".join(f"{key}={size}" for key, size in shape.items())


def run(
    op: str,
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    passes: Sequence[str],
    device: torch.device,
    rounds: int,
    progress: Callable[[Setting], Progress] = lambda setting: iter,
) -> Report:
    """Times every contender of an op, in turn, at every shape, dtype and pass.

    Args:
        op: a key of ``OPS``.
        shapes: sizes by the op's ``SHAPE_KEYS``.
        dtypes: keys of ``fast_prompt.parity.DTYPES``.
        passes: of ``PASSES``.
        device: where to run.
        rounds: samples of each contender.
        progress: for each setting, what wraps the range of its rounds.
    """
    report = Report(machine.describe(device) | {"rounds": rounds, "gemm_gflops": {}, "copy_gib_s": 0.0})
    settings = [Setting(op, shape, dtype, name) for shape in shapes for dtype in dtypes for name in passes]
    for setting in settings:
        # In this process: the workers it would start instead import torch meanwhile, on the cores that are timed.
        with torch._inductor.config.patch(compile_threads=1):
            rows, best, raised = measure(setting, device, rounds, progress(setting))
        report.rows += rows
        report.raised += raised
        products = report.machine["gemm_gflops"]
        products[setting.dtype] = max(products.get(setting.dtype, 0.0), best.flops / 1e9)
        report.machine["copy_gib_s"] = max(report.machine["copy_gib_s"], best.bytes / 2**30)
    return report


def measure(
    setting: Setting, device: torch.device, rounds: int, progress: Progress = iter, cold_bytes: int = 0
) -> tuple[list[Row], Rates, list[Raised]]:
    """Checks, then times, all contenders of one setting.

    Args:
        setting: what they compute.
        device: where they run.
        rounds: samples of each contender.
        progress: what wraps the range of rounds.
        cold_bytes: with more than 0, no call finds its inputs in a cache smaller than this: calls go through copies
            that hold as much, and on a GPU are replayed from a CUDA graph. With 0, calls follow on one another,
            launches included.

    Returns:
        Their rows, the machine's best rates, and the contenders that raised.
    """
    torch._dynamo.reset()  # a shape is compiled for itself, as if it were the only one
    op, dtype = OPS[setting.op], DTYPES[setting.dtype]
    problem = op.problem(setting.shape, dtype, device)
    everyone = op.contenders(setting.shape, dtype, device, setting.backward)
    failures, raised = _check(everyone, problem, setting)
    inputs = cold_copies(problem, cold_bytes) if cold_bytes else [problem]
    functions: dict[str, Callable[[], object]] = {}
    for entry in (entry for entry in everyone if entry.name in failures):
        calls = [call(entry, copy, setting.backward) for copy in inputs]
        try:
            functions[entry.name] = rotation(calls, device) if cold_bytes else calls[0]
        except RuntimeError as error:  # what waits for the GPU is in no graph
            raised.append(_raised(entry, setting, error))
    contenders = [entry for entry in everyone if entry.name in functions]
    traffic = max(op.traffic(setting.shape, dtype, setting.backward), cold_bytes)
    probed = probes(dtype, device, op.products(setting.shape), traffic)
    probing = {name: probe.function for name, probe in probed.items()}
    timings = interleave(functions | probing, stopwatch_for(device), rounds, progress)
    timings |= {name: timings[name].divided(len(inputs)) for name in functions}
    best = rates(probed, timings)
    saved = {entry.name: saved_bytes(entry.function, problem, op.PARAMETERS) for entry in contenders * setting.backward}
    return _rows(setting, contenders, timings, failures, best, saved), best, raised


def _check(contenders: Sequence[Contender], problem: Problem, setting: Setting) -> tuple[dict[str, str], list[Raised]]:
    """By name, which results are too far from float64 (empty if none); and who raised instead of computing."""
    wide = problem.double()
    definitions = {entry.definition for entry in contenders}
    expected = {definition: evaluate(definition, wide, setting.backward) for definition in definitions}
    tolerance = TOLERANCES[DTYPES[setting.dtype]]
    failures: dict[str, str] = {}
    raised: list[Raised] = []
    for entry in contenders:
        try:
            errors = compare(evaluate(entry.function, problem, setting.backward), expected[entry.definition])
        except Exception as error:  # one contender's failure, such as no compiler here; the others still run
            raised.append(_raised(entry, setting, error))
            continue
        large = {name: error for name, error in errors.items() if error > tolerance}
        failures[entry.name] = ", ".join(f"{name} {error:.1e} > {tolerance:.1e}" for name, error in large.items())
    return failures, raised


def _raised(contender: Contender, setting: Setting, error: Exception) -> Raised:
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    return Raised(contender.name, contender.kind, str(setting), message)


def call(contender: Contender, problem: Problem, backward: bool) -> Callable[[], object]:
    """One pass of a contender over a problem, with nothing else in it."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return contender.function(**problem.tensors, **problem.options)

        return forward
    leaves = problem.leaves()
    trained = [leaves[name] for name in problem.trained]

    def forward_and_backward() -> object:
        output = contender.function(**leaves, **problem.options)
        return torch.autograd.grad(output, trained, problem.grad)

    return forward_and_backward


def cold_copies(problem: Problem, cold_bytes: int) -> list[Problem]:
    """Inputs for a rotation: the problem and copies of it that hold ``cold_bytes`` together, in turn."""
    size = sum(tensor.nbytes for tensor in problem.tensors.values())
    copies = [problem] + [_copy(problem) for _ in range(max(FEWEST_COLD_COPIES, math.ceil(cold_bytes / size)) - 1)]
    return copies * math.ceil(FEWEST_COLD_CALLS / len(copies))


def _copy(problem: Problem) -> Problem:
    tensors = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    return replace(problem, tensors=tensors, grad=problem.grad.clone())


def _rows(
    setting: Setting,
    contenders: Sequence[Contender],
    timings: Mapping[str, Timing],
    failures: Mapping[str, str],
    best: Rates,
    saved: Mapping[str, int],
) -> list[Row]:
    """Baselines that fail parity stay in the race (to drop the fastest would flatter us) but get no speed-up."""
    op = OPS[setting.op]
    flops = op.flops(setting.shape, setting.backward)
    floor = best.floor(flops, op.traffic(setting.shape, DTYPES[setting.dtype], setting.backward))
    best_baseline = min(timings[entry.name].median for entry in contenders if entry.kind == "baseline")
    return [
        Row(
            op=setting.op,
            shape=format_shape(setting.shape),
            dtype=setting.dtype,
            pass_name=setting.pass_name,
            contender=entry.name,
            kind=entry.kind,
            ms=timings[entry.name].median * 1e3,
            spread=timings[entry.name].spread,
            speedup=None if failures[entry.name] else best_baseline / timings[entry.name].median,
            floor_ms=floor * 1e3,
            gemm_share=flops / timings[entry.name].median / best.flops,
            saved_bytes=saved.get(entry.name),
            failure=failures[entry.name],
        )
        for entry in contenders
    ]
