"""Compiles every op's Triton kernels for chips that need not be here, and says what they use.

A program of its own, since tests run with ``TRITON_INTERPRET=1``. What came out is recorded in
tests/build/kernel_usage.json beside a digest of all that it follows from, so that only what has changed is compiled again:

    python tests/build/aot_compile.py             writes one JSON object a line to stdout, for each of ``cases()`` in order
    python tests/build/aot_compile.py --sample    the same of every eleventh, recorded or not: is the record true?
    python tests/build/aot_compile.py --record    brings the record up to date

A new op gets a line in ``MODULES`` and a module like the one there, with:

    kernels                         the module of fast_prompt_kernels
    variants()                      what to compile; each has kernel, arch, dtype, budget, multiplies, fills_a_tile
    launch(variant)                 constants of compile time, launch options
    argument_type(name, variant)    in Triton's spelling, such as "*bf16"
    is_aligned(name, variant)       whether that argument is a multiple of 16
"""

import ast
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = {
    "prompt_diffusion": "aot_prompt_diffusion",
    "prompt_compress": "aot_prompt_compress",
    "skip_adapter": "aot_skip_adapter",
}

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
RECORD = Path(__file__).with_name("kernel_usage.json")
KERNELS = Path(__file__).parents[2] / "kernels" / "fast_prompt_kernels"
SAMPLE = slice(None, None, 11)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cases():
    """Every (op, variant)."""
    return [(op, variant) for op in MODULES for variant in module_of(op).variants()]


def module_of(op):
    return importlib.import_module(MODULES[op])


def launch_of(op, variant):
    """The kernel's signature, constants and attributes as Triton takes them, and the launch options."""
    module = module_of(op)
    names = getattr(module.kernels, variant.kernel).arg_names
    constants, options = module.launch(variant)
    constants = {name: constants[name] for name in names if name.isupper()}
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        signature[name] = "constexpr" if name in constants else module.argument_type(name, variant)
        if name not in constants and module.is_aligned(name, variant):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def digest(op, variant):
    """A digest of all that a result follows from."""
    facts = (triton.__version__, code_of(op), variant.kernel, variant.arch, *launch_of(op, variant))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@functools.cache
def code_of(op):
    """The op's kernels and what all ops share, without comments."""
    files = [*sorted(KERNELS.glob(f"{op}*.py")), KERNELS / "tiles.py"]
    return [ast.unparse(ast.parse(file.read_text())) for file in files]


def compile_case(op, variant):
    """Registers a thread, spilled bytes (registers on AMD), bytes of shared memory, tensor-core instructions."""
    signature, constants, attributes, options = launch_of(op, variant)
    kernel = getattr(module_of(op).kernels, variant.kernel)
    tree = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(tree, target=TARGETS[variant.arch], options=options)
    measure = measure_amd if variant.arch.startswith("gfx") else measure_nvidia
    return {"shared": compiled.metadata.shared, **measure(compiled.asm)}


def measure_nvidia(asm):
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    instructions = [name for name in ("mma.sync", "wgmma.mma", "tcgen05.mma") if name in asm["ptx"]]
    copies = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+)", asm["ptx"])]
    widest = max(copies, default=16)
    return {"registers": registers, "spilled": stack + local, "instructions": instructions, "widest_copy": widest}


def measure_amd(asm):
    text = asm["amdgcn"]
    registers, spilled = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
    instructions = ["mfma"] if "v_mfma" in text else []
    return {"registers": registers, "spilled": spilled, "instructions": instructions, "widest_copy": 16}


def describe(case):
    try:
        return compile_case(*case)
    except Exception as error:  # a kernel that does not compile is a result too
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def recorded():
    """What each case used when it was last compiled, by its digest."""
    entries = json.loads(RECORD.read_text())["cases"].values() if RECORD.exists() else ()
    return {entry["digest"]: {key: value for key, value in entry.items() if key != "digest"} for entry in entries}


def results(chosen, known):
    """The results of these cases, from what is known or from the compiler."""
    keys = [digest(*case) for case in chosen]
    missing = [case for key, case in zip(keys, chosen, strict=True) if key not in known]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        compiled = pool.map(describe, missing)
        return [known[key] if key in known else next(compiled) for key in keys]


def words(variant):
    """A variant's ``__str__``: chip, budget, and the names of the flags that are set."""
    flags = [name for name, value in variant._asdict().items() if value is True]
    return " ".join([variant.arch, variant.budget, *flags])


def label(case):
    op, variant = case
    return f"{op} {variant}"


def write_record():
    """One line a case."""
    found = zip(cases(), results(cases(), recorded()), strict=True)
    lines = [f"{json.dumps(label(case))}: {json.dumps({'digest': digest(*case), **used})}" for case, used in found]
    version = json.dumps(triton.__version__)
    RECORD.write_text(f'{{"triton": {version}, "cases": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        write_record()
    else:
        sample = sys.argv[1:] == ["--sample"]
        for result in results(cases()[SAMPLE], {}) if sample else results(cases(), recorded()):
            print(json.dumps(result))
