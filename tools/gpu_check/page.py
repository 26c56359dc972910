"""docs/gpu.md, made of the budgets and of every record under bench/results: ``python -m gpu_check.page``.

Never edited by hand, so that it says of no kernel what no machine has shown.
"""

import json
from collections.abc import Iterable
from typing import Any

from fast_prompt.ops.declaration import OPS
from gpu_check.machine import digest, kernel_files
from gpu_check.place import ROOT
from gpu_check.report import LAUNCHED_HEADERS, SPEED_HEADERS, launched_rows, speed_rows
from gpu_check.runner import RECORD

PAGE = ROOT / "docs" / "gpu.md"
BUDGETS = ROOT / "tests" / "build" / "kernel_budgets.json"
NOT_YET = "**not yet run on a GPU**"

INTRODUCTION = """\
# What is proved of the GPU kernels, and where

Made by `make docs` from `tests/build/kernel_budgets.json` and the records that `make gpu-check` leaves in
`bench/results/<gpu>/`; not edited by hand. The tiers of proof are those of `CONTRIBUTING.md`. Tiers 3 to 5 need no
GPU: `make test` passes them wherever it passes. Tier 6 is a GPU's own.
"""

SPEED = """\
Inputs out of the cache, bf16, under CUDA graphs; microseconds. The floor is what the card's own best matrix product and
copy, measured in the same rounds, would allow; `% of floor` and the speed-ups (`x`) are those of the faster of ours,
over the best form by hand, torch.compile as it comes, and torch.compile with max-autotune.
"""

NO_SPEED = """\
## Speed

Not measured on any GPU yet. Aimed at for `prompt_diffusion`, on an H100-class card with bf16, 64 samples of 577 tokens
and width 768: a forward at 75 % of the floor or better and 1.5 times as fast as torch.compile with max-autotune at 16,
64 and 200 prompts, forward and backward 1.3 times; one sample twice as fast as eager, both under CUDA graphs. Aimed at
for `prompt_compress` with one query and 64 samples of 197 tokens of width 768: 75 % of the memory's bandwidth, 5 times
as fast as torch's attention with projected tokens, 1.5 times as fast as torch.compile of the absorbed form.
"""

LAUNCHED = "The smallest batch, bf16, call after call without a graph, so that launches count; microseconds.\n"

Entry = dict[str, Any]


def records() -> list[Entry]:
    """Every record of a GPU, by its folder's name."""
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob(f"*/{RECORD}"))]
    return [record for record in found if not record["dry_run"]]


def render(measured: list[Entry]) -> str:
    """The page's text, for these records."""
    parts = [INTRODUCTION, *(_kernels(op, measured) for op in OPS if kernel_files(op))]
    parts += [_speeds(record) for record in measured] or [NO_SPEED]
    return "\n".join(parts)


def _kernels(op: str, measured: list[Entry]) -> str:
    budgets = json.loads(BUDGETS.read_text()).get(op, {})
    rows = [
        [f"`{file}`", tier, where]
        for backend, file in kernel_files(op).items()
        for tier, where in [*_tiers(op, backend, budgets.get(backend, {})), *_on_gpus(op, backend, measured)]
    ]
    return f"## `{op}`\n\n{_table(('kernels', 'tier', 'where'), rows)}"


def _tiers(op: str, backend: str, budgets: Entry) -> list[tuple[str, str]]:
    """The tiers that need no GPU, as far as their tests cover the op."""
    chips = list(dict.fromkeys(chip for by_chip in budgets.get("registers", {}).values() for chip in by_chip))
    gated = f"{', '.join(chips)}: `tests/build/test_{'aot' if backend == 'triton' else 'nvcc'}.py`"
    if backend == "triton":
        in_parity = op in OPS and "triton" in OPS[op].kernels
        found = [("3, in Triton's interpreter", "any CPU: `tests/ops/test_parity.py`")] * in_parity
        return found + [("4, compiled ahead of time", gated)] * bool(chips)
    emulated = "shared_memory" in budgets
    found = [("5, compiled by nvcc", gated)] * bool(chips)
    return found + [("5, run by the emulator", "any CPU: `tests/backends/test_simt.py`")] * emulated


def _on_gpus(op: str, backend: str, measured: list[Entry]) -> list[tuple[str, str]]:
    """Tier 6: a line a GPU, or that there is none."""
    lines = []
    for record in measured:
        steps = [step for step in record["steps"] if (step["op"], step["backend"]) == (op, backend)]
        if steps:
            same = record["machine"]["sources"].get(op, {}).get(backend) == digest(op, backend)
            age = "" if same else ", **before its last change**"
            lines.append(("6, on a GPU", f"{record['machine']['device']}{age}: {_summary(steps)}"))
    return lines or [("6, on a GPU", NOT_YET)]


def _summary(steps: list[Entry]) -> str:
    """``parity passed (fp32, bf16); stress FAILED``."""
    words = []
    for stage in dict.fromkeys(step["stage"] for step in steps):
        of_stage = [step for step in steps if step["stage"] == stage]
        for status in dict.fromkeys(step["status"] for step in of_stage):
            variants = ", ".join(filter(None, (step["variant"] for step in of_stage if step["status"] == status)))
            words.append(
                f"{stage} {status.upper() if status == 'failed' else status}" + f" ({variants})" * bool(variants)
            )
    return "; ".join(words)


def _speeds(record: Entry) -> str:
    facts = record["machine"]
    versions = facts["versions"]
    cold = [step["figures"] for step in record["steps"] if step["stage"] == "cold" and step["figures"]]
    product, copy = (max((figures[name] for figures in cold), default=0.0) for name in ("gemm_tflops", "copy_gb_s"))
    title = f"""\
## Speed on {facts["device"]}

Compute capability {facts["compute_capability"]}, driver {versions["driver"]}, torch {versions["torch"]}, \
triton {versions["triton"]}, nvcc {versions["nvcc"]}, revision {facts["revision"] or "not recorded"}. \
Best measured: matrix product {product:.0f} TFLOP/s, copy {copy:.0f} GB/s.
"""
    tables = [(SPEED, SPEED_HEADERS, speed_rows(record)), (LAUNCHED, LAUNCHED_HEADERS, launched_rows(record))]
    return "\n".join([title, *(f"{text}\n{_table(headers, rows)}" for text, headers, rows in tables if rows)])


def _table(headers: Iterable[str], rows: list[list[str]]) -> str:
    lines = [list(headers), ["---"] * len(list(headers)), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(records()))
