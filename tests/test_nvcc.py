"""What nvcc makes of the CUDA kernels for chips that need not be here: no spills, within budget, on tensor cores.

The budgets are in tests/kernel_budgets.json, under each op's ``cuda``; those of shared memory are checked by
tests/test_simt.py, since only a launch tells it. A new op is picked up from ``build_native.CUDA_KERNELS``; it gets a
section of budgets, and a line in ``HELPERS``.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))
import build_native  # noqa: E402 (lives beside setup.py, outside the package)

CUDA = build_native.find_cuda()
pytestmark = [
    pytest.mark.skipif(isinstance(CUDA, str), reason=f"the CUDA kernels cannot be compiled here: {CUDA}"),
    pytest.mark.xdist_group("nvcc"),
]

SOURCES = {Path(source).stem: source for source in build_native.CUDA_KERNELS}  # by op
BUDGETS = json.loads((TESTS / "kernel_budgets.json").read_text())
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
CHIPS = [f"sm_{chip}" for chip in build_native.CUDA_CHIPS]
ELEMENTS = {"float": "fp32", "__nv_bfloat16": "bf16", "__half": "fp16"}
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def layouts(op):
    """The names that an op's source gives to ``Layout<...>`` and ``WeightLayout<T, ...>``, by its numbers."""
    text = (TESTS.parent / SOURCES[op]).read_text()
    return {numbers: name for name, numbers in re.findall(r"using (\w+) = \w*Layout<(?:T, )?([\d, ]+)>", text)}


LAYOUTS = {op: layouts(op) for op in SOURCES}


def short_name(op, symbol):
    """``forward_kernel Wide64 bf16`` of a mangled name."""
    name = subprocess.run(["c++filt", symbol], text=True, capture_output=True, check=True).stdout
    name = name.replace("fast_prompt::cuda::", "").replace("(anonymous namespace)::", "")
    kernel, arguments = re.match(r"(?:void )?(?:\w+::)*(\w+)(.*)", name.strip()).groups()
    layout = re.search(r"Layout<(?:[a-z_]\w*, )?([\d, ]+)>", arguments)
    element = next(label for spelling, label in ELEMENTS.items() if re.search(rf"\b{spelling}\b", arguments))
    return " ".join([kernel, *([LAYOUTS[op][layout[1]]] if layout else []), element])


@pytest.fixture(scope="module")
def objects():
    """By op: its compiled files, one an element type, brought up to date by the library's own build."""
    names = {
        op: [build_native.cuda_object(source, element) for element in build_native.CUDA_ELEMENTS]
        for op, source in SOURCES.items()
    }
    build_native.run_ninja(build_native.find_toolchain(), *(name for group in names.values() for name in group))
    return {op: [build_native.BUILD_DIR / name for name in group] for op, group in names.items()}


@pytest.fixture(scope="module")
def usage(objects):
    """By op, chip and kernel: registers a thread, bytes of stack and spills."""
    found = {op: {chip: {} for chip in CHIPS} for op in objects}
    for op, path in ((op, path) for op, paths in objects.items() for path in paths):
        log = path.with_name(path.name + ".log").read_text()
        for part in log.split("ptxas info    : Compiling entry")[1:]:
            symbol, chip = ENTRY.search("Compiling entry" + part).groups()
            spilled = sum(map(int, SPILLS.search(part).groups()))
            name = short_name(op, symbol)
            before = found[op][chip].get(name, {"registers": 0, "spilled": 0})  # a helper kernel is in several files
            found[op][chip][name] = {
                "registers": max(before["registers"], int(REGISTERS.search(part)[1])),
                "spilled": max(before["spilled"], spilled),
            }
    return found


def skip_unknown(chip):
    if chip.removeprefix("sm_") not in CUDA.chips:
        pytest.skip(f"{CUDA.nvcc} ({CUDA.version}) does not know {chip}")


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("op", SOURCES)
def test_nothing_spills(usage, op, chip):
    skip_unknown(chip)
    assert usage[op][chip]
    assert not {name: used for name, used in usage[op][chip].items() if used["spilled"]}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("op", SOURCES)
def test_registers_within_budget(usage, op, chip):
    skip_unknown(chip)
    registers = {name: used["registers"] for name, used in usage[op][chip].items()}
    budgets = BUDGETS[op]["cuda"]["registers"]
    assert registers.keys() == budgets.keys()
    assert not {name: count for name, count in registers.items() if count > budgets[name][chip]}


def disassembler():
    """nvcc's cuobjdump, or the one in Triton's package."""
    if path := shutil.which("cuobjdump"):
        return path
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(bundled) if bundled and bundled.exists() else None


@pytest.fixture(scope="module")
def instructions(objects):
    """By op, chip and kernel: how often each kind of instruction stands in its machine code."""
    program = disassembler()
    if program is None:
        pytest.skip("no cuobjdump, neither nvcc's nor Triton's")
    found = {op: {chip: {} for chip in CHIPS} for op in objects}
    files = [(op, path) for op, paths in objects.items() for path in paths]
    with ThreadPoolExecutor(2) as pool:
        listings = pool.map(lambda file: subprocess.check_output([program, "-sass", str(file[1])], text=True), files)
    for (op, _), code in zip(files, listings, strict=True):
        chip = counts = None
        for new_chip, function, instruction in MARKS.findall(code):
            if new_chip:
                chip = new_chip
            elif function:
                counts = found[op][chip][short_name(op, function)] = dict.fromkeys(WATCHED, 0)
            else:
                for kind, pattern in WATCHED.items():
                    counts[kind] += bool(pattern.match(instruction))
    return found


MARKS = re.compile(r"code for (sm_\d+)|Function : (\w+)|\b((?:HMMA|LDGSTS|LDSM|LDL|STL)\b[.\w]*)")
WATCHED = {
    "tensor cores": re.compile(r"HMMA\.(16816|1688)\.F32"),
    "16-byte async copies": re.compile(r"LDGSTS\.[.\w]*\b128"),
    "matrix loads": re.compile(r"LDSM\."),
    "local memory": re.compile(r"LDL|STL"),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("op", SOURCES)
def test_machine_code(instructions, op, chip):
    skip_unknown(chip)
    assert instructions[op][chip].keys() == BUDGETS[op]["cuda"]["registers"].keys()
    for name, counts in instructions[op][chip].items():
        if name.startswith(HELPERS[op]):
            continue
        assert counts["tensor cores"] > 0, name
        assert counts["16-byte async copies"] > 0, name
        assert counts["local memory"] == 0, name
        assert name.endswith("fp32") or counts["matrix loads"] > 0, name
