"""Triton kernels of ``prompt_diffusion``: ``Y = e^s (H + w * (R P))``, ``R = dropout(act(X K^T))``, ``w = rowmax(R)``.

X, H and Y are [M, d] with M = B n rows, P and K are [p, d], R is [M, p]; `fast_prompt.reference` is the definition.

Forward: one kernel, a program for each tile of rows. It walks d once to sum S = X K^T for its rows and all p prompts
on chip, turns S into R and w there, and walks d again to write Y. X, H and Y cross device memory once, R never. That
is 4 p d FLOP a row for 3 d elements: 133 FLOP/byte at p = 200 in bfloat16, below the 250 or so where a Hopper-class
GPU turns from memory-bound to compute-bound. Every tile reads the weights, so they come from the L2 cache.

Backward: R and dS are the coefficients of every gradient, dP = (e^s w R)^T G, dK = dS^T X and dX = dS K.

1. `coefficients_kernel`, laid out like the forward, forms S again, sums T = G P^T, and writes e^s w R and dS [M, p],
   dH, and one partial sum of ds a tile. It reads X, G and Y once.
2. `source_gradient_kernel` is the product dX = dS K.
3. `weight_gradient_kernel` is the product for dP or dK, its long sum over rows split among programs, and
   `sum_splits_kernel` adds the splits in order. No atomics: the same bits every time.

Why R and dS go through device memory, here and only here: a sum of [p, d] does not fit on chip, so a kernel for dP
and dK must cut d or p, and without stored coefficients it forms S and T anew in every piece. Each time costs 4 d FLOP
for each of the M p elements (3,072 at d = 768: 8 ps at 400 TFLOP/s); writing and reading both matrices costs 8 bytes
in bfloat16 (3 ps at 3 TB/s, less from L2). In float32 the gap is wider. They are freed on return.

Precision: sums are float32. Where activations are float16, coefficients lose their row's scale before they are
rounded, since a squared softmax weight would leave float16's range. Float32 weights beside half activations
(autocast) are rounded to half once, and what rounding took from the keys is multiplied in a second pass of S:
ReLU's gate would otherwise open or close on rounding errors. Float32 products are exact ("ieee") and leave NVIDIA's
tensor cores idle; three TF32 products would be faster and about ten times less exact, which again moves gates.

Large p: a program takes 64 rows up to p = 256, 32 at 512 and 16 at 1024, so that all of S stays in registers. X is read
once whatever p is; the price is that L2 delivers the weights more often.

Speeds above are arithmetic: none of these kernels has run on a GPU yet.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_prompt_kernels.tiles import (
    TINY,
    Rows,
    Tile,
    batched,
    coefficient_dot,
    coefficients_dtype,
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

_LENGTHS = ("rows", "rows_per_batch", "rows_per_split")  # no new kernel for a new batch or sequence length

# ---------------------------------------------------------------------------------------------------------------
# R, as forward and backward both compute it


@triton.jit
def _add_scores(scores, source, offsets, valid, keys, d, p, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr):
    """``scores + source[rows] @ keys.T``."""
    column = tl.arange(0, BLOCK_P)
    for start in tl.range(0, d, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        x = load_tile(source, offsets, lane, valid, lane < d)
        scores = dot(x, load_tile(keys, lane, column * d, lane < d, column < p), scores)
    return scores


@triton.jit
def _negate_dropped(active, row, column, p, seed, threshold):
    word = dropout_words(row, column, p, seed)
    return tl.where(word >= threshold, active, -active)


@triton.jit
def _signed_activation(
    source, offsets, valid, row, keys, keys_low, seed, threshold, d, p,
    SOFTMAX: tl.constexpr, DROPOUT: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``act(X K^T)``, negated where dropout drops it: one tile tells the backward both, and registers are scarce."""
    column = tl.arange(0, BLOCK_P)
    scores = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    scores = _add_scores(scores, source, offsets, valid, keys, d, p, BLOCK_D, BLOCK_P)
    if SPLIT_KEYS:
        scores = _add_scores(scores, source, offsets, valid, keys_low, d, p, BLOCK_D, BLOCK_P)
    inside = (column < p)[None, :]
    if SOFTMAX:
        scores = tl.where(inside, scores, float("-inf"))
        signed = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    else:
        signed = tl.where(inside & ~(scores <= 0), scores, 0.0)  # a NaN stays
    if DROPOUT:  # even and odd columns in turn, which halves the registers that Philox needs at once
        seed = tl.load(seed)
        even, odd = tl.split(tl.reshape(signed, [BLOCK_M, BLOCK_P // 2, 2]))
        pair = 2 * tl.arange(0, BLOCK_P // 2)
        even = _negate_dropped(even, row, pair, p, seed, threshold)
        odd = _negate_dropped(odd, row, pair + 1, p, seed, threshold)
        signed = tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_P])
    if SOFTMAX:
        signed *= (1.0 / tl.sum(tl.abs(signed), axis=1))[:, None]
    return signed


# ---------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=_LENGTHS)
def forward_kernel(
    output, hidden, source, prompts, keys, keys_low, log_scale, seed, threshold: tl.uint32, keep_scale: tl.float32,
    rows, rows_per_batch, d, p,
    hidden_stride_batch, hidden_stride_row, source_stride_batch, source_stride_row,
    HIDDEN_FLAT: tl.constexpr, SOURCE_FLAT: tl.constexpr,
    SOFTMAX: tl.constexpr, MAX_WEIGHT: tl.constexpr, DROPOUT: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Y for BLOCK_M rows."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    local_row = tl.arange(0, BLOCK_M)  # offsets within a tile of a contiguous tensor fit 32 bits
    row = first_row + local_row
    valid = row < rows
    source_offsets = row_offsets(row, rows_per_batch, source_stride_batch, source_stride_row, SOURCE_FLAT)
    hidden_offsets = row_offsets(row, rows_per_batch, hidden_stride_batch, hidden_stride_row, HIDDEN_FLAT)
    signed = _signed_activation(
        source, source_offsets, valid, row, keys, keys_low, seed, threshold, d, p,
        SOFTMAX, DROPOUT, SPLIT_KEYS, BLOCK_M, BLOCK_D, BLOCK_P,
    )  # fmt: skip
    kept = tl.where(signed <= 0, 0.0, signed)
    largest = tl.max(kept, axis=1)
    unit = tl.maximum(largest, TINY)
    coefficients = round_to(kept * (1.0 / unit)[:, None], prompts.dtype.element_ty)
    weight = unit * keep_scale
    if MAX_WEIGHT:
        weight *= largest * keep_scale
    scale = tl.exp(tl.load(log_scale))
    column = tl.arange(0, BLOCK_P)
    for start in tl.range(0, d, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        prompt = load_tile(prompts, column * d, lane, column < p, lane < d)
        mixed = dot(coefficients, prompt, tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
        h = load_tile(hidden, hidden_offsets, lane, valid, lane < d).to(tl.float32)
        store_tile(output + first_row * d, local_row * d, lane, valid, lane < d, scale * (h + weight[:, None] * mixed))


@triton.jit(do_not_specialize=_LENGTHS)
def coefficients_kernel(
    prompt_coefficients, key_coefficients, grad_hidden, scale_partials,
    grad, output, source, prompts, keys, keys_low, log_scale, seed, threshold: tl.uint32, keep_scale: tl.float32,
    rows, rows_per_batch, d, p, pitch,
    grad_stride_batch, grad_stride_row, source_stride_batch, source_stride_row,
    GRAD_FLAT: tl.constexpr, SOURCE_FLAT: tl.constexpr,
    NEED_PROMPTS: tl.constexpr, NEED_SCORES: tl.constexpr, NEED_HIDDEN: tl.constexpr, NEED_SCALE: tl.constexpr,
    SOFTMAX: tl.constexpr, MAX_WEIGHT: tl.constexpr, DROPOUT: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """For BLOCK_M rows: ``e^s w R``, dS, dH, and their share of ds; each only when it is needed."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    local_row = tl.arange(0, BLOCK_M)  # offsets within a tile of a contiguous tensor fit 32 bits
    row = first_row + local_row
    valid = row < rows
    column = tl.arange(0, BLOCK_P)
    scale = tl.exp(tl.load(log_scale))
    if NEED_PROMPTS or NEED_SCORES:
        source_offsets = row_offsets(row, rows_per_batch, source_stride_batch, source_stride_row, SOURCE_FLAT)
        signed = _signed_activation(
            source, source_offsets, valid, row, keys, keys_low, seed, threshold, d, p,
            SOFTMAX, DROPOUT, SPLIT_KEYS, BLOCK_M, BLOCK_D, BLOCK_P,
        )  # fmt: skip
        weight = tl.full([BLOCK_M], 1.0, tl.float32) * scale * keep_scale
        if MAX_WEIGHT:
            weight *= tl.maximum(tl.max(signed, axis=1), 0.0) * keep_scale
        if NEED_PROMPTS:
            scaled = weight[:, None] * tl.where(signed <= 0, 0.0, signed)
            store_tile(
                prompt_coefficients + first_row * pitch, local_row * pitch, column, valid, column < pitch, scaled
            )  # fmt: skip

    product = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)  # T = G P^T
    overlap = tl.zeros([BLOCK_M], tl.float32)  # rows' sums of G Y
    if NEED_SCORES or NEED_HIDDEN or NEED_SCALE:
        grad_offsets = row_offsets(row, rows_per_batch, grad_stride_batch, grad_stride_row, GRAD_FLAT)
        for start in tl.range(0, d, BLOCK_D):
            lane = start + tl.arange(0, BLOCK_D)
            g = load_tile(grad, grad_offsets, lane, valid, lane < d)
            if NEED_SCORES:
                product = dot(g, load_tile(prompts, lane, column * d, lane < d, column < p), product)
            g = g.to(tl.float32)
            if NEED_HIDDEN:
                store_tile(grad_hidden + first_row * d, local_row * d, lane, valid, lane < d, scale * g)
            if NEED_SCALE:
                y = load_tile(output + first_row * d, local_row * d, lane, valid, lane < d).to(tl.float32)
                overlap += tl.sum(g * y, axis=1)

    if NEED_SCALE:
        tl.store(scale_partials + tl.program_id(0), tl.sum(overlap))
    if NEED_SCORES:
        product *= weight[:, None]  # dR, times the scale of what dropout keeps
        if SOFTMAX:
            pull = tl.where(signed > 0, signed * product, 0.0)  # R dR
            grad_scores = pull - tl.abs(signed) * tl.sum(pull, axis=1)[:, None]
        else:
            grad_scores = tl.where(signed > 0, product, 0.0)
        store_tile(
            key_coefficients + first_row * pitch, local_row * pitch, column, valid, column < pitch, grad_scores
        )  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def source_gradient_kernel(
    grad_source, key_coefficients, keys, rows, d, p, pitch,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_D] tile of dX = dS K."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, p, BLOCK_P):
        column = start + tl.arange(0, BLOCK_P)
        a = load_tile(key_coefficients, row * pitch, column, row < rows, column < pitch)
        total = coefficient_dot(a, load_tile(keys, column * d, lane, column < p, lane < d), total)
    store_tile(grad_source, row * d, lane, row < rows, lane < d, total)


@triton.jit(do_not_specialize=_LENGTHS)
def weight_gradient_kernel(
    splits, coefficients, tensor, rows, rows_per_split, rows_per_batch, d, p, pitch, stride_batch, stride_row,
    FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_P, BLOCK_D] tile of ``coefficients.T @ tensor`` over the rows of one split."""
    column = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    lane = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2).to(tl.int64)
    first = split * rows_per_split
    end = tl.minimum(first + rows_per_split, rows)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in tl.range(first, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        offsets = row_offsets(row, rows_per_batch, stride_batch, stride_row, FLAT)
        a = load_tile(coefficients, column, row * pitch, column < pitch, row < end)
        total = coefficient_dot(a, load_tile(tensor, offsets, lane, row < end, lane < d), total)
    store_tile(splits + split * p * d, column * d, lane, column < p, lane < d, total)


@triton.jit
def sum_splits_kernel(output, splits, num_splits, size, BLOCK: tl.constexpr):
    """``output = splits.sum(0)`` in order, ``splits`` [num_splits, size]."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.range(0, num_splits):
        total += tl.load(splits + element, mask=element < size, other=0.0)
        splits += size
    tl.store(output + element, round_to(total, output.dtype.element_ty), mask=element < size)


@triton.jit
def round_weights_kernel(prompts_half, keys_half, keys_low, prompts, keys, size, BLOCK: tl.constexpr):
    """Float32 weights in half precision; ``keys_low`` is what rounding took from the keys."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    dtype: tl.constexpr = keys_half.dtype.element_ty
    tl.store(prompts_half + element, round_to(tl.load(prompts + element, mask=inside), dtype), mask=inside)
    key = tl.load(keys + element, mask=inside)
    half = round_to(key, dtype)
    tl.store(keys_half + element, half, mask=inside)
    tl.store(keys_low + element, round_to(key - half.to(tl.float32), dtype), mask=inside)


# ---------------------------------------------------------------------------------------------------------------
# Tiles, chosen by p and dtype, and never tuned by a length. Each compiles for every target without a spilled register
# and within 99 KiB of shared memory, the least of any chip since Ampere; tests/build/test_aot.py holds them to that.


# By p rounded up to a power of two.
_HALF_TILES = {
    16: Tile(64, 64, 4, 3),
    32: Tile(64, 64, 4, 3),
    64: Tile(64, 64, 4, 3),
    128: Tile(64, 64, 8, 2),
    256: Tile(64, 32, 8, 3),
    512: Tile(32, 16, 8, 3),
    1024: Tile(16, 16, 8, 2),
}
_FLOAT32_TILES = {
    16: Tile(64, 32, 4, 2),
    32: Tile(32, 32, 4, 2),
    64: Tile(32, 32, 4, 2),
    128: Tile(32, 16, 8, 2),
    256: Tile(32, 16, 8, 3),
    512: Tile(16, 16, 8, 2),
    1024: Tile(4, 16, 8, 2),
}
_FEWEST_ROWS = 16  # that the tensor cores multiply
_PRODUCT_TILES = {True: Tile(64, 64, 4, 3), False: Tile(32, 64, 4, 2)}  # by whether activations are half
_SPLIT_ROWS = 256  # the weight gradients' sum over rows is cut into no shorter pieces
_ELEMENTS = 1024  # of one program of an elementwise kernel


def row_tile(num_prompts: int, dtype: torch.dtype) -> Tile:
    """The tile of the kernels that hold a row's scores, for activations in ``dtype``."""
    tiles = _FLOAT32_TILES if dtype == torch.float32 else _HALF_TILES
    return tiles[padded_prompts(num_prompts)]


def narrow(tile: Tile) -> Tile:
    """The same tile with few rows, for inputs too small to give every multiprocessor one of the full size."""
    return tile._replace(rows=min(tile.rows, _FEWEST_ROWS))


def product_tile(dtype: torch.dtype) -> Tile:
    """The tile of the backward's products: rows of what is summed or written, BLOCK_D."""
    return _PRODUCT_TILES[dtype != torch.float32]


def padded_prompts(num_prompts: int) -> int:
    """BLOCK_P: p rounded up to a power of two, at least 16."""
    return max(16, triton.next_power_of_2(num_prompts))


def product_prompts(num_prompts: int, dtype: torch.dtype) -> int:
    """BLOCK_P of the backward's products, which go through p in pieces."""
    return min(padded_prompts(num_prompts), 64 if dtype != torch.float32 else 32)


# ---------------------------------------------------------------------------------------------------------------
# Launchers. Nothing here reads device memory or waits for the device, so CUDA graphs can capture it.


class _Weights(NamedTuple):
    """Contiguous prompts and keys in the activations' dtype; ``keys_low`` is what rounding took, or None."""

    prompts: Tensor
    keys: Tensor
    keys_low: Tensor | None

    @classmethod
    def of(cls, prompts: Tensor, keys: Tensor, dtype: torch.dtype) -> "_Weights":
        prompts, keys = prompts.contiguous(), keys.contiguous()
        if keys.dtype == dtype:
            return cls(prompts, keys, None)
        half = torch.empty((3, *keys.shape), dtype=dtype, device=keys.device)
        size = keys.numel()
        round_weights_kernel[(triton.cdiv(size, _ELEMENTS),)](*half, prompts, keys, size, BLOCK=_ELEMENTS)
        return cls(*half)


class _Plan(NamedTuple):
    """What the forward and the backward of one call share."""

    source: Rows
    weights: _Weights
    rows: int
    rows_per_batch: int
    width: int
    num_prompts: int
    grid: tuple[int]
    arguments: dict[str, object]  # of the kernels that hold a row's scores

    @classmethod
    def of(
        cls, source: Tensor, prompts: Tensor, keys: Tensor, log_scale: Tensor, seed: Tensor | None,
        activation: str, row_weight: str, dropout_p: float,
    ) -> "_Plan":  # fmt: skip
        batch, rows_per_batch, width = batched(source).shape
        rows, num_prompts = batch * rows_per_batch, prompts.shape[0]
        tile = row_tile(num_prompts, source.dtype)
        if triton.cdiv(rows, tile.rows) < multiprocessors(source.device):
            tile = narrow(tile)
        weights = _Weights.of(prompts, keys, source.dtype)
        rows_of_source = Rows.of(source)
        arguments = {
            "source": rows_of_source.tensor,
            **rows_of_source.strides("source"),
            "prompts": weights.prompts,
            "keys": weights.keys,
            "keys_low": weights.keys_low,
            "log_scale": log_scale,
            **dropout_arguments(seed, dropout_p),
            "rows": rows,
            "rows_per_batch": rows_per_batch,
            "d": width,
            "p": num_prompts,
            "SOFTMAX": activation == "softmax",
            "MAX_WEIGHT": row_weight == "max",
            "SPLIT_KEYS": weights.keys_low is not None,
            "BLOCK_M": tile.rows,
            "BLOCK_D": tile.width,
            "BLOCK_P": padded_prompts(num_prompts),
            **launch_options(tile),
        }
        grid = (triton.cdiv(rows, tile.rows),)
        return cls(rows_of_source, weights, rows, rows_per_batch, width, num_prompts, grid, arguments)


def prompt_diffusion(hidden: Tensor, *arguments: Any) -> list[Tensor]:
    """``fast_prompt.reference.prompt_diffusion`` for tensors that ``fast_prompt.backends.triton`` takes.

    hidden and source are [n, d] or [B, n, d] of any strides, not empty; log_scale (float32) and seed (int64) are
    scalars on their device. Returns a contiguous tensor like ``hidden``.
    """
    output = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    _forward(output, hidden, *arguments)
    return [output]


def prompt_diffusion_(hidden: Tensor, *arguments: Any) -> None:
    """The same, written over ``hidden``, which is contiguous."""
    _forward(hidden, hidden, *arguments)


def _forward(
    output: Tensor, hidden: Tensor, source: Tensor, prompts: Tensor, keys: Tensor, log_scale: Tensor,
    seed: Tensor | None, activation: str, row_weight: str, dropout_p: float,
) -> None:  # fmt: skip
    with device_guard(source.device):
        plan = _Plan.of(source, prompts, keys, log_scale, seed, activation, row_weight, dropout_p)
        rows = Rows.of(hidden)
        forward_kernel[plan.grid](output=output, hidden=rows.tensor, **rows.strides("hidden"), **plan.arguments)


def prompt_diffusion_backward(
    grad: Tensor, source: Tensor, prompts: Tensor, keys: Tensor, log_scale: Tensor, seed: Tensor | None,
    output: Tensor | None, activation: str, row_weight: str, dropout_p: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients that are needed, contiguous, in their inputs' dtypes; the same bits every time.

    grad is like source, of any strides; the output may be None where log_scale's gradient is not needed.
    """
    need_hidden, need_source, need_prompts, need_keys, need_scale = needs
    with device_guard(source.device):
        plan = _Plan.of(source, prompts, keys, log_scale, seed, activation, row_weight, dropout_p)
        rows_of_grad = Rows.of(grad)
        pitch = 16 * triton.cdiv(plan.num_prompts, 16)  # keeps rows of the coefficients aligned for wide loads

        def empty(needed: bool, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=source.device) if needed else None

        dtype = coefficients_dtype(source.dtype)
        prompt_coefficients = empty(need_prompts, (plan.rows, pitch), dtype)
        key_coefficients = empty(need_source or need_keys, (plan.rows, pitch), dtype)
        grad_hidden = empty(need_hidden, source.shape, source.dtype)
        scale_partials = empty(need_scale, plan.grid, torch.float32)
        coefficients_kernel[plan.grid](
            prompt_coefficients=prompt_coefficients, key_coefficients=key_coefficients,
            grad_hidden=grad_hidden, scale_partials=scale_partials,
            grad=rows_of_grad.tensor, **rows_of_grad.strides("grad"),
            output=output.contiguous() if need_scale else None, pitch=pitch,
            NEED_PROMPTS=need_prompts, NEED_SCORES=need_source or need_keys, NEED_HIDDEN=need_hidden,
            NEED_SCALE=need_scale, **plan.arguments,
        )  # fmt: skip
        weight_dtype = prompts.dtype
        return needed(
            (
                grad_hidden,
                _source_gradient(key_coefficients, plan).view(source.shape) if need_source else None,
                _weight_gradient(prompt_coefficients, rows_of_grad, plan, weight_dtype) if need_prompts else None,
                _weight_gradient(key_coefficients, plan.source, plan, weight_dtype) if need_keys else None,
                scale_partials.sum().view(log_scale.shape) if need_scale else None,
            ),
            needs,
        )


def _source_gradient(key_coefficients: Tensor, plan: _Plan) -> Tensor:
    """dX = dS K, [B, n, d]."""
    source = plan.source.tensor
    output = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    tile = product_tile(source.dtype)
    source_gradient_kernel[triton.cdiv(plan.rows, tile.rows), triton.cdiv(plan.width, tile.width)](
        output, key_coefficients, plan.weights.keys, plan.rows, plan.width, plan.num_prompts, key_coefficients.shape[1],
        BLOCK_M=tile.rows, BLOCK_D=tile.width, BLOCK_P=product_prompts(plan.num_prompts, source.dtype),
        **launch_options(tile),
    )  # fmt: skip
    return output


def _weight_gradient(coefficients: Tensor, rows: Rows, plan: _Plan, dtype: torch.dtype) -> Tensor:
    """``coefficients.T @ rows``, [p, d] in ``dtype``; split over rows until every multiprocessor has two programs."""
    p, d = plan.num_prompts, plan.width
    tile, block_p = product_tile(rows.tensor.dtype), product_prompts(p, rows.tensor.dtype)
    tiles = triton.cdiv(p, block_p), triton.cdiv(d, tile.width)
    wanted = triton.cdiv(2 * multiprocessors(coefficients.device), tiles[0] * tiles[1])
    rows_per_split = max(_SPLIT_ROWS, triton.cdiv(triton.cdiv(plan.rows, wanted), tile.rows) * tile.rows)
    num_splits = triton.cdiv(plan.rows, rows_per_split)
    output = torch.empty((p, d), dtype=dtype, device=coefficients.device)
    splits = output
    if num_splits > 1:
        splits = torch.empty((num_splits, p, d), dtype=torch.float32, device=coefficients.device)
    weight_gradient_kernel[(*tiles, num_splits)](
        splits, coefficients, rows.tensor, plan.rows, rows_per_split, plan.rows_per_batch, d, p, coefficients.shape[1],
        rows.stride_batch, rows.stride_row,
        FLAT=rows.flat, BLOCK_M=tile.rows, BLOCK_D=tile.width, BLOCK_P=block_p, **launch_options(tile),
    )  # fmt: skip
    if num_splits > 1:
        sum_splits_kernel[(triton.cdiv(p * d, _ELEMENTS),)](output, splits, num_splits, p * d, BLOCK=_ELEMENTS)
    return output
