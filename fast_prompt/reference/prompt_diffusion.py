"""What ``prompt_diffusion`` computes, in plain PyTorch."""

import torch
from torch import Tensor

from fast_prompt.reference.autocast import without_autocast
from fast_prompt.reference.philox import dropout_mask


def prompt_diffusion(
    hidden: Tensor,
    source: Tensor,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    *,
    activation: str = "relu",
    row_weight: str = "max",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Approximated prompt tuning's diffusion step, ``exp(log_scale) * (hidden + w * (R @ prompts))``.

    ``R = dropout(activation(source @ keys.T))`` and ``w`` is each row's maximum of ``R``, without gradient.
    This is the definition: arithmetic in float32 (float64 for float64 inputs), rounded once to ``hidden.dtype``.

    Args:
        hidden: [..., n, d] floating point; the attention's output projection, before dropout and residual.
        source: [..., n, d], dtype of ``hidden``; the input of the attention's queries.
        prompts: [p, d], dtype of ``hidden`` or float32.
        keys: [p, d], dtype of ``prompts``.
        log_scale: one element, any floating dtype; the logarithm of the output's scale.
        activation: ``"relu"`` or ``"softmax"`` (over the p prompts).
        row_weight: ``"max"``, or ``"none"`` for ``w = 1``.
        dropout_p: probability in [0, 1) that an element of ``R`` is dropped; the others are divided by
            ``1 - dropout_p``.
        seed: int64; needed when ``dropout_p > 0``. Element (row, column) uses Philox counter ``row * p + column``,
            with the rows of all leading dimensions counted in order.

    Returns:
        [..., n, d], dtype of ``hidden``.

    Source: "Approximated Prompt Tuning for Vision-Language Pre-trained Models", arXiv 2306.15706, section 3.
    """
    with without_autocast(hidden.device):
        return _diffuse(hidden, source, prompts, keys, log_scale, activation, row_weight, dropout_p, seed)


def _diffuse(
    hidden: Tensor,
    source: Tensor,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    activation: str,
    row_weight: str,
    dropout_p: float,
    seed: int | Tensor | None,
) -> Tensor:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    x, p, k = source.to(wide), prompts.to(wide), keys.to(wide)
    scores = x @ k.transpose(-1, -2)
    diffusion = ACTIVATIONS[activation](scores)
    if dropout_p > 0:
        columns = diffusion.shape[-1]
        rows = diffusion.numel() // columns
        kept = dropout_mask(torch.as_tensor(seed), rows, columns, dropout_p, diffusion.device)
        diffusion = diffusion * kept.view(diffusion.shape) / (1 - dropout_p)
    weight = ROW_WEIGHTS[row_weight](diffusion)
    output = log_scale.to(wide).reshape(()).exp() * (hidden.to(wide) + weight * (diffusion @ p))
    return output.to(hidden.dtype)


ACTIVATIONS = {"relu": torch.relu, "softmax": lambda scores: scores.softmax(-1)}
ROW_WEIGHTS = {"max": lambda r: r.detach().amax(-1, keepdim=True), "none": lambda r: 1.0}
