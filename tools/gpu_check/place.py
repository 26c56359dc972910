"""Where the steps run and how much they do: on a GPU, or on a CPU that only walks through them."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fast_prompt import bench
from fast_prompt.parity import DTYPES

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
IMPORTED = ("", "kernels", "tools")  # of the checkout, what a process of its own must find
CACHES_TO_FILL = 3  # a rotation's inputs hold as much as so many L2 caches


def environment_of_a_process() -> dict[str, str]:
    """This one's, in which Python finds the checkout and what lies in it."""
    folders = [str(ROOT / name) for name in IMPORTED]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}


@dataclass(frozen=True)
class Place:
    """One kind of machine.

    Attributes:
        device: where tensors live.
        backends: what is checked.
        dtypes: keys of ``fast_prompt.parity.DTYPES``.
        rounds: samples of each contender.
        huge: elements that the largest input must exceed.
        largest_size: no dimension of a benchmark's shape exceeds it.
        sanitizers: tools of compute-sanitizer.
        compile_options: of ``torch.compile``, where it is checked.
        environment: of the benchmarks' processes.
    """

    device: torch.device
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    rounds: int
    huge: int
    largest_size: int
    sanitizers: tuple[str, ...]
    compile_options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def dry(self) -> bool:
        """Whether nothing here is measured."""
        return self.device.type == "cpu"

    def devices(self) -> list[torch.device]:
        """All devices of this kind; the CPU stands for two."""
        if self.dry:
            return [self.device] * 2
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]

    def cold_bytes(self) -> int:
        """How much input a rotation needs for no call to find its own in the cache."""
        cache = 2**12 if self.dry else torch.cuda.get_device_properties(self.device).L2_cache_size
        return CACHES_TO_FILL * cache

    def shapes(self, op: str) -> list[dict[str, int]]:
        """The benchmark's shapes of an op, as large as they may be here."""
        module = bench.OPS[op]
        shapes = getattr(module, "GPU_SHAPES", module.DEFAULT_SHAPES)
        found = [{key: min(size, self.largest_size) for key, size in shape.items()} for shape in shapes]
        return [shape for index, shape in enumerate(found) if shape not in found[:index]]

    def samples(self, op: str, most: int) -> list[dict[str, int]]:
        """The same shapes with no more than ``most`` samples."""
        found = [{**shape, "B": min(shape["B"], most)} for shape in self.shapes(op)]
        return [shape for index, shape in enumerate(found) if shape not in found[:index]]


GPU = Place(
    device=torch.device("cuda"), backends=("triton", "cuda"), dtypes=tuple(DTYPES), rounds=20, huge=2**31,
    largest_size=2**31, sanitizers=("memcheck", "racecheck"),
)  # fmt: skip

# torch.compile would spend minutes in a C++ compiler: here it runs what it traced as it is; in benchmarks, nothing.
DRY = Place(
    device=torch.device("cpu"), backends=("cpu",), dtypes=("fp32",), rounds=1, huge=2**12, largest_size=4,
    sanitizers=("memcheck",), compile_options={"backend": "eager"}, environment={"TORCHDYNAMO_DISABLE": "1"},
)  # fmt: skip
