"""The Triton kernels of ``prompt_diffusion``, as tests/build/aot_compile.py compiles them.

The launcher's own tables give tiles and warps. Each tile stands here with the options that need most registers,
softmax with dropout and float32 weights; at the default p the plain case and the narrow tile as well.
"""

from typing import NamedTuple

import torch
from aot_compile import ARCHS, DTYPES, words
from fast_prompt_kernels import prompt_diffusion as kernels

ROW_KERNELS = ("forward_kernel", "coefficients_kernel")
PRODUCT_KERNELS = ("source_gradient_kernel", "weight_gradient_kernel")
OTHER_KERNELS = ("sum_splits_kernel", "round_weights_kernel")
COEFFICIENTS = ("prompt_coefficients", "key_coefficients", "coefficients")
FLOAT32 = ("log_scale", "scale_partials", "splits")
INTEGERS = ("rows", "rows_per_batch", "rows_per_split", "num_splits", "size", "d", "p", "pitch")
SCALARS = {"threshold": "u32", "keep_scale": "fp32", "seed": "*i64"}
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

    __str__ = words

    @property
    def budget(self):
        """Its name in tests/build/kernel_budgets.json."""
        return f"{self.kernel} {self.dtype} p={self.p}"

    @property
    def multiplies(self):
        return self.kernel not in OTHER_KERNELS

    @property
    def fills_a_tile(self):
        """The 64 rows that each chip's newest tensor cores ask for."""
        return self.p in (64, 200) and not self.narrow


def variants():
    hardest = {"softmax": True, "dropout": True}
    for arch in ARCHS:
        for kernel in ROW_KERNELS:
            for p in (16, 64, 200, 1024):
                yield Variant(kernel, arch, "bf16", p, wide_weights=True, **hardest)
            yield Variant(kernel, arch, "bf16")
            yield Variant(kernel, arch, "fp32", **hardest)
        for kernel in PRODUCT_KERNELS:
            for dtype in DTYPES:
                yield Variant(kernel, arch, dtype)
        for kernel in OTHER_KERNELS:
            yield Variant(kernel, arch, "bf16")
    for arch in ("sm_90", "gfx942"):  # what is left of the tables, on one chip of each kind
        for kernel in ROW_KERNELS:
            yield Variant(kernel, arch, "bf16", narrow=True, wide_weights=True, **hardest)
            yield Variant(kernel, arch, "fp16", wide_weights=True, **hardest)
            for p in (128, 512):
                yield Variant(kernel, arch, "bf16", p, wide_weights=True, **hardest)
            for p in (64, 512):
                yield Variant(kernel, arch, "fp32", p, **hardest)
    for kernel in ROW_KERNELS:
        yield Variant(kernel, "sm_90", "fp32", 1024, **hardest)


def launch(variant):
    """The kernel's compile-time constants and launch options, from the launcher's own tables."""
    constants = dict.fromkeys((name for name in argument_names(variant) if name.isupper()), True)
    constants |= {name: getattr(variant, field) for name, field in OPTIONS.items() if name in constants}
    if variant.kernel in OTHER_KERNELS:
        return constants | {"BLOCK": kernels._ELEMENTS}, {"num_warps": 4}
    dtype = DTYPES[variant.dtype]
    if variant.kernel in ROW_KERNELS:
        tile, block_p = kernels.row_tile(variant.p, dtype), kernels.padded_prompts(variant.p)
        tile = kernels.narrow(tile) if variant.narrow else tile
    else:
        tile, block_p = kernels.product_tile(dtype), kernels.product_prompts(variant.p, dtype)
    blocks = {"BLOCK_M": tile.rows, "BLOCK_D": tile.width, "BLOCK_P": block_p}
    return constants | blocks, kernels.launch_options(tile, hip=variant.arch.startswith("gfx"))


def argument_type(name, variant):
    """In Triton's spelling."""
    if name in INTEGERS or "stride" in name:
        return "i32"
    if name in SCALARS:
        return SCALARS[name]
    if name in FLOAT32 or (variant.kernel == "round_weights_kernel" and name in ("prompts", "keys")):
        return "*fp32"
    if name in COEFFICIENTS and kernels.coefficients_dtype(DTYPES[variant.dtype]) == torch.float32:
        return "*fp32"
    return f"*{variant.dtype}"


def is_aligned(name, variant):
    """Whether a launch finds the argument to be a multiple of 16: widths and strides are, as in every model."""
    return argument_type(name, variant).startswith("*") or name in ("d", "pitch", "size") or "stride" in name


def argument_names(variant):
    return getattr(kernels, variant.kernel).arg_names
