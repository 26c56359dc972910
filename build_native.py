"""Compiles csrc/ into one library, fast_prompt/_native.so, with ninja; setup.py decides when.

Kernel files are compiled once per instruction set, with the compiler's flags for it; which one runs is decided
on the user's machine (csrc/cpu/isa.h). The library speaks PyTorch's stable ABI and holds no Python symbol, so
one build serves every Python and every torch from 2.11 on.

Where nvcc is, the CUDA kernels are compiled too, once per type of the activations, with machine code for each
chip of CUDA_CHIPS that this nvcc knows. They need no CUDA torch; where nvcc is not, the record says why they are
missing. The environment variable NVCC names another nvcc, as CXX names another C++ compiler.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import tempfile
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
KERNELS = ("csrc/cpu/prompt_diffusion.cpp", "csrc/cpu/prompt_compress.cpp", "csrc/cpu/skip_adapter.cpp")

CUDA_BINDINGS = ("csrc/bind_cuda.cpp",)
CUDA_KERNELS = tuple(
    f"csrc/cuda/{op}{direction}.cu"
    for op in ("prompt_diffusion", "prompt_compress", "skip_adapter")
    for direction in ("", "_backward")
)
CUDA_ELEMENTS = ("float32", "bfloat16", "float16")
CUDA_CHIPS = ("80", "90", "100")  # the newest one's PTX as well, which later chips compile for themselves
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Xptxas -v"


class BuildError(RuntimeError):
    """The library cannot be compiled here; the message says why."""


class Cuda(NamedTuple):
    """What compiles the CUDA kernels.

    Attributes:
        nvcc: its path.
        version: what it calls itself.
        chips: the chips there will be machine code for, e.g. ``("80", "90")``.
        library_flags: where the linker finds the CUDA runtime.
    """

    nvcc: str
    version: str
    chips: tuple[str, ...]
    library_flags: str


class Toolchain(NamedTuple):
    """What compiles the library.

    Attributes:
        compiler, ninja: paths of the programs.
        torch_dir, torch_version: the torch to compile against.
        cuda: what compiles the CUDA kernels, or why there will be none.
    """

    compiler: str
    ninja: str
    torch_dir: Path
    torch_version: str
    cuda: Cuda | str


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
    return Toolchain(compiler, ninja, Path(torch.__file__).parent, torch.__version__, find_cuda())


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


def find_cuda() -> Cuda | str:
    """What compiles the CUDA kernels here, or why they cannot be compiled."""
    named = os.environ.get("NVCC")
    nvcc = shutil.which(named or "nvcc") or (None if named else shutil.which("/usr/local/cuda/bin/nvcc"))
    if nvcc is None:
        return f"no nvcc: looked for {named or 'nvcc, /usr/local/cuda/bin/nvcc'}"
    known = _run(nvcc, "--list-gpu-code").stdout.split()
    chips = tuple(chip for chip in CUDA_CHIPS if f"sm_{chip}" in known)
    if not chips:
        return f"{nvcc} compiles for none of sm_{', sm_'.join(CUDA_CHIPS)}"
    with tempfile.TemporaryDirectory() as directory:
        probe = Path(directory) / "probe.cu"
        probe.write_text("#include <cuda_fp16.h>\n__global__ void probe() {}\n")
        done = _run(nvcc, "-c", str(probe), "-o", f"{directory}/probe.o")
        if done.returncode != 0:
            return f"{nvcc} compiles nothing here: {done.stderr.strip()[:500]}"
        plan = _run(nvcc, "--dryrun", str(probe)).stderr
    library_flags = next(line for line in plan.splitlines() if "LIBRARIES=" in line).split("=", 1)[1]
    return Cuda(nvcc, _run(nvcc, "--version").stdout.strip().splitlines()[-1], chips, library_flags.strip())


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, check=False)


def build(tools: Toolchain, directory: Path) -> None:
    """Compiles what has changed and puts the library and a record of its making into ``directory``."""
    run_ninja(tools)
    directory.mkdir(parents=True, exist_ok=True)
    # A process that has the old library loaded keeps its file: replace, never overwrite.
    fresh = directory / f".{LIBRARY}"
    shutil.copyfile(BUILD_DIR / LIBRARY, fresh)
    fresh.replace(directory / LIBRARY)
    record(directory, _describe(tools))


def run_ninja(tools: Toolchain, *targets: str) -> None:
    """Brings ``targets``, files in BUILD_DIR, up to date; all of them by default."""
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    (BUILD_DIR / "build.ninja").write_text(ninja_file(tools))
    done = _run(tools.ninja, "-C", str(BUILD_DIR), *targets)
    print(done.stdout, end="")
    if done.returncode != 0:
        raise BuildError(f"compilation failed:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")


def record(directory: Path, facts: dict[str, object]) -> None:
    """Writes what ``fast_prompt.backends.cpu.build_info`` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD).write_text(json.dumps(facts, indent=2) + "\n")


def record_absence(directory: Path, reason: str) -> None:
    """Records why there is no library, and removes one that an earlier build may have left."""
    record(directory, {"built": False, "reason": reason})
    (directory / LIBRARY).unlink(missing_ok=True)


def _describe(tools: Toolchain) -> dict[str, object]:
    if isinstance(tools.cuda, str):
        cuda: dict[str, object] = {"built": False, "reason": tools.cuda}
    else:
        cuda = {"built": True, "nvcc": tools.cuda.version, "chips": [f"sm_{chip}" for chip in tools.cuda.chips]}
    return {
        "built": True,
        "compiler": _run(tools.compiler, "--version").stdout.splitlines()[0],
        "flags": f"{COMMON_FLAGS} {KERNEL_FLAGS}",
        "instruction_sets": INSTRUCTION_SETS,
        "torch": tools.torch_version,
        "stable_abi": STABLE_ABI,
        "cuda": cuda,
    }


def ninja_file(tools: Toolchain) -> str:
    """The text of build.ninja: each binding once, each kernel once per instruction set or element type, one link."""
    include = tools.torch_dir / "include"
    cuda = None if isinstance(tools.cuda, str) else tools.cuda
    objects: list[str] = []
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {tools.compiler} {COMMON_FLAGS} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {tools.compiler} -shared $in -L{_escape(tools.torch_dir / 'lib')} "
        f"-Wl,--no-as-needed -ltorch -ltorch_cpu {_cuda_link_flags(cuda)} -o $out",
    ]

    def compile_file(source: str, target: str, flags: str) -> None:
        lines.extend([f"build {target}: compile {_escape(ROOT / source)}", f"  flags = {flags}"])
        objects.append(target)

    headers = f"-isystem {_escape(include)} -isystem {_escape(include / 'torch/csrc/api/include')}"
    for source in (*BINDINGS, *(CUDA_BINDINGS if cuda else ())):
        compile_file(source, f"{Path(source).stem}.o", f"{BINDING_FLAGS} {headers}")
    for source in KERNELS:
        for name, flags in INSTRUCTION_SETS.items():
            target = f"{Path(source).stem}.{name}.o"
            compile_file(source, target, f"{KERNEL_FLAGS} {flags} -DFAST_PROMPT_ISA={name}")
    if cuda:
        lines.extend(_cuda_rule(cuda))
        for source in CUDA_KERNELS:
            for element in CUDA_ELEMENTS:
                target = cuda_object(source, element)
                lines.extend([f"build {target}: compile_cuda {_escape(ROOT / source)}", f"  element = {element}"])
                objects.append(target)
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cuda_object(source: str, element: str) -> str:
    """The object of a CUDA kernel file for one type; what ptxas says of it is in the same name with ``.log`` added."""
    return f"{Path(source).stem}.cuda.{element}.o"


def _cuda_rule(cuda: Cuda) -> list[str]:
    code = [f"-gencode arch=compute_{chip},code=sm_{chip}" for chip in cuda.chips]
    code.append(f"-gencode arch=compute_{cuda.chips[-1]},code=compute_{cuda.chips[-1]}")
    return [
        "rule compile_cuda",
        f"  command = {cuda.nvcc} {CUDA_FLAGS} {' '.join(code)} -I{_escape(ROOT / 'csrc' / 'cuda')} "
        "-DFAST_PROMPT_ELEMENT=$element -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def _cuda_link_flags(cuda: Cuda | None) -> str:
    return f"{cuda.library_flags} -lcudart_static -lpthread -ldl -lrt" if cuda else ""


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
