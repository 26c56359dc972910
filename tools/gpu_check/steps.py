"""The table of steps. An op is in it by being in the tables of ``parity`` and ``bench``."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from fast_prompt import bench
from fast_prompt.ops.declaration import OPS
from gpu_check import machine, proof, speed, stress
from gpu_check.outcome import Figures
from gpu_check.place import Place

# Read by torch.compile when it is imported; what mode="max-autotune-no-cudagraphs" sets, for every thread.
MAX_AUTOTUNE = {"TORCHINDUCTOR_MAX_AUTOTUNE": "1", "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"}


class Step(NamedTuple):
    """One step, run in a process of its own.

    Attributes:
        stage: steps of one stage may run side by side (``STAGES``).
        seconds: its time limit.
        run: does it; given the place and where to put figures.
        op, backend, variant: what it is about; empty where it is about none.
        environment: of its process, beside the inherited one.
    """

    stage: str
    seconds: int
    run: Callable[[Place, Figures], None]
    op: str = ""
    backend: str = ""
    variant: str = ""
    environment: Mapping[str, str] = MappingProxyType({})

    @property
    def name(self) -> str:
        """``parity prompt_diffusion triton bf16``."""
        return " ".join(filter(None, (self.stage, self.op, self.backend, self.variant)))


def steps(place: Place, ops: Sequence[str] | None = None) -> list[Step]:
    """All steps in order, of these ops or of all: first what is right, then what is fast, whole models last."""
    kernels = [
        (op, backend) for op in OPS for backend in place.backends if backend in OPS[op].kernels and op in (ops or OPS)
    ]
    shaped = [(op, backend) for op, backend in kernels if op in bench.OPS]
    in_cpp = [(op, backend) for op, backend in shaped if backend != "triton"]
    table = [Step("machine", 30, machine.describe), Step("build", 150, proof.build)]
    table += [
        Step("parity", 180, partial(proof.parity_suite, op=op, backend=backend, dtype=dtype), op, backend, dtype)
        for op, backend in kernels
        for dtype in place.dtypes
    ]
    table += [Step("stress", 90, partial(stress.stress, op=op, backend=backend), op, backend) for op, backend in shaped]
    table += [
        Step("sanitizer", 120, partial(proof.sanitizer, op=op, backend=backend, tool=tool), op, backend, tool)
        for op, backend in in_cpp
        for tool in place.sanitizers
    ]
    table += [Step("huge", 60, partial(stress.huge, op=op, backend=backend), op, backend) for op, backend in shaped]
    timed = [op for op in bench.OPS if op in (ops or bench.OPS)]
    single, models = ([op for op in timed if (op in OPS) == wanted] for wanted in (True, False))
    own = place.environment
    table += [Step("cold", 150, partial(speed.cold, op=op), op, environment=own) for op in single]
    table += [Step("tuned", 150, partial(speed.tuned, op=op), op, environment=own | MAX_AUTOTUNE) for op in single]
    table += [Step("launched", 60, partial(speed.launched, op=op), op, environment=own) for op in single]
    table += [Step("cold", 60, partial(speed.cold, op=op), op, environment=own) for op in models]
    return table
