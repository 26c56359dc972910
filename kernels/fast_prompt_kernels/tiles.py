"""What the kernels of every op share: tile operations, Philox, tensors of any strides, launch options."""

import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
TINY = tl.constexpr(1e-30)  # its reciprocal is finite

# ---------------------------------------------------------------------------------------------------------------
# Tile operations


@triton.jit
def dot(a, b, total):
    """``total + a @ b``, summed in float32."""
    if INTERPRETED:  # the interpreter multiplies bfloat16 as if its bits were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def round_to(tile, dtype: tl.constexpr):
    """``tile`` in ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and tile.dtype == tl.float32:  # the interpreter cuts the low bits off
        bits = tile.to(tl.uint32, bitcast=True)
        tile = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tile.to(dtype)


@triton.jit
def coefficient_dot(a, b, total):
    """``total + a @ b``; float32 coefficients beside half ``b`` lose each row's scale before they are rounded."""
    if a.dtype == b.dtype:
        return dot(a, b, total)
    unit = tl.maximum(tl.max(tl.abs(a), axis=1), TINY)
    return total + unit[:, None] * dot(round_to(a * (1.0 / unit)[:, None], b.dtype), b, tl.zeros_like(total))


@triton.jit
def row_offsets(row, rows_per_batch, stride_batch, stride_row, FLAT: tl.constexpr):
    """Where rows begin in a [B, n, d] tensor of any batch and row strides; FLAT when one stride serves all rows."""
    if FLAT:
        return row * stride_row
    return (row // rows_per_batch) * stride_batch + (row % rows_per_batch) * stride_row


@triton.jit
def load_tile(base, first, second, first_valid, second_valid):
    """The tile ``base[first[i] + second[j]]``, zero outside."""
    return tl.load(base + (first[:, None] + second[None, :]), first_valid[:, None] & second_valid[None, :], other=0.0)


@triton.jit
def store_tile(base, first, second, first_valid, second_valid, tile):
    """``base[first[i] + second[j]] = tile[i, j]``, rounded to what it is stored in."""
    tile = round_to(tile, base.dtype.element_ty)
    tl.store(base + (first[:, None] + second[None, :]), tile, first_valid[:, None] & second_valid[None, :])


@triton.jit
def dropout_words(row, column, columns, seed):
    """Philox words of the elements (row, column) of a matrix with so many columns; row is int64."""
    counter = row[:, None] * columns + column[None, :]
    low = counter.to(tl.uint32)
    zero = tl.zeros_like(low)
    word, _, _, _ = tl.philox(seed, low, (counter >> 32).to(tl.uint32), zero, zero)
    return word


# ---------------------------------------------------------------------------------------------------------------
# Launches


class Tile(NamedTuple):
    """How a program works: BLOCK_M rows, BLOCK_D of the width at a time, its warps (of 32), loads in flight."""

    rows: int
    width: int
    num_warps: int
    num_stages: int


def joined(tensor: Tensor) -> Tensor:
    """The tensor, copied only where neighbours in a row lie apart."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def batched(tensor: Tensor) -> Tensor:
    """[n, d] as [1, n, d]."""
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)


def needed(gradients: Iterable[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Those that are needed, in their order."""
    return [gradient for gradient, need in zip(gradients, needs, strict=True) if need and gradient is not None]


class Rows(NamedTuple):
    """A [B, n, d] tensor as kernels take it: neighbouring elements in a row, any stride of rows and batches."""

    tensor: Tensor | None
    stride_batch: int
    stride_row: int
    flat: bool

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Rows":
        """Copies only where neighbours in a row lie apart."""
        if tensor is None:
            return cls(None, 0, 0, True)
        tensor = joined(batched(tensor))
        batch, rows_per_batch, _ = tensor.shape
        stride_batch, stride_row, _ = tensor.stride()
        if rows_per_batch == 1:
            return cls(tensor, 0, stride_batch, True)
        return cls(tensor, stride_batch, stride_row, batch == 1 or stride_batch == rows_per_batch * stride_row)

    def strides(self, name: str) -> dict[str, int | bool]:
        """Kernel arguments."""
        return {
            f"{name}_stride_batch": self.stride_batch,
            f"{name}_stride_row": self.stride_row,
            f"{name.upper()}_FLAT": self.flat,
        }


def chunk_width(width: int, most: int) -> int:
    """BLOCK_D: the power of two up to ``most`` that covers the width with least to spare, the larger of two such."""
    sizes = [size for size in (256, 128, 64, 32, 16) if size <= most and (size >= most // 2 or size >= width)]
    return min(sizes, key=lambda size: (triton.cdiv(width, size) * size, -size))


def coefficients_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a backward keeps its coefficients in: float16's range is too small for them before they are scaled."""
    return torch.float32 if dtype == torch.float16 else dtype


def dropout_arguments(seed: Tensor | None, dropout_p: float) -> dict[str, object]:
    """Kernel arguments; Philox words below ``threshold`` are dropped."""
    return {
        "seed": seed,
        "threshold": min(round(dropout_p * 2**32), 2**32 - 1),
        "keep_scale": 1 / (1 - dropout_p),
        "DROPOUT": dropout_p > 0,
    }


def launch_options(tile: Tile, hip: bool = torch.version.hip is not None) -> dict[str, int]:
    """Triton's launch options; AMD's warps are twice as wide and its loads go no deeper than two."""
    if hip:
        return {"num_warps": tile.num_warps // 2, "num_stages": min(tile.num_stages, 2)}
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def device_guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device's current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side; a few for the interpreter, so that it takes the same paths."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
