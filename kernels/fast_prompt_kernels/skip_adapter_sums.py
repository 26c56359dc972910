"""Triton kernels of ``skip_adapter``'s backward pass that sum over rows; `skip_adapter_backward` says what for."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_prompt_kernels.skip_adapter import activate, dropped, normed_tile
from fast_prompt_kernels.tiles import Tile, dot, load_tile, round_to, row_offsets, store_tile


@triton.jit
def store_weight_sums(
    weight_sums, tile, part, split, item, lane, column, d, w, group_width, inner_width, pitch,
    UP: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """A tile [hidden columns, columns of x] of a weight's gradient, in the layout of that weight."""
    if MIXED:
        inner = column[:, None] - (lane // group_width * inner_width)[None, :]
        inside = (inner >= 0) & (inner < inner_width) & (lane < d)[None, :]
        place = split * d * pitch + (lane * pitch + item * inner_width)[None, :] + inner
        tl.store(weight_sums + place, round_to(tile, weight_sums.dtype.element_ty), inside)
    elif UP:
        store_tile(weight_sums + part * d * w, column, lane * w, column < w, lane < d, tile)
    else:
        store_tile(weight_sums + part * d * w, column * d, lane, column < w, lane < d, tile)


@triton.jit(do_not_specialize=("rows_per_sample", "rows_per_split", "num_splits", "adapter", "experts"))
def weight_gradient_kernel(
    weight_sums, bias_sums, coefficients, tensor, row_mean, row_inverse, norm_weight, norm_bias,
    scale, gates, route, seed, threshold: tl.uint32, keep_scale: tl.float32,
    rows: tl.int64, rows_per_sample, rows_per_split, num_splits, adapter,
    d, w, experts, group_width, inner_width, pitch, tensor_stride_batch, tensor_stride_row, TENSOR_FLAT: tl.constexpr,
    UP: tl.constexpr, NORMED: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    ROUTED: tl.constexpr, MIXED: tl.constexpr, NORM_BIASED: tl.constexpr, SCALED: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A split's share of dW_u, and of the sum of dv (NEED_BIAS), or of dW_d; for one adapter or expert.

    UP: ``coefficients`` is the hidden layer and ``tensor`` dv; else dh and x, which NORMED takes through its norm.
    """
    lane = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    part = tl.program_id(2).to(tl.int64)
    item, split = part // num_splits, part % num_splits
    index = item if ROUTED else item * 0 + adapter
    dtype: tl.constexpr = tensor.dtype.element_ty
    if DROPOUT and UP:
        seed = tl.load(seed)
    if NORMED:
        norm_weight += index * d
        if NORM_BIASED:
            norm_bias += index * d
    total = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
    bias_total = tl.zeros([BLOCK_D], tl.float32)
    end = tl.minimum((split + 1) * rows_per_split, rows)
    for start in tl.range(split * rows_per_split, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        valid = row < end
        if ROUTED:
            valid &= tl.load(route + row // rows_per_sample, mask=valid, other=-1) == item
        a = load_tile(coefficients, row * w, column, valid, column < w)
        offsets = row_offsets(row, rows_per_sample, tensor_stride_batch, tensor_stride_row, TENSOR_FLAT)
        b = load_tile(tensor, offsets, lane, valid, lane < d)
        gate = tl.full([BLOCK_M], 1.0, tl.float32)
        if MIXED:
            gate = tl.load(gates + row // rows_per_sample * experts + item, mask=valid, other=0.0)
        if UP:
            t = activate(a.to(tl.float32), ACTIVATION)
            if DROPOUT:
                t = dropped(t, adapter * rows + row, column, w, seed, threshold, keep_scale)
            a = round_to(t * gate[:, None], dtype)
        if NORMED:
            mean = tl.load(row_mean + row, mask=valid, other=0.0)
            inverse = tl.load(row_inverse + row, mask=valid, other=0.0)
            b = round_to(normed_tile(b, mean, inverse, norm_weight, norm_bias, lane, d, NORM_BIASED), dtype)
        if NEED_BIAS:
            bias_total += tl.sum(b.to(tl.float32) * gate[:, None], axis=0)
        if NEED_WEIGHT:
            total = dot(tl.trans(a), b, total)
    factor = tl.load(scale + index) if UP and SCALED else 1.0
    if NEED_WEIGHT:
        store_weight_sums(
            weight_sums, factor * total, part, split, item, lane, column, d, w, group_width, inner_width, pitch,
            UP, MIXED,
        )  # fmt: skip
    if NEED_BIAS and tl.program_id(1) == 0:
        result = round_to(factor * bias_total, bias_sums.dtype.element_ty)
        tl.store(bias_sums + part * d + lane, result, mask=lane < d)


@triton.jit(do_not_specialize=("count", "item_stride", "row_blocks"))
def sum_partials_kernel(
    output, partials, route, count, item_stride: tl.int64, size, row_blocks,
    ROUTED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``output[item]``: the sum, in order, of ``partials[item * item_stride + p]`` [size] for p below ``count``.

    ROUTED: of those p whose sample, of ``row_blocks`` partial sums each, has this item as its route.
    """
    blocks = tl.cdiv(size, BLOCK)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    element = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, count, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        valid = part < count
        if ROUTED:
            valid &= tl.load(route + part // row_blocks, mask=valid, other=-1) == item
        total += tl.sum(load_tile(partials, (item * item_stride + part) * size, element, valid, element < size), axis=0)
    tl.store(output + item * size + element, round_to(total, output.dtype.element_ty), mask=element < size)


_PRODUCT_TILES = {True: Tile(64, 64, 8, 3), False: Tile(32, 32, 4, 2)}  # rows, columns; by whether half
SPLIT_ROWS = 256  # a sum over rows is cut into no shorter pieces
_SUM_TILE = (32, 128)  # partial sums of one step of `sum_partials_kernel`, and elements of each


def product_tile(dtype: torch.dtype) -> Tile:
    """Rows of a step and columns of `weight_gradient_kernel`."""
    return _PRODUCT_TILES[dtype != torch.float32]


def sum_partials(
    output: Tensor, partials: Tensor, items: int, count: int, item_stride: int | None = None,
    route: Tensor | None = None, row_blocks: int = 1,
) -> None:  # fmt: skip
    """`sum_partials_kernel` for ``output`` of ``items`` sums, ``count`` of partial sums to each."""
    size = output.numel() // items
    if item_stride is None:
        item_stride = 0 if route is not None else count
    block_p, block = _SUM_TILE
    sum_partials_kernel[(items * triton.cdiv(size, block),)](
        output, partials, route, count, item_stride, size, row_blocks,
        ROUTED=route is not None, BLOCK_P=block_p, BLOCK=block,
    )  # fmt: skip
