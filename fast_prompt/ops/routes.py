"""Routes as tensors on the device: copied there once, so that later calls neither wait for it nor break a capture."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_ROUTES = 256  # that are remembered


class RouteTensors(NamedTuple):
    """A route where its samples are; int64, and never to be written to.

    Attributes:
        adapters: [B], each sample's adapter, or -1.
        kept: the samples of route -1.
    """

    adapters: Tensor
    kept: Tensor


_lock = threading.Lock()
_recent: dict[tuple[tuple[int, ...], torch.device], RouteTensors] = {}
_captured: list[RouteTensors] = []  # for good: a graph's replays read them


def route_tensors(route: Sequence[int], device: torch.device) -> RouteTensors:
    """The route on ``device``.

    Raises:
        RuntimeError: the device captures a CUDA graph, and no call before had this route.
    """
    if torch.compiler.is_compiling():
        return _copied(route, device)
    key, capturing = (tuple(route), device), _is_capturing(device)
    with _lock:
        found = _recent.pop(key, None)
        if found is None:
            if capturing:
                raise RuntimeError(
                    "route: a CUDA graph cannot capture the first call with a route, which copies it to the GPU; "
                    "make one call with the same route before the capture"
                )
            found = _copied(route, device)
        if _is_real(found.kept):
            _recent[key] = found  # behind all others
            if len(_recent) > MOST_ROUTES:
                del _recent[next(iter(_recent))]
        if capturing and not any(found is each for each in _captured):
            _captured.append(found)
    return found


def _copied(route: Sequence[int], device: torch.device) -> RouteTensors:
    kept = [sample for sample, adapter in enumerate(route) if adapter < 0]
    with torch.inference_mode(False):  # autograd may want them in a later call
        return RouteTensors(*(torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (route, kept)))


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_real(tensor: Tensor) -> bool:
    """Whether it has numbers: not that of a trace, which is of no use after it."""
    return type(tensor) is Tensor
