"""What a checkpoint must hold to be gone on from: each check is of the whole, before anything is taken from it."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

# Differences listed in full before an error says how many more there are.
LISTED = 4

# The prefixes of a checkpoint's names: the parameters, what the optimizer keeps of each, the state of the run.
PARAMETER, OPTIMIZER, STATE = "parameter.", "optimizer.", "state."
STEP, SQUARE = f"{OPTIMIZER}step.", f"{OPTIMIZER}exp_avg_sq."


def check_like(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that differ from the expected ones in name, dtype or shape, or that are not finite."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    shared = {name: value for name, value in expected.items() if name in found}
    problems += [
        f"{name}: expected {_kind(value)}, got {_kind(found[name])}"
        for name, value in shared.items()
        if _kind(value) != _kind(found[name])
    ]
    problems += [f"{name} is not finite" for name in not_finite(found) if name in shared]
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ValueError("; ".join(problems[:LISTED]) + more)


def check_counters(found: Mapping[str, Tensor], steps: int) -> None:
    """Refuse counts that no run of ``steps`` steps can have, of ``done`` and of the optimizer."""
    done = int(found["done"])
    if not 1 <= done <= steps:
        raise ValueError(f"done: expected from 1 to {steps} steps, got {done}")
    for name, value in found.items():
        if name.startswith(STEP) and not (0 <= value <= done and value == value.round()):
            raise ValueError(f"{name}: expected from 0 to {done} steps, got {float(value)}")
        if name.startswith(SQUARE) and (value < 0).any():
            raise ValueError(f"{name}: expected squares, got numbers below 0")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinity."""
    return [name for name, value in tensors.items() if not value.isfinite().all()]


def check_same(found: Mapping[str, Any], expected: Mapping[str, Any], run: str) -> None:
    """Refuse the checkpoint of another run: what it says of itself differs."""
    names = [name for name in _union(expected, found) if expected.get(name) != found.get(name)]
    if names:
        differences = "; ".join(f"{name} {found.get(name)} there, {expected.get(name)} here" for name in names)
        raise ValueError(f"another {run}'s checkpoint: {differences}")


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name begins with ``prefix``, by the rest of the name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _union(*names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for each in names for name in each))
