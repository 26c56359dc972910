"""Compiles csrc/ into one library, fast_prompt/_native.so, with ninja; setup.py decides when.

Kernel files are compiled once per instruction set, with the compiler's flags for it; which one runs is decided
on the user's machine (csrc/cpu/isa.h). The library speaks PyTorch's stable ABI and holds no Python symbol, so
one build serves every Python and every torch from 2.11 on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
BUILD_DIR = ROOT / "build" / "native"
LIBRARY = "_native.so"
RECORD = "_build.json"

STABLE_ABI = "2.11"
COMMON_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
BINDING_FLAGS = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
# GCC's own intrinsics headers leave a register undefined on purpose, and GCC warns of it.
KERNEL_FLAGS = "-ffp-contract=fast -fno-exceptions -fno-rtti -Wno-uninitialized"
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
INSTRUCTION_SETS = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}

BINDINGS = ("csrc/bind.cpp", "csrc/cpu/isa.cpp")
KERNELS = ("csrc/cpu/prompt_diffusion.cpp",)


class BuildError(RuntimeError):
    """The library cannot be compiled here; the message says why."""


class Toolchain(NamedTuple):
    """What compiles the library: paths of the compiler and of ninja, and the torch to compile against."""

    compiler: str
    ninja: str
    torch_dir: Path
    torch_version: str


def find_toolchain() -> Toolchain:
    """The tools on this machine; raises BuildError that names the first one missing."""
    try:
        import torch  # noqa: PLC0415 (may be absent: that is what is being found out)
    except ImportError as error:
        raise BuildError(
            f"torch could not be imported at build time ({error}); install it, then pip install --no-build-isolation"
        ) from error
    compiler = _find_compiler()
    ninja = _find_ninja()
    if platform.system() != "Linux":
        raise BuildError(f"the native library is built on Linux only, not on {platform.system()}")
    return Toolchain(compiler, ninja, Path(torch.__file__).parent, torch.__version__)


def _find_compiler() -> str:
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler: looked for {named or 'c++, g++, clang++'}")


def _find_ninja() -> str:
    if path := shutil.which("ninja"):
        return path
    if importlib.util.find_spec("ninja"):
        import ninja  # noqa: PLC0415 (optional)

        return str(Path(ninja.BIN_DIR) / "ninja")
    raise BuildError("no ninja: pip install ninja")


def build(tools: Toolchain, directory: Path) -> None:
    """Compiles what has changed and puts the library and a record of its making into ``directory``."""
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    (BUILD_DIR / "build.ninja").write_text(ninja_file(tools))
    done = subprocess.run([tools.ninja, "-C", str(BUILD_DIR)], text=True, capture_output=True, check=False)
    print(done.stdout, end="")
    if done.returncode != 0:
        raise BuildError(f"compilation failed:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
    directory.mkdir(parents=True, exist_ok=True)
    # A process that has the old library loaded keeps its file: replace, never overwrite.
    fresh = directory / f".{LIBRARY}"
    shutil.copyfile(BUILD_DIR / LIBRARY, fresh)
    fresh.replace(directory / LIBRARY)
    record(directory, _describe(tools))


def record(directory: Path, facts: dict[str, object]) -> None:
    """Writes what ``fast_prompt.backends.cpu.build_info`` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD).write_text(json.dumps(facts, indent=2) + "\n")


def record_absence(directory: Path, reason: str) -> None:
    """Records why there is no library, and removes one that an earlier build may have left."""
    record(directory, {"built": False, "reason": reason})
    (directory / LIBRARY).unlink(missing_ok=True)


def _describe(tools: Toolchain) -> dict[str, object]:
    version = subprocess.run([tools.compiler, "--version"], text=True, capture_output=True, check=True).stdout
    return {
        "built": True,
        "compiler": version.splitlines()[0],
        "flags": f"{COMMON_FLAGS} {KERNEL_FLAGS}",
        "instruction_sets": INSTRUCTION_SETS,
        "torch": tools.torch_version,
        "stable_abi": STABLE_ABI,
    }


def ninja_file(tools: Toolchain) -> str:
    """The text of build.ninja: each binding once, each kernel once per instruction set, one link."""
    include = tools.torch_dir / "include"
    objects: list[str] = []
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {tools.compiler} {COMMON_FLAGS} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {tools.compiler} -shared $in -L{_escape(tools.torch_dir / 'lib')} "
        "-Wl,--no-as-needed -ltorch -ltorch_cpu -o $out",
    ]

    def compile_file(source: str, target: str, flags: str) -> None:
        lines.extend([f"build {target}: compile {_escape(ROOT / source)}", f"  flags = {flags}"])
        objects.append(target)

    headers = f"-isystem {_escape(include)} -isystem {_escape(include / 'torch/csrc/api/include')}"
    for source in BINDINGS:
        compile_file(source, f"{Path(source).stem}.o", f"{BINDING_FLAGS} {headers}")
    for source in KERNELS:
        for name, flags in INSTRUCTION_SETS.items():
            target = f"{Path(source).stem}.{name}.o"
            compile_file(source, target, f"{KERNEL_FLAGS} {flags} -DFAST_PROMPT_ISA={name}")
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
