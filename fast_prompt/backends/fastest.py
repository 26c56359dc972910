"""Which GPU backend is tried first: Triton, but for what is in the one table here.

The table is empty: neither backend has been timed on a GPU yet (docs/gpu.md says when one has). A line goes in with
the figures of a record that ``make gpu-check`` left, and out when a later record says otherwise.
"""

from typing import NamedTuple

import torch

from fast_prompt.backends.call import Call

DEFAULT = "triton"


class Faster(NamedTuple):
    """A backend that was measured to be faster than ``DEFAULT`` on one chip, up to a size.

    Attributes:
        op: the op.
        capability: the chip's compute capability, such as ``(9, 0)``.
        fact: the size in the op's call that decides, such as ``"num_prompts"``.
        most: the largest such size.
        backend: the faster one.
        figures: what was measured, at which shapes, and the record it stands in.
    """

    op: str
    capability: tuple[int, int]
    fact: str
    most: int
    backend: str
    figures: str


FASTER: tuple[Faster, ...] = ()


def first_choice(op: str, call: Call) -> str | None:
    """The backend to try before the others; None where the call is on no GPU."""
    if call.device.type != "cuda":
        return None
    for line in FASTER:
        fits = line.op == op and call.sizes[line.fact] <= line.most
        if fits and torch.cuda.get_device_capability(call.device) == line.capability:
            return line.backend
    return DEFAULT
