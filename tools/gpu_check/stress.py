"""The steps that use the kernels as programs do: from graphs, streams and compilers, and with very large inputs."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fast_prompt import bench, parity
from fast_prompt.backends import BACKENDS, use_backend
from fast_prompt.bench.contender import forced
from fast_prompt.ops.declaration import OPS
from fast_prompt.parity import DTYPES, Problem, compare, evaluate
from fast_prompt.tolerances import TOLERANCES
from gpu_check.outcome import AbsentError, Figures, StepError
from gpu_check.place import Place

DTYPE = "bf16"
SAMPLES = 4
TURNS = 20  # of two streams
GRAPH_CASES = ("dropout", "route", "route, dropout")  # names of parity cases, with numbers for a seed or a route
Results = dict[str, Tensor]


def stress(place: Place, figures: Figures, op: str, backend: str) -> None:
    """Every check of ``CHECKS``, in this order: the graph's first, while no kernel has run."""
    problem = bench.OPS[op].problem(place.samples(op, SAMPLES)[0], DTYPES[DTYPE], place.device)
    failed = {}
    for name, check in CHECKS.items():
        try:
            figures.save(**{name: check(place, op, backend, problem)})
        except Exception as error:  # whatever it is; the other checks still run
            failed[name] = f"{type(error).__name__}: {error}"
            figures.save(**{name: failed[name][:500]})
    if failed:
        raise StepError("\n".join(f"{name}: {message}" for name, message in failed.items()))


def graph(place: Place, op: str, backend: str, problem: Problem) -> str:
    """Forward and backward captured and replayed on new numbers. C++ is captured untried; Triton compiles first."""
    if reason := BACKENDS[backend].unavailable():  # asking loads the library, which a capture does not allow
        raise StepError(reason)
    function = forced(OPS[op].api, backend)
    static = _scaled(problem, 1.0)
    if backend == "triton":
        evaluate(function, static)
    results, replay = CAPTURES[place.device.type](lambda: evaluate(function, static))
    for scale in (1.0, 0.5):
        fresh = _scaled(problem, scale)
        static.grad.copy_(fresh.grad)
        for name, tensor in fresh.tensors.items():
            static.tensors[name].copy_(tensor)
        replay()
        _check(results, fresh, op)
    return "passed"


def graph_of_numbers(place: Place, op: str, backend: str, problem: Problem) -> str:
    """A seed and a route that come as plain numbers: known after a first call, then captured like all else."""
    function = forced(OPS[op].api, backend)
    known = [case for case in parity.cases_of(op).CASES if case.name in GRAPH_CASES]
    for case in known:
        static = parity.cases_of(op).build(case, DTYPES[DTYPE], place.device)
        evaluate(function, static)
        results, replay = CAPTURES[place.device.type](partial(evaluate, function, static))
        for scale in (1.0, 0.5):
            fresh = replace(static, grad=static.grad * scale)
            static.grad.copy_(fresh.grad)
            replay()
            _check(results, fresh, op)
    return f"passed: {', '.join(case.name for case in known)}"


def streams(place: Place, op: str, backend: str, problem: Problem) -> str:
    """Two streams at once give what one after the other gives, bit for bit."""
    function = forced(OPS[op].api, backend)
    problems = [problem, _scaled(problem, 0.5)]
    expected = [evaluate(function, one) for one in problems]
    lanes = [_stream(place.device) for _ in problems]
    for _ in range(TURNS):
        found = []
        for lane, one in zip(lanes, problems, strict=True):
            with lane():
                found.append(evaluate(function, one))
        _synchronize(place.device)
        for actual, right in zip(found, expected, strict=True):
            _check_same_bits(actual, right)
    return "passed"


def other_device(place: Place, op: str, backend: str, problem: Problem) -> str:
    """A call on a device that is not the current one."""
    others = place.devices()[1:]
    if not others:
        return "one GPU"
    tensors = {name: tensor.to(others[-1]) for name, tensor in problem.tensors.items()}
    moved = replace(problem, tensors=tensors, grad=problem.grad.to(others[-1]))
    _check(evaluate(forced(OPS[op].api, backend), moved), moved, op)
    return "passed"


def compiled(place: Place, op: str, backend: str, problem: Problem) -> str:
    """``torch.compile`` takes it whole, forward and backward."""
    with use_backend(backend):
        function = torch.compile(OPS[op].api, fullgraph=True, **place.compile_options)
        _check(evaluate(function, problem), problem, op)
    return "passed"


def same_bits(place: Place, op: str, backend: str, problem: Problem) -> str:
    """The same call twice gives the same bits, gradients included."""
    function = forced(OPS[op].api, backend)
    _check_same_bits(evaluate(function, problem), evaluate(function, problem))
    return "passed"


CHECKS: dict[str, Callable[[Place, str, str, Problem], str]] = {
    "cuda_graph": graph,
    "cuda_graph_of_numbers": graph_of_numbers,
    "two_streams": streams,
    "other_device": other_device,
    "torch_compile": compiled,
    "same_bits": same_bits,
}


def huge(place: Place, figures: Figures, op: str, backend: str) -> None:
    """More elements than an int32 counts: a small problem's samples over and over, of which the ends are looked at.

    The samples' gradients are the small problem's; the parameters' are its own so many times.
    """
    small = bench.OPS[op].problem(place.samples(op, SAMPLES)[0], DTYPES[DTYPE], place.device)
    parameters = bench.OPS[op].PARAMETERS
    largest = max(tensor.numel() for name, tensor in small.tensors.items() if name not in parameters)
    times = math.ceil(place.huge / largest) + 1
    figures.save(elements=times * largest)

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(times, *[1] * (tensor.dim() - 1))

    tensors = {name: one if name in parameters else repeated(one) for name, one in small.tensors.items()}
    try:
        problem = replace(small, tensors=tensors, grad=repeated(small.grad))
        results = evaluate(forced(OPS[op].api, backend), problem)
    except torch.OutOfMemoryError as error:
        raise AbsentError(f"there is too little memory for {times * largest} elements: {error}") from None
    expected = evaluate(OPS[op].definition, small.double())
    ends = {"first": slice(0, SAMPLES), "last": slice(-len(small.grad), None)}
    for where, end in ends.items():
        _compare(
            {name: one if name in parameters else one[end] for name, one in results.items()},
            {name: one * times if name in parameters else one for name, one in expected.items()},
        )
        figures.save(**{where: "passed"})


def _scaled(problem: Problem, scale: float) -> Problem:
    """The problem in memory of its own, every floating number times ``scale``."""
    tensors = {
        name: tensor * scale if tensor.is_floating_point() else tensor for name, tensor in problem.tensors.items()
    }
    return replace(problem, tensors=tensors, grad=problem.grad * scale)


def _check(results: Results, problem: Problem, op: str) -> None:
    _compare(results, evaluate(OPS[op].definition, problem.double()))


def _compare(results: Results, expected: Results) -> None:
    tolerance = TOLERANCES[DTYPES[DTYPE]]
    errors = compare(results, expected)
    if max(errors.values()) > tolerance:
        raise StepError(f"errors {errors}, allowed {tolerance}")


def _check_same_bits(actual: Results, expected: Results) -> None:
    if different := [name for name in expected if not torch.equal(actual[name], expected[name])]:
        raise StepError(f"other bits in {', '.join(different)}")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _stream(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """Enters a new stream of the device; the CPU has none."""
    if device.type == "cpu":
        return contextlib.nullcontext
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return lambda: torch.cuda.stream(stream)


def _capture(call: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
    """The results' memory, and what fills it anew."""
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        results = call()
    return results, recorded.replay


def _repeat(call: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
    """What stands for a graph where there are none."""
    results = call()

    def replay() -> None:
        for name, value in call().items():
            results[name].copy_(value)

    return results, replay


CAPTURES = {"cuda": _capture, "cpu": _repeat}
