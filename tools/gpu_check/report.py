"""The short table at the end, and the figures that docs/gpu.md shows: both are drawn from a record alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fast_prompt.cli.output import emit_table
from gpu_check.runner import Record

BACKENDS = ("triton", "cuda")
KEYS = ("op", "shape", "pass")
SPEED_HEADERS = (*KEYS, "floor us", "triton us", "cuda us", "% of floor", "x eager", "x compile", "x tuned")
LAUNCHED_HEADERS = (*KEYS, "triton us", "cuda us", "best baseline us", "speedup")

Entry = dict[str, Any]


def print_summary(record: Record) -> None:
    """Speed, then what is wrong, then the count of it all."""
    speeds = speed_rows(record.content)
    if speeds:
        emit_table(SPEED_HEADERS, speeds)
    steps = record.content["steps"]
    for entry in (entry for entry in steps if entry["status"] != "passed"):
        print(f"{entry['status']}: {entry['name']}: {(entry.get('output') or ['?'])[-1]}")
    counts = {status: sum(entry["status"] == status for entry in steps) for status in ("passed", "failed", "absent")}
    facts = record.content["machine"]
    print(f"{facts.get('device')}: {', '.join(f'{n} {status}' for status, n in counts.items())}; {record.path}")


def speed_rows(content: Entry) -> list[list[str]]:
    """A line a shape and pass, inputs out of the cache and under CUDA graphs; speed-ups are of our faster one.

    ``x eager`` is over the best form by hand, ``x compile`` over torch.compile as it comes, ``x tuned`` over
    max-autotune, which was timed in a process of its own beside ours. A figure that is not there is ``-``.
    """
    tuned = dict(_settings(content, "tuned"))
    lines = []
    for key, group in _settings(content, "cold"):
        floor, ours = group[0]["floor_ms"], _best(group, _is_ours)
        by_backend = [_microseconds(_best(group, partial(_is_of, backend))) for backend in BACKENDS]
        share = "-" if ours is None else f"{floor / ours:.0%}"
        in_tuned = tuned.get(key, [])
        ratios = [
            _ratio(_best(group, _is_eager), ours),
            _ratio(_best(group, _is_compiled), ours),
            _ratio(_best(in_tuned, _is_compiled), _best(in_tuned, _is_ours)),
        ]
        lines.append([*key, f"{1e3 * floor:.1f}", *by_backend, share, *ratios])
    return lines


def launched_rows(content: Entry) -> list[list[str]]:
    """A line a shape and pass of the smallest batch, call after call, launches included."""
    lines = []
    for key, group in _settings(content, "launched"):
        by_backend = [_microseconds(_best(group, partial(_is_of, backend))) for backend in BACKENDS]
        baseline = _best(group, lambda row: row["kind"] == "baseline")
        lines.append([*key, *by_backend, _microseconds(baseline), _ratio(baseline, _best(group, _is_ours))])
    return lines


def _is_ours(row: Entry) -> bool:
    """And right: what fails parity is given no speed-up."""
    return row["kind"] == "ours" and row["speedup"] is not None


def _is_of(backend: str, row: Entry) -> bool:
    """``apt_model`` has several of one backend."""
    return _is_ours(row) and row["contender"].split("_")[0] == backend


def _is_compiled(row: Entry) -> bool:
    return row["contender"].startswith("compiled")


def _is_eager(row: Entry) -> bool:
    return row["kind"] == "baseline" and not _is_compiled(row)


def _best(rows: list[Entry], which: Callable[[Entry], bool]) -> float | None:
    return min((row["ms"] for row in rows if which(row)), default=None)


def _settings(content: Entry, stage: str) -> list[tuple[tuple[str, str, str], list[Entry]]]:
    """The rows of one stage by op, shape and pass."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for step in content["steps"]:
        for row in step["figures"].get("rows", []) if step["stage"] == stage else []:
            groups.setdefault((row["op"], row["shape"], row["pass"]), []).append(row)
    return list(groups.items())


def _microseconds(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{1e3 * milliseconds:.1f}"


def _ratio(over: float | None, under: float | None) -> str:
    return "-" if over is None or under is None else f"{over / under:.2f}"
