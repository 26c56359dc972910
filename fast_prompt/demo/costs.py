"""What a method costs: milliseconds, taken in turn so that a busy machine is unfair to no one, and multiply-adds."""

import importlib
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

importlib.import_module("fast_prompt.ops.flops")  # the formulas of the ops of this package


@dataclass(frozen=True)
class Contender:
    """Something to time. `ready` is entered before each call, untimed: it puts a model into the form to be timed."""

    name: str
    ready: Callable[[], AbstractContextManager[object]]
    call: Callable[[], object]


def median_ms(contenders: list[Contender], rounds: int, on_round: Callable[[], object]) -> dict[str, float]:
    """Median milliseconds of each contender's call; every round calls all of them, one untimed call before each."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            with contender.ready():
                contender.call()
                start = time.perf_counter()
                contender.call()
                times[contender.name].append((time.perf_counter() - start) * 1e3)
        on_round()
    return {name: statistics.median(values) for name, values in times.items()}


def _addmm_flops(added: list[int], left: list[int], right: list[int], **_: object) -> int:
    """Of `added += left @ right`, which torch counts out of place only."""
    return 2 * left[0] * left[1] * right[1]


@torch.no_grad()
def count_macs(model: nn.Module, **inputs: Tensor) -> int:
    """Multiply-adds of a forward pass on `inputs` [B, ...], per sample.

    Counted from the matrix products and convolutions that run. Attention is run as plain products, since torch
    has no formula for its fused form on a CPU.
    """
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter,
    ):
        model(**inputs)
    return counter.get_total_flops() // 2 // len(next(iter(inputs.values())))
