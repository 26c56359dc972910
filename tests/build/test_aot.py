"""Every Triton kernel compiled ahead of time for chips that need not be here: no spills, within budget.

The budgets are in tests/build/kernel_budgets.json, under each op's ``triton``; what is compiled is in tests/build/aot_<op>.py. A
case that has not changed since it was recorded (tests/build/aot_compile.py) is not compiled again, but for a sample.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import aot_compile  # noqa: E402 (imports triton)
from aot_compile import label  # noqa: E402
from build_cache import root  # noqa: E402

pytestmark = pytest.mark.gate

TESTS = Path(__file__).parent
BUDGETS = json.loads((TESTS / "kernel_budgets.json").read_text())
CASES = aot_compile.cases()
CHIPS_NEWEST = {"sm_80": "mma.sync", "sm_90": "wgmma.mma", "sm_100": "tcgen05.mma", "gfx942": "mfma"}

REFRESH = "run `PYTHONPATH=.:kernels python tests/build/aot_compile.py --record`"


def run(*arguments):
    """What the program says of each case; in another process, where Triton compiles and does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(root() / "triton")
    command = [sys.executable, TESTS / "aot_compile.py", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled():
    """What each case uses, by label."""
    return {label(case): result for case, result in zip(CASES, run(), strict=True)}


def test_the_record_is_up_to_date():
    """Else every run would compile anew what has changed."""
    record, installed = json.loads(aot_compile.RECORD.read_text()), aot_compile.triton.__version__
    if record["triton"] != installed:
        pytest.skip(f"recorded with triton {record['triton']}, here is {installed}: all is compiled")
    current = {label(case): aot_compile.digest(*case) for case in CASES}
    assert {name: entry["digest"] for name, entry in record["cases"].items()} == current, REFRESH


def test_the_record_is_what_the_compiler_says(compiled):
    sample = [compiled[label(case)] for case in CASES[aot_compile.SAMPLE]]
    assert run("--sample") == sample


@pytest.mark.parametrize("case", CASES, ids=label)
def test_within_budget(compiled, case):
    op, variant = case
    used, budgets = compiled[label(case)], BUDGETS[op]["triton"]
    assert "error" not in used, used
    assert used["spilled"] == 0
    assert used["shared"] <= budgets["shared_memory"][variant.arch]
    assert used["registers"] <= budgets["registers"][variant.budget][variant.arch]
    assert used["widest_copy"] == 16  # bytes: the launcher's alignment reached the loads


MULTIPLYING = [(op, variant) for op, variant in CASES if variant.multiplies and variant.dtype != "fp32"]


@pytest.mark.parametrize("case", MULTIPLYING, ids=label)
def test_tensor_cores(compiled, case):
    """The chip's newest kind wherever a tile has its 64 rows, one kind or another everywhere."""
    _, variant = case
    instructions = compiled[label(case)]["instructions"]
    assert instructions
    if variant.fills_a_tile:
        assert CHIPS_NEWEST[variant.arch] in instructions


@pytest.mark.parametrize("op", aot_compile.MODULES)
def test_no_budget_is_left_over(op):
    """Every number in the file is held against a kernel."""
    compiled = {(variant.budget, variant.arch) for case_op, variant in CASES if case_op == op}
    registers = BUDGETS[op]["triton"]["registers"]
    assert {(name, arch) for name, by_chip in registers.items() for arch in by_chip} == compiled
