"""What the ranks of a ``torch.distributed`` job agree on; alone, a process agrees with itself."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def number() -> int:
    """This rank's, counted from 0."""
    return dist.get_rank() if _several() else 0


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _several() else 1


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Each gradient averaged over the ranks, which must all have one for the same parameters."""
    if _several():
        for gradient in [parameter.grad for parameter in parameters if parameter.grad is not None]:
            dist.all_reduce(gradient)
            gradient.div_(count())


def mean(value: Tensor) -> Tensor:
    """A tensor's mean over the ranks."""
    if not _several():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / count()


def from_first(number: int) -> int:
    """The first rank's ``number``, on every rank."""
    if not _several():
        return number
    shared = torch.tensor(number, dtype=torch.int64, device=_device())
    dist.broadcast(shared, src=0)
    return int(shared)


def mean_of_finite(values: Tensor) -> Tensor:
    """Each of ``values`` [n] averaged over the ranks where it is finite; NaN where it is on none."""
    finite = values.isfinite()
    sums = torch.stack([values.where(finite, 0.0), finite.to(values.dtype)]).to(_device())
    if _several():
        dist.all_reduce(sums)
    total, ranks = sums.to(values.device)
    return total / ranks  # 0 / 0 is NaN


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """Where the job's backend can reach tensors."""
    on_gpu = _several() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
