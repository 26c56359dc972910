"""The Triton kernels of ``prompt_compress``, as tests/build/aot_compile.py compiles them.

The launcher's own tables give tiles and warps. The passes over the tokens stand here with every option that costs
registers, at widths on both sides of what fits a chip; at the paper's size the plain case as well.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from aot_compile import ARCHS, DTYPES, words
from fast_prompt_kernels import prompt_compress, prompt_compress_backward

kernels = SimpleNamespace(**(vars(prompt_compress) | vars(prompt_compress_backward)))

TOKEN_KERNELS = ("attend_kernel", "score_gradient_kernel")
PRODUCT_KERNELS = ("expand_kernel", "output_kernel", "query_gradient_kernel", "weight_gradient_kernel")
SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
STORED = ("u", "dy", "visual", "tensor", "expanded", "output")
COEFFICIENTS = ("token_weights", "score_gradients")
WEIGHTS = ("weight", "bias", "bias_gradient")
SCALARS = {"threshold": "u32", "keep_scale": "fp32", "factor": "fp32", "seed": "*i64", "mask": "*u8"}
LONG = ("all_rows", "all_queries")
INTEGERS = ("queries", "heads", "head_dim", "d", "rows", "tokens", "tokens_per_split", "row_blocks", "token_blocks")
HEAD_DIM = 64


class Variant(NamedTuple):
    """One kernel as one call would launch it; ``hard`` with every option, ``kept`` with kept probabilities.

    ``narrow`` with the small tile of few queries.
    """

    kernel: str
    arch: str
    dtype: str
    width: int = 768
    rows: int = 12
    hard: bool = False
    kept: bool = False
    wide_weights: bool = False
    narrow: bool = False

    __str__ = words

    @property
    def budget(self):
        """Its name in tests/build/kernel_budgets.json."""
        return f"{self.kernel} {self.dtype} d={self.width} rows={self.rows}"

    @property
    def multiplies(self):
        return True

    @property
    def fills_a_tile(self):
        """The 64 rows that each chip's newest tensor cores ask for; a pass over tokens has the few of a sample."""
        return False


def variants():
    for arch in (*ARCHS, "sm_86"):
        for kernel in TOKEN_KERNELS:
            yield Variant(kernel, arch, "bf16")
            yield Variant(kernel, arch, "bf16", hard=True)
            yield Variant(kernel, arch, "fp32", hard=True)
            for width, rows in ((1024, 12), (768, 96), (2048, 12)):
                yield Variant(kernel, arch, "bf16", width, rows, hard=True)
    for arch in ARCHS:
        yield Variant("score_gradient_kernel", arch, "bf16", hard=True, kept=True)
        yield Variant("score_gradient_kernel", arch, "fp16", hard=True)
        yield Variant("visual_gradient_kernel", arch, "bf16")
        yield Variant("visual_gradient_kernel", arch, "fp32")
        for kernel in PRODUCT_KERNELS:
            yield Variant(kernel, arch, "bf16", hard=True, wide_weights=True)
            yield Variant(kernel, arch, "bf16", hard=True, narrow=True)
            yield Variant(kernel, arch, "fp32", hard=True)


def launch(variant):
    """The kernel's compile-time constants and launch options, from the launcher's own tables."""
    names = getattr(kernels, variant.kernel).arg_names
    constants = dict.fromkeys((name for name in names if name.isupper()), variant.hard)
    dtype, hip = DTYPES[variant.dtype], variant.arch.startswith("gfx")
    if variant.kernel in TOKEN_KERNELS:
        forward = variant.kernel == "attend_kernel"
        constants |= {} if forward else {"KEPT": variant.kept}
        operands = 1 if forward or variant.kept else 2
        memory = SHARED_MEMORY[variant.arch]
        tile = kernels.token_tile(variant.width, variant.rows, dtype, operands, constants["MASKED"], memory)
        return constants | tile.constants(), kernels.launch_options(tile, hip)
    if variant.kernel == "visual_gradient_kernel":
        tile = kernels.visual_tile(dtype)
        return {"BLOCK_T": tile.rows, "BLOCK_D": tile.width, "BLOCK_R": kernels._ROWS}, kernels.launch_options(
            tile, hip
        )
    tile = kernels.product_tile(64 if variant.narrow else 10**4, 12, HEAD_DIM, dtype, 132)
    if variant.kernel == "output_kernel":
        tile = kernels.NARROW_TILE
    blocks = kernels.product_blocks(tile, HEAD_DIM, variant.width, torch.float32 if variant.wide_weights else dtype)
    blocks["BLOCK_K"] = blocks["BLOCK_E"]
    return constants | blocks, kernels.launch_options(tile, hip)


def argument_type(name, variant):
    """In Triton's spelling."""
    if name in LONG:
        return "i64"
    if name in INTEGERS or name == "num_splits" or "stride" in name:
        return "i32"
    if name in SCALARS:
        return SCALARS[name]
    if name in COEFFICIENTS:
        wide = kernels.coefficients_dtype(DTYPES[variant.dtype]) == torch.float32
        return "*fp32" if wide else f"*{variant.dtype}"
    if name in WEIGHTS or (name == "gradient" and variant.kernel == "weight_gradient_kernel"):
        return "*fp32" if variant.wide_weights else f"*{variant.dtype}"
    return f"*{variant.dtype}" if name in STORED or name == "gradient" else "*fp32"


def is_aligned(name, variant):
    """Whether a launch finds the argument to be a multiple of 16: widths and strides are, as in every model."""
    return argument_type(name, variant).startswith("*") or name in ("d", "head_dim") or "_stride" in name
