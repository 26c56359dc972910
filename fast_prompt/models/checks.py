"""Checks that depend on what tensors hold."""

import torch
from torch import Tensor


def check_data(holds: Tensor, message: str) -> None:
    """Raise a ValueError with ``message`` unless ``holds`` is True; compiled, a RuntimeError as the graph runs.

    The device is waited for, so only what came besides the usual is checked this way.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not bool(holds):
        raise ValueError(message)
