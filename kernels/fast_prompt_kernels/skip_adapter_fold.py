"""``skip_adapter``'s norm folded into its down projection; `fast_prompt_kernels.skip_adapter` says what for."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_prompt_kernels.tiles import round_to

_FOLD_COLUMNS = 1024  # of one step of `fold_kernel`


@triton.jit
def fold_kernel(
    folded, column_sums, constants, down_weight, down_bias, norm_weight, norm_bias, w, d,
    DOWN_BIASED: tl.constexpr, NORM_BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row j: ``folded = down_weight * norm_weight``, its sum, and ``down_weight @ norm_bias + down_bias``."""
    row = tl.program_id(0).to(tl.int64)
    adapter = row // w
    total = tl.zeros([BLOCK], tl.float32)
    constant = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, d, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        weight = tl.load(down_weight + row * d + lane, mask=lane < d, other=0.0).to(tl.float32)
        factor = tl.load(norm_weight + adapter * d + lane, mask=lane < d, other=0.0).to(tl.float32)
        product = round_to(weight * factor, folded.dtype.element_ty)
        tl.store(folded + row * d + lane, product, mask=lane < d)
        total += product.to(tl.float32)
        if NORM_BIASED:
            bias = tl.load(norm_bias + adapter * d + lane, mask=lane < d, other=0.0).to(tl.float32)
            constant += weight * bias
    tl.store(column_sums + row, tl.sum(total, axis=0))
    offset = tl.sum(constant, axis=0)
    if DOWN_BIASED:
        offset += tl.load(down_bias + row).to(tl.float32)
    tl.store(constants + row, offset)


class Folded(NamedTuple):
    """The down projection with the norm before it: W' [A, w, d], its row sums and constants, float32 [A, w]."""

    weight: Tensor
    column_sums: Tensor
    constants: Tensor


def fold(
    dtype: torch.dtype, down_weight: Tensor, down_bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None
) -> Folded:
    """Of contiguous parameters; the folded weight in ``dtype``."""
    adapters, hidden, width = down_weight.shape
    folded = torch.empty(down_weight.shape, dtype=dtype, device=down_weight.device)
    sums = torch.empty((2, adapters, hidden), dtype=torch.float32, device=down_weight.device)
    fold_kernel[(adapters * hidden,)](
        folded, *sums, down_weight, down_bias, norm_weight, norm_bias, hidden, width,
        DOWN_BIASED=down_bias is not None, NORM_BIASED=norm_bias is not None, BLOCK=_FOLD_COLUMNS,
    )  # fmt: skip
    return Folded(folded, *sums)
