"""``fast-prompt parity``: every op, backend, dtype and gradient against the float64 reference."""

import argparse
import dataclasses
import sys
from typing import Any

from tqdm import tqdm

from fast_prompt import parity
from fast_prompt.backends import BACKENDS
from fast_prompt.cli.output import emit_json, emit_table, note
from fast_prompt.ops.declaration import OPS
from fast_prompt.tolerances import TOLERANCES

EXAMPLES = """\
examples:
  fast-prompt parity                                  all that can run here
  fast-prompt parity --backend cpu --dtype bf16       one backend, which must be able to run
  TRITON_INTERPRET=1 fast-prompt parity --backend triton --dtype fp32    Triton without a GPU
  fast-prompt parity --json > parity.json

An error is max|a - b| / max|b| against float64 on the same rounded inputs. The exit code is 1 if any is
above its tolerance, or if the backend named by --backend cannot run.
"""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "parity",
        help="check every backend against float64, forward and every gradient",
        description="Max error of every op, forward and for every gradient, per backend, dtype and case.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", choices=list(OPS), action="append", help="this op only (repeatable)")
    backend_help = "this backend only, and fail if it cannot run (repeatable)"
    parser.add_argument("--backend", choices=list(BACKENDS), action="append", help=backend_help)
    parser.add_argument("--dtype", choices=list(parity.DTYPES), action="append", help="this dtype only (repeatable)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the cases, prints every error, and returns 1 if one is too large or a named backend cannot run."""
    with tqdm(desc="parity", unit=" case", file=sys.stderr, disable=None, leave=False) as bar:
        report = parity.run(args.op, args.backend, args.dtype, progress=lambda cases: _tick(bar, cases))
    if args.json:
        emit_json({"rows": [dataclasses.asdict(row) for row in report.rows]})
    elif report.rows:
        _print_table(report.rows)
    for (op, backend), reason in report.refused.items():
        note(f"not run: {op} on {backend}: {reason}")
    for call, message in report.raised.items():
        note(f"RAISED: {' '.join(call)}: {message}")
    for row in report.failures:
        where = f"{row.op} on {row.backend}, {row.dtype}, {row.case}, {row.what}"
        note(f"FAILED: {where}: {row.error:.2e} > {row.tolerance:.1e}")
    named_cannot_run = bool(args.backend and report.refused)
    return int(named_cannot_run or bool(report.failures))


def _tick(bar: "tqdm[Any]", cases: list[Any]) -> Any:
    bar.reset(total=len(cases))
    for case in cases:
        yield case
        bar.update()


def _print_table(rows: list[parity.Row]) -> None:
    """One line a case, one column for the forward and for each gradient; ``!`` marks what is too large."""
    columns = list(dict.fromkeys(row.what for row in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: (row.op, row.backend)):
        cells = lines.setdefault((row.op, row.backend, row.dtype, row.case), {})
        cells[row.what] = f"{row.error:.1e}" + ("" if row.ok else " !")
    table = [[*key, *(cells.get(column, "-") for column in columns)] for key, cells in lines.items()]
    emit_table(["op", "backend", "dtype", "case", *columns], table)
    allowed = ", ".join(f"{name} {TOLERANCES[dtype]:.1e}" for name, dtype in parity.DTYPES.items())
    print(f"\n{len(rows)} comparisons, {sum(not row.ok for row in rows)} too large (allowed: {allowed})")
