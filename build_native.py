"""Compiles csrc/ into one library with ninja: ``python build_native.py`` for the checkout, setup.py for pip.

Kernel files are compiled once per instruction set, with the compiler's flags for it; which one runs is decided
on the user's machine (csrc/cpu/isa.h). The library speaks PyTorch's stable ABI and holds no Python symbol, so
one build serves every Python and every torch from 2.11 on.

The CUDA kernels are compiled once per type of the activations, with machine code for several chips. They need no
CUDA torch to compile; where there are none, the record says why. ccache runs the compilers where it is installed.
What the environment says:

    FAST_PROMPT_BUILD       auto (the default) compiles where torch, a C++ compiler and ninja are, and otherwise leaves
                            pure Python and says what is missing; 1 fails instead; 0 does not try
    FAST_PROMPT_CUDA        auto (the default) compiles the CUDA kernels where torch has CUDA and nvcc is; on compiles
                            them for any torch, and fails without nvcc; off never does
    FAST_PROMPT_CUDA_ARCHS  the chips to compile them for, e.g. 80;90, or all; by default those of this machine, and
                            all for a wheel or where no GPU is to be seen
    CXX, NVCC               another C++ compiler, another nvcc
"""

from __future__ import annotations

import filecmp
import importlib.util
import io
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
BUILD_DIR = ROOT / "build" / "native"
PACKAGE = "fast_prompt"
LIBRARY = "_native.so"
RECORD = "_build.json"

SETTINGS = {"FAST_PROMPT_BUILD": ("auto", "0", "1"), "FAST_PROMPT_CUDA": ("auto", "on", "off")}
ARCHS = "FAST_PROMPT_CUDA_ARCHS"

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

BINDINGS = ("csrc/bind/cpu.cpp", "csrc/cpu/isa.cpp")
KERNELS = ("csrc/cpu/prompt_diffusion.cpp", "csrc/cpu/prompt_compress.cpp", "csrc/cpu/skip_adapter.cpp")

CUDA_BINDINGS = ("csrc/bind/cuda.cpp",)
CUDA_KERNELS = tuple(
    f"csrc/cuda/{op}{direction}.cu"
    for op in ("prompt_diffusion", "prompt_compress", "skip_adapter")
    for direction in ("", "_backward")
)
CUDA_ELEMENTS = ("float32", "bfloat16", "float16")
CUDA_CHIPS = ("80", "90", "100")  # oldest first
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Xptxas -v"


class BuildError(RuntimeError):
    """The library cannot be compiled here; the message says why."""


class Cuda(NamedTuple):
    """What compiles the CUDA kernels.

    Attributes:
        nvcc: its path.
        version: what it calls itself.
        chips: the chips there will be machine code for, e.g. ``("80", "90")``, oldest first.
        library_flags: where the linker finds the CUDA runtime.
    """

    nvcc: str
    version: str
    chips: tuple[str, ...]
    library_flags: str


class Torch(NamedTuple):
    """The torch to compile against.

    Attributes:
        directory, version: where it is, and which.
        cuda: the version of CUDA it was built with, or None.
    """

    directory: Path
    version: str
    cuda: str | None


class Toolchain(NamedTuple):
    """What compiles the library.

    Attributes:
        compiler, ninja: paths of the programs.
        torch_dir, torch_version: the torch to compile against.
        cuda: what compiles the CUDA kernels, or why there will be none.
        launcher: the path of ccache, which runs the compilers; empty where it is not installed.
    """

    compiler: str
    ninja: str
    torch_dir: Path
    torch_version: str
    cuda: Cuda | str
    launcher: str = ""


def main() -> None:
    """Brings the checkout's own library up to date, for this machine."""
    carry_out(plan(), ROOT / PACKAGE, for_this_machine=True)


# ---- What is to be built, as the environment has it ----


def setting(name: str) -> str:
    """What the environment says of one of SETTINGS; ends the program where that is none of its values."""
    value = os.environ.get(name, "auto")
    if value not in SETTINGS[name]:
        raise SystemExit(f"{name}: expected {', '.join(SETTINGS[name])}; got {value!r}")
    return value


def asked_chips() -> tuple[str, ...]:
    """The chips that FAST_PROMPT_CUDA_ARCHS names; all of CUDA_CHIPS where it names none."""
    value = os.environ.get(ARCHS, "")
    chips = CUDA_CHIPS if value in ("", "all") else re.split("[;, ]+", value)
    if not set(chips) <= set(CUDA_CHIPS):
        raise SystemExit(f"{ARCHS}: expected all, or some of {';'.join(CUDA_CHIPS)}; got {value!r}")
    return tuple(chip for chip in CUDA_CHIPS if chip in chips)


def plan() -> Toolchain | str:
    """What to build with, or why there will be no library."""
    if setting("FAST_PROMPT_BUILD") == "0":
        return "FAST_PROMPT_BUILD=0 when it was built"
    try:
        return _with_what_was_asked(find_toolchain(choose_cuda()))
    except BuildError as error:
        return give_up(error)


def carry_out(planned: Toolchain | str, directory: Path, for_this_machine: bool) -> None:
    """Puts the library and its record into ``directory``, or a record of why there is none.

    Args:
        planned: by ``plan``.
        for_this_machine: no chips but those that are here, unless FAST_PROMPT_CUDA_ARCHS names them.
    """
    if isinstance(planned, str):
        record_absence(directory, planned)
        return
    try:
        if for_this_machine and not os.environ.get(ARCHS):
            planned = _with_what_was_asked(narrow(planned, visible_gpus()))
        build(planned, directory)
    except BuildError as error:
        record_absence(directory, give_up(error))


def give_up(error: BuildError) -> str:
    """Ends the program if the library was asked for; else says that there will be none."""
    for name, demand in (("FAST_PROMPT_BUILD", "1"), ("FAST_PROMPT_CUDA", "on")):
        if setting(name) == demand:
            raise SystemExit(f"{name}={demand}: {error}")
    print(f"fast-prompt: going on without the native library: {error}", file=sys.stderr)
    return str(error)


def choose_cuda() -> Cuda | str:
    """What compiles the CUDA kernels, or why nothing does."""
    mode, chips, torch = setting("FAST_PROMPT_CUDA"), asked_chips(), find_torch()
    if mode == "off":
        return "FAST_PROMPT_CUDA=off when it was built"
    if mode == "auto" and torch.cuda is None:
        return f"torch {torch.version} has no CUDA (FAST_PROMPT_CUDA=on compiles the kernels all the same)"
    return find_cuda(chips)


def _with_what_was_asked(tools: Toolchain) -> Toolchain:
    if isinstance(tools.cuda, str) and setting("FAST_PROMPT_CUDA") == "on":
        raise BuildError(tools.cuda)
    return tools


def narrow(tools: Toolchain, gpus: Iterable[int]) -> Toolchain:
    """The same tools, for these GPUs alone, by compute capability (86 for 8.6); unchanged where there are none.

    A GPU runs code for an older chip of its own generation, and compiles the newest chip's PTX for itself.
    """
    if isinstance(tools.cuda, str) or not (gpus := sorted(set(gpus))):
        return tools
    fitting = {max((chip for chip in tools.cuda.chips if int(chip) <= gpu), key=int, default="") for gpu in gpus}
    chips = tuple(chip for chip in tools.cuda.chips if chip in fitting)
    if not chips:
        return tools._replace(cuda=f"there are kernels for {_names(tools.cuda.chips)}, not for {_names(gpus)}")
    return tools._replace(cuda=tools.cuda._replace(chips=chips))


def _names(chips: Iterable[object]) -> str:
    return ", ".join(f"sm_{chip}" for chip in chips)


# ---- What there is to build with ----


def find_toolchain(cuda: Cuda | str | None = None) -> Toolchain:
    """The tools on this machine; raises BuildError that names the first one missing.

    Args:
        cuda: what compiles the CUDA kernels, or why nothing does; by default what ``find_cuda`` finds.
    """
    torch = find_torch()
    compiler = _find_compiler()
    ninja = _find_ninja()
    if platform.system() != "Linux":
        raise BuildError(f"the native library is built on Linux only, not on {platform.system()}")
    cuda = find_cuda() if cuda is None else cuda
    return Toolchain(compiler, ninja, torch.directory, torch.version, cuda, shutil.which("ccache") or "")


def find_torch() -> Torch:
    """The installed torch. It is not imported: that would take longer than a build that has nothing to do."""
    spec = importlib.util.find_spec("torch")
    versions = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if versions is None or not versions.exists():
        raise BuildError("there is no torch at build time; install it, then pip install --no-build-isolation")
    facts = runpy.run_path(str(versions))
    return Torch(versions.parent, str(facts["__version__"]), facts.get("cuda"))


def _find_compiler() -> str:
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler: looked for {named or 'c++, g++, clang++'}")


def _find_ninja() -> str:
    """The package's own program before any other: one of another version would compile everything again."""
    try:
        import ninja.ninja_syntax  # noqa: PLC0415 (may be absent: that is what is being found out)
    except ImportError as error:
        raise BuildError(
            f"no Python package ninja ({error}): pip install ninja; a program of that name alone will not do, "
            "since the package also writes the build file"
        ) from error
    if path := shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja"):
        return path
    raise BuildError("the Python package ninja has no program beside it: pip install --force-reinstall ninja")


def visible_gpus() -> list[int]:
    """The compute capabilities of this machine's GPUs, 86 for 8.6, as the driver tells them without torch."""
    if (smi := shutil.which("nvidia-smi")) is None:
        return []
    told = _run(smi, "--query-gpu=compute_cap", "--format=csv,noheader").stdout
    return [10 * int(major) + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", told, re.MULTILINE)]


def find_cuda(wanted: tuple[str, ...] = CUDA_CHIPS) -> Cuda | str:
    """What compiles the CUDA kernels here, for those of the wanted chips that nvcc knows, or why nothing does."""
    named = os.environ.get("NVCC")
    nvcc = shutil.which(named or "nvcc") or (None if named else shutil.which("/usr/local/cuda/bin/nvcc"))
    if nvcc is None:
        return f"no nvcc: looked for {named or 'nvcc, /usr/local/cuda/bin/nvcc'}"
    known = _run(nvcc, "--list-gpu-code").stdout.split()
    chips = tuple(chip for chip in wanted if f"sm_{chip}" in known)
    if not chips:
        return f"{nvcc} compiles for none of {_names(wanted)}"
    with tempfile.TemporaryDirectory() as directory:
        probe = Path(directory) / "probe.cu"
        probe.write_text("#include <cuda_fp16.h>\n__global__ void probe() {}\n")
        done = _run(nvcc, "-c", str(probe), "-o", f"{directory}/probe.o")
        if done.returncode != 0:
            return f"{nvcc} compiles nothing here: {done.stderr.strip()[:500]}"
        plan = _run(nvcc, "--dryrun", str(probe)).stderr
    library_flags = next(line for line in plan.splitlines() if "LIBRARIES=" in line).split("=", 1)[1]
    return Cuda(nvcc, _run(nvcc, "--version").stdout.strip().splitlines()[-1], chips, library_flags.strip())


# ---- Building ----


def build(tools: Toolchain, directory: Path) -> None:
    """Compiles what has changed and puts the library and a record of its making into ``directory``."""
    run_ninja(tools)
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / LIBRARY
    if not (library.exists() and filecmp.cmp(BUILD_DIR / LIBRARY, library, shallow=False)):
        # A process that has the old library loaded keeps its file: replace, never overwrite.
        fresh = directory / f".{LIBRARY}"
        shutil.copyfile(BUILD_DIR / LIBRARY, fresh)
        fresh.replace(library)
    record(directory, _describe(tools))
    print(f"{LIBRARY}: CUDA kernels: {_names(tools.cuda.chips) if isinstance(tools.cuda, Cuda) else tools.cuda}")


def run_ninja(tools: Toolchain, *targets: str) -> None:
    """Brings ``targets``, files in BUILD_DIR, up to date, all of them by default; what ninja says is seen at once."""
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    (BUILD_DIR / "build.ninja").write_text(ninja_file(tools))
    said = []
    command = [tools.ninja, *targets]
    # Not the jobs of a make above: their pipes are not handed down, and ninja counts the cores itself.
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    with subprocess.Popen(
        command, cwd=BUILD_DIR, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    if process.returncode != 0:
        raise BuildError(f"compilation failed:\n{''.join(said)[-4000:]}")


def record(directory: Path, facts: dict[str, object]) -> None:
    """Writes what ``fast_prompt.backends.native.build_info`` reads."""
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
        "ccache": bool(tools.launcher),
        "flags": f"{COMMON_FLAGS} {KERNEL_FLAGS}",
        "instruction_sets": INSTRUCTION_SETS,
        "torch": tools.torch_version,
        "stable_abi": STABLE_ABI,
        "cuda": cuda,
    }


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, check=False)


# ---- The text of build.ninja ----


class Object(NamedTuple):
    """One object file: its name, what it is made of, by which rule, and the rule's variables."""

    name: str
    source: str
    rule: str
    variables: dict[str, str]


def ninja_file(tools: Toolchain) -> str:
    """The text of build.ninja: each object by the rule for it, and one link."""
    from ninja.ninja_syntax import Writer, escape  # noqa: PLC0415 (absent where nothing is compiled)

    text = io.StringIO()
    writer = Writer(text)
    writer.variable("ninja_required_version", "1.5")
    for name, command in _compile_commands(tools).items():
        writer.rule(name, command, description="compile $out", depfile="$out.d", deps="gcc")
    writer.rule("link", _link_command(tools), description="link $out")
    objects = _objects(tools)
    for name, source, rule, variables in objects:
        writer.build(name, rule, escape(_from_build_dir(source)), variables=variables)
    writer.build(LIBRARY, "link", [each.name for each in objects])
    return text.getvalue()


def _objects(tools: Toolchain) -> list[Object]:
    """Each binding once, each kernel once per instruction set or type of the activations."""
    include = tools.torch_dir / "include"
    headers = f"-isystem {_word(include)} -isystem {_word(include / 'torch/csrc/api/include')}"
    has_cuda = isinstance(tools.cuda, Cuda)
    bindings = [
        Object(f"{Path(source).stem}.o", source, "compile", {"flags": f"{BINDING_FLAGS} {headers}"})
        for source in (*BINDINGS, *(CUDA_BINDINGS if has_cuda else ()))
    ]
    kernels = [
        Object(f"{Path(source).stem}.{name}.o", source, "compile", {"flags": _kernel_flags(name)})
        for source in KERNELS
        for name in INSTRUCTION_SETS
    ]
    cuda_kernels = [
        Object(cuda_object(source, element), source, "compile_cuda", {"element": element})
        for source in CUDA_KERNELS
        for element in CUDA_ELEMENTS
    ]
    return bindings + kernels + (cuda_kernels if has_cuda else [])


def _kernel_flags(instruction_set: str) -> str:
    return f"{KERNEL_FLAGS} {INSTRUCTION_SETS[instruction_set]} -DFAST_PROMPT_ISA={instruction_set}"


def cuda_object(source: str, element: str) -> str:
    """The object of a CUDA kernel file for one type; what ptxas says of it is in the same name with ``.log`` added."""
    return f"{Path(source).stem}.cuda.{element}.o"


def _compile_commands(tools: Toolchain) -> dict[str, str]:
    """By rule; each leaves the headers it read in ``$out.d``."""
    launcher = f"{_word(tools.launcher)} " if tools.launcher else ""
    compile_this = "-MD -MF $out.d -c $in -o $out"
    commands = {"compile": f"{launcher}{_word(tools.compiler)} {COMMON_FLAGS} $flags {compile_this}"}
    if isinstance(tools.cuda, Cuda):
        flags = f"{CUDA_FLAGS} {_chip_flags(tools.cuda.chips)} -I{_word(_from_build_dir('csrc/cuda'))}"
        command = f"{_word(tools.cuda.nvcc)} {flags} -DFAST_PROMPT_ELEMENT=$element {compile_this}"
        commands["compile_cuda"] = f"{launcher}{command} > $out.log 2>&1 || (cat $out.log; false)"
    return commands


def _chip_flags(chips: tuple[str, ...]) -> str:
    """Machine code for each chip, and the newest one's PTX, which later chips compile for themselves."""
    code = [(chip, f"sm_{chip}") for chip in chips] + [(chips[-1], f"compute_{chips[-1]}")]
    return " ".join(f"-gencode arch=compute_{chip},code={target}" for chip, target in code)


def _link_command(tools: Toolchain) -> str:
    runtime = f"{tools.cuda.library_flags} -lcudart_static -lpthread -ldl -lrt" if isinstance(tools.cuda, Cuda) else ""
    torch = f"-L{_word(tools.torch_dir / 'lib')} -Wl,--no-as-needed -ltorch -ltorch_cpu"
    return f"{_word(tools.compiler)} -shared $in {torch} {runtime} -o $out"


def _from_build_dir(path: str) -> str:
    """A path in the checkout; relative, so that ccache knows the same file of another checkout."""
    return os.path.relpath(ROOT / path, BUILD_DIR)


def _word(path: Path | str) -> str:
    """A path as the shell that ninja starts must read it."""
    return shlex.quote(str(path)).replace("$", "$$")


if __name__ == "__main__":
    main()
