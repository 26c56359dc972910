"""What the commands print: results to stdout, as a table or as JSON; everything else to stderr."""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any


def emit_json(payload: dict[str, Any]) -> None:
    """One JSON document on stdout; numbers that JSON cannot hold become null."""
    print(json.dumps(_finite(payload), indent=1, allow_nan=False))


def emit_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """An aligned table on stdout: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(headers))]
    for row in (headers, ["-" * width for width in widths], *rows):
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        print("  ".join(cells).rstrip())


def note(message: str) -> None:
    """One line for a person, on stderr."""
    print(message, file=sys.stderr)


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("+-")[:1].isdigit() or cell == "inf"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
