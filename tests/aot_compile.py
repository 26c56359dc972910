"""Compiles Triton kernels for chips that need not be here, and says what they use.

A program of its own, since tests run with ``TRITON_INTERPRET=1``: reads a JSON list of variants (``Variant``'s fields)
from stdin and writes one JSON object a line to stdout, in order.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from fast_prompt_kernels import prompt_diffusion as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COEFFICIENTS = ("prompt_coefficients", "key_coefficients", "coefficients")
FLOAT32 = ("log_scale", "scale_partials", "splits")
INTEGERS = ("rows", "rows_per_batch", "rows_per_split", "num_splits", "size", "d", "p", "pitch")
ALIGNED = ("d", "pitch", "size")  # multiples of 16, as in every model; strides too
OPTIONS = {"SOFTMAX": "softmax", "DROPOUT": "dropout", "SPLIT_KEYS": "wide_weights"}


class Variant(NamedTuple):
    """One kernel as one call would launch it; ``narrow`` with the few rows a tile that small inputs get."""

    kernel: str
    arch: str
    dtype: str
    p: int = 200
    softmax: bool = False
    dropout: bool = False
    wide_weights: bool = False
    narrow: bool = False


def launch(variant: Variant) -> tuple[dict, dict]:
    """The kernel's compile-time constants and launch options, from the launcher's own tables."""
    dtype, hip = DTYPES[variant.dtype], variant.arch.startswith("gfx")
    if variant.kernel in ("sum_splits_kernel", "round_weights_kernel"):
        return {"BLOCK": kernels._ELEMENTS}, {"num_warps": 4}
    if variant.kernel in ("forward_kernel", "coefficients_kernel"):
        tile, block_p = kernels.row_tile(variant.p, dtype), kernels.padded_prompts(variant.p)
        tile = kernels.narrow(tile) if variant.narrow else tile
    else:
        tile, block_p = kernels.product_tile(dtype), kernels.product_prompts(variant.p, dtype)
    blocks = {"BLOCK_M": tile.rows, "BLOCK_D": tile.width, "BLOCK_P": block_p}
    return blocks, kernels.launch_options(tile, hip)


def source(variant: Variant) -> tuple[ASTSource, dict]:
    kernel = getattr(kernels, variant.kernel)
    blocks, options = launch(variant)
    constants, signature, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name.isupper():
            value = getattr(variant, OPTIONS[name]) if name in OPTIONS else blocks.get(name, True)
            constants[name], signature[name] = value, "constexpr"
            continue
        signature[name] = argument_type(name, variant)
        if signature[name].startswith("*") or name in ALIGNED or "stride" in name:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def argument_type(name: str, variant: Variant) -> str:
    if name in INTEGERS or "stride" in name:
        return "i32"
    scalars = {"threshold": "u32", "keep_scale": "fp32", "seed": "*i64"}
    if name in scalars:
        return scalars[name]
    if name in FLOAT32 or (variant.kernel == "round_weights_kernel" and name in ("prompts", "keys")):
        return "*fp32"
    if name in COEFFICIENTS and kernels.coefficients_dtype(DTYPES[variant.dtype]) == torch.float32:
        return "*fp32"
    return f"*{variant.dtype}"


def compile_variant(variant: Variant) -> dict:
    """Registers a thread, spilled bytes (registers on AMD), bytes of shared memory, tensor-core instructions."""
    ast, options = source(variant)
    compiled = triton.compile(ast, target=TARGETS[variant.arch], options=options)
    measure = measure_amd if variant.arch.startswith("gfx") else measure_nvidia
    return {"shared": compiled.metadata.shared, **measure(compiled.asm)}


def measure_nvidia(asm: dict) -> dict:
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


def measure_amd(asm: dict) -> dict:
    text = asm["amdgcn"]
    registers, spilled = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
    instructions = ["mfma"] if "v_mfma" in text else []
    return {"registers": registers, "spilled": spilled, "instructions": instructions, "widest_copy": 16}


def describe(variant: Variant) -> str:
    try:
        return json.dumps(compile_variant(variant))
    except Exception as error:  # a kernel that does not compile is a result too
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})


if __name__ == "__main__":
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for line in pool.map(describe, [Variant(**fields) for fields in json.load(sys.stdin)]):
            print(line, flush=True)
