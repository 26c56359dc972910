"""Builds csrc/cuda with a C++ compiler against the SIMT headers here: the kernels of the backend ``simt``."""

import itertools
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_cache
import torch

import build_native

ROOT = Path(__file__).parents[2]
SIMT = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cuda"
ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Several libraries are in one process: nothing of one may stand in for what is called the same in another.
FLAGS = "-std=c++17 -fPIC -fno-gnu-unique -fno-semantic-interposition"
LEVEL = "-O1"  # compiles in half the time of -O2, and runs about as fast
WARNINGS = "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-psabi"


# ---- Building, of what the cache does not have ----


def has_compiler():
    return shutil.which("c++") is not None


def sources_of(op):
    """The kernels' files, one for each direction: the forward first."""
    return sorted(SOURCES.glob(f"{op}*.cu"))


def build(op):
    """An op's library, with kernels of every element type."""
    kernels = itertools.product(sources_of(op), ELEMENTS.values())
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_kernels, *zip(*kernels, strict=True)))
    return link(objects)


def build_planted(op, file, right, wrong, element="bfloat16"):
    """The library of one element type with a bug: in ``file``, ``right``, which stands there once, made ``wrong``.

    A header that both directions include has it in the forward alone.
    """
    sources = sources_of(op)
    broken = next(source for source in sources if SOURCES / file in build_cache.closure([source], [SOURCES]))
    with tempfile.TemporaryDirectory() as folder:
        copies = Path(shutil.copytree(SOURCES.parent, folder, dirs_exist_ok=True)) / SOURCES.name
        text = (copies / file).read_text()
        assert text.count(right) == 1, f"{file}: found {text.count(right)} times: {right}"
        (copies / file).write_text(text.replace(right, wrong))
        planted = compile_kernels(copies / broken.name, element)
    # First: of what both directions have, the linker takes the first.
    return link([planted, *(compile_kernels(source, element) for source in sources if source != broken)])


def compile_kernels(source, element):
    return compile_file(source, source.parent, LEVEL, f"-DFAST_PROMPT_ELEMENT={element}", "-x", "c++")


def compile_file(source, sources, *flags):
    includes = [SIMT / "include", SIMT, sources]
    command = ["c++", *f"{FLAGS} {WARNINGS}".split(), *(f"-I{path}" for path in includes), *flags]
    command += ["-c", str(source), "-o", "object.o"]
    return build_cache.cached(command, [source], includes) / "object.o"


def build_binding():
    """The library that binds the emulated kernels to torch, of whatever op."""
    folder = Path(torch.__file__).parent
    headers = [f"-isystem{folder / path}" for path in ("include", "include/torch/csrc/api/include")]
    object_file = compile_file(SIMT / "bind.cpp", SOURCES.parent, "-O1", build_native.BINDING_FLAGS, *headers)
    command = ["c++", "-shared", str(object_file), f"-L{folder / 'lib'}", "-ltorch_cpu", "-o", "library.so"]
    return build_cache.cached(command, [object_file]) / "library.so"


def link(objects):
    inputs = [*objects, compile_file(SIMT / "simt.cpp", SOURCES, "-O3")]
    return build_cache.cached(["c++", "-shared", *map(str, inputs), "-o", "library.so"], inputs) / "library.so"
