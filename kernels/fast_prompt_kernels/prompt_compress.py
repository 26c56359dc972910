"""Triton kernels of ``prompt_compress`` in its absorbed form; `fast_prompt.reference` is the definition.

A sample's R = h m rows are its (head, query) pairs. ``u = W_k[h]^T q / sqrt(d_h)``, ``a = softmax(u X^T)``, ``w =
dropout(a)``, ``y = w X`` and ``o = W_v[h] y + b_v[h] sum(w)``: no token is ever projected.

Forward, three launches. At m = 1 it is bound by one read of the tokens X [B, n, d] (19 MB at B = 64, n = 197, d =
768 in bfloat16: 5.8 us at 3.35 TB/s); the weights and everything else come to a fifth of that and stay in L2.

1. `expand_kernel` takes the queries through W_k: u [B, R, d].
2. `attend_kernel` is the pass over the tokens. A program has one sample's rows, all heads together, so that the 12
   rows of m = 1 fill the tensor cores' 16. A tile of tokens of the whole width d lies in shared memory once, copied
   there ahead of time, and is multiplied twice, for scores and for y: the online softmax lets one pass do both. y is
   [rows, d] in registers, in pieces of at most 256 columns, since d is rarely a power of two. Where a batch leaves
   multiprocessors idle, a sample's tokens are split among programs (B = 64: two, on 132 multiprocessors).
3. `output_kernel` adds the splits with their softmax weights while it takes them through W_v.

Backward, with g the gradient of o and dy = W_v[h]^T g: `expand_kernel` for dy; `score_gradient_kernel` passes over
the tokens once more for ds and du = ds X; `query_gradient_kernel` and `weight_gradient_kernel` are products of what
has R rows a sample. The softmax's own sum over a row is known before the pass, since ``sum_j w_j dw_j = dy y + (g b_v)
sum(w)``. Without kept probabilities u and y are first computed again. Only tokens that want a gradient cost a
`visual_gradient_kernel`, a product of stored w and ds. Sums over splits go in order, and there are no atomics: the
same bits every time.

Precision: sums are float32. u and dy are stored in the activations' dtype, divided by their row's largest query or
gradient, so that float16's range holds them. Rounded dy is what both ``dy y`` and ``dw`` are made of: an offset that
all tokens share would not cancel otherwise. Float32 weights beside half activations are rounded to half when loaded.

A wide d, whose tile of tokens or y would not fit, is cut into column blocks: each has its own y and repeats the scores
over all of d, so that X comes from L2 more often. It is right for every size, and fast up to d = 1024 or so.

Speeds above are arithmetic: none of these kernels has run on a GPU yet.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_prompt_kernels.tiles import (
    TINY,
    Rows,
    Tile,
    chunk_width,
    coefficient_dot,
    device_guard,
    dot,
    dropout_arguments,
    dropout_words,
    joined,
    launch_options,
    load_tile,
    multiprocessors,
    needed,
    round_to,
    row_offsets,
    store_tile,
)

LENGTHS = (
    "all_queries",
    "all_rows",
    "queries",
    "rows",
    "tokens",
    "tokens_per_split",
    "num_splits",
    "row_blocks",
    "token_blocks",
)  # no new kernel for new ones

# ---------------------------------------------------------------------------------------------------------------
# Rows and tokens. A "query" is one of all B m; row ``(b h + head) m + i`` is query ``b m + i`` at one head.


@triton.jit
def row_of(query, head, heads, queries):
    """The row of a query at a head."""
    return ((query // queries) * heads + head) * queries + query % queries


@triton.jit
def load_chunks(base, offsets, valid, first, d, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns from ``first`` on of the rows at ``offsets``: CHUNKS tiles of BLOCK_D columns."""
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        lane = first + chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        tiles = tiles + (load_tile(base, offsets, lane, valid, lane < d),)
    return tiles


@triton.jit
def without_padding(tile, inside, MASKED: tl.constexpr):
    """Tokens that are padding as zeros. A load that waited for the mask could not be made ahead of time."""
    return tl.where(inside[:, None], tile, tl.zeros_like(tile)) if MASKED else tile


@triton.jit
def load_tokens(
    visual, offsets, exists, inside, first, d, MASKED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """`load_chunks` of tokens, padding as zeros."""
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        lane = first + chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        tiles = tiles + (without_padding(load_tile(visual, offsets, lane, exists, lane < d), inside, MASKED),)
    return tiles


@triton.jit
def row_products(
    tiles, rows, offsets, valid, token_tiles, visual, token_offsets, exists, inside, d,
    MASKED: tl.constexpr, WHOLE: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``rows @ tokens.T`` over all of d, from tiles on chip where those hold it all."""
    total = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    if WHOLE:
        for chunk in tl.static_range(CHUNKS):  # sums of their own, which the tensor cores need not wait for
            total += dot(tiles[chunk], tl.trans(token_tiles[chunk]), tl.zeros([BLOCK_R, BLOCK_T], tl.float32))
    else:
        for start in tl.range(0, d, BLOCK_D):
            lane = start + tl.arange(0, BLOCK_D)
            tile = without_padding(load_tile(visual, token_offsets, lane, exists, lane < d), inside, MASKED)
            total = dot(load_tile(rows, offsets, lane, valid, lane < d), tl.trans(tile), total)
    return total


@triton.jit
def valid_tokens(token, end, mask, sample, stride_batch, stride_row, MASKED: tl.constexpr):
    """Which tokens are there and no padding."""
    valid = token < end
    if MASKED:
        valid &= tl.load(mask + sample * stride_batch + token * stride_row, mask=valid, other=1) == 0
    return valid


# ---------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit(do_not_specialize=LENGTHS)
def expand_kernel(
    expanded, row_scale, bias_product, tensor, weight, bias, factor: tl.float32,
    all_queries: tl.int64, queries, heads, head_dim, d, tensor_stride_batch, tensor_stride_row, weight_stride,
    TENSOR_FLAT: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``tensor[:, head] @ weight[head]`` for BLOCK_M queries, BLOCK_D columns: ``expanded * row_scale / factor``.

    BIASED: also ``tensor[:, head] @ bias[head]``.
    """
    head = tl.program_id(1)
    query = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = query < all_queries
    offsets = row_offsets(query, queries, tensor_stride_batch, tensor_stride_row, TENSOR_FLAT)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest = tl.zeros([BLOCK_M], tl.float32)
    product = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, head_dim, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        column = head * head_dim + inner
        a = load_tile(tensor, offsets, column, valid, inner < head_dim)
        b = load_tile(weight, column.to(tl.int64) * weight_stride, lane, inner < head_dim, lane < d)
        total = dot(a, round_to(b, a.dtype), total)
        a = a.to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(a), axis=1))
        if BIASED:
            product += tl.sum(a * tl.load(bias + column, mask=inner < head_dim, other=0.0).to(tl.float32), axis=1)
    unit = tl.maximum(largest, TINY)
    row = row_of(query, head, heads, queries)
    store_tile(expanded, row * d, lane, valid, lane < d, total * (1.0 / unit)[:, None])
    if tl.program_id(2) == 0:
        tl.store(row_scale + row, unit * factor, mask=valid)
        if BIASED:
            tl.store(bias_product + row, product, mask=valid)


@triton.jit(do_not_specialize=LENGTHS)
def attend_kernel(
    split_attended, split_logsumexp, split_kept, scores,
    u, u_scale, visual, mask, seed, threshold: tl.uint32, keep_scale: tl.float32,
    rows, tokens, tokens_per_split, row_blocks, all_rows: tl.int64, d,
    visual_stride_batch, visual_stride_row, mask_stride_batch, mask_stride_row,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, KEEP_SCORES: tl.constexpr,
    WHOLE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A split's share of y, of the logarithm of the softmax's sum and of sum(w), for BLOCK_R rows of a sample."""
    sample = (tl.program_id(0) // row_blocks).to(tl.int64)
    local_row = (tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = local_row < rows
    row = sample * rows + local_row
    first = tl.program_id(2) * CHUNKS * BLOCK_D
    u_tiles = load_chunks(u, row * d, valid, 0, d, CHUNKS if WHOLE else 0, BLOCK_D)
    scale = tl.load(u_scale + row, mask=valid, other=0.0)
    visual += sample * visual_stride_batch
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros([BLOCK_R, BLOCK_D], tl.float32),)
    largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    kept = tl.zeros([BLOCK_R], tl.float32)
    split = tl.program_id(1).to(tl.int64)
    end = tl.minimum((split + 1) * tokens_per_split, tokens)
    for start in tl.range(split * tokens_per_split, end, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        inside = valid_tokens(token, end, mask, sample, mask_stride_batch, mask_stride_row, MASKED)
        offsets = token * visual_stride_row
        exists = token < end
        tiles = load_tokens(visual, offsets, exists, inside, first, d, MASKED, CHUNKS, BLOCK_D)
        score = row_products(
            u_tiles, u, row * d, valid, tiles, visual, offsets, exists, inside, d,
            MASKED, WHOLE, CHUNKS, BLOCK_R, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        score = tl.where(inside[None, :], score * scale[:, None], float("-inf"))
        if KEEP_SCORES and tl.program_id(2) == 0:
            store_tile(scores, row * tokens, token, valid, exists, score)
        before = largest
        largest = tl.maximum(before, tl.max(score, axis=1))
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        weight = tl.exp(score - shift[:, None])
        shrink = tl.exp(before - shift)
        total = total * shrink + tl.sum(weight, axis=1)
        if DROPOUT:
            weight = tl.where(dropout_words(row, token, tokens, tl.load(seed)) >= threshold, weight, 0.0)
            kept = kept * shrink + tl.sum(weight, axis=1)
        weight = round_to(weight, visual.dtype.element_ty)
        updated = ()
        for chunk in tl.static_range(CHUNKS):
            updated = updated + (dot(weight, tiles[chunk], sums[chunk] * shrink[:, None]),)
        sums = updated
    share = split * all_rows + row
    inverse = tl.where(total == 0, 0.0, keep_scale / total)
    for chunk in tl.static_range(CHUNKS):
        lane = first + chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        store_tile(split_attended, share * d, lane, valid, lane < d, sums[chunk] * inverse[:, None])
    if tl.program_id(2) == 0:
        logsumexp = tl.where(total == 0, float("-inf"), largest + tl.log(total))
        tl.store(split_logsumexp + share, logsumexp, mask=valid)
        if DROPOUT:
            tl.store(split_kept + share, kept * inverse, mask=valid)


@triton.jit
def contract(
    total, values, offsets, valid, share, weight, column, column_valid, weight_stride, d,
    BLOCK_D: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """``total + (share * values) @ weight[column].T``, values [rows, d] in float32, the product in ``dtype``."""
    for start in tl.range(0, d, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        a = load_tile(values, offsets, lane, valid, lane < d) * share[:, None]
        b = load_tile(weight, lane, column.to(tl.int64) * weight_stride, lane < d, column_valid)
        total = coefficient_dot(a, round_to(b, dtype), total)
    return total


@triton.jit(do_not_specialize=LENGTHS)
def output_kernel(
    output, logsumexp, probabilities, attended, split_attended, split_logsumexp, split_kept, weight, bias,
    all_queries: tl.int64, all_rows: tl.int64, queries, heads, head_dim, d, tokens, num_splits, weight_stride,
    BIASED: tl.constexpr, DROPOUT: tl.constexpr, KEEP_PROBABILITIES: tl.constexpr, ADD_ATTENDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_E columns of one head's output for BLOCK_M queries, and their part of what is kept for the backward."""
    head, block = tl.program_id(1), tl.program_id(2)
    query = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = query < all_queries
    row = row_of(query, head, heads, queries)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for split in tl.range(0, num_splits):
        part = tl.load(split_logsumexp + split * all_rows + row, mask=valid, other=float("-inf"))
        before = largest
        largest = tl.maximum(before, part)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(before - shift) + tl.exp(part - shift)
    whole = tl.where(total == 0, float("-inf"), largest + tl.log(total))
    if block == 0:
        tl.store(logsumexp + row, whole, mask=valid)
    nothing = whole == float("-inf")

    column = block * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = column < head_dim
    column += head * head_dim
    result = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    kept = tl.zeros([BLOCK_M], tl.float32)
    for split in tl.range(0, num_splits):
        shares = split * all_rows
        part = tl.load(split_logsumexp + shares + row, mask=valid, other=float("-inf"))
        share = tl.where(nothing, 0.0, tl.exp(part - whole))
        result = contract(
            result, split_attended + shares * d, row * d, valid, share,
            weight, column, inside, weight_stride, d, BLOCK_D, output.dtype.element_ty,
        )  # fmt: skip
        kept += share * tl.load(split_kept + shares + row, mask=valid, other=0.0) if DROPOUT else share
    if BIASED:
        result += kept[:, None] * tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    store_tile(output, query * (heads * head_dim), column, valid, inside, result)

    if KEEP_PROBABILITIES:  # until now the scores
        for start in tl.range(block * BLOCK_D, tokens, tl.num_programs(2) * BLOCK_D):
            token = start + tl.arange(0, BLOCK_D)
            score = load_tile(probabilities, row * tokens, token, valid, token < tokens)
            probability = tl.where(nothing[:, None], 0.0, tl.exp(score - whole[:, None]))
            store_tile(probabilities, row * tokens, token, valid, token < tokens, probability)
    if ADD_ATTENDED:
        for start in tl.range(block * BLOCK_D, d, tl.num_programs(2) * BLOCK_D):
            lane = start + tl.arange(0, BLOCK_D)
            added = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for split in tl.range(0, num_splits):
                shares = split * all_rows
                part = tl.load(split_logsumexp + shares + row, mask=valid, other=float("-inf"))
                share = tl.where(nothing, 0.0, tl.exp(part - whole))
                added += share[:, None] * load_tile(split_attended + shares * d, row * d, lane, valid, lane < d)
            store_tile(attended, row * d, lane, valid, lane < d, added)


# ---------------------------------------------------------------------------------------------------------------
# Tiles, chosen by widths, rows a sample, dtype and the chip's shared memory, and never tuned by a length.


class TokenTile(NamedTuple):
    """How a program passes over tokens.

    Attributes:
        rows, tokens: of one step.
        width, chunks: the columns it sums, in so many tiles of this width.
        whole: whether those are all columns.
        num_warps, num_stages: of Triton; one stage fewer is the tiles of tokens in shared memory.
    """

    rows: int
    tokens: int
    width: int
    chunks: int
    whole: bool
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int | bool]:
        """Compile-time arguments of a kernel."""
        return {
            "WHOLE": self.whole,
            "CHUNKS": self.chunks,
            "BLOCK_R": self.rows,
            "BLOCK_T": self.tokens,
            "BLOCK_D": self.width,
        }


# Tokens a step and steps in shared memory at once, the fastest first; by whether activations are half.
_STEPS = {True: ((32, 3), (32, 2), (16, 3), (16, 2), (16, 1)), False: ((16, 2), (16, 1))}
_MOST_SUMS = {1: 16 * 1024, 2: 16 * 768}  # elements that registers hold beside so many operands
_SPARE_MEMORY = 4096  # bytes of shared memory for the reductions
_PIECE = 256  # columns of a column block, where the whole width does not fit
_PRODUCT_TILES = {True: Tile(32, 32, 4, 2), False: Tile(16, 32, 4, 2)}  # by whether activations are half
NARROW_TILE = Tile(16, 32, 4, 3)  # and always of `output_kernel`, which has the most to hold


def token_tile(width: int, rows: int, dtype: torch.dtype, operands: int, masked: bool, shared_memory: int) -> TokenTile:
    """The tile of a pass over tokens of one width, for so many rows a sample.

    Args:
        operands: how many tensors of all rows and columns lie in shared memory beside the tokens.
        masked: whether tokens pass through registers, where padding becomes zero, and back, once for each product.
        shared_memory: bytes that a program may have.
    """
    half = dtype != torch.float32
    block_d = chunk_width(width, (256 if operands == 1 else 128) if half else 64)
    chunks = triton.cdiv(width, block_d)
    columns, most = chunks * block_d, _MOST_SUMS[operands]
    block_r = 32 if rows > 16 and half and not masked and 32 * columns <= most else 16
    if block_r * columns <= most:
        for tokens, steps in _STEPS[half]:
            needed = columns * dtype.itemsize * (tokens * (steps + 2 * masked) + block_r * operands)
            if needed + _SPARE_MEMORY <= shared_memory:
                return TokenTile(block_r, tokens, block_d, chunks, True, 8, steps + 1)
    piece = min(chunks, _PIECE // block_d)
    return TokenTile(16, 16, block_d, piece, piece == chunks, 8, 2)


def product_tile(all_queries: int, heads: int, head_dim: int, dtype: torch.dtype, programs: int) -> Tile:
    """Queries and columns of the products with the weights; a small one where else programs would be too few."""
    tile = _PRODUCT_TILES[dtype != torch.float32]
    if triton.cdiv(all_queries, tile.rows) * heads * triton.cdiv(head_dim, tile.width) < programs:
        tile = NARROW_TILE
    return tile


def product_blocks(tile: Tile, head_dim: int, width: int, weight_dtype: torch.dtype) -> dict[str, int]:
    """Compile-time arguments of those kernels: queries, columns of a head and columns of a token."""
    columns, most = max(16, triton.next_power_of_2(head_dim)), 32 if weight_dtype == torch.float32 else 64
    block_d = min(max(16, triton.next_power_of_2(width)), most)
    return {"BLOCK_M": tile.rows, "BLOCK_E": min(columns, tile.width), "BLOCK_D": block_d}


# ---------------------------------------------------------------------------------------------------------------
# Launchers. Nothing here reads device memory or waits for the device, so CUDA graphs can capture it.


class Sizes(NamedTuple):
    """B, m, n, d, h and d_h of a call."""

    batch: int
    queries: int
    tokens: int
    width: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, query: Tensor, visual: Tensor, num_heads: int) -> "Sizes":
        """From the op's arguments."""
        batch, queries, inner_width = query.shape
        return cls(batch, queries, *visual.shape[1:], num_heads, inner_width // num_heads)

    @property
    def rows(self) -> int:
        """Of a sample."""
        return self.heads * self.queries

    @property
    def all_queries(self) -> int:
        """Of the batch."""
        return self.batch * self.queries

    @property
    def all_rows(self) -> int:
        """Of the batch."""
        return self.batch * self.rows

    def arguments(self) -> dict[str, int]:
        """Of the kernels that multiply by weights."""
        return {
            "all_queries": self.all_queries,
            "all_rows": self.all_rows,
            "queries": self.queries,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "d": self.width,
        }

    def tile(self, tensor: Tensor, weight_dtype: torch.dtype) -> tuple[Tile, dict[str, int]]:
        """The tile of those kernels, and its constants."""
        programs = multiprocessors(tensor.device)
        tile = product_tile(self.all_queries, self.heads, self.head_dim, tensor.dtype, programs)
        return tile, product_blocks(tile, self.head_dim, self.width, weight_dtype)


class TokenPass(NamedTuple):
    """How the tokens are gone through: launch grid, splits, and the arguments of each kernel that does it."""

    grid: tuple[int, int, int]
    splits: int
    arguments: dict[str, object]

    @classmethod
    def of(
        cls, sizes: Sizes, visual: Tensor, mask: Tensor | None, seed: Tensor | None, dropout_p: float, operands: int
    ) -> "TokenPass":
        """``operands`` as in ``token_tile``."""
        tile = token_tile(
            sizes.width, sizes.rows, visual.dtype, operands, mask is not None, _shared_memory(visual.device)
        )
        visual = joined(visual)
        row_blocks = triton.cdiv(sizes.rows, tile.rows)
        column_blocks = triton.cdiv(sizes.width, tile.chunks * tile.width)
        programs = sizes.batch * row_blocks * column_blocks
        splits = max(1, min(multiprocessors(visual.device) // programs, sizes.tokens // tile.tokens))
        tokens_per_split = triton.cdiv(sizes.tokens, splits)
        splits = triton.cdiv(sizes.tokens, tokens_per_split)
        arguments = {
            "visual": visual,
            "visual_stride_batch": visual.stride(0),
            "visual_stride_row": visual.stride(1),
            "mask": None if mask is None else mask.view(torch.uint8),
            "mask_stride_batch": 0 if mask is None else mask.stride(0),
            "mask_stride_row": 0 if mask is None else mask.stride(1),
            "MASKED": mask is not None,
            **dropout_arguments(seed, dropout_p),
            "rows": sizes.rows,
            "tokens": sizes.tokens,
            "tokens_per_split": tokens_per_split,
            "row_blocks": row_blocks,
            "all_rows": sizes.all_rows,
            "d": sizes.width,
            **tile.constants(),
            **launch_options(tile),
        }
        return cls((sizes.batch * row_blocks, splits, column_blocks), splits, arguments)


class Expanded(NamedTuple):
    """Rows taken through a weight: ``tensor`` [B, R, d] times ``scale`` [B, R]; their product with the bias."""

    tensor: Tensor
    scale: Tensor
    bias_product: Tensor | None


def expand(tensor: Tensor, weight: Tensor, bias: Tensor | None, factor: float, sizes: Sizes) -> Expanded:
    """``factor * tensor @ weight``, head by head: u of the queries, dy of the gradient."""
    rows, weight, bias = Rows.of(tensor), joined(weight), None if bias is None else joined(bias)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((sizes.batch, sizes.rows, *shape), dtype=dtype, device=tensor.device)

    result = Expanded(empty(sizes.width, dtype=tensor.dtype), empty(), None if bias is None else empty())
    tile, blocks = sizes.tile(tensor, weight.dtype)
    grid = (triton.cdiv(sizes.all_queries, tile.rows), sizes.heads, triton.cdiv(sizes.width, blocks["BLOCK_D"]))
    arguments = sizes.arguments()
    del arguments["all_rows"]
    expand_kernel[grid](
        *result, rows.tensor, weight, bias, factor, **arguments,
        **rows.strides("tensor"), weight_stride=weight.stride(0), BIASED=bias is not None,
        BLOCK_M=blocks["BLOCK_M"], BLOCK_K=blocks["BLOCK_E"], BLOCK_D=blocks["BLOCK_D"], **launch_options(tile),
    )  # fmt: skip
    return result


class Attended(NamedTuple):
    """Each split's y [splits, B, R, d], logarithm of its softmax's sum and, with dropout, sum(w), [splits, B, R]."""

    tensor: Tensor
    logsumexp: Tensor
    kept: Tensor | None


def attend(
    u: Expanded, sizes: Sizes, token_pass: TokenPass, scores: Tensor | None = None, attended: Tensor | None = None
) -> Attended:
    """The pass over the tokens; it writes the scores, and y where a single split makes it all, where they are given."""
    device, shape = u.tensor.device, (token_pass.splits, sizes.batch, sizes.rows)

    def empty(*more: int) -> Tensor:
        return torch.empty((*shape, *more), dtype=torch.float32, device=device)

    whole = attended is not None and token_pass.splits == 1
    dropout = token_pass.arguments["DROPOUT"]
    result = Attended(attended if whole else empty(sizes.width), empty(), empty() if dropout else None)
    attend_kernel[token_pass.grid](
        *result, scores, u.tensor, u.scale, **token_pass.arguments, KEEP_SCORES=scores is not None
    )
    return result


def prompt_compress(
    query: Tensor, visual: Tensor, key_weight: Tensor, value_weight: Tensor, key_bias: Tensor | None,
    value_bias: Tensor | None, key_padding_mask: Tensor | None, seed: Tensor | None, num_heads: int, dropout_p: float,
    keep: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """``fast_prompt.reference.prompt_compress`` on tensors that ``fast_prompt.backends.triton`` takes.

    Returns the output [B, m, E], contiguous, dtype of ``query``, and those to be kept, in float32, of the logarithm of
    the softmax's sums [B, h, m], the probabilities before dropout [B, h, m, n] and y [B, h, m, d_v].
    """
    _, keep_probabilities, keep_attended = keep
    sizes = Sizes.of(query, visual, num_heads)

    def empty(*shape: int) -> Tensor:
        shape = (sizes.batch, num_heads, sizes.queries, *shape)
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    with device_guard(query.device):
        logsumexp = empty()
        probabilities = empty(sizes.tokens) if keep_probabilities else None
        attended = empty(sizes.width) if keep_attended else None
        u = expand(query, key_weight, None, sizes.head_dim**-0.5, sizes)
        token_pass = TokenPass.of(sizes, visual, key_padding_mask, seed, dropout_p, operands=1)
        splits = attend(u, sizes, token_pass, probabilities, attended)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        value_weight, tile = joined(value_weight), NARROW_TILE
        value_bias = None if value_bias is None else joined(value_bias)
        blocks = product_blocks(tile, sizes.head_dim, sizes.width, value_weight.dtype)
        grid = (triton.cdiv(sizes.all_queries, tile.rows), num_heads, triton.cdiv(sizes.head_dim, blocks["BLOCK_E"]))
        output_kernel[grid](
            output, logsumexp, probabilities, attended, *splits, value_weight, value_bias,
            **sizes.arguments(), tokens=sizes.tokens, num_splits=token_pass.splits,
            weight_stride=value_weight.stride(0), BIASED=value_bias is not None, DROPOUT=dropout_p > 0,
            KEEP_PROBABILITIES=keep_probabilities, ADD_ATTENDED=keep_attended and token_pass.splits > 1,
            **blocks, **launch_options(tile),
        )  # fmt: skip
    return [output, *needed((logsumexp, probabilities, attended), keep)]


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; for the interpreter the least of any chip since Ampere."""
    if device.type != "cuda":
        return 101376
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
