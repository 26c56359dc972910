"""Activations of any rank as a batch of rows."""

from torch import Tensor


def three_dimensional(activation: Tensor) -> Tensor:
    """[..., n, d] as [B, n, d]; a view wherever one exists."""
    if activation.dim() == 3:
        return activation
    if activation.dim() < 3:
        return activation.reshape(1, -1, activation.shape[-1])
    return activation.flatten(0, -3)
