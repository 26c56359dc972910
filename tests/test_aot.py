"""Every Triton kernel compiled ahead of time for chips that need not be here: no spills, within tests/aot_budgets.json.

The launcher's own tables give tiles and warps. Each tile stands here with the options that need most registers,
softmax with dropout and float32 weights; at the default p the plain case and the narrow tile as well.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent
BUDGETS = json.loads((TESTS / "aot_budgets.json").read_text())
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
ROW_KERNELS = ("forward_kernel", "coefficients_kernel")
PRODUCT_KERNELS = ("source_gradient_kernel", "weight_gradient_kernel")
OTHER_KERNELS = ("sum_splits_kernel", "round_weights_kernel")
HARDEST = {"softmax": True, "dropout": True}


def variants():
    for arch in ARCHS:
        for kernel in ROW_KERNELS:
            for p in (16, 64, 200, 1024):
                yield {"kernel": kernel, "arch": arch, "dtype": "bf16", "p": p, "wide_weights": True, **HARDEST}
            yield {"kernel": kernel, "arch": arch, "dtype": "bf16"}
            yield {"kernel": kernel, "arch": arch, "dtype": "fp32", **HARDEST}
        for kernel in PRODUCT_KERNELS:
            for dtype in ("bf16", "fp16", "fp32"):
                yield {"kernel": kernel, "arch": arch, "dtype": dtype}
        for kernel in OTHER_KERNELS:
            yield {"kernel": kernel, "arch": arch, "dtype": "bf16"}
    for arch in ("sm_90", "gfx942"):  # what is left of the tables, on one chip of each kind
        for kernel in ROW_KERNELS:
            yield {"kernel": kernel, "arch": arch, "dtype": "bf16", "narrow": True, "wide_weights": True, **HARDEST}
            yield {"kernel": kernel, "arch": arch, "dtype": "fp16", "wide_weights": True, **HARDEST}
            for p in (128, 512):
                yield {"kernel": kernel, "arch": arch, "dtype": "bf16", "p": p, "wide_weights": True, **HARDEST}
            for p in (64, 512):
                yield {"kernel": kernel, "arch": arch, "dtype": "fp32", "p": p, **HARDEST}
    for kernel in ROW_KERNELS:
        yield {"kernel": kernel, "arch": "sm_90", "dtype": "fp32", "p": 1024, **HARDEST}


VARIANTS = list(variants())


def label(variant):
    words = [variant["arch"], variant["kernel"], variant["dtype"], f"p={variant.get('p', 200)}"]
    return " ".join(words + [name for name, value in variant.items() if value is True])


@pytest.fixture(scope="module")
def compiled():
    """What each variant uses, by label; from another process, where Triton compiles and does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, TESTS / "aot_compile.py"]
    process = subprocess.run(
        command, input=json.dumps(VARIANTS), capture_output=True, text=True, env=environment, check=False
    )
    assert process.returncode == 0, process.stderr
    results = [json.loads(line) for line in process.stdout.splitlines()]
    return {label(variant): result for variant, result in zip(VARIANTS, results, strict=True)}


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_within_budget(compiled, variant):
    used = compiled[label(variant)]
    assert "error" not in used, used
    assert used["spilled"] == 0
    assert used["shared"] <= BUDGETS["shared_memory"][variant["arch"]]
    budget = BUDGETS["registers"][f"{variant['kernel']} {variant['dtype']} p={variant.get('p', 200)}"]
    assert used["registers"] <= budget[variant["arch"]]
    assert used["widest_copy"] == 16  # bytes: the launcher's alignment reached the loads


MULTIPLYING = [v for v in VARIANTS if v["kernel"] not in OTHER_KERNELS and v["dtype"] != "fp32"]


@pytest.mark.parametrize("variant", MULTIPLYING, ids=label)
def test_tensor_cores(compiled, variant):
    """The chip's newest kind wherever a tile has its 64 rows, one kind or another everywhere."""
    instructions = compiled[label(variant)]["instructions"]
    assert instructions
    newest = {"sm_80": "mma.sync", "sm_90": "wgmma.mma", "sm_100": "tcgen05.mma", "gfx942": "mfma"}
    if variant.get("p", 200) in (64, 200) and not variant.get("narrow"):
        assert newest[variant["arch"]] in instructions
