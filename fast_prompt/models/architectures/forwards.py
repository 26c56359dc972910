"""The forwards that several architectures share.

An attention gives H (its output projection) alone, first in a tuple, or, in BERT's family, never: its ``output`` module
projects, drops out and normalises, so that module's forward is replaced. A skipped block's forward runs the adapter in
its place.

A parallel adapter reads what its sublayer reads before any norm, and is computed together with the residual:
``x + adapter(x)`` is one pass, to which the sublayer's result is added. For that, a pre-norm block's sublayers are
called from here; without adapters they must give what the block's own forward gives, which a trial call checks.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fast_prompt.models.architectures.architecture import Place, Sublayers
from fast_prompt.models.cache import cache_in
from fast_prompt.models.skip import SKIP_CHILD, adapter_in_place
from fast_prompt.tuning.adapters import at_site
from fast_prompt.tuning.classes import Replacement
from fast_prompt.tuning.site import CHILD

# The child of BERT's ``output`` module that keeps adapters of its residual.
RESIDUAL_CHILD = f"{CHILD}_residual"

# Children of a pre-norm block that keep its parallel adapters.
ATTENTION_CHILD, MLP_CHILD = f"{CHILD}_attention", f"{CHILD}_mlp"

# The argument of an attention that is X, where it comes by name.
SOURCES = ("hidden_states", "query", "x")


@functools.cache  # so that the same attentions have the same class
def attention_forward(projection: str) -> Replacement:
    """The forward of an attention module that returns H, alone or first in a tuple.

    Args:
        projection: the path of the linear layer that gives H, where the attention is known to keep that nowhere;
            otherwise empty.
    """

    def forward_with_adapter(self: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        source = args[0] if args else next(kwargs[name] for name in SOURCES if name in kwargs)
        output = forward(self, *args, **kwargs)
        hidden, *others = output if isinstance(output, tuple) else (output,)
        adapters = getattr(self, CHILD)
        inplace = bool(projection) and may_write_over(self.get_submodule(projection), adapters)
        adapted = adapters(hidden, source.to(hidden.device), inplace=inplace)
        return (adapted, *others) if isinstance(output, tuple) else adapted

    return forward_with_adapter


def may_write_over(projection: nn.Module, adapters: Any) -> bool:
    """Whether H has no user but the adapter: a plain linear layer's result that nobody watches, there or here.

    Its backward pass reads its input and weight alone. Hooks, other tools' forwards, and subclasses may keep it.
    """
    plain = type(projection) is nn.Linear and "forward" not in vars(projection)
    watched = any(map(_has_hook, (projection, adapters, adapters.in_use()))) or _has_any_global_hook()
    return plain and not watched


def _has_hook(module: nn.Module | None) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in hooks)


def output_forward(self: Any, _: Callable[..., Any], hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """The forward of ViLT's ``output`` module: projection, (the adapter,) dropout."""
    return self.dropout(_adapted(self, hidden_states, input_tensor))


def _adapted(output: Any, heads: Tensor, source: Tensor) -> Tensor:
    adapters = getattr(output, CHILD, None)
    hidden = output.dense(heads)
    return hidden if adapters is None else adapters(hidden, source, inplace=may_write_over(output.dense, adapters))


def normed_output_forward(self: Any, _: Callable[..., Any], hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """The forward of BERT's ``output`` module: projection, (the adapter,) dropout, (adapted) residual, LayerNorm."""
    hidden_states = _adapted(self, hidden_states, input_tensor)
    return self.LayerNorm(self.dropout(hidden_states) + at_site(self, RESIDUAL_CHILD, input_tensor))


def skippable_forward(self: Any, forward: Callable[..., Tensor], *, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The forward of a block that returns its hidden states alone; its parallel adapters are deeper inside."""
    adapter = adapter_in_place(self)
    if adapter is not None:
        return adapter.replace(hidden_states, kwargs.get("attention_mask"), cache_in(kwargs))
    return forward(self, hidden_states=hidden_states, **kwargs)


def adapt_after(self: Any, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The forward of a module whose output is a sublayer's: the adapter comes after it."""
    return self.fast_prompt(forward(self, x))


def adapt_before(self: Any, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The forward of the dropout that a sublayer's output goes through: the adapter comes before it."""
    return forward(self, self.fast_prompt(x))


def has_parallel(block: Any) -> bool:
    """Whether an adapter that keeps this pre-norm block is in use."""
    adapters = getattr(block, ATTENTION_CHILD, None)
    return adapters is not None and adapters.in_use() is not None


def pre_norm(sublayers: Sublayers, forward: Replacement | None = None) -> dict[str, Any]:
    """Fields of ``Blocks`` for pre-norm blocks, whose forward is replaced whole.

    Args:
        sublayers: what computes the sublayers of a kept block, each beside its adapter.
        forward: what replaces the block's forward, if that gives more than the hidden states.
    """
    forward = forward or pre_norm_forward(sublayers)
    return {
        "skip": Place("", SKIP_CHILD, forward),
        "kept": tuple(Place("", child, forward) for child in (ATTENTION_CHILD, MLP_CHILD)),
        "sublayers": sublayers,
    }


def pre_norm_forward(sublayers: Sublayers) -> Replacement:
    """The forward of a pre-norm block that returns its hidden states alone."""

    def block_forward(self: Any, forward: Callable[..., Tensor], *, hidden_states: Tensor, **kwargs: Any) -> Any:
        adapter = adapter_in_place(self)
        if adapter is not None:
            return adapter.replace(hidden_states, kwargs.get("attention_mask"))
        run = sublayers if has_parallel(self) else forward
        return run(self, hidden_states=hidden_states, **kwargs)

    return block_forward
