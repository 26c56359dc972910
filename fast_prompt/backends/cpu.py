"""C++ on the CPU: one library for every instruction set, chosen when it runs (csrc/cpu/isa.h)."""

import torch

from fast_prompt.backends.call import Call, refuses_kernels
from fast_prompt.backends.native import run, unavailable

__all__ = [
    "compiled",
    "isa",
    "isa_levels",
    "name",
    "poison_scratch",
    "refuses",
    "run",
    "select_isa",
    "suffix",
    "unavailable",
]

name, suffix, compiled = "cpu", "", True


def refuses(call: Call) -> str | None:
    """Why this backend cannot take a call of any op, or None."""
    if call.device.type != "cpu":
        return f"runs on cpu, not on {call.device.type}"
    return refuses_kernels(call)


def isa() -> str:
    """The instruction set in use: ``"avx512_bf16"``, ``"avx512"``, ``"avx2"`` or ``"portable"``.

    The environment variable ``FAST_PROMPT_CPU_ISA`` names one for a whole process.
    """
    return torch.ops.fast_prompt_native.cpu_isa()


def isa_levels() -> list[str]:
    """The instruction sets this machine can run, best first."""
    return torch.ops.fast_prompt_native.cpu_isa_levels().split()


def select_isa(level: str = "") -> None:
    """Uses one of ``isa_levels()`` from now on, the best by default; RuntimeError if this machine lacks it."""
    torch.ops.fast_prompt_native.select_cpu_isa(level)


def poison_scratch(on: bool) -> None:
    """Whether the kernels' scratch starts as NaN: a test sees then what is read before it is written."""
    torch.ops.fast_prompt_native.poison_scratch(on)
