"""Importing this module lets ``torch.utils.flop_counter.FlopCounterMode`` count the ops' arithmetic.

A module of its own, since torch's counter imports triton, which takes as long as the rest of this package.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fast_prompt.ops import prompt_diffusion  # noqa: F401 (registers the ops counted here)


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
