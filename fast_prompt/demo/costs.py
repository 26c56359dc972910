"""What a method costs in milliseconds, taken in turn so that a busy machine is unfair to no one."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass


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
