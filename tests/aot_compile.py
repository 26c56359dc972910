"""Compiles every op's Triton kernels for chips that need not be here, and says what they use.

A program of its own, since tests run with ``TRITON_INTERPRET=1``: writes one JSON object a line to stdout, for
each of ``cases()`` in order. A new op gets a line in ``MODULES`` and a module like the one there, with:

    kernels                         the module of fast_prompt_kernels
    variants()                      what to compile; each has kernel, arch, dtype, budget, multiplies, fills_a_tile
    launch(variant)                 constants of compile time, launch options
    argument_type(name, variant)    in Triton's spelling, such as "*bf16"
    is_aligned(name, variant)       whether that argument is a multiple of 16
"""

import importlib
import json
import os
import re
import subprocess
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
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cases():
    """Every (op, variant)."""
    return [(op, variant) for op in MODULES for variant in module_of(op).variants()]


def module_of(op):
    return importlib.import_module(MODULES[op])


def source(op, variant):
    module = module_of(op)
    kernel = getattr(module.kernels, variant.kernel)
    constants, options = module.launch(variant)
    constants = {name: constants[name] for name in kernel.arg_names if name.isupper()}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else module.argument_type(name, variant)
        if name not in constants and module.is_aligned(name, variant):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def compile_case(op, variant):
    """Registers a thread, spilled bytes (registers on AMD), bytes of shared memory, tensor-core instructions."""
    ast, options = source(op, variant)
    compiled = triton.compile(ast, target=TARGETS[variant.arch], options=options)
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
        return json.dumps(compile_case(*case))
    except Exception as error:  # a kernel that does not compile is a result too
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})


if __name__ == "__main__":
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for line in pool.map(describe, cases()):
            print(line, flush=True)
