"""What Python costs a call: an op of one row beside its registered op alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fast_prompt.backends import BACKENDS
from fast_prompt.bench.runner import OPS as BENCHES
from fast_prompt.bench.timing import interleave, stopwatch_for
from fast_prompt.ops.declaration import OPS


@dataclass(frozen=True)
class Overhead:
    """Medians of one kind of call, in microseconds.

    Attributes:
        op: the op.
        call: ``"no gradient"`` or ``"gradient recorded"``.
        call_us: the function that users call.
        registered_us: the registered op alone, on what that function hands it.
        python_us: their difference.
    """

    op: str
    call: str
    call_us: float
    registered_us: float
    python_us: float


def measure(
    name: str, device: torch.device, rounds: int, progress: Callable[[range], Iterator[int]] = iter
) -> list[Overhead]:
    """Times an op's calls of one row in float32, at the width of the first shape that its benchmark has.

    Args:
        name: one of ``fast_prompt.ops.declaration.OPS``.
        device: where the row is.
        rounds: samples of each call.
        progress: wraps the range of rounds, for a progress bar.

    Raises:
        ValueError: the op is none of those, or plain PyTorch would run it here.
    """
    if name not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {name!r}")
    op, bench = OPS[name], BENCHES[name]
    problem = bench.problem(bench.DEFAULT_SHAPES[0] | bench.ONE_ROW, torch.float32, device)
    arguments: dict[str, Any] = {**problem.tensors, **problem.options}
    named = op.arguments_of(**arguments)
    plan = op.plan(*named.values())
    if plan.form == "reference" or plan.form not in BACKENDS:
        raise ValueError(f"op: expected one that has a kernel on {device.type}, got {name!r}")
    function, registered = op.api, op.registered(plan.form, "")
    inputs = plan.cast(*(named.get(argument.name) for argument in op.tensors))

    def alone(keep: bool) -> Callable[[], Any]:
        flags = (plan.keep if keep else op.keep_nothing,) if op.kept else ()
        return lambda: registered(*inputs, *plan.numbers, *flags)

    def call(trained: tuple[str, ...]) -> Callable[[], Any]:
        leaves = {key: value.detach() for key, value in problem.tensors.items()}
        for key in trained:
            leaves[key].requires_grad_()
        return lambda: function(**leaves, **problem.options)

    trained = tuple(each.name for each in op.tensors if each.role == "weight" and each.name in problem.tensors)
    calls = {
        ("no gradient", "call"): call(()),
        ("no gradient", "registered"): alone(False),
        ("gradient recorded", "call"): call(trained),
        ("gradient recorded", "registered"): alone(True),
    }
    timings = interleave({" ".join(key): each for key, each in calls.items()}, stopwatch_for(device), rounds, progress)
    found = {key: timings[" ".join(key)].median * 1e6 for key in calls}
    pairs = {kind: (found[kind, "call"], found[kind, "registered"]) for kind in ("no gradient", "gradient recorded")}
    return [Overhead(name, kind, whole, own, whole - own) for kind, (whole, own) in pairs.items()]
