"""Compiles the CUDA kernels for chips that need not be here, and says what nvcc makes of each.

Device code alone, one file for each direction of an op, type and chip: a unit. What came out is recorded in
tests/build/cuda_usage.json beside a digest of all that it follows from (sources, headers, flags, nvcc's version), so that
only what has changed is compiled again:

    python tests/build/nvcc_compile.py     brings the record up to date

A new op is picked up from ``build_native.CUDA_KERNELS``.
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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("cuda_usage.json")
HEADERS = ROOT / "csrc" / "cuda"
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]
import build_cache  # noqa: E402 (lies beside the tests)

import build_native  # noqa: E402 (lives beside setup.py, outside the package)

CUDA = build_native.find_cuda()
CHIPS = [f"sm_{chip}" for chip in build_native.CUDA_CHIPS]
ELEMENTS = {"float": "fp32", "__nv_bfloat16": "bf16", "__half": "fp16"}
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
MARKS = re.compile(r"Function : (\w+)|\b((?:HMMA|LDGSTS|LDSM|LDL|STL)\b[.\w]*)")
WATCHED = {
    "tensor_cores": re.compile(r"HMMA\.(16816|1688)\.F32"),
    "async_copies": re.compile(r"LDGSTS\.[.\w]*\b128"),  # of 16 bytes
    "matrix_loads": re.compile(r"LDSM\."),
    "local_memory": re.compile(r"LDL|STL"),
}


class Unit(NamedTuple):
    """One compilation: a file of ``csrc/cuda``, the type of the activations, the chip."""

    source: str
    element: str
    chip: str

    @property
    def op(self):
        return Path(self.source).stem.removesuffix("_backward")

    @property
    def label(self):
        return f"{Path(self.source).stem} {self.element} {self.chip}"


UNITS = [Unit(*each) for each in itertools.product(build_native.CUDA_KERNELS, build_native.CUDA_ELEMENTS, CHIPS)]


def sample():
    """A third of the units: every file for each chip and with each type once."""
    places = itertools.product(*(range(len(each)) for each in (build_native.CUDA_KERNELS, ELEMENTS, CHIPS)))
    return [unit for unit, place in zip(UNITS, places, strict=True) if sum(place) % 3 == 0]


def known(units):
    """Those for chips that this nvcc knows."""
    return [unit for unit in units if unit.chip.removeprefix("sm_") in CUDA.chips]


def _compilation(unit):
    """As ``build_cache`` takes it."""
    source = ROOT / unit.source
    flags = f"{build_native.CUDA_FLAGS} -cubin -arch={unit.chip} -I{HEADERS} -DFAST_PROMPT_ELEMENT={unit.element}"
    return [CUDA.nvcc, *flags.split(), str(source), "-o", "kernels.cubin"], [source], [HEADERS]


def digest(unit):
    """A digest of all that a unit's measurements follow from."""
    return build_cache.key(*_compilation(unit))[:16]


def measure(unit):
    """By kernel: registers a thread, bytes of stack and spills, and how often each kind of instruction stands in it."""
    folder = build_cache.cached(*_compilation(unit))
    counts = _instructions(unit.op, folder / "kernels.cubin")
    usage = _resources(unit.op, (folder / "log").read_text())
    return {name: usage[name] | counts[name] for name in sorted(usage)}


def _resources(op, log):
    found = {}
    for part in log.split("ptxas info    : Compiling entry")[1:]:
        name = short_name(op, ENTRY.search("Compiling entry" + part)[1])
        spilled = sum(map(int, SPILLS.search(part).groups()))
        found[name] = {"registers": int(REGISTERS.search(part)[1]), "spilled": spilled}
    return found


def _instructions(op, cubin):
    found = {}
    for function, instruction in MARKS.findall(_marked_lines(cubin)):
        if function:
            counts = found[short_name(op, function)] = dict.fromkeys(WATCHED, 0)
        else:
            for kind, pattern in WATCHED.items():
                counts[kind] += bool(pattern.match(instruction))
    return found


def _marked_lines(cubin):
    """The lines of a disassembly that are counted, a hundredth of it."""
    script = f"{disassembler()} -sass {cubin} | grep -E 'Function :|HMMA|LDGSTS|LDSM|LDL|STL'"
    return (build_cache.cached(["bash", "-c", f"set -o pipefail; {script}"], [cubin]) / "log").read_text()


def disassembler():
    """nvcc's cuobjdump, or the one in Triton's package; None where there is neither."""
    if path := shutil.which("cuobjdump"):
        return path
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(bundled) if bundled and bundled.exists() else None


@functools.cache
def short_name(op, symbol):
    """``forward_kernel Wide64 bf16`` of a mangled name."""
    name = subprocess.run(["c++filt", symbol], text=True, capture_output=True, check=True).stdout
    name = name.replace("fast_prompt::cuda::", "").replace("(anonymous namespace)::", "")
    kernel, arguments = re.match(r"(?:void )?(?:\w+::)*(\w+)(.*)", name.strip()).groups()
    layout = re.search(r"Layout<(?:[a-z_]\w*, )?([\d, ]+)>", arguments)
    element = next(label for spelling, label in ELEMENTS.items() if re.search(rf"\b{spelling}\b", arguments))
    return " ".join([kernel, *([_layouts(op)[layout[1]]] if layout else []), element])


@functools.cache
def _layouts(op):
    """The names that an op's files give to ``Layout<...>`` and ``WeightLayout<T, ...>``, by its numbers."""
    text = "".join(path.read_text() for path in sorted(HEADERS.glob(f"{op}*")))
    return {numbers: name for name, numbers in re.findall(r"using (\w+) = \w*Layout<(?:T, )?([\d, ]+)>", text)}


def measured(units: Iterable[Unit]):
    """By unit what ``measure`` says; two at a time, one where another worker has tests to run."""
    units = list(units)
    with ThreadPoolExecutor(1 if "PYTEST_XDIST_WORKER" in os.environ else 2) as pool:
        return dict(zip(units, pool.map(measure, units), strict=True))


def recorded():
    """By digest, what a unit's kernels used when it was last compiled."""
    entries = json.loads(RECORD.read_text())["units"].values() if RECORD.exists() else ()
    return {entry["digest"]: entry["kernels"] for entry in entries}


def results(units):
    """By unit, from the record or, where that is of other sources or another nvcc, from the compiler."""
    keys, record = {unit: digest(unit) for unit in units}, recorded()
    fresh = measured(unit for unit, key in keys.items() if key not in record)
    return {unit: fresh[unit] if unit in fresh else record[key] for unit, key in keys.items()}


def version():
    """What nvcc calls itself."""
    return subprocess.run([CUDA.nvcc, "--version"], text=True, capture_output=True, check=True).stdout


def write_record():
    """One line a kernel."""
    lines = [
        f'"{unit.label}": {{"digest": "{digest(unit)}", "kernels": {{\n'
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(used)}" for name, used in kernels.items())
        + "\n}}"
        for unit, kernels in results(UNITS).items()
    ]
    RECORD.write_text(f'{{"nvcc": {json.dumps(version())}, "units": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    if isinstance(CUDA, str):
        raise SystemExit(CUDA)
    write_record()
