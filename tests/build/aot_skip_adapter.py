"""The Triton kernels of ``skip_adapter``, as tests/build/aot_compile.py compiles them.

The launcher's own tables give tiles and warps. Each tile stands here with the options that need most registers; at
the usual widths the plain case and the narrow tile as well.
"""

from types import SimpleNamespace
from typing import NamedTuple

from aot_compile import ARCHS, DTYPES
from fast_prompt_kernels import skip_adapter, skip_adapter_backward, skip_adapter_fold, skip_adapter_sums

_MODULES = (skip_adapter, skip_adapter_backward, skip_adapter_fold, skip_adapter_sums)
kernels = SimpleNamespace(**{name: value for module in _MODULES for name, value in vars(module).items()})

ROW_KERNELS = ("forward_kernel", "row_gradient_kernel")
OTHER_KERNELS = ("fold_kernel", "sum_partials_kernel")
# What a call is, by name; every constant that is not named here is True in "hard" forms, else False.
FORMS = {
    "plain": {"NORM": "layer", "ACTIVATION": "relu", "RESIDUAL": "input"},
    "run": {"NORM": "layer", "ACTIVATION": "gelu", "RESIDUAL": "normed", "DROPOUT": True, "RUN": True},
    "route": {"NORM": "layer", "ACTIVATION": "silu", "RESIDUAL": "input", "DROPOUT": True, "ROUTED": True},
    "mixture": {"NORM": "rms", "ACTIVATION": "silu", "RESIDUAL": "input", "DROPOUT": True, "MIXED": True},
    "after": {"NORM": "layer_after", "ACTIVATION": "gelu", "RESIDUAL": "input", "DROPOUT": True},
    "again": {"NORM": "layer", "ACTIVATION": "gelu", "RESIDUAL": "normed", "DROPOUT": True, "FROM_HIDDEN": True},
}
OPTIONAL = ("DROPOUT", "RUN", "ROUTED", "MIXED", "FROM_HIDDEN")
STORED = ("output", "hidden", "x", "grad", "grad_x", "hidden_gradient", "up_gradient", "coefficients", "tensor")
WEIGHTS = ("down_weight", "up_weight", "up_bias", "norm_weight", "norm_bias", "folded")
SCALARS = {"threshold": "u32", "keep_scale": "fp32", "eps": "fp32", "seed": "*i64", "route": "*i64"}
LONG = ("rows", "output_stride", "item_stride")
INTEGERS = ("rows_per_sample", "rows_per_split", "num_splits", "row_blocks", "adapters", "adapter", "experts")
INTEGERS += ("d", "w", "group_width", "inner_width", "pitch", "count", "size")


class Variant(NamedTuple):
    """One kernel as one call of a form would launch it, its parameters in the activations' dtype.

    ``up`` for the up projection's weight gradient; ``narrow`` with the few rows a tile that small inputs get.
    """

    kernel: str
    arch: str
    dtype: str
    w: int = 96
    form: str = "run"
    up: bool = False
    narrow: bool = False

    def __str__(self):
        flags = [name for name, value in self._asdict().items() if value is True]
        return " ".join([self.arch, self.budget, self.form, *flags])

    @property
    def budget(self):
        """Its name in tests/build/kernel_budgets.json."""
        return f"{self.kernel} {self.dtype} w={self.w}"

    @property
    def multiplies(self):
        return self.kernel not in OTHER_KERNELS

    @property
    def fills_a_tile(self):
        """The 64 rows that each chip's newest tensor cores ask for."""
        return self.kernel in ROW_KERNELS and self.w <= 96 and self.form != "mixture" and not self.narrow


def variants():
    for arch in ARCHS:
        for kernel in ROW_KERNELS:
            for form in ("run", "mixture", "after"):
                yield Variant(kernel, arch, "bf16", form=form)
            yield Variant(kernel, arch, "fp32")
        for dtype in ("bf16", "fp32"):
            yield Variant("weight_gradient_kernel", arch, dtype, form="mixture", up=True)
        yield Variant("weight_gradient_kernel", arch, "bf16", form="route")
        for kernel in OTHER_KERNELS:
            yield Variant(kernel, arch, "bf16")
    for arch in ("sm_90", "gfx942"):  # what is left of forms and tables, on one chip of each kind
        for form in ("route", "again"):
            yield Variant("forward_kernel", arch, "bf16", form=form)
        for kernel in ROW_KERNELS:
            yield Variant(kernel, arch, "bf16", narrow=True)
            yield Variant(kernel, arch, "bf16", 288)
            yield Variant(kernel, arch, "bf16", 256, "mixture")
    for kernel in ROW_KERNELS:
        yield Variant(kernel, "sm_90", "bf16", form="plain")
        yield Variant(kernel, "sm_90", "bf16", 768, "plain")
        for w in (192, 768):
            yield Variant(kernel, "sm_90", "fp32", w, "plain")


def launch(variant):
    """The kernel's compile-time constants and launch options, from the launcher's own tables."""
    names = [name for name in argument_names(variant) if name.isupper()]
    form, dtype, hip = FORMS[variant.form], DTYPES[variant.dtype], variant.arch.startswith("gfx")
    constants = {name: form.get(name, name not in OPTIONAL) for name in names}
    if variant.kernel == "fold_kernel":
        return constants | {"BLOCK": kernels._FOLD_COLUMNS}, {"num_warps": 4}
    if variant.kernel == "sum_partials_kernel":
        block_p, block = kernels._SUM_TILE
        return constants | {"ROUTED": True, "BLOCK_P": block_p, "BLOCK": block}, {"num_warps": 4}
    block_w, chunks = kernels.hidden_blocks(variant.w)
    if variant.kernel in ROW_KERNELS:
        tile = kernels.row_tile(variant.w, dtype, "MIXED" in form, variant.kernel == "row_gradient_kernel", hip)
        tile = kernels.narrow(tile) if variant.narrow else tile
        constants |= {"KEEP_HIDDEN": variant.form != "again"}
        constants |= {"NEED_MOMENTS": form["NORM"] in ("layer", "rms"), "NORM_BIASED": form["NORM"] != "rms"}
    else:
        tile = kernels.product_tile(dtype)
        constants |= {"UP": variant.up, "NORMED": not variant.up, "MIXED": variant.up}
    blocks = {"BLOCK_M": tile.rows, "BLOCK_D": tile.width, "BLOCK_W": block_w, "CHUNKS": chunks}
    return constants | blocks, kernels.launch_options(tile, hip)


def argument_type(name, variant):
    """In Triton's spelling."""
    if name in LONG:
        return "i64"
    if name in INTEGERS or "stride" in name:
        return "i32"
    if name in SCALARS:
        return SCALARS[name]
    if name in WEIGHTS or name in STORED or (name == "output" and variant.kernel == "forward_kernel"):
        return f"*{variant.dtype}"
    return "*fp32"


def is_aligned(name, variant):
    """Whether a launch finds the argument to be a multiple of 16: widths and strides are, as in every model."""
    aligned = ("d", "w", "group_width", "inner_width", "pitch", "size")
    return argument_type(name, variant).startswith("*") or name in aligned or "_stride" in name


def argument_names(variant):
    return getattr(kernels, variant.kernel).arg_names
