"""Runs the parity cases; knows nothing of any particular op."""

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from fast_prompt.backends import BACKENDS, refusals, use_backend
from fast_prompt.ops.declaration import OPS
from fast_prompt.parity.problem import DTYPES, Problem, compare, evaluate
from fast_prompt.tolerances import TOLERANCES


def cases_of(op: str) -> ModuleType:
    """The module of an op's cases: ``CASES``, and ``build(case, dtype, device)``, which makes a ``Problem`` of one."""
    return importlib.import_module(OPS[op].cases)


@dataclass(frozen=True)
class Row:
    """One comparison. ``what`` is ``"forward"`` or the name of the argument whose gradient it is."""

    op: str
    backend: str
    dtype: str
    case: str
    what: str
    error: float
    tolerance: float
    ok: bool


@dataclass
class Report:
    """Every comparison made, and what could not be run.

    Attributes:
        rows: the comparisons.
        refused: for each (op, backend) that could not take every case, why.
        raised: by (op, backend, dtype, case), what a backend raised there; its rows have an infinite error.
    """

    rows: list[Row] = field(default_factory=list)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    raised: dict[tuple[str, str, str, str], str] = field(default_factory=dict)

    @property
    def failures(self) -> list[Row]:
        """The comparisons outside their tolerance."""
        return [row for row in self.rows if not row.ok]


def run(
    op_names: Sequence[str] | None = None,
    backend_names: Sequence[str] | None = None,
    dtype_names: Sequence[str] | None = None,
    case_names: Sequence[str] | None = None,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Report:
    """Compares the chosen backends with the float64 reference; None stands for all.

    Each backend gets the same, already rounded, numbers as the reference, runs through the public API, and runs
    with ``torch.empty`` filled with NaN. On a GPU machine a backend is run there if it can be.

    Args:
        op_names: names of ops, one's own included once they are declared.
        backend_names: keys of ``fast_prompt.backends.BACKENDS``.
        dtype_names: keys of ``DTYPES``.
        case_names: names of cases.
        progress: wraps the list of (op, dtype, case), for a progress bar.
    """
    report = Report()
    cases = [
        (op, dtype, case)
        for op in (op_names or OPS)
        for dtype in (dtype_names or DTYPES)
        for case in cases_of(op).CASES
        if case.applies_to(DTYPES[dtype]) and (case_names is None or case.name in case_names)
    ]
    for op, dtype, case in progress(cases):
        with _one_thread():
            rounded = cases_of(op).build(case, DTYPES[dtype], torch.device("cpu"))
            expected = evaluate(OPS[op].definition, rounded.double())
        for backend in backend_names or BACKENDS:
            problem, reason = _problem_for(backend, op, case, DTYPES[dtype])
            if problem is None:
                report.refused.setdefault((op, backend), reason)
                continue
            try:
                with use_backend(backend), _poisoned_memory():
                    errors = compare(evaluate(OPS[op].api, problem), expected)
            except Exception as error:  # a backend's failure, whatever it is; the other cases must still run
                report.raised[op, backend, dtype, case.name] = f"{type(error).__name__}: {error}"
                errors = dict.fromkeys(expected, float("inf"))
            report.rows += _rows(op, backend, dtype, case.name, errors)
    return report


def devices() -> list[torch.device]:
    """The kinds of device here, accelerators first."""
    return [torch.device("cuda")] * torch.cuda.is_available() + [torch.device("cpu")]


def _problem_for(backend: str, op: str, case: Any, dtype: torch.dtype) -> tuple[Problem | None, str]:
    """The case on the first device where the backend takes it; else None, and the last device's reason."""
    reason = ""
    for device in devices():
        with _one_thread():
            problem = cases_of(op).build(case, dtype, device)
        declared = OPS[op]
        call = declared.call(declared.arguments_of(**problem.tensors, **problem.options))
        reason = refusals(declared, call)[backend] or ""
        if not reason:
            return problem, ""
    return None, reason


def _rows(op: str, backend: str, dtype: str, case: str, errors: dict[str, float]) -> list[Row]:
    tolerance = TOLERANCES[DTYPES[dtype]]
    return [Row(op, backend, dtype, case, what, error, tolerance, error <= tolerance) for what, error in errors.items()]


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN: an element that a backend forgets to write cannot happen to be right."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For tensors so small that waking threads costs more than the work: a hundred times more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
