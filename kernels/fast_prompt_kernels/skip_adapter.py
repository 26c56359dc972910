"""Triton kernels of ``skip_adapter``: ``y = x + s up(dropout(act(down(norm(x)))))``; the reference is the definition.

x and y are [M, d] with M = B n rows, the hidden layer is [M, w]. Bound by memory: 4 w FLOP for each element read and
written once, so 96 FLOP/byte at w = 96 in bfloat16, below the 250 or so where a Hopper-class GPU turns compute-bound.

Forward, two launches, or one where there is no norm before the down projection.

1. `fold_kernel` multiplies the norm's weight into the down projection, W' = W_d diag(weight), and sums up what a row's
   mean and the norm's bias come to: ``h = rstd ((x - c) W'^T - (mean - c) sum(W')) + W_d bias + b_d``. Two MB at most.
2. `forward_kernel`, a program for each tile of rows. It walks d once, multiplying ``x - c`` by W' and summing the
   row's moments meanwhile, has the hidden layer in registers, and walks d again for the up projection, each block
   of columns leaving with its residual. c is the mean of the row's first columns: near enough to its mean that neither
   the product nor the variance cancels, whatever offset the row has. So x comes from device memory once, again from L2
   for the residual, and never a third time for the norm. A norm after the up projection takes that product twice.

A run of A adapters is the same launch: a program writes its rows to the output and reads them back for the next
adapter, from the L2 cache and by itself alone, for any width. The mixture and the route give each program rows of one
sample, so that gates are numbers and a kept sample's programs return at once; a mixture's experts are products of
their own, summed in float32.

Backward: `fast_prompt_kernels.skip_adapter_backward`. Its rows within a run are `forward_kernel`'s too, from the kept
hidden layer.

Precision: sums are float32; half activations meet weights rounded to half once. Speeds above are arithmetic: none of
these kernels has run on a GPU yet.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_prompt_kernels.skip_adapter_fold import Folded, fold
from fast_prompt_kernels.tiles import (
    Rows,
    Tile,
    batched,
    chunk_width,
    device_guard,
    dot,
    dropout_arguments,
    dropout_words,
    launch_options,
    load_tile,
    multiprocessors,
    needed,
    round_to,
    row_offsets,
    store_tile,
)

LENGTHS = ("rows", "rows_per_sample", "row_blocks", "adapters", "experts")  # no new kernel for new ones

# ---------------------------------------------------------------------------------------------------------------
# Rows, and what is done to each of their elements


@triton.jit
def program_rows(rows, rows_per_sample, row_blocks, BY_SAMPLE: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's rows, which of them exist, and their sample where they are of one."""
    program = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_M)
    if BY_SAMPLE:
        sample = program // row_blocks
        place += (program % row_blocks) * BLOCK_M
        return sample * rows_per_sample + place, place < rows_per_sample, sample
    row = program * BLOCK_M + place
    return row, row < rows, program


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """The activation of a float32 tile."""
    if ACTIVATION == "relu":
        return tl.where(h < 0, 0.0, h)
    if ACTIVATION == "silu":
        return h * tl.sigmoid(h)
    return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def dropped(t, row, column, w, seed, threshold, keep_scale):
    """``t`` after dropout."""
    return tl.where(dropout_words(row, column, w, seed) >= threshold, t * keep_scale, 0.0)


@triton.jit
def zero_tiles(CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """CHUNKS tiles of zeros, for sums."""
    tiles = ()
    for _ in tl.static_range(CHUNKS):
        tiles = tiles + (tl.zeros([BLOCK_M, BLOCK_W], tl.float32),)
    return tiles


@triton.jit
def row_center(source, offsets, valid, d, BLOCK_D: tl.constexpr):
    """The mean of a row's first columns: what its moments are summed about."""
    lane = tl.arange(0, BLOCK_D)
    first = load_tile(source, offsets, lane, valid, lane < d).to(tl.float32)
    return tl.sum(first, axis=1) / tl.minimum(d, BLOCK_D)


@triton.jit
def moments(total, squares, d, eps, CENTERED: tl.constexpr):
    """Rows' mean and 1 / root of the variance, or 0 and 1 / root of the mean square, from sums over d columns."""
    mean, square = total / d, squares / d
    if CENTERED:
        return mean, tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)
    return tl.zeros_like(mean), tl.rsqrt(square + eps)


@triton.jit
def normed_tile(tile, mean, inverse, norm_weight, norm_bias, lane, d, NORM_BIASED: tl.constexpr):
    """The norm of some columns of rows, from the rows' moments."""
    weight = tl.load(norm_weight + lane, mask=lane < d, other=0.0).to(tl.float32)
    normed = (tile.to(tl.float32) - mean[:, None]) * inverse[:, None] * weight[None, :]
    if NORM_BIASED:
        normed += tl.load(norm_bias + lane, mask=lane < d, other=0.0).to(tl.float32)[None, :]
    return normed


# ---------------------------------------------------------------------------------------------------------------
# Products


@triton.jit
def down_product(
    source, offsets, valid, weight, d, w, eps,
    NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """``(source - center) @ weight.T`` in tiles; center, mean - center and 1 / deviation of the rows."""
    sums = zero_tiles(CHUNKS, BLOCK_M, BLOCK_W)
    total = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    center = row_center(source, offsets, valid, d, BLOCK_D) if NORM == "layer" else total
    for start in tl.range(0, d, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        tile = load_tile(source, offsets, lane, valid, lane < d)
        if NORM == "layer":
            centered = tl.where((lane < d)[None, :], tile.to(tl.float32) - center[:, None], 0.0)
            total += tl.sum(centered, axis=1)
            squares += tl.sum(centered * centered, axis=1)
            tile = round_to(centered, tile.dtype)
        if NORM == "rms":
            squares += tl.sum(tile.to(tl.float32) * tile.to(tl.float32), axis=1)
        updated = ()
        for chunk in tl.static_range(CHUNKS):
            column = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
            updated = updated + (dot(tile, load_tile(weight, lane, column * d, lane < d, column < w), sums[chunk]),)
        sums = updated
    shift, inverse = moments(total, squares, d, eps, NORM == "layer")
    return sums, center, shift, inverse


@triton.jit
def row_moments(source, offsets, valid, d, eps, CENTERED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """`moments` of rows, the mean as it is."""
    total = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    center = row_center(source, offsets, valid, d, BLOCK_D) if CENTERED else total
    for start in tl.range(0, d, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        tile = load_tile(source, offsets, lane, valid, lane < d).to(tl.float32)
        tile = tl.where((lane < d)[None, :], tile - center[:, None], 0.0)
        total += tl.sum(tile, axis=1)
        squares += tl.sum(tile * tile, axis=1)
    shift, inverse = moments(total, squares, d, eps, CENTERED)
    return center + shift, inverse


@triton.jit
def activated_tiles(
    tiles, hidden, row, valid, shift, inverse, column_sums, down_bias, w, first_row, seed, threshold, keep_scale,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, DOWN_BIASED: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr, FROM_HIDDEN: tl.constexpr,
    BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The hidden layer after activation and dropout, from the down products or, FROM_HIDDEN, from what was kept."""
    activated = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
        inside = column < w
        if FROM_HIDDEN:
            h = load_tile(hidden, row * w, column, valid, inside).to(tl.float32)
        else:
            h = tiles[chunk]
            if NORM == "layer":
                h -= shift[:, None] * tl.load(column_sums + column, mask=inside, other=0.0)[None, :]
            if NORM == "layer" or NORM == "rms":
                h *= inverse[:, None]
            if DOWN_BIASED:
                h += tl.load(down_bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if KEEP_HIDDEN:
                store_tile(hidden, row * w, column, valid, inside, h)
        t = activate(h, ACTIVATION)
        if DROPOUT:
            t = dropped(t, first_row + row, column, w, seed, threshold, keep_scale)
        activated = activated + (round_to(t, dtype),)
    return activated


@triton.jit
def load_up(
    weight, chunk: tl.constexpr, lane, expert, d, w, group_width, inner_width, pitch,
    MIXED: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The up projection's tile of BLOCK_W hidden columns by output columns ``lane``; an expert's, its groups apart."""
    column = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    if MIXED:
        inner = column[:, None] - (lane // group_width * inner_width)[None, :]
        inside = (inner >= 0) & (inner < inner_width) & (lane < d)[None, :]
        return tl.load(weight + ((lane * pitch + expert * inner_width)[None, :] + inner), inside, other=0.0)
    return load_tile(weight, column, lane * w, column < w, lane < d)


@triton.jit
def up_product(
    tiles, weight, bias, gates, lane, d, w, experts, group_width, inner_width, pitch,
    MIXED: tl.constexpr, UP_BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Output columns ``lane`` of the up projection with its bias."""
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if MIXED:
        for expert in tl.range(0, experts):
            part = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for chunk in tl.static_range(CHUNKS):
                tile = load_up(weight, chunk, lane, expert, d, w, group_width, inner_width, pitch, MIXED, BLOCK_W)
                part = dot(tiles[chunk], tile, part)
            if UP_BIASED:
                part += tl.load(bias + expert * d + lane, mask=lane < d, other=0.0).to(tl.float32)[None, :]
            result += tl.load(gates + expert) * part
    else:
        for chunk in tl.static_range(CHUNKS):
            tile = load_up(weight, chunk, lane, 0, d, w, group_width, inner_width, pitch, MIXED, BLOCK_W)
            result = dot(tiles[chunk], tile, result)
        if UP_BIASED:
            result += tl.load(bias + lane, mask=lane < d, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit
def up_moments(
    tiles, weight, bias, gates, factor, d, w, experts, group_width, inner_width, pitch, eps,
    MIXED: tl.constexpr, UP_BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of the rows of ``factor * up_product``, summed about the mean of their first columns."""
    total = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    center = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, d, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        v = factor * up_product(
            tiles, weight, bias, gates, lane, d, w, experts, group_width, inner_width, pitch,
            MIXED, UP_BIASED, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS,
        )  # fmt: skip
        center = tl.where(start == 0, tl.sum(v, axis=1) / tl.minimum(d, BLOCK_D), center)
        v = tl.where((lane < d)[None, :], v - center[:, None], 0.0)
        total += tl.sum(v, axis=1)
        squares += tl.sum(v * v, axis=1)
    shift, inverse = moments(total, squares, d, eps, True)
    return center + shift, inverse


# ---------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def adapt_rows(
    target, hidden, source, offsets, row, valid, index, first_row,
    down_weight, column_sums, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale, gates,
    seed, threshold, keep_scale, eps, d, w, experts, group_width, inner_width, pitch,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, MIXED: tl.constexpr,
    DOWN_BIASED: tl.constexpr, UP_BIASED: tl.constexpr, NORM_BIASED: tl.constexpr, SCALED: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr, FROM_HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Adapter ``index`` on rows ``source + offsets``, its result to ``target``."""
    up_weight += index * d * w
    if UP_BIASED:
        up_bias += index * d
    if NORM != "none":
        norm_weight += index * d
    if NORM_BIASED:
        norm_bias += index * d
    if NORM == "layer":
        column_sums += index * w
    if DOWN_BIASED:
        down_bias += index * w
    factor = tl.load(scale + index) if SCALED else 1.0
    if FROM_HIDDEN:
        sums = ()
        center = tl.zeros([BLOCK_M], tl.float32)
        shift, inverse = center, center
        if RESIDUAL == "normed":
            center, inverse = row_moments(source, offsets, valid, d, eps, NORM == "layer", BLOCK_M, BLOCK_D)
    else:
        sums, center, shift, inverse = down_product(
            source, offsets, valid, down_weight + index * w * d, d, w, eps, NORM, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS
        )
    tiles = activated_tiles(
        sums, hidden, row, valid, shift, inverse, column_sums, down_bias, w, first_row, seed, threshold, keep_scale,
        NORM, ACTIVATION, DROPOUT, DOWN_BIASED, KEEP_HIDDEN, FROM_HIDDEN, BLOCK_W, CHUNKS, target.dtype.element_ty,
    )  # fmt: skip
    mean = center + shift
    if NORM == "layer_after":
        mean, inverse = up_moments(
            tiles, up_weight, up_bias, gates, factor, d, w, experts, group_width, inner_width, pitch, eps,
            MIXED, UP_BIASED, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS,
        )  # fmt: skip
    for start in tl.range(0, d, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        result = factor * up_product(
            tiles, up_weight, up_bias, gates, lane, d, w, experts, group_width, inner_width, pitch,
            MIXED, UP_BIASED, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS,
        )  # fmt: skip
        if NORM == "layer_after":
            result = normed_tile(result, mean, inverse, norm_weight, norm_bias, lane, d, NORM_BIASED)
        if RESIDUAL != "none":
            tile = load_tile(source, offsets, lane, valid, lane < d).to(tl.float32)
            result += tile
            if RESIDUAL == "normed":
                result += normed_tile(tile, mean, inverse, norm_weight, norm_bias, lane, d, NORM_BIASED)
        store_tile(target, row * d, lane, valid, lane < d, result)


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    output, hidden, x, down_weight, column_sums, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale, gates,
    route, seed, threshold: tl.uint32, keep_scale: tl.float32, eps: tl.float32,
    rows: tl.int64, rows_per_sample, row_blocks, adapters, output_stride: tl.int64,
    d, w, experts, group_width, inner_width, pitch, x_stride_batch, x_stride_row, X_FLAT: tl.constexpr,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ROUTED: tl.constexpr, MIXED: tl.constexpr, RUN: tl.constexpr,
    DOWN_BIASED: tl.constexpr, UP_BIASED: tl.constexpr, NORM_BIASED: tl.constexpr, SCALED: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr, FROM_HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows through their adapter, or through all of a run; the a-th result at ``output + a output_stride``."""
    row, valid, sample = program_rows(rows, rows_per_sample, row_blocks, ROUTED or MIXED, BLOCK_M)
    index = sample * 0
    if ROUTED:
        index = tl.load(route + sample)
        if index < 0:
            return
    if MIXED:
        gates += sample * experts
    if DROPOUT:
        seed = tl.load(seed)
    offsets = row_offsets(row, rows_per_sample, x_stride_batch, x_stride_row, X_FLAT)
    for adapter in tl.range(0, adapters if RUN else 1):
        adapt_rows(
            output, hidden, x, offsets, row, valid, index + adapter, adapter * rows,
            down_weight, column_sums, down_bias, up_weight, up_bias, norm_weight, norm_bias, scale, gates,
            seed, threshold, keep_scale, eps, d, w, experts, group_width, inner_width, pitch,
            NORM, ACTIVATION, RESIDUAL, DROPOUT, MIXED, DOWN_BIASED, UP_BIASED, NORM_BIASED, SCALED,
            KEEP_HIDDEN, FROM_HIDDEN, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS,
        )  # fmt: skip
        if RUN:
            tl.debug_barrier()  # what the other threads of this program wrote is what it reads now
            x = output
            offsets = row * d
            output += output_stride
            if KEEP_HIDDEN or FROM_HIDDEN:
                hidden += rows * w


# ---------------------------------------------------------------------------------------------------------------
# Tiles, chosen by w and dtype; fewer rows only where else multiprocessors would be idle.

# By the padded width of what a row holds: rows, columns of x at a time, warps, stages.
_HALF_TILES = {
    256: Tile(64, 64, 8, 3),
    512: Tile(32, 32, 8, 2),
    768: Tile(16, 32, 8, 2),
}
_AMD_HALF_TILES = _HALF_TILES | {512: Tile(16, 32, 8, 2), 768: Tile(16, 16, 8, 2)}  # within 64 KiB, without spills
_FLOAT32_TILES = {
    128: Tile(32, 32, 8, 2),
    256: Tile(16, 32, 4, 2),
    384: Tile(16, 32, 8, 2),
    768: Tile(16, 16, 8, 2),
}
_MIXED_GRADIENT_TILES = {True: Tile(16, 64, 8, 2), False: Tile(16, 32, 4, 2)}  # by whether half; up to w = 256
MOST_HIDDEN = max(_HALF_TILES)
_FEWEST_ROWS = 16  # that the tensor cores multiply


def hidden_blocks(width: int) -> tuple[int, int]:
    """BLOCK_W and CHUNKS: how a row's hidden layer lies in registers."""
    block = chunk_width(width, 64 if width <= 256 else 128)
    return block, triton.cdiv(width, block)


def row_tile(
    width: int, dtype: torch.dtype, mixed: bool, backward: bool, hip: bool = torch.version.hip is not None
) -> Tile:
    """The tile of the kernels that hold rows' hidden layer, for w and the activations' dtype.

    A mixture holds an expert's share beside the sum, the backward pass the layer's gradient beside the layer.
    """
    half = dtype != torch.float32
    if mixed and backward and width <= 256:
        return _MIXED_GRADIENT_TILES[half]
    tiles = (_AMD_HALF_TILES if hip else _HALF_TILES) if half else _FLOAT32_TILES
    block, chunks = hidden_blocks(width)
    held = min(block * chunks * (1 + mixed) * (1 + backward), MOST_HIDDEN)
    return tiles[min(size for size in tiles if size >= held)]


def narrow(tile: Tile) -> Tile:
    """The same tile with few rows, for inputs too small to give every multiprocessor one of the full size."""
    return tile._replace(rows=_FEWEST_ROWS)


# ---------------------------------------------------------------------------------------------------------------
# Launchers. Nothing here reads device memory or waits for the device, so CUDA graphs can capture it.


class Parameters(NamedTuple):
    """An adapter's parameters as kernels take them: contiguous, the weights in the activations' dtype.

    ``folded`` only where a norm comes before the down projection.
    """

    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    scale: Tensor | None
    gates: Tensor | None
    folded: Folded | None

    @classmethod
    def of(
        cls, dtype: torch.dtype, norm: str, down_weight: Tensor, up_weight: Tensor, *others: Tensor | None
    ) -> "Parameters":
        """From the op's arguments, ``others`` in their order."""
        parameters, numbers = others[:4], others[4:]
        if down_weight.dim() == 2:
            down_weight, up_weight = down_weight.unsqueeze(0), up_weight.unsqueeze(0)
            parameters = [None if other is None else other.unsqueeze(0) for other in parameters]
        rest = [None if other is None else other.contiguous() for other in (*parameters, *numbers)]
        down_bias, _, norm_weight, norm_bias, _, _ = rest
        folded = None
        if norm in ("layer", "rms"):
            folded = fold(dtype, down_weight.contiguous(), down_bias, norm_weight, norm_bias)
        return cls(down_weight.to(dtype).contiguous(), up_weight.to(dtype).contiguous(), *rest, folded)

    def arguments(self) -> dict[str, object]:
        """Of the kernels that hold rows."""
        width = self.down_weight.shape[-1]
        hidden, pitch = self.down_weight.shape[-2], self.up_weight.shape[-1]
        experts = 1 if self.gates is None else self.gates.shape[1]
        groups = experts * hidden // pitch
        return {
            "up_weight": self.up_weight,
            "up_bias": self.up_bias,
            "norm_weight": self.norm_weight,
            "norm_bias": self.norm_bias,
            "scale": self.scale,
            "gates": self.gates,
            "d": width,
            "w": hidden,
            "experts": experts,
            "group_width": width // groups,
            "inner_width": hidden // groups,
            "pitch": pitch,
            "MIXED": self.gates is not None,
            "UP_BIASED": self.up_bias is not None,
            "NORM_BIASED": self.norm_bias is not None,
            "SCALED": self.scale is not None,
        }


class Plan(NamedTuple):
    """What the launches of one call share.

    Attributes:
        parameters: of all adapters.
        x: the op's input.
        tile: of the kernels that hold rows.
        grid: of those.
        row_blocks: programs of a sample, where rows of a program are of one sample; else of all rows.
        arguments: of those kernels.
    """

    parameters: Parameters
    x: Rows
    tile: Tile
    grid: tuple[int]
    row_blocks: int
    arguments: dict[str, object]

    @classmethod
    def of(
        cls, x: Tensor, parameters: Parameters, route: Tensor | None, seed: Tensor | None,
        norm: str, activation: str, residual: str, eps: float, dropout_p: float, backward: bool = False,
    ) -> "Plan":  # fmt: skip
        """For x [B, n, d]."""
        batch, rows_per_sample, _ = x.shape
        by_sample = route is not None or parameters.gates is not None
        hidden = parameters.down_weight.shape[-2]
        samples, length = (batch, rows_per_sample) if by_sample else (1, batch * rows_per_sample)
        tile = row_tile(hidden, x.dtype, parameters.gates is not None, backward)
        if samples * triton.cdiv(length, tile.rows) < multiprocessors(x.device):
            tile = narrow(tile)
        row_blocks = triton.cdiv(length, tile.rows)
        rows, (block_w, chunks) = Rows.of(x), hidden_blocks(hidden)
        arguments = {
            **parameters.arguments(),
            **dropout_arguments(seed, dropout_p),
            "route": route,
            "eps": eps,
            "rows": batch * rows_per_sample,
            "rows_per_sample": rows_per_sample,
            "row_blocks": row_blocks,
            "NORM": norm,
            "ACTIVATION": activation,
            "RESIDUAL": residual,
            "ROUTED": route is not None,
            "BLOCK_M": tile.rows,
            "BLOCK_D": tile.width,
            "BLOCK_W": block_w,
            "CHUNKS": chunks,
            **launch_options(tile),
        }
        return cls(parameters, rows, tile, (samples * row_blocks,), row_blocks, arguments)

    def forward(self, output: Tensor, hidden: Tensor | None, adapters: int, output_stride: int, again: bool) -> None:
        """Writes ``adapters`` results of a run, ``output_stride`` elements apart; ``again``: from the hidden layer."""
        down_weight, column_sums, bias = self.parameters.down_weight, None, self.parameters.down_bias
        if self.parameters.folded is not None:
            down_weight, column_sums, bias = self.parameters.folded
        forward_kernel[self.grid](
            output, hidden, self.x.tensor, down_weight, column_sums, bias, **self.x.strides("x"),
            adapters=adapters, output_stride=output_stride, RUN=adapters > 1, DOWN_BIASED=bias is not None,
            KEEP_HIDDEN=hidden is not None and not again, FROM_HIDDEN=again, **self.arguments,
        )  # fmt: skip


def skip_adapter(
    x: Tensor, down_weight: Tensor, up_weight: Tensor, down_bias: Tensor | None, up_bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, scale: Tensor | None, gates: Tensor | None,
    kept: Tensor | None, route: Tensor | None, kept_samples: Tensor | None, seed: Tensor | None,
    norm: str, activation: str, residual: str, eps: float, dropout_p: float, keep: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """``fast_prompt.reference.skip_adapter`` on tensors that ``fast_prompt.backends.triton`` takes.

    Returns the output and, where it is to be kept, the hidden layer before its activation, [A, B, n, w] ([1, B, n, w]
    with a route), dtype of ``x``.
    """
    x, shape = batched(x), x.shape
    parameters = Parameters.of(
        x.dtype, norm, down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, scale, gates
    )
    adapters, width, _ = parameters.down_weight.shape
    with device_guard(x.device):
        output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        kept_adapters = 1 if route is not None else adapters
        hidden = None
        if keep[0]:
            hidden = torch.empty((kept_adapters, *x.shape[:-1], width), dtype=x.dtype, device=x.device)
        plan = Plan.of(x, parameters, route, seed, norm, activation, residual, eps, dropout_p)
        plan.forward(output, hidden, kept_adapters, 0, again=False)
        if kept_samples is not None and kept_samples.numel():
            if kept is not None:
                output.index_copy_(0, kept_samples, kept)
            if hidden is not None:
                hidden.index_fill_(1, kept_samples, 0)  # left alone, it would be another at every call
    return [output.view(shape), *needed((hidden,), keep)]
