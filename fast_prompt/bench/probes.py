"""What this machine can do at best: its matrix product and its copy, timed in the same rounds as the contenders."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from fast_prompt.bench.timing import Timing

SQUARE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = 512 * 2**20  # read and written; larger than the caches of most processors


@dataclass(frozen=True)
class Probe:
    """Work of a known size.

    Attributes:
        function: does it once.
        flops: floating-point operations of one call (0 for a copy).
        bytes: bytes read and written by one call (0 for a product).
    """

    function: Callable[[], object]
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Rates:
    """The best rates any probe reached, by its median: FLOP/s and bytes/s."""

    flops: float
    bytes: float

    def floor(self, flops: int, traffic: int) -> float:
        """Seconds below which work of this size cannot fall."""
        return max(flops / self.flops, traffic / self.bytes)


def probes(
    dtype: torch.dtype, device: torch.device, products: Iterable[tuple[int, int, int]], traffic: int
) -> dict[str, Probe]:
    """Products of large squares and of the op's own shapes; copies of a large tensor and of one of the op's size.

    The op's own sizes are there so that a floor is one: what fits the cache is copied faster. For half types float32
    products are there too: where the processor multiplies those faster, so may a kernel.

    Args:
        dtype: of the op's activations.
        device: where the op runs.
        products: (m, k, n) of the op's own matrix products.
        traffic: bytes the op must read and write.
    """
    side = SQUARE[device.type]
    shapes = [(side, side, side), *products]
    found = {
        f"mm {operand} {m}x{k}x{n}": _product(m, k, n, operand, device)
        for operand in dict.fromkeys((dtype, torch.float32))
        for m, k, n in shapes
    }
    return found | {f"copy {size} bytes": _copy(size, device) for size in (COPY_BYTES, traffic)}


def rates(probed: Mapping[str, Probe], timings: Mapping[str, Timing]) -> Rates:
    """The best of the probes."""
    return Rates(
        flops=max(probe.flops / timings[name].median for name, probe in probed.items()),
        bytes=max(probe.bytes / timings[name].median for name, probe in probed.items()),
    )


def _product(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> Probe:
    left, right = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    output = torch.empty(m, n, device=device, dtype=dtype)
    return Probe(lambda: torch.mm(left, right, out=output), flops=2 * m * k * n)


def _copy(traffic: int, device: torch.device) -> Probe:
    """Reads and writes ``traffic`` bytes between them."""
    source = torch.zeros(traffic // 2, device=device, dtype=torch.uint8)
    target = torch.ones_like(source)
    return Probe(lambda: target.copy_(source), bytes=2 * len(source))
