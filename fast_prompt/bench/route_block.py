"""A batch of which half skips a block, against its two halves run apart: what routing itself costs.

The block is one of ViT's, with random weights; every second sample skips it. The halves apart are the least there is to
do: nothing is told apart, compacted or put back. The usual way computes block and adapter for all, and selects.
"""

import functools
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fast_prompt.bench import skip_adapter
from fast_prompt.bench.contender import Contender, backends_for, forced
from fast_prompt.nn import SkipAdapter, route_block
from fast_prompt.parity import Problem

SHAPE_KEYS = skip_adapter.SHAPE_KEYS
LARGEST: dict[str, int] = {}
DEFAULT_SHAPES = tuple({"B": 8, "n": 237, "d": d, "width": width} for d, width in ((768, 96), (384, 48)))
GPU_SHAPES = ({"B": 64, "n": 577, "d": 768, "width": 96},)
PASSES = ("fwd",)
PARAMETERS = ()

HEAD_WIDTH = 64
SEED = 0

Shape = dict[str, int]


def problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random hidden states [B, n, d]; block and adapter are each contender's own."""
    hidden = torch.randn(shape["B"], shape["n"], shape["d"], generator=torch.Generator().manual_seed(SEED))
    return Problem({"x": hidden.to(device, dtype)}, torch.empty(0))


def products(shape: Shape) -> list[tuple[int, int, int]]:
    """(m, k, n) of the block's largest matrix products: the two of its MLP."""
    rows, d = shape["B"] // 2 * shape["n"], shape["d"]
    return [(rows, d, 4 * d), (rows, 4 * d, d)]


def flops(shape: Shape, backward: bool) -> int:
    """FLOPs of the block for one half, and of the adapter for the other."""
    rows, n, d = shape["B"] // 2 * shape["n"], shape["n"], shape["d"]
    return rows * (24 * d**2 + 4 * n * d) + 4 * rows * d * shape["width"]


def traffic(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Bytes of the weights, of x and of the result."""
    rows, d = shape["B"] * shape["n"], shape["d"]
    return dtype.itemsize * (12 * d**2 + 2 * d * shape["width"] + 2 * rows * d)


def contenders(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> list[Contender]:
    """Baselines first."""
    sizes = {"width": shape["d"], "adapter_width": shape["width"], "num_adapters": 1, "num_experts": 0}
    modules = functools.cache(partial(build, shape, device))

    def on(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: form(x, *modules(x.dtype))

    return [
        Contender("halves_apart", "baseline", on(halves_apart), on(kept_half)),
        Contender("both_and_select", "baseline", on(both_and_select), on(both_and_select)),
        *(
            Contender(backend, "ours", forced(on(routed), backend), on(both_and_select))
            for backend in backends_for("skip_adapter", device, dtype, **sizes)
        ),
    ]


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, SkipAdapter]:
    """A block of ViT and an adapter, the same random weights each time."""
    vit = importlib.import_module("transformers.models.vit.modeling_vit")  # an extra, and slow to import
    d = shape["d"]
    config = vit.ViTConfig(hidden_size=d, intermediate_size=4 * d, num_attention_heads=d // HEAD_WIDTH)
    config._attn_implementation = "sdpa"
    torch.manual_seed(SEED)
    block, adapter = vit.ViTLayer(config).eval(), SkipAdapter(d, shape["width"]).eval()
    return block.to(device, dtype).requires_grad_(False), adapter.to(device, dtype).requires_grad_(False)


def routed(x: Tensor, block: Any, adapter: SkipAdapter) -> Tensor:
    """Samples 0, 2, ... through the block, the others through the adapter in its place."""
    return route_block(x, [sample % 2 - 1 for sample in range(len(x))], [adapter], block)


def both_and_select(x: Tensor, block: Any, adapter: SkipAdapter) -> Tensor:
    """The same, all samples through both."""
    skips = (torch.arange(len(x), device=x.device) % 2 == 1).view(-1, 1, 1)
    return torch.where(skips, adapter(x), block(x))


def halves_apart(x: Tensor, block: Any, adapter: SkipAdapter) -> Tensor:
    """As many samples through each, already told apart. Returns what the block makes of its half."""
    half = len(x) // 2
    adapter(x[half:])
    return block(x[:half])


def kept_half(x: Tensor, block: Any, adapter: SkipAdapter) -> Tensor:
    """What ``halves_apart`` must return."""
    return block(x[: len(x) // 2])
