"""Several skip adapters at once: runs of them over the same rows, and batches whose samples take different ones."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fast_prompt.nn.skip_adapter import SkipAdapter
from fast_prompt.ops.checks import check_rows
from fast_prompt.ops.routes import route_tensors
from fast_prompt.ops.skip_adapter import checked_route, skip_adapter
from fast_prompt.reference.skip_adapter import Adapter


def run_adapters(x: Tensor, adapters: Iterable[SkipAdapter]) -> Tensor:
    """Adapters one after the other, as if each were called on the one before's result.

    Neighbours of one form go into one call of the op, in which the rows stay on chip; a mixture of experts is always a
    call of its own, since its gates come from the rows before it.

    Args:
        x: [..., n, d].
        adapters: the first is applied first.

    Returns:
        as ``x``, dtype of ``x`` (the autocast dtype under autocast).
    """
    for run in _runs(adapters):
        x = run[0](x) if len(run) == 1 else skip_adapter(x, *_stacked(run), **run[0].options())
    return x


def route_block(
    x: Tensor,
    route: Sequence[int] | Tensor,
    adapters: Sequence[SkipAdapter],
    block: Callable[..., Tensor],
    *context: Any,
) -> Tensor:
    """A batch of which each sample goes through ``block`` or through an adapter in its place.

    The samples of the block are compacted for it; the others are computed where they are. A batch that keeps the block
    throughout costs nothing extra: ``block(x, *context)`` is called on the very tensors that came. Nor does one that
    takes a single adapter throughout.

    Args:
        x: [B, n, d].
        route: for each sample the index of its adapter, or -1 for the block. Whole numbers, in a sequence or a tensor
            on the CPU (on another device it is waited for).
        adapters: of one form, without experts.
        block: [K, n, d] and the context to [K, n, d], K samples in their order.
        context: further arguments of ``block``; a tensor whose first size is B is compacted along with x, anything else
            is handed on as it is.

    Returns:
        [B, n, d], dtype of ``x`` (the autocast dtype under autocast).

    Raises:
        TypeError: x is no tensor, or the route is not of whole numbers.
        ValueError: x or the route has a wrong shape, the route names no adapter, or the adapters differ in form.
    """
    _check_adapters(adapters)
    check_rows("x", x, adapters[0].down_proj.in_features, 3)
    chosen = checked_route(x, route, len(adapters))
    taken = set(chosen)
    if taken == {-1}:
        return block(x, *context)
    if len(taken) < 2:
        return adapters[max(taken, default=0)](x)
    kept = None
    if -1 in taken:
        kept = block(*(_compacted(each, chosen) for each in (x, *context)))
    parameters = adapters[0].tensors() if len(adapters) == 1 else _stacked(adapters)
    return skip_adapter(x, *parameters, None, kept, route=chosen, **adapters[0].options())


def _runs(adapters: Iterable[SkipAdapter]) -> list[list[SkipAdapter]]:
    """Neighbours of one form together, in order; every mixture alone."""
    runs: list[list[SkipAdapter]] = []
    for adapter in adapters:
        if runs and adapter.expert_gate is None and _form(adapter) == _form(runs[-1][0]):
            runs[-1].append(adapter)
        else:
            runs.append([adapter])
    return runs


def _form(adapter: SkipAdapter) -> tuple[Any, ...]:
    """Whether it mixes experts, and all else that adapters of one call share."""
    shapes = [None if tensor is None else tensor.shape for tensor in adapter.tensors()]
    return adapter.expert_gate is not None, adapter.options(), shapes, adapter.down_proj.weight.dtype


def _stacked(adapters: Sequence[SkipAdapter]) -> Adapter:
    """The parameters [A, ...] of adapters of one form."""
    columns = zip(*(adapter.tensors() for adapter in adapters), strict=True)
    return Adapter(*(None if column[0] is None else torch.stack(column) for column in columns))  # type: ignore[arg-type]


def _check_adapters(adapters: Sequence[SkipAdapter]) -> None:
    if not len(adapters):
        raise ValueError("adapters: expected at least one, got none")
    different = [adapter for adapter in adapters if _form(adapter) != _form(adapters[0])]
    if different:
        raise ValueError(f"adapters: expected one form, got {adapters[0]} and {different[0]}")
    if adapters[0].expert_gate is not None:
        raise ValueError("adapters: expected adapters without experts, got a mixture of experts")


def _compacted(value: Any, route: list[int]) -> Any:
    """A tensor [B, ...] without the samples that take an adapter; anything else as it is."""
    if not isinstance(value, Tensor) or not value.dim() or len(value) != len(route):
        return value
    return value.index_select(0, route_tensors(route, value.device).kept)
