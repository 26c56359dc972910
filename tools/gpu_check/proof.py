"""The steps that say whether the kernels are right: build, parity, sanitizer."""

import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch

from fast_prompt import parity
from fast_prompt.backends import use_backend
from fast_prompt.bench import OPS as BENCHMARKS
from fast_prompt.ops.declaration import OPS
from fast_prompt.parity import DTYPES, evaluate
from gpu_check.outcome import AbsentError, Figures, StepError
from gpu_check.place import ROOT, Place, environment_of_a_process

SMALL_CASES = 7  # of the parity suite's: the first are the plain sizes
SMALL_BATCH = 16  # samples that fill a chip's multiprocessors with the tiles of large inputs
ERRORS_FOUND = 9  # the sanitizer's exit code for them
# Not what CUDA calls return: torch tries some that may fail, and our launches check theirs.
SANITIZER_OPTIONS = ("--report-api-errors", "no", "--error-exitcode", str(ERRORS_FOUND))


def build(place: Place, figures: Figures) -> None:
    """Compiles the library against this torch, for this chip alone; a dry run only plans it."""
    builder = _builder()
    tools = builder.find_toolchain()
    if place.dry:
        with tempfile.TemporaryDirectory() as directory, patch.object(builder, "BUILD_DIR", Path(directory)):
            builder.run_ninja(tools, "-n")
            figures.save(planned=(Path(directory) / "build.ninja").read_text().count("\nbuild "))
        return
    major, minor = torch.cuda.get_device_capability(place.device)
    tools = builder.narrow(tools, [10 * major + minor])
    if isinstance(tools.cuda, str):
        raise StepError(f"no CUDA kernels can be compiled: {tools.cuda}")
    builder.build(tools, ROOT / "fast_prompt")
    figures.save(chips=tools.cuda.chips, nvcc=tools.cuda.version, compiler=tools.compiler)


def _builder() -> ModuleType:
    """build_native.py of the checkout."""
    if not (ROOT / "build_native.py").exists():
        raise AbsentError("this is an installed package, not a checkout: there is nothing to build")
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("build_native")


def parity_suite(place: Place, figures: Figures, op: str, backend: str, dtype: str) -> None:
    """Every case of the parity suite: strides, dropout, empty inputs, each gradient."""
    report = parity.run([op], [backend], [dtype])
    figures.save(
        comparisons=len(report.rows),
        largest_error=max((row.error / row.tolerance for row in report.rows if row.ok), default=0.0),
        refused=list(report.refused.values()),
        raised=list(report.raised.values()),
        failures=[dataclasses.asdict(row) | {"error": str(row.error)} for row in report.failures],
    )
    if report.failures or report.refused:
        raise StepError("\n".join([*report.refused.values(), *report.raised.values(), *map(str, report.failures)][:20]))


def sanitizer(place: Place, figures: Figures, op: str, backend: str, tool: str) -> None:
    """compute-sanitizer over forwards and backwards on small inputs; a dry run makes the same calls without it."""
    command = [sys.executable, "-m", "gpu_check.proof", op, backend, "dry" if place.dry else "gpu"]
    if not place.dry:
        command = [_sanitizer(), "--tool", tool, *SANITIZER_OPTIONS, *command]
    # Each tensor an allocation of its own: past its end is then past what is allocated.
    environment = environment_of_a_process() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, text=True, capture_output=True, check=False, env=environment)
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", done.stdout + done.stderr)
    figures.save(summary=summary, tool=None if place.dry else tool)
    if done.returncode != 0 or (not place.dry and not summary):
        raise StepError(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def _sanitizer() -> str:
    nvcc = shutil.which("nvcc")
    beside = str(Path(nvcc).resolve().parent) if nvcc else ""
    path = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join((beside, "/usr/local/cuda/bin"))
    )
    if path is None:
        raise AbsentError("there is no compute-sanitizer on this machine")
    return path


def small_calls(place: Place, op: str, backend: str) -> int:
    """The first parity cases in every dtype, then the tiles of large inputs; returns how many results were wrong."""
    cases = [case.name for case in parity.cases_of(op).CASES[:SMALL_CASES]]
    report = parity.run([op], [backend], place.dtypes, cases)
    with use_backend(backend):
        for shape in place.samples(op, SMALL_BATCH):
            problem = BENCHMARKS[op].problem(shape, DTYPES["bf16"], place.device)
            evaluate(OPS[op].api, problem)
    if not place.dry:
        torch.cuda.synchronize()
    return len(report.failures) + len(report.refused)


if __name__ == "__main__":
    from gpu_check.place import DRY, GPU

    sys.exit(min(1, small_calls({"dry": DRY, "gpu": GPU}[sys.argv[3]], *sys.argv[1:3])))
