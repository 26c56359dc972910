"""``prompt_compress``: what it is, its declaration, its checks and its other form."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from fast_prompt import reference
from fast_prompt.backends import Call, Kernels
from fast_prompt.ops import checks
from fast_prompt.ops.declaration import Op, activation, choice, index, number, weight
from fast_prompt.ops.seeds import seed_tensor
from fast_prompt.reference.autocast import without_autocast
from fast_prompt.reference.prompt_compress import FORMS, optional_to, split_heads

# What the absorbed form keeps for its backward pass is at most this part of the projected keys and values.
KEPT_SHARE = 1 / 10


def prompt_compress(
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    num_heads: int,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    form: str = "auto",
) -> Tensor:
    """Compresses visual tokens into m prompts: multi-head attention of m queries over n tokens.

    For every head, with its slices of query and projections, ``a = dropout(softmax(q @ (X @ W_k.T + b_k).T /
    sqrt(d_h)))`` and ``output = a @ (X @ W_v.T + b_v)``. Two forms compute exactly this. The *absorbed* one never
    projects the tokens: it takes the few queries through ``W_k`` and the few results through ``W_v``, and reads the
    tokens once, in float32 arithmetic whatever the storage. The *projected* one projects every token, as
    ``nn.MultiheadAttention`` does, with torch's own matrix products and attention: in half precision the projections,
    and the keys and values that it forms, are rounded to the dtype of ``query``, and end where that ends. Under
    autocast query and tokens are cast to the autocast dtype; the projections may stay float32.

    Args:
        query: [B, m, E] float32, bfloat16, float16 or float64; projected queries, head by head: E = num_heads * d_h.
            Any strides.
        visual: [B, n, d_v], dtype of ``query``; the visual tokens X. Any strides. Their gradient is computed only
            where they ask for it.
        key_weight: [E, d_v], dtype of ``query`` or float32; W_k.
        value_weight: [E, d_v], dtype of ``key_weight``; W_v.
        key_bias: [E], dtype of ``key_weight``, or None; b_k. It shifts a row's scores alike, so that it changes
            nothing and its gradient is 0.
        value_bias: [E], dtype of ``key_weight``, or None; b_v.
        num_heads: h, at least 1.
        key_padding_mask: bool [B, n], True where a token is padding, or None. A sample of padding alone gives 0 and
            no gradients.
        dropout_p: probability in [0, 1) that an attention weight is dropped; the rest are divided by
            ``1 - dropout_p``.
        seed: int64 number or one-element tensor that fixes the dropout mask; drawn from torch's generator when None.
        form: ``"absorbed"``, ``"projected"``, or ``"auto"`` for the one of fewer FLOPs.

    Returns:
        [B, m, E], dtype of ``query`` (the autocast dtype under autocast): the heads side by side, before any output
        projection. An empty batch gives an empty result and zero gradients; no tokens give 0.

    Raises:
        TypeError: an argument is not a tensor, or dtypes do not go together.
        ValueError: a shape, device or option does not fit; the message names it.
        fast_prompt.BackendError: a backend was forced that cannot take the call.

    Source: "Adapting Pre-trained Language Models to Vision-Language Tasks via Dynamic Visual Prompting",
    arXiv 2306.00409, section 3; the absorbed form is exact algebra.
    """
    tensors = (query, visual, key_weight, value_weight, key_bias, value_bias)
    plan = PROMPT_COMPRESS.plan(*tensors, key_padding_mask, num_heads, dropout_p, form)
    seed = seed_tensor(seed, dropout_p, query.device)
    if plan.form == "projected":
        return _projected(plan.cast(*tensors), num_heads, key_padding_mask)
    if plan.form == "reference":
        return plan.define(*tensors, key_padding_mask=key_padding_mask, seed=seed)
    return plan.run(*tensors, key_padding_mask, seed)


def cheaper_form(num_queries: int, num_tokens: int, inner_width: int, visual_width: int, num_heads: int) -> str:
    """``"absorbed"`` or ``"projected"``: the one of fewer FLOPs a sample.

    Args:
        num_queries: m.
        num_tokens: n.
        inner_width: E, of all heads together.
        visual_width: d_v.
        num_heads: h.
    """
    absorbed = flops(num_queries, num_tokens, inner_width, visual_width, num_heads)
    projected = 4 * num_tokens * inner_width * (visual_width + num_queries)
    return "absorbed" if absorbed <= projected else "projected"


def flops(num_queries: int, num_tokens: int, inner_width: int, visual_width: int, num_heads: int) -> int:
    """The absorbed form's FLOPs a sample: through W_k and W_v, then scores and weighted tokens for every head."""
    return 4 * num_queries * visual_width * (inner_width + num_heads * num_tokens)


def _projected(tensors: tuple[Any, ...], num_heads: int, key_padding_mask: Tensor | None) -> Tensor:
    """Torch's own matrix products and attention; without dropout, whose mask torch's attention would draw itself."""
    query, visual, key_weight, value_weight, key_bias, value_bias = tensors
    mask = None
    # b_k changes nothing: times 0 it does not round the keys away either, and its gradient is 0.
    no_bias = None if key_bias is None else 0 * key_bias
    if key_padding_mask is not None:
        visual = visual.masked_fill(key_padding_mask.unsqueeze(-1), 0)
        # A sample of padding alone attends to its zeroed tokens, and its result is replaced by 0.
        empty = key_padding_mask.all(-1)
        mask = (~key_padding_mask | empty[:, None])[:, None, None, :]
    with without_autocast(query.device):
        k = linear(visual, key_weight.to(query.dtype), optional_to(no_bias, query.dtype))
        v = linear(visual, value_weight.to(query.dtype), optional_to(value_bias, query.dtype))
        # Torch's attention makes garbage of a query whose elements overlap.
        q, k, v = (split_heads(tensor, num_heads) for tensor in (query.contiguous(), k, v))
        output = scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    return output if key_padding_mask is None else output.masked_fill(empty[:, None, None], 0)


def _check(
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    num_heads: int,
    dropout_p: float,
    form: str,
) -> None:
    for name, value in (("query", query), ("visual", visual)):
        if value.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions [batch, tokens, width], got shape {tuple(value.shape)}")
    if query.shape[0] != visual.shape[0]:
        raise ValueError(f"visual: expected a batch of {query.shape[0]} (that of query), got {visual.shape[0]}")
    inner_width, visual_width = query.shape[2], visual.shape[2]
    checks.check_count("num_heads", num_heads)
    if inner_width == 0 or inner_width % num_heads:
        raise ValueError(f"query: expected a width that num_heads={num_heads} divides, got {inner_width}")
    if visual_width == 0:
        raise ValueError(f"visual: expected a width of at least 1, got shape {tuple(visual.shape)}")
    parameters = {
        "key_weight": key_weight,
        "value_weight": value_weight,
        "key_bias": key_bias,
        "value_bias": value_bias,
    }
    for name, parameter in parameters.items():
        if parameter is not None:
            expected = (inner_width,) if name.endswith("bias") else (inner_width, visual_width)
            checks.check_shape(name, parameter, expected, "from the widths of query and visual")
    checks.check_probability("dropout_p", dropout_p)
    if key_padding_mask is not None:
        checks.check_mask("key_padding_mask", key_padding_mask)
        checks.check_shape("key_padding_mask", key_padding_mask, tuple(visual.shape[:2]), "that of visual's tokens")


def kept_for_backward(
    num_queries: int, num_tokens: int, inner_width: int, visual_width: int, num_heads: int
) -> tuple[bool, bool]:
    """Whether the probabilities, and the weighted tokens as well, stay within ``KEPT_SHARE``; else they are computed
    again in the backward pass."""
    allowed = KEPT_SHARE * 2 * num_tokens * inner_width
    rows = num_queries * num_heads
    return rows * num_tokens <= allowed, rows * (num_tokens + visual_width) <= allowed


def _other_form(
    call: Call, query: Tensor, visual: Tensor, num_heads: int, dropout_p: float, form: str, **_: Any
) -> str | None:
    """The projected form is torch's own products and attention; with dropout, or a tangent, it is the definition."""
    if form == "auto":
        form = cheaper_form(query.shape[1], visual.shape[1], query.shape[2], visual.shape[2], num_heads)
    if form != "projected":
        return None
    return "projected" if dropout_p == 0 and not call.transformed else "reference"


def _sizes(query: Tensor, visual: Tensor, num_heads: int, **_: Any) -> dict[str, int]:
    """``num_queries``: m; ``num_heads``: h; ``head_width``: d_h; ``visual_width``: d_v."""
    return {
        "num_queries": query.shape[1],
        "num_heads": num_heads,
        "head_width": query.shape[2] // num_heads,
        "visual_width": visual.shape[2],
    }


def _keep(query: Tensor, visual: Tensor, num_heads: int, **_: Any) -> tuple[bool, bool, bool]:
    kept = kept_for_backward(query.shape[1], visual.shape[1], query.shape[2], visual.shape[2], num_heads)
    return (True, *kept)


def _results(query: Tensor, visual: Tensor, num_heads: int, keep: Sequence[bool], **_: Any) -> list[Tensor]:
    rows = (query.shape[0], num_heads, query.shape[1])
    shapes = (rows, (*rows, visual.shape[1]), (*rows, visual.shape[2]))
    kept = [query.new_empty(shape, dtype=torch.float32) for shape, wanted in zip(shapes, keep, strict=True) if wanted]
    return [torch.empty_like(query, memory_format=torch.contiguous_format), *kept]


def _flops(query: Sequence[int], visual: Sequence[int], num_heads: int, **_: Any) -> int:
    """The queries through W_k, the results through W_v; scores and weighted tokens for every head."""
    projection, tokens = _products(query, visual, num_heads)
    return 2 * projection + 2 * tokens


def _flops_backward(
    query: Sequence[int],
    visual: Sequence[int],
    num_heads: int,
    probabilities: Sequence[int] | None,
    attended: Sequence[int] | None,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    """What was not kept again, then a product for each of dy, dw, du and every gradient; two for the tokens'."""
    projection, tokens = _products(query, visual, num_heads)
    need_query, need_visual, need_keys, need_values, _key_bias, _value_bias = needs
    need_scores = need_query or need_visual or need_keys
    recomputed = [need_scores and probabilities is None, need_values and attended is None]
    need_absorbed_query = need_visual or recomputed[0]
    projections = [need_scores, need_absorbed_query, need_query, need_keys, need_values]
    passes = [*recomputed, need_scores, need_query or need_keys, need_visual, need_visual]
    return projection * sum(map(bool, projections)) + tokens * sum(map(bool, passes))


def _products(query: Sequence[int], visual: Sequence[int], num_heads: int) -> tuple[int, int]:
    """FLOPs of one product with a projection's weight, and of one of all rows with the visual tokens."""
    batch, num_tokens, visual_width = visual
    projection = 2 * math.prod(query) * visual_width
    return projection, 2 * batch * query[1] * num_heads * num_tokens * visual_width


_MOST_HEADS = 65535  # of Triton's: a launch grid's second dimension


def _triton_refuses(call: Call) -> str | None:
    heads = call.sizes["num_heads"]
    return f"takes up to {_MOST_HEADS} heads, not {heads}" if heads > _MOST_HEADS else None


PROMPT_COMPRESS = Op(
    prompt_compress,
    reference.prompt_compress,
    tensors=(
        activation("query"),
        activation("visual"),
        weight("key_weight"),
        weight("value_weight"),
        weight("key_bias", optional=True),
        weight("value_bias", optional=True),
        index("key_padding_mask"),
        index("seed", planned=False),
    ),
    options=(number("num_heads", int), number("dropout_p"), choice("form", FORMS, registered=False)),
    check=_check,
    sizes=_sizes,
    results=_results,
    kernels={
        "cpu": Kernels(),
        "cuda": Kernels(),
        "triton": Kernels(
            _triton_refuses, "fast_prompt_kernels.prompt_compress", "fast_prompt_kernels.prompt_compress_backward"
        ),
    },
    kept=("logsumexp", "probabilities", "attended"),
    keep=_keep,
    always_kept=("logsumexp",),
    other_form=_other_form,
    flops=_flops,
    flops_backward=_flops_backward,
    cases="fast_prompt.parity.prompt_compress",
)
