"""Who runs against whom in ``prompt_compress``: projected attention, absorbed forms by hand, both compiled, ours.

The visual tokens are frozen: the other gradients are computed. Each form by hand is here because it was the fastest of
several at some shape, dtype and pass.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from fast_prompt import ops, reference
from fast_prompt.bench.contender import Contender, backends_for, forced, in_float32
from fast_prompt.ops.prompt_compress import flops as absorbed_flops
from fast_prompt.parity import Problem
from fast_prompt.parity.prompt_compress import draw
from fast_prompt.reference.prompt_compress import split_heads

SHAPE_KEYS = ("B", "m", "n", "d", "h")
LARGEST: dict[str, int] = {}
PASSES = ("fwd", "fwdbwd")
ONE_ROW = {"B": 1, "m": 1}
DEFAULT_SHAPES = tuple({"B": 64, "m": m, "n": 197, "d": 768, "h": 12} for m in (1, 4, 16))
TRAINED = ("query", "key_weight", "value_weight", "value_bias")
# Not counted as kept for the backward: the tokens exist anyway.
PARAMETERS = ("visual", "key_weight", "value_weight", "key_bias", "value_bias")


def problem(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Problem:
    """Arguments of this shape, every gradient wanted but that of the tokens."""
    drawn = draw(shape["B"], shape["m"], shape["n"], shape["h"], shape["d"] // shape["h"], shape["d"], dtype, dtype)
    tensors = {name: tensor.to(device) for name, tensor in drawn.tensors.items()}
    return replace(drawn, tensors=tensors, grad=drawn.grad.to(device), trained=TRAINED)


def products(shape: dict[str, int]) -> list[tuple[int, int, int]]:
    """(m, k, n) of its matrix products: a head's queries through its weights, a sample's scores and weighted tokens."""
    rows, width = shape["h"] * shape["m"], shape["d"]
    return [
        (shape["B"] * shape["m"], width // shape["h"], width),
        (rows, width, shape["n"]),
        (rows, shape["n"], width),
    ]


def flops(shape: dict[str, int], backward: bool) -> int:
    """FLOPs of the absorbed form; backward has two more products with the tokens, four with weights."""
    m, n, d, h = (shape[key] for key in ("m", "n", "d", "h"))
    forward = absorbed_flops(m, n, d, d, h)
    return shape["B"] * (forward + 4 * m * d * (h * n + 2 * d) if backward else forward)


def traffic(shape: dict[str, int], dtype: torch.dtype, backward: bool) -> int:
    """Bytes that must be read and written once: tokens, query, output, weights; then all again, and the gradients."""
    tokens, queries = (shape["B"] * shape[key] * shape["d"] for key in ("n", "m"))
    weights = 2 * shape["d"] ** 2
    forward = tokens + 2 * queries + weights
    return dtype.itemsize * (2 * forward + queries + weights if backward else forward)


def contenders(shape: dict[str, int], dtype: torch.dtype, device: torch.device, backward: bool) -> list[Contender]:
    """Baselines first. Every function takes the op's arguments."""
    eager = EAGER
    if dtype != torch.float32:
        eager = eager | {f"{name}_in_fp32": in_float32(function) for name, function in eager.items()}
    definition = reference.prompt_compress
    forms = eager | {name: torch.compile(form, dynamic=False) for name, form in COMPILED.items()}
    baselines = [Contender(name, "baseline", form, definition) for name, form in forms.items()]
    backends = backends_for("prompt_compress", device, dtype, num_heads=shape["h"])
    return baselines + [Contender(name, "ours", forced(ops.prompt_compress, name), definition) for name in backends]


def projected(
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor,
    value_bias: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """Keys and values of every token, then torch's attention, as ``nn.MultiheadAttention`` does."""
    keys, values = linear(visual, key_weight, key_bias), linear(visual, value_weight, value_bias)
    q, k, v = (split_heads(tensor, num_heads) for tensor in (query, keys, values))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _folded(query: Tensor, key_weight: Tensor, num_heads: int) -> Tensor:
    """The queries through ``W_k``, one product a head: [B, h * m, d]."""
    weight = key_weight.unflatten(0, (num_heads, -1))
    heads = query.unflatten(-1, (num_heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    folded = torch.bmm(heads, weight).view(num_heads, query.shape[0], query.shape[1], -1)
    return folded.transpose(0, 1).flatten(1, 2)


def _unfolded(attended: Tensor, query: Tensor, value_weight: Tensor, value_bias: Tensor, num_heads: int) -> Tensor:
    """The weighted tokens [B, h * m, d] through ``W_v``, one product a head."""
    weight = value_weight.unflatten(0, (num_heads, -1))
    rows = attended.unflatten(1, (num_heads, -1)).transpose(0, 1).flatten(1, 2)
    output = torch.bmm(rows, weight.transpose(1, 2)).view(num_heads, query.shape[0], query.shape[1], -1)
    return output.permute(1, 2, 0, 3).flatten(2) + value_bias


def absorbed_bmm(
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor,
    value_bias: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """Four batched products; the scale goes into the queries, where it costs least."""
    scale = (query.shape[-1] // num_heads) ** -0.5
    folded = _folded(query * scale, key_weight, num_heads)
    weights = torch.bmm(folded, visual.transpose(1, 2)).softmax(-1)
    return _unfolded(torch.bmm(weights, visual), query, value_weight, value_bias, num_heads)


def absorbed_einsum(
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor,
    value_bias: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """The same left to ``torch.einsum``, which chooses the layouts itself."""
    heads = query.unflatten(-1, (num_heads, -1))
    key_heads, value_heads = (weight.unflatten(0, (num_heads, -1)) for weight in (key_weight, value_weight))
    folded = torch.einsum("bmhe,hed->bhmd", heads * heads.shape[-1] ** -0.5, key_heads)
    weights = torch.einsum("bhmd,bnd->bhmn", folded, visual).softmax(-1)
    attended = torch.einsum("bhmn,bnd->bhmd", weights, visual)
    return torch.einsum("bhmd,hed->bmhe", attended, value_heads).flatten(2) + value_bias


def absorbed_sdpa(
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor,
    value_bias: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """Torch's attention between the folded queries and the tokens themselves, as one head of the tokens' width."""
    scale = (query.shape[-1] // num_heads) ** -0.5
    folded, tokens = _folded(query, key_weight, num_heads).unsqueeze(1), visual.unsqueeze(1)
    attended = scaled_dot_product_attention(folded, tokens, tokens, scale=scale).squeeze(1)
    return _unfolded(attended, query, value_weight, value_bias, num_heads)


EAGER: dict[str, Any] = {
    "projected": projected,
    "absorbed_bmm": absorbed_bmm,
    "absorbed_einsum": absorbed_einsum,
    "absorbed_sdpa": absorbed_sdpa,
}
COMPILED: dict[str, Any] = {
    "compiled_projected": projected,
    "compiled_bmm": absorbed_bmm,
    "compiled_einsum": absorbed_einsum,
}
