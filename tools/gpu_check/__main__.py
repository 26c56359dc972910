"""``python -m gpu_check``: see the package.

Exit codes: 0 every step passed, 1 one failed, 2 there is no GPU here, 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

import torch

from fast_prompt import bench
from fast_prompt.cli import INTERRUPTED
from gpu_check.place import DRY, GPU
from gpu_check.report import print_summary
from gpu_check.runner import run_all, run_here
from gpu_check.steps import steps

NO_GPU = 2
DESCRIPTION = "Builds, checks and times every kernel on this GPU, within 9 minutes."


def main() -> int:
    """Runs all steps, or in a process started for it, one."""
    args = _parser().parse_args()
    place = DRY if args.dry_run else GPU
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu-check: there is no CUDA GPU here; --dry-run walks through every step without one")
        return NO_GPU
    table = steps(place, args.op)
    if args.step:
        return run_here(next(step for step in table if step.name == args.step), place, args.figures)
    try:
        record = run_all(table, place, args.out)
    except KeyboardInterrupt:
        return INTERRUPTED
    print_summary(record)
    return int(bool(record.failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gpu_check", description=DESCRIPTION)
    add = parser.add_argument
    add(
        "--op",
        choices=list(bench.OPS),
        action="append",
        help="this op only (repeatable; default: all)",
    )
    add("--out", type=Path, metavar="DIR", help="where the record goes (default bench/results/<gpu>)")
    add("--dry-run", action="store_true", help="walk through every step on this CPU, with tiny inputs")
    add("--step", help=argparse.SUPPRESS)
    add("--figures", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
