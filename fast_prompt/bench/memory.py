"""How many bytes a function keeps for its backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from fast_prompt.parity import Problem


def saved_bytes(function: Callable[..., Tensor], problem: Problem, parameters: tuple[str, ...]) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward.

    Args:
        function: called with the problem's tensors.
        problem: one call.
        parameters: names of the tensors not to count, since they exist anyway.
    """
    leaves = problem.leaves()
    excluded = {leaves[name].untyped_storage().data_ptr() for name in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The output lives until the count is made, so that no storage is freed and counted again at its address.
        output = function(**leaves, **problem.options)
    total = sum(kept.values())
    del output
    return total
