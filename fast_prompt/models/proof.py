"""Trial calls: whether an attention's projections read X and give H, whatever its class; whether a block still computes
what our own code computes in its stead.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fast_prompt.tuning.classes import base_class

TOKENS = 3

# What another sequence than the queries' is called, for keys and values.
MEMORIES = ("encoder_hidden_states", "key_value_states")


@dataclass(frozen=True)
class Verdict:
    """What a trial call has shown.

    Attributes:
        holds: whether X and H are where they are expected; None where no call could be made.
        reason: why not, or why there was no call; empty where it holds.
    """

    holds: bool | None
    reason: str = ""


@dataclass(frozen=True)
class Trial:
    """An attention, and where X and H are expected in it; modules are its own children.

    Attributes:
        attention: the module to call.
        query: reads X.
        memory: the keys' and values' projections; they read X, or the memory of a cross-attention.
        output: gives H.
        host: the module that is given the heads' output and X and whose forward is replaced; None where the attention
            returns H, alone or first in a tuple.
        replacement: what replaces the host's forward.
        is_cross: whether keys and values are of another sequence.
    """

    attention: nn.Module
    query: nn.Module
    memory: tuple[nn.Module, ...]
    output: nn.Module
    host: nn.Module | None
    replacement: Callable[..., Any]
    is_cross: bool


@torch.no_grad()
def prove(trial: Trial) -> Verdict:
    """Call the attention once, in eval mode, on three random tokens, and look at what its projections read and give."""
    try:
        with _in_eval(trial.attention):
            return _judge(trial)
    except Exception as error:  # noqa: BLE001 (what a foreign module raises when it is called like that is anybody's guess)
        return _not_called(error)


@torch.no_grad()
def prove_equal(block: nn.Module, ours: Callable[..., Any], width: int) -> Verdict:
    """Call a block's own forward and ``ours(block, ...)`` on three random tokens, without a mask, in eval mode."""
    try:
        x = _tokens(next(block.parameters()), width, 0)
        with _in_eval(block):
            own = base_class(block).forward(block, hidden_states=x, attention_mask=None)
            found = ours(block, hidden_states=x, attention_mask=None)
        equal = torch.allclose(_first(own), _first(found), rtol=1e-2, atol=1e-3)
    except Exception as error:  # noqa: BLE001 (weights may be anywhere, of any kind: where no call can be made, none is)
        return _not_called(error)
    return Verdict(True) if equal else Verdict(False, "it computes something else than its sublayers one after another")


def _not_called(error: Exception) -> Verdict:
    return Verdict(None, f"a trial call failed with {type(error).__name__}: {error}")


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _judge(trial: Trial) -> Verdict:
    weight = next(trial.query.parameters())
    x = _tokens(weight, _input_width(trial.query), 0)
    memory = _tokens(weight, _input_width(trial.memory[0] if trial.memory else trial.query), 1)
    watched = [trial.query, *trial.memory, trial.output, *([trial.host] if trial.host else [])]
    with _recorded(watched) as calls:
        result = trial.attention(**_arguments(trial, x, memory))
    unseen = [module for module in watched if module not in calls]
    if unseen:
        return Verdict(False, f"it does not call its {type(unseen[0]).__name__}")
    read = dict.fromkeys(trial.memory, memory if trial.is_cross else x) | {trial.query: x}
    if not all(_same(calls[module][0][0], expected) for module, expected in read.items()):
        return Verdict(False, "its projections do not read its input")
    if trial.host is None:
        return Verdict(True) if _same(_first(result), calls[trial.output][1]) else _NOT_H
    arguments, given = calls[trial.host]
    if not _same(arguments[1], x):
        return Verdict(False, f"its {type(trial.host).__name__} is not given its input")
    ours = trial.replacement(trial.host, type(trial.host).forward, *arguments)
    return Verdict(True) if torch.allclose(ours, given, rtol=1e-3, atol=1e-5) else _NOT_H


_NOT_H = Verdict(False, "what it returns is not its output projection's result")


def _input_width(projection: Any) -> int:
    return getattr(projection, "in_features", None) or projection.weight.shape[0]  # GPT-2's Conv1D is [d, width]


def _tokens(weight: Tensor, width: int, seed: int) -> Tensor:
    values = torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(seed))
    return values.to(weight.device, weight.dtype)


def _arguments(trial: Trial, x: Tensor, memory: Tensor) -> dict[str, Any]:
    """X as the first argument, None for whatever else has no default; rotary positions that turn nothing."""
    _, first, *others = inspect.signature(base_class(trial.attention).forward).parameters.values()
    given: dict[str, Any] = {first.name: x}
    for parameter in others:
        if trial.is_cross and parameter.name in MEMORIES:
            given[parameter.name] = memory
        elif parameter.name == "position_embeddings":
            head_dim: Any = trial.attention.head_dim
            angles = x.new_zeros(1, TOKENS, head_dim)
            given[parameter.name] = (angles.cos(), angles.sin())
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            given[parameter.name] = None
    return given


@contextmanager
def _in_eval(module: nn.Module) -> Iterator[None]:
    """Every part in eval mode, and afterwards each in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[tuple[Any, ...], Any]]]:
    """By module: the arguments and the result of its last call."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module] = ((*args, *kwargs.values()), output)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        yield calls


def _same(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)
