"""Importing this module lets ``torch.utils.flop_counter.FlopCounterMode`` count the ops' arithmetic.

A module of its own, since torch's counter imports triton, which takes as long as the rest of this package.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fast_prompt.ops import prompt_compress, prompt_diffusion, skip_adapter  # noqa: F401 (registers the ops counted here)


@register_flop_formula(torch.ops.fast_prompt.prompt_diffusion)
def _flops(hidden_shape: Any, source_shape: Any, prompts_shape: Any, *_: Any, **__: Any) -> int:
    """Two products of 2·M·p·d each."""
    return 4 * math.prod(hidden_shape) * prompts_shape[0]


@register_flop_formula(torch.ops.fast_prompt.prompt_diffusion_backward)
def _flops_backward(
    grad_shape: Any, hidden_shape: Any, source_shape: Any, prompts_shape: Any, *args: Any, **__: Any
) -> int:
    """S again, then one product for each of dR (which dX, dK and the scale need), dX, dP and dK."""
    _, need_source, need_prompts, need_keys, need_scale = args[-1]
    need_scores = need_source or need_prompts or need_keys or need_scale
    need_score_gradient = need_source or need_keys or need_scale
    products = need_scores + need_score_gradient + need_source + need_prompts + need_keys
    return 2 * products * math.prod(grad_shape) * prompts_shape[0]


@register_flop_formula(torch.ops.fast_prompt.prompt_compress)
def _compress_flops(query_shape: Any, visual_shape: Any, *args: Any, **__: Any) -> int:
    """The queries through W_k, the results through W_v; scores and weighted tokens for every head."""
    projection, tokens = _compress_products(query_shape, visual_shape, num_heads=args[5])
    return 2 * projection + 2 * tokens


@register_flop_formula(torch.ops.fast_prompt.prompt_compress_backward)
def _compress_flops_backward(grad_shape: Any, query_shape: Any, visual_shape: Any, *args: Any, **__: Any) -> int:
    """What was not kept again, then a product for each of dy, dw, du and every gradient; two for the tokens'."""
    num_heads, _, _, probabilities, attended, _, needs = args[5:]
    projection, tokens = _compress_products(query_shape, visual_shape, num_heads)
    need_query, need_visual, need_keys, need_values, _ = needs
    need_scores = need_query or need_visual or need_keys
    recomputed = [need_scores and not math.prod(probabilities), need_values and not math.prod(attended)]
    need_absorbed_query = need_visual or recomputed[0]
    projections = [need_scores, need_absorbed_query, need_query, need_keys, need_values]
    passes = [*recomputed, need_scores, need_query or need_keys, need_visual, need_visual]
    return projection * sum(map(bool, projections)) + tokens * sum(map(bool, passes))


def _compress_products(query_shape: Any, visual_shape: Any, num_heads: int) -> tuple[int, int]:
    """FLOPs of one product with a projection's weight, and of one of all rows with the visual tokens."""
    batch, num_tokens, visual_width = visual_shape
    projection = 2 * math.prod(query_shape) * visual_width
    return projection, 2 * batch * query_shape[1] * num_heads * num_tokens * visual_width


@register_flop_formula(torch.ops.fast_prompt.skip_adapter)
def _skip_flops(x_shape: Any, down_shape: Any, up_shape: Any, *args: Any, **__: Any) -> int:
    """Down and up, for every adapter that a row goes through."""
    kept_shape, route_shape = args[6], args[7]
    down, up = _skip_products(x_shape, down_shape, up_shape, kept_shape)
    return (down + up) * (1 if route_shape is not None else down_shape[0])


@register_flop_formula(torch.ops.fast_prompt.skip_adapter_backward)
def _skip_flops_backward(grad_shape: Any, x_shape: Any, down_shape: Any, up_shape: Any, *args: Any, **__: Any) -> int:
    """A product for each of the hidden layer, the normed rows and both weights; in a run its rows again."""
    route_shape, kept_samples_shape, needs = args[6], args[7], args[-1]
    down, up = _skip_products(x_shape, down_shape, up_shape, kept_samples_shape)
    adapters = 1 if route_shape is not None else down_shape[0]
    need_x, need_down, need_up, need_down_bias, _, need_norm, need_norm_bias, need_scale, need_gates = needs
    need_rows = need_x or need_norm or need_norm_bias
    need_hidden = need_rows or need_down or need_down_bias or need_scale or need_gates
    own = adapters * (up * (need_hidden + need_up) + down * need_down)
    # Between the adapters of a run, rows are computed again and their gradients handed on.
    return own + down * (adapters if need_rows else adapters - 1) + up * (adapters - 1)


def _skip_products(x_shape: Any, down_shape: Any, up_shape: Any, kept_shape: Any) -> tuple[int, int]:
    """FLOPs of the products of every row that is not kept with one adapter's down and up projection."""
    kept = 0 if kept_shape is None else kept_shape[0]
    rows = (x_shape[0] - kept) * x_shape[1]
    return 2 * rows * math.prod(down_shape[1:]), 2 * rows * math.prod(up_shape[1:])
