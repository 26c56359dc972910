"""Timing in turn: each contender once a round, in an order drawn anew, so that the machine's noise meets all alike.

A call in a loop finds its inputs where the last one left them, in the cache, and on a GPU a small one waits for its
launch. ``rotation`` times neither: each call has inputs of its own, and a GPU replays them all from one CUDA graph.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

WARM_UP_CALLS = 3
SHORTEST_SAMPLE = 0.004  # seconds; shorter calls are repeated to fill it
ORDER_SEED = 0
GRAPH_WARM_UP_CALLS = 3  # before a capture: torch compiles, and chooses its algorithms, at the first

Stopwatch = Callable[[Callable[[], object], int], float]


@dataclass(frozen=True)
class Timing:
    """One contender's samples.

    Attributes:
        seconds: of a call, one number a round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds a call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        if len(self.seconds) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (upper - lower) / self.median

    def divided(self, parts: int) -> "Timing":
        """The samples of one of ``parts`` equal calls, where these samples are of all."""
        return Timing(tuple(seconds / parts for seconds in self.seconds))


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The function that times ``repeats`` calls on this kind of device and returns seconds a call."""
    return STOPWATCHES[device.type]


def interleave(
    functions: Mapping[str, Callable[[], object]],
    stopwatch: Stopwatch,
    rounds: int,
    progress: Callable[[range], Iterator[int]] = iter,
) -> dict[str, Timing]:
    """Times each function once a round.

    Args:
        functions: what to time, by name; each is called with no arguments.
        stopwatch: see ``stopwatch_for``.
        rounds: samples of each function.
        progress: wraps the range of rounds, for a progress bar.
    """
    repeats = {name: _warm_up(function, stopwatch) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(ORDER_SEED).shuffle
    with _no_garbage_collection():
        for _ in progress(range(rounds)):
            shuffle(order)
            for name in order:
                samples[name].append(stopwatch(functions[name], repeats[name]))
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def _warm_up(function: Callable[[], object], stopwatch: Stopwatch) -> int:
    """Calls the function until it is compiled and its memory allocated; returns how many calls fill a sample."""
    fastest = min(stopwatch(function, 1) for _ in range(WARM_UP_CALLS))
    return max(1, math.ceil(SHORTEST_SAMPLE / fastest))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rotation(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """One function that makes all calls in turn, every result kept until the last, so that no memory is used twice.

    Args:
        calls: the same work on different inputs.
        device: where they run; on a GPU the function replays them as one CUDA graph, captured here.

    Raises:
        RuntimeError: a call cannot be captured, such as one that waits for the GPU.
    """
    return ROTATIONS[device.type](calls)


def _sequence(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    return lambda: [call() for call in calls]


def _cuda_graph(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARM_UP_CALLS):
            calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    del results  # their memory is the graph's own
    return graph.replay


def _cpu_seconds(function: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _cuda_seconds(function: Callable[[], object], repeats: int) -> float:
    """Wall time between two points at which the device has nothing left to do."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


STOPWATCHES: dict[str, Stopwatch] = {"cpu": _cpu_seconds, "cuda": _cuda_seconds}
ROTATIONS = {"cpu": _sequence, "cuda": _cuda_graph}
