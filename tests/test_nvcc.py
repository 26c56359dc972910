"""What nvcc makes of the CUDA kernels for chips that need not be here: no spills, within budget, on tensor cores.

The budgets are in tests/nvcc_budgets.json; those of shared memory are checked by tests/test_simt.py, since only a
launch tells it.
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

BUDGETS = json.loads((TESTS / "nvcc_budgets.json").read_text())
CHIPS = [f"sm_{chip}" for chip in build_native.CUDA_CHIPS]
ELEMENTS = {"float": "fp32", "__nv_bfloat16": "bf16", "__half": "fp16"}
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def layouts():
    """The names that the kernels' source gives to ``Layout<...>`` and ``WeightLayout<T, ...>``, by its numbers."""
    text = "".join((TESTS.parent / source).read_text() for source in build_native.CUDA_KERNELS)
    return {numbers: name for name, numbers in re.findall(r"using (\w+) = \w*Layout<(?:T, )?([\d, ]+)>", text)}


LAYOUTS = layouts()


def short_name(symbol):
    """``forward_kernel Wide64 bf16`` of a mangled name."""
    name = subprocess.run(["c++filt", symbol], text=True, capture_output=True, check=True).stdout
    name = name.replace("fast_prompt::cuda::", "").replace("(anonymous namespace)::", "")
    kernel, arguments = re.match(r"(?:void )?(?:\w+::)*(\w+)(.*)", name.strip()).groups()
    layout = re.search(r"Layout<(?:[a-z_]\w*, )?([\d, ]+)>", arguments)
    element = next(label for spelling, label in ELEMENTS.items() if re.search(rf"\b{spelling}\b", arguments))
    return " ".join([kernel, *([LAYOUTS[layout[1]]] if layout else []), element])


@pytest.fixture(scope="module")
def objects():
    """The compiled kernel files, brought up to date by the library's own build."""
    names = [
        build_native.cuda_object(source, element)
        for source in build_native.CUDA_KERNELS
        for element in build_native.CUDA_ELEMENTS
    ]
    build_native.run_ninja(build_native.find_toolchain(), *names)
    return [build_native.BUILD_DIR / name for name in names]


@pytest.fixture(scope="module")
def usage(objects):
    """By chip and kernel: registers a thread, bytes of stack and spills."""
    found = {chip: {} for chip in CHIPS}
    for path in objects:
        log = path.with_name(path.name + ".log").read_text()
        for part in log.split("ptxas info    : Compiling entry")[1:]:
            symbol, chip = ENTRY.search("Compiling entry" + part).groups()
            spilled = sum(map(int, SPILLS.search(part).groups()))
            name = short_name(symbol)
            before = found[chip].get(name, {"registers": 0, "spilled": 0})  # a helper kernel is in several files
            found[chip][name] = {
                "registers": max(before["registers"], int(REGISTERS.search(part)[1])),
                "spilled": max(before["spilled"], spilled),
            }
    return found


def skip_unknown(chip):
    if chip.removeprefix("sm_") not in CUDA.chips:
        pytest.skip(f"{CUDA.nvcc} ({CUDA.version}) does not know {chip}")


@pytest.mark.parametrize("chip", CHIPS)
def test_nothing_spills(usage, chip):
    skip_unknown(chip)
    assert usage[chip]
    assert not {name: used for name, used in usage[chip].items() if used["spilled"]}


@pytest.mark.parametrize("chip", CHIPS)
def test_registers_within_budget(usage, chip):
    skip_unknown(chip)
    registers = {name: used["registers"] for name, used in usage[chip].items()}
    assert registers.keys() == BUDGETS["registers"].keys()
    over = {name: count for name, count in registers.items() if count > BUDGETS["registers"][name][chip]}
    assert not over


def disassembler():
    """nvcc's cuobjdump, or the one in Triton's package."""
    if path := shutil.which("cuobjdump"):
        return path
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(bundled) if bundled and bundled.exists() else None


@pytest.fixture(scope="module")
def instructions(objects):
    """By chip and kernel: how often each kind of instruction stands in its machine code."""
    program = disassembler()
    if program is None:
        pytest.skip("no cuobjdump, neither nvcc's nor Triton's")
    found = {chip: {} for chip in CHIPS}
    with ThreadPoolExecutor(2) as pool:
        listings = pool.map(lambda path: subprocess.check_output([program, "-sass", str(path)], text=True), objects)
    for code in listings:
        chip = counts = None
        for new_chip, function, instruction in MARKS.findall(code):
            if new_chip:
                chip = new_chip
            elif function:
                counts = found[chip][short_name(function)] = dict.fromkeys(WATCHED, 0)
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
HELPERS = ("reduce_kernel", "round_weights_kernel")


@pytest.mark.parametrize("chip", CHIPS)
def test_machine_code(instructions, chip):
    skip_unknown(chip)
    products = {name: counts for name, counts in instructions[chip].items() if not name.startswith(HELPERS)}
    assert len(products) == 3 * 14  # fewer would mean that this looks at nothing
    for name, counts in products.items():
        assert counts["tensor cores"] > 0, name
        assert counts["16-byte async copies"] > 0, name
        assert counts["local memory"] == 0, name
        assert name.endswith("fp32") or counts["matrix loads"] > 0, name
