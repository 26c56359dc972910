"""What ``prompt_compress`` computes, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from fast_prompt.reference.autocast import without_autocast
from fast_prompt.reference.philox import dropout_mask

FORMS = ("auto", "absorbed", "projected")


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
    sqrt(d_h)))`` and ``output = a @ (X @ W_v.T + b_v)``. This is the definition: arithmetic in float32 (float64 for
    float64 inputs), rounded once to ``query.dtype``.

    Args:
        query: [B, m, E] floating point; projected queries, head by head: E = num_heads * d_h.
        visual: [B, n, d_v], dtype of ``query``; the visual tokens X.
        key_weight: [E, d_v], dtype of ``query`` or float32; W_k.
        value_weight: [E, d_v], dtype of ``key_weight``; W_v.
        key_bias: [E] or None; b_k. It shifts a row's scores alike, so that it changes nothing.
        value_bias: [E] or None; b_v.
        num_heads: h.
        key_padding_mask: bool [B, n], True where a token is padding. Padding is never read; a sample of padding alone
            gives 0 and no gradients.
        dropout_p: probability in [0, 1) that an attention weight is dropped; the others are divided by
            ``1 - dropout_p``.
        seed: int64; needed when ``dropout_p > 0``. Element (row, column) of the weights [B * h * m, n] uses Philox
            counter ``row * n + column``.
        form: here without effect, since every form computes this.

    Returns:
        [B, m, E], dtype of ``query``: the heads side by side, before any output projection.

    Source: "Adapting Pre-trained Language Models to Vision-Language Tasks via Dynamic Visual Prompting",
    arXiv 2306.00409, section 3.
    """
    with without_autocast(query.device):
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        projections = (
            key_weight.to(wide),
            value_weight.to(wide),
            optional_to(key_bias, wide),
            optional_to(value_bias, wide),
        )
        q, x = query.to(wide), visual.to(wide)
        output = _attend(q, x, *projections, num_heads, key_padding_mask, dropout_p, seed)
        return output.to(query.dtype)


def optional_to(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias in another dtype, if there is one."""
    return None if bias is None else bias.to(dtype)


def _attend(
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    num_heads: int,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
) -> Tensor:
    if key_padding_mask is not None:
        visual = visual.masked_fill(key_padding_mask.unsqueeze(-1), 0)
    q = split_heads(query, num_heads)
    k = split_heads(linear(visual, key_weight, key_bias), num_heads)
    v = split_heads(linear(visual, value_weight, value_bias), num_heads)
    weights = masked_softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, key_padding_mask)
    if dropout_p > 0:
        columns = weights.shape[-1]
        kept = dropout_mask(torch.as_tensor(seed), weights.shape[:-1].numel(), columns, dropout_p, weights.device)
        weights = weights * kept.view(weights.shape) / (1 - dropout_p)
    return (weights @ v).transpose(1, 2).flatten(2)


def split_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """[B, n, h * d_h] as [B, h, n, d_h]."""
    return tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def masked_softmax(scores: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Softmax of scores [B, h, m, n] over the tokens that are no padding; 0, without gradient, where all are."""
    if key_padding_mask is None:
        return scores.softmax(-1)
    padding = key_padding_mask[:, None, None, :]
    empty = padding.all(-1, keepdim=True)
    # A row of -inf alone would have NaN for its softmax and its gradient.
    return scores.masked_fill(padding & ~empty, -torch.inf).softmax(-1).masked_fill(padding, 0)
