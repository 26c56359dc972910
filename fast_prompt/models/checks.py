"""Checks that depend on what tensors hold."""

import torch
from torch import Tensor


def check_data(holds: Tensor, message: str) -> None:
    """Raise a ValueError with ``message`` unless ``holds`` is True.

    The device is waited for, so only what came besides the usual is checked this way. Where nothing can wait, compiled
    or in a CUDA graph, it is a RuntimeError, on a GPU an asynchronous one.
    """
    capturing = holds.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not bool(holds):
        raise ValueError(message)
