"""What nvcc makes of the CUDA kernels for chips that need not be here: no spills, within budget, on tensor cores.

The budgets are in tests/build/kernel_budgets.json, under each op's ``cuda``; those of shared memory are checked by
tests/backends/test_simt.py, since only a launch tells it. A unit that has not changed since it was recorded
(tests/build/nvcc_compile.py) is not compiled again, but for a sample. A new op gets a section of budgets, and a line in
``HELPERS``.
"""

import json
from pathlib import Path

import nvcc_compile
import pytest
from nvcc_compile import CHIPS, CUDA, UNITS

pytestmark = [
    pytest.mark.skipif(isinstance(CUDA, str), reason=f"the CUDA kernels cannot be compiled here: {CUDA}"),
    pytest.mark.skipif(nvcc_compile.disassembler() is None, reason="no cuobjdump, neither nvcc's nor Triton's"),
    pytest.mark.gate,
]

OPS = list(dict.fromkeys(unit.op for unit in UNITS))
BUDGETS = json.loads(Path(__file__).with_name("kernel_budgets.json").read_text())
# By op: kernels that multiply nothing, and so need no tensor cores.
HELPERS = {
    "prompt_diffusion": ("reduce_kernel", "round_weights_kernel"),
    "prompt_compress": ("combine_kernel", "moments_kernel", "sum_splits_kernel", "units_kernel"),
    "skip_adapter": (
        "down_gradient_kernel",
        "expert_dots_kernel",
        "round_parameters_kernel",
        "scale_gradient_kernel",
        "sum_parts_kernel",
        "up_gradient_kernel",
        "vector_gradient_kernel",
        "weighted_sums_kernel",
    ),
}
REFRESH = "run `python tests/build/nvcc_compile.py`"


@pytest.fixture(scope="module")
def results():
    """What each unit's kernels use, from the record or the compiler."""
    return nvcc_compile.results(nvcc_compile.known(UNITS))


@pytest.fixture(params=CHIPS)
def chip(request):
    if request.param.removeprefix("sm_") not in CUDA.chips:
        pytest.skip(f"{CUDA.nvcc} ({CUDA.version}) does not know {request.param}")
    return request.param


@pytest.fixture
def kernels(results, op, chip):
    """(name, what it uses) of each kernel of an op on a chip; a helper kernel that is in several files comes again."""
    files = [used for unit, used in results.items() if (unit.op, unit.chip) == (op, chip)]
    return [each for file in files for each in file.items()]


def test_the_record_is_up_to_date():
    """Else every run would compile anew what has changed."""
    record = json.loads(nvcc_compile.RECORD.read_text())
    if record["nvcc"] != nvcc_compile.version():
        pytest.skip("recorded with another nvcc than the one here: all is compiled")
    assert {label: unit["digest"] for label, unit in record["units"].items()} == {
        unit.label: nvcc_compile.digest(unit) for unit in UNITS
    }, REFRESH


def test_the_record_is_what_the_compiler_says(results):
    for unit, used in nvcc_compile.measured(nvcc_compile.known(nvcc_compile.sample())).items():
        assert results[unit] == used, unit


@pytest.mark.parametrize("op", OPS)
def test_nothing_spills(kernels):
    assert kernels
    assert not [(name, used) for name, used in kernels if used["spilled"]]


@pytest.mark.parametrize("op", OPS)
def test_registers_within_budget(kernels, op, chip):
    budgets = BUDGETS[op]["cuda"]["registers"]
    assert {name for name, _ in kernels} == budgets.keys()
    assert not [(name, used) for name, used in kernels if used["registers"] > budgets[name][chip]]


@pytest.mark.parametrize("op", OPS)
def test_machine_code(kernels, op):
    for name, used in kernels:
        assert used["local_memory"] == 0, name
        if not name.startswith(HELPERS[op]):
            assert used["tensor_cores"] > 0, name
            assert used["async_copies"] > 0, name
            assert name.endswith("fp32") or used["matrix_loads"] > 0, name
