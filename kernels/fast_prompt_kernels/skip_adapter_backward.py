"""Triton kernels of ``skip_adapter``'s backward pass; `fast_prompt_kernels.skip_adapter` has the forward.

With g the gradient of y, dv what it is before a norm after the up projection (else g), t the activated hidden layer
and h the kept one: ``q = dv W_u``, ``dh = s q t'(h)``, ``dz = dh W_d``, and dx is dz through the norm, plus g. Adapter
by adapter, the last of a run first:

1. `row_gradient_kernel`, laid out like the forward, walks d for q and again for dz. The sums over a row that the norm's
   gradient needs are those of dh with what `fold_kernel` has summed up, and with h, so that dz is formed once. It
   writes dx and dh, rows' moments, and partial sums for the norm, the scale, the gates and the down projection's bias.
2. `weight_gradient_kernel` is dW_u = s dv^T t with the sum of dv, and dW_d = dh^T z: t from h, z from x and its
   moments, the long sum over rows split among programs.
3. `sum_partials_kernel` adds partial sums in order. No atomics: the same bits every time.

x and g are read once by each of 1 and 2: a sum of [w, d] does not fit on chip beside the rows. A run's rows between
its adapters are computed again at once, up projections only, and are in memory until the gradient is there. With a
mixture 1 takes q expert by expert, for the gates' gradient, and 2 writes each expert's part; with a route 2 sums
once for each adapter, the rows of others as zeros.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_prompt_kernels.skip_adapter import (
    LENGTHS,
    Parameters,
    Plan,
    activated_tiles,
    dropped,
    hidden_blocks,
    load_up,
    program_rows,
    row_moments,
    up_moments,
    up_product,
    zero_tiles,
)
from fast_prompt_kernels.skip_adapter_sums import SPLIT_ROWS, product_tile, sum_partials, weight_gradient_kernel
from fast_prompt_kernels.tiles import (
    Rows,
    batched,
    device_guard,
    dot,
    launch_options,
    load_tile,
    multiprocessors,
    needed,
    round_to,
    row_offsets,
    store_tile,
)

# ---------------------------------------------------------------------------------------------------------------
# Rows


@triton.jit
def activation_slope(h, ACTIVATION: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == "relu":
        return tl.where(h > 0, 1.0, 0.0)
    if ACTIVATION == "silu":
        gate = tl.sigmoid(h)
        return gate * (1.0 + h * (1.0 - gate))
    return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)


@triton.jit
def norm_after_gradient(
    up_gradient, norm_weight_sums, norm_bias_sums, grad, grad_offsets, tiles, row, valid,
    up_weight, up_bias, norm_weight, gates, factor, eps, d, w, experts, group_width, inner_width, pitch,
    MIXED: tl.constexpr, UP_BIASED: tl.constexpr, NEED_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Rows' gradient before the norm after the up projection, and their sums for the norm's own gradients."""
    mean, inverse = up_moments(
        tiles, up_weight, up_bias, gates, factor, d, w, experts, group_width, inner_width, pitch, eps,
        MIXED, UP_BIASED, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS,
    )  # fmt: skip
    inverse = tl.where(valid, inverse, 0.0)
    total = tl.zeros([BLOCK_M], tl.float32)
    product = tl.zeros([BLOCK_M], tl.float32)
    for step in tl.static_range(2):  # the sums over a row, then what they are for
        for start in tl.range(0, d, BLOCK_D):
            lane = start + tl.arange(0, BLOCK_D)
            v = factor * up_product(
                tiles, up_weight, up_bias, gates, lane, d, w, experts, group_width, inner_width, pitch,
                MIXED, UP_BIASED, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS,
            )  # fmt: skip
            normed = (v - mean[:, None]) * inverse[:, None]
            g = load_tile(grad, grad_offsets, lane, valid, lane < d).to(tl.float32)
            weighted = g * tl.load(norm_weight + lane, mask=lane < d, other=0.0).to(tl.float32)[None, :]
            if step == 0:
                total += tl.sum(weighted, axis=1) / d
                product += tl.sum(weighted * normed, axis=1) / d
            else:
                weighted = (weighted - total[:, None] - normed * product[:, None]) * inverse[:, None]
                store_tile(up_gradient, row * d, lane, valid, lane < d, weighted)
                if NEED_NORM:
                    tl.store(norm_weight_sums + lane, tl.sum(g * normed, axis=0), mask=lane < d)
                    tl.store(norm_bias_sums + lane, tl.sum(g, axis=0), mask=lane < d)


@triton.jit
def hidden_product(
    grad, offsets, valid, weight, bias, expert, d, w, group_width, inner_width, pitch,
    MIXED: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """``grad @ up_weight`` in tiles, of one expert, and ``grad @ bias`` (BIASED)."""
    sums = zero_tiles(CHUNKS, BLOCK_M, BLOCK_W)
    bias_product = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, d, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        tile = load_tile(grad, offsets, lane, valid, lane < d)
        if BIASED:
            row_bias = tl.load(bias + expert * d + lane, mask=lane < d, other=0.0).to(tl.float32)
            bias_product += tl.sum(tile.to(tl.float32) * row_bias[None, :], axis=1)
        updated = ()
        for chunk in tl.static_range(CHUNKS):
            up = load_up(weight, chunk, lane, expert, d, w, group_width, inner_width, pitch, MIXED, BLOCK_W)
            updated = updated + (dot(tile, tl.trans(up), sums[chunk]),)
        sums = updated
    return sums, bias_product


@triton.jit
def mixed_hidden_product(
    products, grad, offsets, valid, tiles, weight, bias, gates, experts, d, w, group_width, inner_width, pitch,
    MIXED: tl.constexpr, BIASED: tl.constexpr, NEED_PRODUCTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """`hidden_product` summed with the gates; each expert's ``(grad * up(t)).sum()`` goes to ``products``."""
    sums = zero_tiles(CHUNKS, BLOCK_M, BLOCK_W)
    for expert in tl.range(0, experts if MIXED else 1):
        part, bias_product = hidden_product(
            grad, offsets, valid, weight, bias, expert, d, w, group_width, inner_width, pitch,
            MIXED, BIASED and NEED_PRODUCTS, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS,
        )  # fmt: skip
        if NEED_PRODUCTS:
            for chunk in tl.static_range(CHUNKS):
                bias_product += tl.sum(part[chunk] * tiles[chunk].to(tl.float32), axis=1)
            # As a matrix of one row: Triton 3.7 compiles no sum of a vector beside products on sm_100.
            tl.store(products + expert + tl.arange(0, 1), tl.sum(bias_product[None, :], axis=1))
        gate = tl.load(gates + expert) if MIXED else 1.0
        updated = ()
        for chunk in tl.static_range(CHUNKS):
            updated = updated + (sums[chunk] + gate * part[chunk],)
        sums = updated
    return sums


@triton.jit
def hidden_gradient_tiles(
    hidden_gradient, hidden_sums, sums, hidden, row, valid, factor, column_sums, constants, w,
    first_row, seed, threshold, keep_scale,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_DOWN: tl.constexpr, NEED_DOWN_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dh in tiles, and the rows' sums of ``dz * weight`` and, times the normed x, of the same."""
    tiles = ()
    total = tl.zeros([BLOCK_M], tl.float32)
    product = tl.zeros([BLOCK_M], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
        inside = column < w
        h = load_tile(hidden, row * w, column, valid, inside).to(tl.float32)
        gradient = factor * sums[chunk] * activation_slope(h, ACTIVATION)
        if DROPOUT:
            gradient = dropped(gradient, first_row + row, column, w, seed, threshold, keep_scale)
        if NEED_DOWN:
            store_tile(hidden_gradient, row * w, column, valid, inside, gradient)
        if NEED_DOWN_BIAS:
            tl.store(hidden_sums + column, tl.sum(gradient, axis=0), mask=inside)
        if NORM == "layer":
            total += tl.sum(gradient * tl.load(column_sums + column, mask=inside, other=0.0)[None, :], axis=1)
        if NORM == "layer" or NORM == "rms":
            h -= tl.load(constants + column, mask=inside, other=0.0)[None, :]
            product += tl.sum(gradient * h, axis=1)
        tiles = tiles + (round_to(gradient, hidden.dtype.element_ty),)
    return tiles, total, product


@triton.jit
def residual_sums(
    total, product, grad, grad_offsets, x, offsets, valid, mean, inverse, norm_weight, d, BLOCK_D: tl.constexpr
):
    """Adds the residual's share, ``g * weight`` and that times the normed x, to rows' sums."""
    for start in tl.range(0, d, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        weight = tl.load(norm_weight + lane, mask=lane < d, other=0.0).to(tl.float32)
        g = load_tile(grad, grad_offsets, lane, valid, lane < d).to(tl.float32) * weight[None, :]
        tile = load_tile(x, offsets, lane, valid, lane < d).to(tl.float32)
        total += tl.sum(g, axis=1)
        product += tl.sum(g * ((tile - mean[:, None]) * inverse[:, None]), axis=1)
    return total, product


@triton.jit
def input_gradient(
    grad_x, norm_weight_sums, norm_bias_sums, tiles, total, product,
    grad, grad_offsets, x, offsets, row, valid, mean, inverse, down_weight, norm_weight, d, w,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, NEED_X: tl.constexpr, NEED_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dx from dh and the rows' sums, and the partial sums of the gradients of a norm before."""
    for start in tl.range(0, d, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            column = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
            gradient = dot(tiles[chunk], load_tile(down_weight, column * d, lane, column < w, lane < d), gradient)
        g = load_tile(grad, grad_offsets, lane, valid, lane < d).to(tl.float32) if RESIDUAL != "none" else 0.0
        if NORM == "layer" or NORM == "rms":
            normed = load_tile(x, offsets, lane, valid, lane < d).to(tl.float32)
            normed = (normed - mean[:, None]) * inverse[:, None]
            if RESIDUAL == "normed":
                gradient += g
            if NEED_NORM:
                tl.store(norm_weight_sums + lane, tl.sum(gradient * normed, axis=0), mask=lane < d)
                tl.store(norm_bias_sums + lane, tl.sum(gradient, axis=0), mask=lane < d)
            gradient *= tl.load(norm_weight + lane, mask=lane < d, other=0.0).to(tl.float32)[None, :]
            gradient = (gradient - total[:, None] / d - normed * (product / d)[:, None]) * inverse[:, None]
        if NEED_X:
            store_tile(grad_x, row * d, lane, valid, lane < d, gradient + g)


@triton.jit(do_not_specialize=(*LENGTHS, "adapter"))
def row_gradient_kernel(
    grad_x, hidden_gradient, up_gradient, row_mean, row_inverse,
    hidden_sums, products, norm_weight_sums, norm_bias_sums,
    grad, x, hidden, down_weight, column_sums, constants, up_weight, up_bias, norm_weight, scale, gates,
    route, seed, threshold: tl.uint32, keep_scale: tl.float32, eps: tl.float32,
    rows: tl.int64, rows_per_sample, row_blocks, adapter, d, w, experts, group_width, inner_width, pitch,
    grad_stride_batch, grad_stride_row, x_stride_batch, x_stride_row, GRAD_FLAT: tl.constexpr, X_FLAT: tl.constexpr,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ROUTED: tl.constexpr, MIXED: tl.constexpr, UP_BIASED: tl.constexpr, SCALED: tl.constexpr,
    NEED_X: tl.constexpr, NEED_NORM: tl.constexpr, NEED_PRODUCTS: tl.constexpr, NEED_DOWN: tl.constexpr,
    NEED_DOWN_BIAS: tl.constexpr, NEED_MOMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One adapter's dx and dh for BLOCK_M rows, and their partial sums for the other gradients."""
    row, valid, sample = program_rows(rows, rows_per_sample, row_blocks, ROUTED or MIXED, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    index = program * 0 + adapter
    if ROUTED:
        index = tl.load(route + sample)
        if index < 0:
            return
    if DROPOUT:
        seed = tl.load(seed)
    if MIXED:
        gates += sample * experts
    if UP_BIASED:
        up_bias += index * d
    if NORM != "none":
        norm_weight += index * d
    if NORM == "layer":
        column_sums += index * w
    if NORM == "layer" or NORM == "rms":
        constants += index * w
    if NEED_NORM:
        norm_weight_sums += program * d
        norm_bias_sums += program * d
    if NEED_DOWN_BIAS:
        hidden_sums += program * w
    if NEED_PRODUCTS:
        products += program * experts
    up_weight += index * d * w
    factor = tl.load(scale + index) if SCALED else 1.0
    offsets = row_offsets(row, rows_per_sample, x_stride_batch, x_stride_row, X_FLAT)
    grad_offsets = row_offsets(row, rows_per_sample, grad_stride_batch, grad_stride_row, GRAD_FLAT)
    first_row = adapter * rows
    tiles = ()
    if NEED_PRODUCTS or NORM == "layer_after":
        tiles = activated_tiles(
            (), hidden, row, valid, 0, 0, 0, 0, w, first_row, seed, threshold, keep_scale,
            NORM, ACTIVATION, DROPOUT, False, False, True, BLOCK_W, CHUNKS, hidden.dtype.element_ty,
        )  # fmt: skip
    if NORM == "layer_after":
        norm_after_gradient(
            up_gradient, norm_weight_sums, norm_bias_sums, grad, grad_offsets, tiles, row, valid,
            up_weight, up_bias, norm_weight, gates, factor, eps, d, w, experts, group_width, inner_width, pitch,
            MIXED, UP_BIASED, NEED_NORM, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS,
        )  # fmt: skip
        tl.debug_barrier()  # what the other threads of this program wrote is what it reads now
        sums = mixed_hidden_product(
            products, up_gradient, row * d, valid, tiles, up_weight, up_bias, gates, experts,
            d, w, group_width, inner_width, pitch,
            MIXED, UP_BIASED, NEED_PRODUCTS, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS,
        )  # fmt: skip
    else:
        sums = mixed_hidden_product(
            products, grad, grad_offsets, valid, tiles, up_weight, up_bias, gates, experts,
            d, w, group_width, inner_width, pitch,
            MIXED, UP_BIASED, NEED_PRODUCTS, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS,
        )  # fmt: skip
    mean = tl.zeros([BLOCK_M], tl.float32)
    inverse = tl.zeros([BLOCK_M], tl.float32)
    if NORM == "layer" or NORM == "rms":
        mean, inverse = row_moments(x, offsets, valid, d, eps, NORM == "layer", BLOCK_M, BLOCK_D)
        inverse = tl.where(valid, inverse, 0.0)
        if NEED_MOMENTS:
            tl.store(row_mean + row, mean, mask=valid)
            tl.store(row_inverse + row, inverse, mask=valid)
    gradient_tiles, total, product = hidden_gradient_tiles(
        hidden_gradient, hidden_sums, sums, hidden, row, valid, factor, column_sums, constants, w,
        first_row, seed, threshold, keep_scale,
        NORM, ACTIVATION, DROPOUT, NEED_DOWN, NEED_DOWN_BIAS, BLOCK_M, BLOCK_W, CHUNKS,
    )  # fmt: skip
    if RESIDUAL == "normed":
        total, product = residual_sums(
            total, product, grad, grad_offsets, x, offsets, valid, mean, inverse, norm_weight, d, BLOCK_D
        )
        if NORM == "rms":
            total = tl.zeros_like(total)
    if NEED_X or (NEED_NORM and NORM != "layer_after"):
        input_gradient(
            grad_x, norm_weight_sums, norm_bias_sums, gradient_tiles, total, product,
            grad, grad_offsets, x, offsets, row, valid, mean, inverse, down_weight + index * w * d, norm_weight, d, w,
            NORM, RESIDUAL, NEED_X, NEED_NORM, BLOCK_M, BLOCK_D, BLOCK_W, CHUNKS,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Launchers


class Needs(NamedTuple):
    """Whose gradients are wanted, in the op's order."""

    x: bool
    down_weight: bool
    up_weight: bool
    down_bias: bool
    up_bias: bool
    norm_weight: bool
    norm_bias: bool
    scale: bool
    gates: bool

    @property
    def up(self) -> bool:
        """Whether the output's gradient is summed over rows."""
        return self.up_weight or self.up_bias

    @property
    def norm(self) -> bool:
        """Whether the norm's parameters want any."""
        return self.norm_weight or self.norm_bias

    @property
    def products(self) -> bool:
        """Whether the products of the output's gradient with the experts' results are wanted."""
        return self.scale or self.gates


class RowGradients(NamedTuple):
    """What `row_gradient_kernel` writes for an adapter; None where nobody asks.

    Attributes:
        x: dx [B, n, d].
        hidden: dh [B, n, w].
        up: dv [B, n, d], where it is not the output's gradient.
        row_mean, row_inverse: float32 [B n], the moments of the norm before.
        down_bias: float32 [programs, w], partial sums.
        products: float32 [programs, E], partial sums for the scale and the gates.
        norm_weight, norm_bias: float32 [programs, d], partial sums.
    """

    x: Tensor | None
    hidden: Tensor | None
    up: Tensor | None
    row_mean: Tensor | None
    row_inverse: Tensor | None
    down_bias: Tensor | None
    products: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


class Backward(NamedTuple):
    """What the launches of one backward call share.

    Attributes:
        plan: the forward's.
        needs: whose gradients are wanted.
        results: those gradients, but for x's, not yet written.
    """

    plan: Plan
    needs: Needs
    results: list[Tensor | None]

    def adapter(self, adapter: int, grad: Tensor, x: Tensor, hidden: Tensor, need_x: bool) -> Tensor | None:
        """Writes the gradients of one adapter's parameters (of all, with a route); returns dx if needed."""
        rows = self._row_gradients(adapter, Rows.of(grad), Rows.of(x), hidden, need_x)
        if self.needs.up:
            self._weight_gradient(adapter, True, hidden, Rows.of(grad if rows.up is None else rows.up), rows)
        if self.needs.down_weight:
            self._weight_gradient(adapter, False, rows.hidden, Rows.of(x), rows)
        for name in ("down_bias", "norm_weight", "norm_bias"):
            if getattr(self.needs, name):
                self._sum_programs(self._result(name, adapter), getattr(rows, name))
        if self.needs.products:
            self._scale_gradients(adapter, rows.products)
        return rows.x

    def _row_gradients(self, adapter: int, grad: Rows, x: Rows, hidden: Tensor, need_x: bool) -> RowGradients:
        plan, needs, parameters = self.plan, self.needs, self.plan.parameters
        shape, norm, device = x.tensor.shape, plan.arguments["NORM"], x.tensor.device
        after, programs = norm == "layer_after", plan.grid[0]

        def empty(needed: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=device) if needed else None

        moments = needs.down_weight and parameters.folded is not None
        results = RowGradients(
            empty(need_x, *shape, dtype=x.tensor.dtype),
            empty(needs.down_weight, *hidden.shape, dtype=hidden.dtype),
            empty(after, *shape, dtype=x.tensor.dtype),
            *(empty(moments, shape[0] * shape[1]) for _ in range(2)),
            empty(needs.down_bias, programs, hidden.shape[-1]),
            empty(needs.products, programs, plan.arguments["experts"]),
            *(empty(needs.norm, programs, shape[2]) for _ in range(2)),
        )
        if all(result is None for result in results):
            return results
        _, column_sums, constants = parameters.folded or (None, None, None)
        arguments = {name: value for name, value in plan.arguments.items() if not name.lower().startswith("norm_bias")}
        row_gradient_kernel[plan.grid](
            *results, grad=grad.tensor, **grad.strides("grad"), x=x.tensor, **x.strides("x"), hidden=hidden,
            down_weight=parameters.down_weight, column_sums=column_sums, constants=constants, adapter=adapter,
            NEED_X=need_x, NEED_NORM=needs.norm, NEED_PRODUCTS=needs.products, NEED_DOWN=needs.down_weight,
            NEED_DOWN_BIAS=needs.down_bias, NEED_MOMENTS=moments, **arguments,
        )  # fmt: skip
        return results

    def _weight_gradient(self, adapter: int, up: bool, coefficients: Tensor, tensor: Rows, rows: RowGradients) -> None:
        """dW_u and the gradient of its bias (up), or dW_d."""
        plan, parameters = self.plan, self.plan.parameters
        weight = self._result("up_weight" if up else "down_weight", adapter)
        bias = self._result("up_bias", adapter) if up else None
        routed, mixed = plan.arguments["ROUTED"], plan.arguments["MIXED"] and up
        width, hidden = tensor.tensor.shape[-1], coefficients.shape[-1]
        tile, (block_w, _) = product_tile(tensor.tensor.dtype), hidden_blocks(hidden)
        items = parameters.down_weight.shape[0] if routed else plan.arguments["experts"] if mixed else 1
        tiles = triton.cdiv(width, tile.width), triton.cdiv(hidden, block_w)
        num_rows = plan.arguments["rows"]
        wanted = triton.cdiv(2 * multiprocessors(tensor.tensor.device), tiles[0] * tiles[1] * items)
        rows_per_split = max(SPLIT_ROWS, triton.cdiv(triton.cdiv(num_rows, wanted), tile.rows) * tile.rows)
        splits = triton.cdiv(num_rows, rows_per_split)

        def partials(result: Tensor | None) -> Tensor | None:
            if result is None or splits == 1:
                return result
            return torch.empty((splits, result.numel()), dtype=torch.float32, device=result.device)

        weight_sums, bias_sums = partials(weight), partials(bias)
        names = ("norm_weight", "norm_bias", "scale", "gates", "route", "seed", "threshold", "keep_scale", "rows")
        names += ("rows_per_sample", "d", "w", "experts", "group_width", "inner_width", "pitch")
        names += ("ACTIVATION", "DROPOUT", "ROUTED", "NORM_BIASED", "SCALED", "BLOCK_W")
        arguments = {name: plan.arguments[name] for name in names}
        weight_gradient_kernel[(*tiles, items * splits)](
            weight_sums, bias_sums, coefficients, tensor.tensor, rows.row_mean, rows.row_inverse, **arguments,
            rows_per_split=rows_per_split, num_splits=splits, adapter=adapter, **tensor.strides("tensor"),
            UP=up, NORMED=not up and parameters.folded is not None, MIXED=mixed,
            NEED_WEIGHT=weight is not None, NEED_BIAS=bias is not None,
            BLOCK_M=tile.rows, BLOCK_D=tile.width, **launch_options(tile),
        )  # fmt: skip
        if splits > 1:
            if weight is not None:
                sum_partials(weight, weight_sums, 1 if mixed else items, splits)
            if bias is not None:
                sum_partials(bias, bias_sums, items, splits)

    def _scale_gradients(self, adapter: int, products: Tensor) -> None:
        gates, scale = self.plan.parameters.gates, self.plan.parameters.scale
        if gates is None:
            self._sum_programs(self._result("scale", adapter), products)
            return
        sums = torch.empty_like(gates)
        sum_partials(sums, products, gates.shape[0], self.plan.row_blocks, item_stride=self.plan.row_blocks)
        if self.needs.gates:
            self.results[Needs._fields.index("gates")] = sums if scale is None else sums * scale
        if self.needs.scale:
            self.results[Needs._fields.index("scale")] = (sums * gates).sum().view(1)

    def _sum_programs(self, output: Tensor, partials: Tensor) -> None:
        """Sums of what each program of `row_gradient_kernel` wrote."""
        route = self.plan.arguments["route"]
        items = 1 if route is None else output.shape[0]
        sum_partials(output, partials, items, partials.shape[0], route=route, row_blocks=self.plan.row_blocks)

    def _result(self, name: str, adapter: int) -> Tensor | None:
        """Where an adapter's gradient goes; with a route, where all do."""
        result = self.results[Needs._fields.index(name)]
        if result is None or self.plan.arguments["ROUTED"] or (self.plan.arguments["MIXED"]):
            return result
        return result[adapter : adapter + 1]


def skip_adapter_backward(
    grad: Tensor, x: Tensor, down_weight: Tensor, up_weight: Tensor, down_bias: Tensor | None,
    up_bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, scale: Tensor | None,
    gates: Tensor | None, route: Tensor | None, kept_samples: Tensor | None, seed: Tensor | None, hidden: Tensor,
    norm: str, activation: str, residual: str, eps: float, dropout_p: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients that are needed, contiguous, in their inputs' dtypes; the same bits every time.

    grad is like x, of any strides.
    """
    inputs = (x, down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, scale, gates)
    *own_needs, need_kept = needs
    wanted = Needs(*own_needs)
    adapters, outer = hidden.shape[0], grad
    with device_guard(x.device):
        # Of each adapter's: a leading dimension that a single one's parameters have not.
        stacked = [value if value is None or down_weight.dim() == 3 else value.unsqueeze(0) for value in inputs[1:7]]
        shaped = (x, *stacked, None if scale is None else scale.view(-1), gates)
        results = [
            torch.empty(value.shape, dtype=value.dtype, device=value.device) if need and value is not x else None
            for value, need in zip(shaped, wanted, strict=True)
        ]
        x, grad, shape = batched(x), batched(grad), x.shape
        parameters = Parameters.of(x.dtype, norm, *inputs[1:])
        plan = Plan.of(x, parameters, route, seed, norm, activation, residual, eps, dropout_p, backward=True)
        backward = Backward(plan, wanted, results)
        inner = torch.empty((adapters - 1, *x.shape), dtype=x.dtype, device=x.device)
        if adapters > 1:
            plan.forward(inner, hidden, adapters - 1, inner[0].numel(), again=True)
        for adapter in reversed(range(adapters)):
            source, need_x = (inner[adapter - 1], True) if adapter else (x, wanted.x)
            grad = backward.adapter(adapter, grad, source, hidden[adapter], need_x)
        if wanted.x:
            results[0] = grad.view(shape)
            if kept_samples is not None and kept_samples.numel():
                results[0].index_fill_(0, kept_samples, 0)
        gradient_of_kept = outer.index_select(0, kept_samples) if need_kept else None
    found = [
        result if result is None else result.view(like.shape) for result, like in zip(results, inputs, strict=True)
    ]
    return needed((*found, gradient_of_kept), needs)
