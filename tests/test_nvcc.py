"""What nvcc makes of the CUDA kernels for chips that need not be here: no spills, within budget, on tensor cores.

The gate compiles device code alone, one file for each direction of an op, type and chip, and keeps it by content
(tests/build_cache.py). The budgets are in tests/kernel_budgets.json, under each op's ``cuda``; those of shared memory
are checked by tests/test_simt.py, since only a launch tells it. A new op is picked up from
``build_native.CUDA_KERNELS``; it gets a section of budgets, and a line in ``HELPERS``.
"""

import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
HEADERS = TESTS.parent / "csrc" / "cuda"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import build_cache  # noqa: E402 (lies beside the tests)

import build_native  # noqa: E402 (lives beside setup.py, outside the package)

CUDA = build_native.find_cuda()
pytestmark = [
    pytest.mark.skipif(isinstance(CUDA, str), reason=f"the CUDA kernels cannot be compiled here: {CUDA}"),
    pytest.mark.xdist_group("nvcc"),
    pytest.mark.gate,
]

SOURCES = {}  # by op: a file for each direction
for source in build_native.CUDA_KERNELS:
    SOURCES.setdefault(Path(source).stem.removesuffix("_backward"), []).append(TESTS.parent / source)
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
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def layouts(op):
    """The names that an op's files give to ``Layout<...>`` and ``WeightLayout<T, ...>``, by its numbers."""
    text = "".join(path.read_text() for path in sorted(HEADERS.glob(f"{op}*")))
    return {numbers: name for name, numbers in re.findall(r"using (\w+) = \w*Layout<(?:T, )?([\d, ]+)>", text)}


LAYOUTS = {op: layouts(op) for op in SOURCES}


@functools.cache
def short_name(op, symbol):
    """``forward_kernel Wide64 bf16`` of a mangled name."""
    name = subprocess.run(["c++filt", symbol], text=True, capture_output=True, check=True).stdout
    name = name.replace("fast_prompt::cuda::", "").replace("(anonymous namespace)::", "")
    kernel, arguments = re.match(r"(?:void )?(?:\w+::)*(\w+)(.*)", name.strip()).groups()
    layout = re.search(r"Layout<(?:[a-z_]\w*, )?([\d, ]+)>", arguments)
    element = next(label for spelling, label in ELEMENTS.items() if re.search(rf"\b{spelling}\b", arguments))
    return " ".join([kernel, *([LAYOUTS[op][layout[1]]] if layout else []), element])


def compiled(source, element, chip):
    """The folder with ``kernels.cubin``, and in ``log`` what ptxas says of it."""
    flags = f"{build_native.CUDA_FLAGS} -cubin -arch={chip} -I{HEADERS} -DFAST_PROMPT_ELEMENT={element}".split()
    return build_cache.cached([CUDA.nvcc, *flags, str(source), "-o", "kernels.cubin"], [source], [HEADERS])


def in_parallel(function, *arguments):
    """Two at a time; one where another worker has tests to run."""
    with ThreadPoolExecutor(1 if "PYTEST_XDIST_WORKER" in os.environ else 2) as pool:
        return list(pool.map(function, *arguments))


@pytest.fixture(scope="module")
def objects():
    """By op: chip and folder of its compiled files."""
    chips = [chip for chip in CHIPS if chip.removeprefix("sm_") in CUDA.chips]
    found = {}
    for op, sources in SOURCES.items():
        tasks = list(itertools.product(sources, build_native.CUDA_ELEMENTS, chips))
        folders = in_parallel(lambda task: compiled(*task), tasks)
        found[op] = [(chip, folder) for (_, _, chip), folder in zip(tasks, folders, strict=True)]
    return found


@pytest.fixture(scope="module")
def usage(objects):
    """By op, chip and kernel: registers a thread, bytes of stack and spills."""
    found = {op: {chip: {} for chip in CHIPS} for op in objects}
    for op, chip, folder in ((op, *file) for op, files in objects.items() for file in files):
        for part in (folder / "log").read_text().split("ptxas info    : Compiling entry")[1:]:
            name = short_name(op, ENTRY.search("Compiling entry" + part)[1])
            spilled = sum(map(int, SPILLS.search(part).groups()))
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


def marked_lines(program, cubin):
    """Of a disassembly the lines that are counted, a hundredth of it."""
    script = f"{program} -sass {cubin} | grep -E 'Function :|HMMA|LDGSTS|LDSM|LDL|STL'"
    return (build_cache.cached(["bash", "-c", f"set -o pipefail; {script}"], [cubin]) / "log").read_text()


@pytest.fixture(scope="module")
def instructions(objects):
    """By op, chip and kernel: how often each kind of instruction stands in its machine code."""
    program = disassembler()
    if program is None:
        pytest.skip("no cuobjdump, neither nvcc's nor Triton's")
    found = {op: {chip: {} for chip in CHIPS} for op in objects}
    files = [(op, *file) for op, files in objects.items() for file in files]
    listings = in_parallel(lambda file: marked_lines(program, file[2] / "kernels.cubin"), files)
    for (op, chip, _), code in zip(files, listings, strict=True):
        for function, instruction in MARKS.findall(code):
            if function:
                counts = found[op][chip][short_name(op, function)] = dict.fromkeys(WATCHED, 0)
            else:
                for kind, pattern in WATCHED.items():
                    counts[kind] += bool(pattern.match(instruction))
    return found


MARKS = re.compile(r"Function : (\w+)|\b((?:HMMA|LDGSTS|LDSM|LDL|STL)\b[.\w]*)")
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
