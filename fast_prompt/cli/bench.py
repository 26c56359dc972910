"""``fast-prompt bench``: every backend against the best of eager and torch.compile, in one run."""

import argparse
import contextlib
import math
import sys
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from fast_prompt import bench
from fast_prompt.bench import machine
from fast_prompt.cli.output import emit_json, emit_table, note
from fast_prompt.parity import DTYPES

EXAMPLES = """\
examples:
  fast-prompt bench --op prompt_diffusion
  fast-prompt bench --op prompt_diffusion --shape B=8,n=237,d=768,p=200 --dtype bf16 --pass fwd
  fast-prompt bench --op prompt_diffusion --shape B=1,n=50,d=512,p=16 --shape B=1,n=50,d=512,p=64 --json
  fast-prompt bench --op apt_model --shape B=8,n=185,p=200,layers=4 --rounds 10
  fast-prompt bench --op route_block
  fast-prompt bench --op skip_adapter --overhead

All contenders run in turn, round by round. speedup is the best baseline's median over this one's; no speed-up is
given, and the exit code is 1, where a backend's results are not within the tolerance at that very shape. floor is
FLOPs over the best matrix product, or bytes over the best copy, measured in the same rounds.
"""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "bench",
        help="time every backend against the best of eager and torch.compile",
        description="Times an op: plain PyTorch, the best eager forms, torch.compile and every backend, interleaved.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--op", choices=list(bench.OPS), required=True, help="what to time")
    add("--shape", type=_shape, action="append", metavar="K=V,...", help="such as B=8,n=237,d=768,p=200 (repeatable)")
    add("--dtype", choices=list(DTYPES), action="append", help="default fp32 (repeatable)")
    add("--pass", choices=bench.PASSES, action="append", dest="passes", help="default all that the op has (repeatable)")
    add("--device", type=_device, default=_default_device(), help="default %(default)s")
    add("--rounds", type=_rounds, default=30, help="samples of each contender (default %(default)s)")
    add("--saved-bytes", action="store_true", help="add saved_bytes to the JSON: what is kept for the backward")
    add("--overhead", action="store_true", help="time what Python costs a call of one row, and nothing else")
    add("--json", action="store_true", help="print machine and rows as JSON")
    parser.set_defaults(fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, and returns 1 if one of our contenders fails parity."""
    if args.overhead:
        return _run_overhead(args)
    try:
        shapes = [bench.check_shape(args.op, shape) for shape in args.shape or bench.OPS[args.op].DEFAULT_SHAPES]
    except ValueError as error:
        args.fail(f"argument --shape: {error}")
    passes = args.passes or bench.OPS[args.op].PASSES
    if unknown := set(passes) - set(bench.OPS[args.op].PASSES):
        args.fail(f"argument --pass: {args.op} has no {', '.join(unknown)}")
    with contextlib.redirect_stdout(sys.stderr):  # compilers may print
        report = bench.run(args.op, shapes, args.dtype or ["fp32"], passes, args.device, args.rounds, _progress)
    if args.json:
        emit_json({"machine": report.machine, "rows": [row.as_json(args.saved_bytes) for row in report.rows]})
    else:
        _print_tables(report)
    for row in report.rows:
        if row.failure:
            where = f"{row.contender}, {row.shape}, {row.dtype}, {row.pass_name}"
            note(f"no speed-up for {where}: parity fails: {row.failure}")
    for entry in report.raised:
        note(f"not run: {entry.contender}, {entry.setting}: {entry.message}")
    return int(not report.ok)


def _run_overhead(args: argparse.Namespace) -> int:
    """Prints what Python costs an op's calls."""
    for flag, given in {"--shape": args.shape, "--dtype": args.dtype, "--pass": args.passes}.items():
        if given:
            args.fail(f"argument {flag}: expected none with --overhead, which times one row in fp32")
    if args.saved_bytes:
        args.fail("argument --saved-bytes: expected none with --overhead")
    try:
        found = bench.measure(args.op, args.device, args.rounds, _progress("overhead"))
    except ValueError as error:
        args.fail(f"argument --op: {error}")
    if args.json:
        emit_json({"machine": machine.describe(args.device), "overhead": [asdict(each) for each in found]})
        return 0
    rows = [[each.call, *(f"{us:.1f}" for us in (each.call_us, each.registered_us, each.python_us))] for each in found]
    print(f"{args.op}, one row, microseconds")
    emit_table(["call", "whole", "registered op", "Python"], rows)
    return 0


def _progress(setting: object) -> bench.Progress:
    return lambda rounds: iter(tqdm(rounds, desc=str(setting), unit=" round", file=sys.stderr, disable=None))


def _print_tables(report: bench.Report) -> None:
    """One table a setting."""
    facts = report.machine
    products = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in facts["gemm_gflops"].items())
    print(f"{facts['name']}, {facts['cpu']['threads']} threads, torch {facts['versions']['torch']}")
    print(f"best GFLOP/s in a matrix product: {products}; best copy: {facts['copy_gib_s']:.0f} GiB/s")
    groups: dict[tuple[str, ...], list[bench.Row]] = {}
    for row in report.rows:
        groups.setdefault((row.op, row.shape, row.dtype, row.pass_name), []).append(row)
    for title, rows in groups.items():
        print(f"\n{' '.join(title)}, floor {rows[0].floor_ms:.3f} ms")
        headers = ["contender", "kind", "ms", "spread", "speedup", "x ours", "x floor", "% of GEMM", "saved MiB"]
        our_best = min((row.ms for row in rows if row.kind == "ours"), default=math.nan)
        emit_table(headers, [_cells(row, our_best) for row in rows])


def _cells(row: bench.Row, our_best: float) -> list[str]:
    """``x ours``: how many times as long as the fastest of ours."""
    return [
        row.contender,
        row.kind,
        f"{row.ms:.3f}",
        f"{row.spread:.0%}",
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
        "-" if math.isnan(our_best) else f"{row.ms / our_best:.2f}",
        f"{row.ms / row.floor_ms:.2f}",
        f"{row.gemm_share:.0%}",
        "-" if row.saved_bytes is None else f"{row.saved_bytes / 2**20:.1f}",
    ]


def _shape(text: str) -> dict[str, int]:
    """``B=8,n=237`` as a dictionary of positive sizes."""
    shape = {}
    for item in text.split(","):
        key, equals, size = item.partition("=")
        if not (equals and key and size.isdecimal() and int(size) > 0):
            raise argparse.ArgumentTypeError(f"expected KEY=SIZE,... with positive sizes, got {item!r} in {text!r}")
        if key in shape:
            raise argparse.ArgumentTypeError(f"{key} is there twice in {text!r}")
        shape[key] = int(size)
    return shape


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no CUDA device here")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    return device


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
