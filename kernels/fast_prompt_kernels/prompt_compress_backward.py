"""Triton kernels of ``prompt_compress``'s backward pass; `fast_prompt_kernels.prompt_compress` says how it goes."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_prompt_kernels.prompt_compress import (
    LENGTHS,
    Attended,
    Expanded,
    Sizes,
    TokenPass,
    attend,
    contract,
    expand,
    load_chunks,
    load_tokens,
    row_of,
    row_products,
    valid_tokens,
)
from fast_prompt_kernels.tiles import (
    Rows,
    Tile,
    coefficient_dot,
    coefficients_dtype,
    device_guard,
    dropout_words,
    joined,
    launch_options,
    load_tile,
    needed,
    round_to,
    row_offsets,
    store_tile,
)

# ---------------------------------------------------------------------------------------------------------------
# The pass over the tokens


@triton.jit
def split_weight(split_logsumexp, logsumexp, split, row, valid, all_rows, SOFTMAX: tl.constexpr, BLOCK: tl.constexpr):
    """What a split's share counts for in a row: its part of the softmax, or 1 where shares only add up."""
    if SOFTMAX:
        whole = tl.load(logsumexp + row, mask=valid, other=float("-inf"))
        part = tl.load(split_logsumexp + split * all_rows + row, mask=valid, other=float("-inf"))
        return tl.where(whole == float("-inf"), 0.0, tl.exp(part - whole))
    return tl.full([BLOCK], 1.0, tl.float32)


@triton.jit
def _kept_sum(probabilities, row, valid, tokens, seed, threshold, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sums of the probabilities that dropout keeps."""
    kept = tl.zeros([BLOCK_R], tl.float32)
    for start in tl.range(0, tokens, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        a = load_tile(probabilities, row * tokens, token, valid, token < tokens)
        kept += tl.sum(tl.where(dropout_words(row, token, tokens, seed) >= threshold, a, 0.0), axis=1)
    return kept


@triton.jit
def _row_dots(
    tiles, rows, others, offsets, valid, d,
    WHOLE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``(rows * others).sum(-1)``, the rows from their tiles on chip where those hold them all."""
    total = tl.zeros([BLOCK_R], tl.float32)
    if WHOLE:
        for chunk in tl.static_range(CHUNKS):
            lane = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            other = load_tile(others, offsets, lane, valid, lane < d)
            total += tl.sum(tiles[chunk].to(tl.float32) * other, axis=1)
    else:
        for start in tl.range(0, d, BLOCK_D):
            lane = start + tl.arange(0, BLOCK_D)
            other = load_tile(others, offsets, lane, valid, lane < d)
            total += tl.sum(load_tile(rows, offsets, lane, valid, lane < d).to(tl.float32) * other, axis=1)
    return total


@triton.jit
def _row_means(
    dy_tiles, dy, dy_scale, bias_grad, probabilities, logsumexp, split_attended, split_logsumexp, split_kept,
    row, valid, all_rows, num_splits, tokens, d, seed, threshold, keep_scale,
    DROPOUT: tl.constexpr, BIASED: tl.constexpr, KEPT: tl.constexpr,
    WHOLE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows' sums of ``a da``, which are those of ``w dw``, and of w where a bias asks for them."""
    mean = tl.zeros([BLOCK_R], tl.float32)
    kept = tl.zeros([BLOCK_R], tl.float32)
    for split in tl.range(0, num_splits):
        share = split_weight(split_logsumexp, logsumexp, split, row, valid, all_rows, not KEPT, BLOCK_R)
        attended = split_attended + split * all_rows * d
        mean += share * _row_dots(dy_tiles, dy, attended, row * d, valid, d, WHOLE, CHUNKS, BLOCK_R, BLOCK_D)
        if BIASED and DROPOUT and not KEPT:
            kept += share * tl.load(split_kept + split * all_rows + row, mask=valid, other=0.0)
    mean *= dy_scale
    if BIASED and DROPOUT:
        if KEPT:
            kept = keep_scale * _kept_sum(probabilities, row, valid, tokens, seed, threshold, BLOCK_R, BLOCK_T)
        mean += bias_grad * kept
    elif BIASED:
        whole = tl.load(logsumexp + row, mask=valid, other=float("-inf"))
        kept = tl.where(whole == float("-inf"), 0.0, 1.0)
    return mean, kept


@triton.jit(do_not_specialize=LENGTHS)
def score_gradient_kernel(
    split_gradient, kept, token_weights, score_gradients,
    dy, dy_scale, bias_product, u, u_scale, visual, mask, seed, threshold: tl.uint32, keep_scale: tl.float32,
    logsumexp, probabilities, split_attended, split_logsumexp, split_kept,
    rows, tokens, tokens_per_split, row_blocks, all_rows: tl.int64, num_splits, d,
    visual_stride_batch, visual_stride_row, mask_stride_batch, mask_stride_row,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, BIASED: tl.constexpr, KEPT: tl.constexpr, NEED_VISUAL: tl.constexpr,
    WHOLE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A split's share of du for BLOCK_R rows of a sample; sum(w), and w and ds for the tokens' own gradient."""
    sample = (tl.program_id(0) // row_blocks).to(tl.int64)
    local_row = (tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = local_row < rows
    row = sample * rows + local_row
    first = tl.program_id(2) * CHUNKS * BLOCK_D
    dy_tiles = load_chunks(dy, row * d, valid, 0, d, CHUNKS if WHOLE else 0, BLOCK_D)
    u_tiles = load_chunks(u, row * d, valid, 0, d, CHUNKS if WHOLE and not KEPT else 0, BLOCK_D)
    grad_scale = tl.load(dy_scale + row, mask=valid, other=0.0)
    whole = tl.load(logsumexp + row, mask=valid, other=float("-inf"))

    # Without dropout it is the same for all tokens, which the softmax cancels.
    bias_grad = tl.load(bias_product + row, mask=valid, other=0.0) if BIASED and DROPOUT else tl.zeros_like(whole)
    word_seed = tl.load(seed) if DROPOUT else 0
    mean, kept_sum = _row_means(
        dy_tiles, dy, grad_scale, bias_grad, probabilities, logsumexp, split_attended, split_logsumexp, split_kept,
        row, valid, all_rows, num_splits, tokens, d, word_seed, threshold, keep_scale,
        DROPOUT, BIASED, KEPT, WHOLE, CHUNKS, BLOCK_R, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    if BIASED and tl.program_id(1) == 0 and tl.program_id(2) == 0:
        tl.store(kept + row, kept_sum, mask=valid)

    visual += sample * visual_stride_batch
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros([BLOCK_R, BLOCK_D], tl.float32),)
    split = tl.program_id(1).to(tl.int64)
    end = tl.minimum((split + 1) * tokens_per_split, tokens)
    for start in tl.range(split * tokens_per_split, end, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        inside = valid_tokens(token, end, mask, sample, mask_stride_batch, mask_stride_row, MASKED)
        offsets = token * visual_stride_row
        exists = token < end
        tiles = load_tokens(visual, offsets, exists, inside, first, d, MASKED, CHUNKS, BLOCK_D)
        if KEPT:
            a = load_tile(probabilities, row * tokens, token, valid, inside)
        else:
            score = row_products(
                u_tiles, u, row * d, valid, tiles, visual, offsets, exists, inside, d,
                MASKED, WHOLE, CHUNKS, BLOCK_R, BLOCK_T, BLOCK_D,
            )  # fmt: skip
            score *= tl.load(u_scale + row, mask=valid, other=0.0)[:, None]
            a = tl.where(inside[None, :] & (whole != float("-inf"))[:, None], tl.exp(score - whole[:, None]), 0.0)
        grad = row_products(
            dy_tiles, dy, row * d, valid, tiles, visual, offsets, exists, inside, d,
            MASKED, WHOLE, CHUNKS, BLOCK_R, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        grad *= grad_scale[:, None]
        weight = a
        if DROPOUT:
            keep = tl.where(dropout_words(row, token, tokens, word_seed) >= threshold, keep_scale, 0.0)
            weight = a * keep
            grad = (grad + bias_grad[:, None]) * keep
        grad = a * (grad - mean[:, None])
        if NEED_VISUAL and tl.program_id(2) == 0:
            store_tile(token_weights, row * tokens, token, valid, exists, weight * grad_scale[:, None])
            scaled = grad * tl.load(u_scale + row, mask=valid, other=0.0)[:, None]
            store_tile(score_gradients, row * tokens, token, valid, exists, scaled)
        if visual.dtype.element_ty != tl.float16:  # whose range is too small before the rows lose their scale
            grad = round_to(grad, visual.dtype.element_ty)
        updated = ()
        for chunk in tl.static_range(CHUNKS):
            updated = updated + (coefficient_dot(grad, tiles[chunk], sums[chunk]),)
        sums = updated
    for chunk in tl.static_range(CHUNKS):
        lane = first + chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        store_tile(split_gradient, (split * all_rows + row) * d, lane, valid, lane < d, sums[chunk])


# ---------------------------------------------------------------------------------------------------------------
# Products


@triton.jit(do_not_specialize=LENGTHS)
def query_gradient_kernel(
    gradient, split_gradient, weight, factor: tl.float32,
    all_queries: tl.int64, all_rows: tl.int64, queries, heads, head_dim, d, num_splits, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq, BLOCK_E columns of one head for BLOCK_M queries."""
    head = tl.program_id(1)
    query = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = query < all_queries
    row = row_of(query, head, heads, queries)
    column = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = column < head_dim
    column += head * head_dim
    total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    share = tl.full([BLOCK_M], factor, tl.float32)
    for split in tl.range(0, num_splits):
        total = contract(
            total, split_gradient + split * all_rows * d, row * d, valid, share,
            weight, column, inside, weight_stride, d, BLOCK_D, gradient.dtype.element_ty,
        )  # fmt: skip
    store_tile(gradient, query * (heads * head_dim), column, valid, inside, total)


@triton.jit(do_not_specialize=LENGTHS)
def weight_gradient_kernel(
    gradient, bias_gradient, tensor, values, split_logsumexp, logsumexp, kept, factor: tl.float32,
    all_queries: tl.int64, all_rows: tl.int64, queries, heads, head_dim, d, num_splits,
    tensor_stride_batch, tensor_stride_row,
    TENSOR_FLAT: tl.constexpr, SOFTMAX: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``factor * tensor[:, head].T @ values[:, head]``, a tile of BLOCK_E by BLOCK_D, over all queries.

    BIASED: also ``tensor[:, head].T @ kept[:, head]``.
    """
    lane = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    head = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = column < head_dim
    column += head * head_dim
    total = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    bias_total = tl.zeros([BLOCK_E], tl.float32)
    for split in tl.range(0, num_splits):
        for start in tl.range(0, all_queries, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M)
            valid = query < all_queries
            row = row_of(query, head, heads, queries)
            offsets = row_offsets(query, queries, tensor_stride_batch, tensor_stride_row, TENSOR_FLAT)
            t = load_tile(tensor, offsets, column, valid, inside)
            share = factor * split_weight(split_logsumexp, logsumexp, split, row, valid, all_rows, SOFTMAX, BLOCK_M)
            value = load_tile(values + split * all_rows * d, lane, row * d, lane < d, valid)
            total = coefficient_dot(value * share[None, :], t, total)
            if BIASED and split == 0 and tl.program_id(0) == 0:
                sums = tl.load(kept + row, mask=valid, other=0.0)
                bias_total += tl.sum(t.to(tl.float32) * sums[:, None], axis=0)
    store_tile(gradient, lane, column.to(tl.int64) * d, lane < d, inside, total)
    if BIASED and tl.program_id(0) == 0:
        tl.store(bias_gradient + column, round_to(bias_total, bias_gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def visual_gradient_kernel(
    gradient, token_weights, score_gradients, dy, u, rows, tokens, token_blocks, d,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dx for BLOCK_T tokens of a sample, BLOCK_D columns."""
    sample = (tl.program_id(0) // token_blocks).to(tl.int64)
    token = (tl.program_id(0) % token_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    lane = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in tl.range(0, rows, BLOCK_R):
        local_row = start + tl.arange(0, BLOCK_R)
        valid = local_row < rows
        row = sample * rows + local_row
        weight = load_tile(token_weights, token, row * tokens, token < tokens, valid)
        total = coefficient_dot(weight, load_tile(dy, row * d, lane, valid, lane < d), total)
        grad = load_tile(score_gradients, token, row * tokens, token < tokens, valid)
        total = coefficient_dot(grad, load_tile(u, row * d, lane, valid, lane < d), total)
    store_tile(gradient, (sample * tokens + token) * d, lane, token < tokens, lane < d, total)


# ---------------------------------------------------------------------------------------------------------------
# Launchers


def prompt_compress_backward(
    grad: Tensor, query: Tensor, visual: Tensor, key_weight: Tensor, value_weight: Tensor, key_bias: Tensor | None,
    value_bias: Tensor | None, key_padding_mask: Tensor | None, seed: Tensor | None,
    logsumexp: Tensor, probabilities: Tensor | None, attended: Tensor | None, num_heads: int, dropout_p: float,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients that are needed, contiguous, in their inputs' dtypes; the same bits every time.

    grad is [B, m, E] of any strides; the forward's results are used where all of them are there.
    """
    need_query, need_visual, need_key, need_value, need_key_bias, need_bias = needs
    sizes, factor = Sizes.of(query, visual, num_heads), (query.shape[2] // num_heads) ** -0.5
    kept = probabilities is not None and attended is not None
    with device_guard(query.device):
        dy = expand(grad, value_weight, value_bias, 1.0, sizes)
        u = None if kept and not need_visual else expand(query, key_weight, None, factor, sizes)
        options = (sizes, visual, key_padding_mask, seed, dropout_p)
        if kept:
            values = Attended(attended.unsqueeze(0), None, None)
        else:
            values = attend(u, sizes, TokenPass.of(*options, operands=1))
        token_pass = TokenPass.of(*options, operands=1 if kept else 2)
        split_gradient, kept_sums, *coefficients = _score_gradient(
            token_pass, sizes, dy, u, logsumexp, probabilities if kept else None, values, need_visual
        )
        grad_key = grad_value = grad_bias = None
        if need_key:
            grad_key, _ = _weight_gradient(
                query, Attended(split_gradient, None, None), logsumexp, None, key_weight.dtype, factor, sizes
            )
        if need_value or need_bias:
            sums = kept_sums if need_bias else None
            grad_value, grad_bias = _weight_gradient(grad, values, logsumexp, sums, value_weight.dtype, 1.0, sizes)
        gradients = (
            _query_gradient(query, split_gradient, key_weight, factor, sizes) if need_query else None,
            _visual_gradient(coefficients, dy, u, visual, sizes) if need_visual else None,
            grad_key,
            grad_value,
            torch.zeros_like(key_bias) if need_key_bias else None,  # it shifts a row's scores alike
            grad_bias,
        )
        return needed(gradients, needs)


def _score_gradient(
    token_pass: TokenPass, sizes: Sizes, dy: Expanded, u: Expanded | None, logsumexp: Tensor,
    probabilities: Tensor | None, values: Attended, need_visual: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Each split's du [splits, B, R, d], sum(w) [B, R] where there is a bias, and w and ds [B, R, n] if needed.

    w and ds are divided by what ``dy`` and ``u`` were divided by, for the product with those.
    """
    dtype, shape = dy.tensor.dtype, (sizes.batch, sizes.rows)

    def empty(needed: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=logsumexp.device) if needed else None

    biased = dy.bias_product is not None
    split_gradient = empty(True, token_pass.splits, *shape, sizes.width)
    kept_sums = empty(biased, *shape)
    coefficients = [empty(need_visual, *shape, sizes.tokens, dtype=coefficients_dtype(dtype)) for _ in range(2)]
    score_gradient_kernel[token_pass.grid](
        split_gradient, kept_sums, *coefficients,
        dy=dy.tensor, dy_scale=dy.scale, bias_product=dy.bias_product,
        u=None if u is None else u.tensor, u_scale=None if u is None else u.scale,
        logsumexp=logsumexp, probabilities=probabilities, split_attended=values.tensor,
        split_logsumexp=values.logsumexp, split_kept=values.kept, num_splits=values.tensor.shape[0],
        BIASED=biased, KEPT=probabilities is not None, NEED_VISUAL=need_visual, **token_pass.arguments,
    )  # fmt: skip
    return split_gradient, kept_sums, *coefficients


def _query_gradient(query: Tensor, split_gradient: Tensor, weight: Tensor, factor: float, sizes: Sizes) -> Tensor:
    """dq = W_k du / sqrt(d_h), [B, m, E]."""
    gradient, weight = torch.empty(query.shape, dtype=query.dtype, device=query.device), joined(weight)
    tile, blocks = sizes.tile(query, weight.dtype)
    grid = (triton.cdiv(sizes.all_queries, tile.rows), sizes.heads, triton.cdiv(sizes.head_dim, blocks["BLOCK_E"]))
    query_gradient_kernel[grid](
        gradient, split_gradient, weight, factor, **sizes.arguments(),
        num_splits=split_gradient.shape[0], weight_stride=weight.stride(0), **blocks, **launch_options(tile),
    )  # fmt: skip
    return gradient


def _weight_gradient(
    tensor: Tensor, values: Attended, logsumexp: Tensor, kept_sums: Tensor | None, dtype: torch.dtype, factor: float,
    sizes: Sizes,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``factor * tensor.T @ values`` [E, d], head by head, and ``tensor.T @ kept_sums`` [E] where those are given."""
    inner_width, rows = sizes.heads * sizes.head_dim, Rows.of(tensor)
    gradient = torch.empty((inner_width, sizes.width), dtype=dtype, device=tensor.device)
    bias_gradient = None if kept_sums is None else torch.empty(inner_width, dtype=dtype, device=tensor.device)
    tile, blocks = sizes.tile(tensor, dtype)
    grid = (
        triton.cdiv(sizes.width, blocks["BLOCK_D"]), sizes.heads, triton.cdiv(sizes.head_dim, blocks["BLOCK_E"])
    )  # fmt: skip
    weight_gradient_kernel[grid](
        gradient, bias_gradient, rows.tensor, values.tensor, values.logsumexp, logsumexp, kept_sums, factor,
        **sizes.arguments(), num_splits=values.tensor.shape[0],
        **rows.strides("tensor"), SOFTMAX=values.logsumexp is not None, BIASED=kept_sums is not None,
        **blocks, **launch_options(tile),
    )  # fmt: skip
    return gradient, bias_gradient


_VISUAL_TILES = {True: Tile(64, 64, 4, 3), False: Tile(32, 32, 4, 2)}  # tokens, columns; by whether half
_ROWS = 16  # of a step


def visual_tile(dtype: torch.dtype) -> Tile:
    """Tokens and columns of `visual_gradient_kernel`."""
    return _VISUAL_TILES[dtype != torch.float32]


def _visual_gradient(coefficients: Sequence[Tensor], dy: Expanded, u: Expanded, visual: Tensor, sizes: Sizes) -> Tensor:
    """dX = w^T dy + ds^T u, [B, n, d]."""
    gradient = torch.empty(visual.shape, dtype=visual.dtype, device=visual.device)
    tile = visual_tile(visual.dtype)
    token_blocks = triton.cdiv(sizes.tokens, tile.rows)
    grid = (sizes.batch * token_blocks, triton.cdiv(sizes.width, tile.width))
    visual_gradient_kernel[grid](
        gradient, *coefficients, dy.tensor, u.tensor, sizes.rows, sizes.tokens, token_blocks, sizes.width,
        BLOCK_T=tile.rows, BLOCK_D=tile.width, BLOCK_R=_ROWS, **launch_options(tile),
    )  # fmt: skip
    return gradient
