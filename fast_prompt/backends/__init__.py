"""Which backends exist here, which can take a call, and if not, why not.

A backend is a module of this package. It says why it does not exist on this machine (``unavailable``) and why it
cannot take a call (``refuses``), from static facts alone (device, dtypes and widths), so that torch.compile can burn
the choice in; and it runs an op's kernels (``run``). What it has for an op, the op's declaration says.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from fast_prompt.backends import cpu, cuda, reference, triton
from fast_prompt.backends.call import Call, HasKernels, Kernels
from fast_prompt.backends.fastest import first_choice

__all__ = [
    "BACKENDS",
    "BackendError",
    "Call",
    "Kernels",
    "check_backend_name",
    "choose",
    "describe",
    "forced",
    "refusals",
    "use_backend",
]

logger = logging.getLogger("fast_prompt")

# In order of preference; the first that can take a call runs it. ``fastest`` says which comes before all on a GPU.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "cuda": cuda, "reference": reference}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot take the call."""


# A plain global, not a ContextVar: torch.compile guards on it, and compiles anew when it changes.
_forced: str | None = os.environ.get("FAST_PROMPT_BACKEND") or None


def check_backend_name(name: str) -> str:
    """Returns ``name`` or raises ValueError with the known names."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend within a ``with`` block; a call it cannot take raises ``BackendError``.

    Like torch's own backend flags it holds for the whole process, every thread included.

    Args:
        name: ``"cpu"``, ``"triton"``, ``"cuda"`` or ``"reference"``. The environment variable
            ``FAST_PROMPT_BACKEND``, read when the package is imported, does the same for a whole process.
    """
    global _forced
    before, _forced = _forced, check_backend_name(name)
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The backend that ``use_backend`` or the environment asks for, or None."""
    return _forced


def refusals(op: HasKernels, call: Call) -> dict[str, str | None]:
    """For every backend: why it cannot take this call, or None if it can."""
    return {name: _refusal(name, op, call) for name in BACKENDS}


def _refusal(name: str, op: HasKernels, call: Call) -> str | None:
    backend, kernels = BACKENDS[name], op.kernels.get(name)
    if kernels is None and hasattr(backend, "run"):
        return f"has no {op.name}"
    limit = kernels.refuses if kernels else None
    return backend.unavailable() or backend.refuses(call) or (limit(call) if limit else None)


def choose(op: HasKernels, call: Call, forced: str | None) -> str:
    """The name of the backend that runs this call; ``forced`` if that is given.

    Raises:
        BackendError: the forced backend cannot take the call.
        ValueError: there is no such backend.
    """
    if forced is not None:
        if _refusal(check_backend_name(forced), op, call) is not None:
            reasons = describe(refusals(op, call))
            raise BackendError(f"backend {forced!r} cannot take this call of {op.name}:\n{reasons}")
        return forced
    first = first_choice(op.name, call)
    order = (first, *BACKENDS) if first else BACKENDS
    chosen = next(name for name in order if _refusal(name, op, call) is None)
    if chosen == "reference" and call.dtype != torch.float64 and call.device.type != "meta":
        _report_fallback(op, call)
    return chosen


def describe(reasons: dict[str, str | None]) -> str:
    """One line a backend: its name, and why it cannot take the call or that it can."""
    return "\n".join(f"  {name:<10} {reason or 'can take this call'}" for name, reason in reasons.items())


_reported: set[tuple[object, ...]] = set()


def _report_fallback(op: HasKernels, call: Call) -> None:
    """No silent fallback: says once, for each kind of call, that plain PyTorch runs it, and why."""
    kind = (op.name, call.device.type, call.dtype, call.transformed)
    if kind not in _reported:
        _reported.add(kind)
        reasons = describe(refusals(op, call))
        logger.warning("%s runs in plain PyTorch on %s (%s):\n%s", op.name, call.device.type, call.dtype, reasons)
