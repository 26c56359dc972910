"""Prompt diffusion merged with an attention's frozen projections: two wide products and one small step between them.

The scores' keys become further rows of the query, key and value weights, which read the same X; the diffusion becomes
a further term of the output projection, into which ``exp(log_scale)`` is multiplied. What is left of the method is
one activation and row weight on [M, p]. Each product's part of the arithmetic is what it was; only roundings differ.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast_prompt.nn.prompt_diffusion import PromptDiffusion
from fast_prompt.reference.prompt_diffusion import ACTIVATIONS, ROW_WEIGHTS


class CallState:
    """What one call of a folded attention keeps from its first projection to its last.

    Attributes:
        source: X, or None between calls.
        slices: what was computed from it.
    """

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.slices: tuple[Tensor, ...] = ()


class StateByThread(threading.local):
    """A ``CallState`` for each thread: several may run the same module at once. Copies of it start empty."""

    def __init__(self) -> None:
        self.call = CallState()

    def __deepcopy__(self, memo: dict[int, Any]) -> "StateByThread":
        return StateByThread()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return StateByThread, ()


class FoldedPromptDiffusion(nn.Module):
    """Takes over the forwards of an attention's linear layers, for inference.

    ``project_query`` computes all that reads X in one product and keeps the other slices until the forwards they
    belong to ask for them within the same forward pass, in the same thread; ``project_output`` adds the diffusion and
    lets go of them.

    Args:
        adapter: what to merge.
        query: the query projection, d to its own width.
        memory: the key and value projections where they read X too; empty for cross-attention.
        output: the output projection, to d.
    """

    input_weight: Tensor
    input_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    prompts: Tensor

    def __init__(
        self, adapter: PromptDiffusion, query: nn.Linear, memory: Sequence[nn.Linear], output: nn.Linear
    ) -> None:
        super().__init__()
        self.activation = adapter.activation
        self.row_weight = adapter.row_weight
        inputs = (query, *memory)
        self.widths = [linear.out_features for linear in inputs] + [adapter.prompts.shape[0]]
        with torch.no_grad():
            keys, scale = adapter.keys().to(query.weight), adapter.log_scale.exp()
            wide = {
                "input_weight": torch.cat([*(linear.weight for linear in inputs), keys]),
                "input_bias": torch.cat([*map(_bias, inputs), keys.new_zeros(len(keys))]),
                "output_weight": (output.weight * scale).to(output.weight),
                "output_bias": (_bias(output) * scale).to(output.weight),
                "prompts": (adapter.prompts * scale).to(output.weight),
            }
        for name, value in wide.items():
            self.register_buffer(name, value, persistent=False)
        self._states, self._traced = StateByThread(), CallState()
        self.eval()

    def _call(self) -> CallState:
        """The state of the call that this thread makes; while torch traces, one that it can follow."""
        return self._traced if torch.compiler.is_compiling() else self._states.call

    def project_query(self, source: Tensor) -> Tensor:
        """X [..., n, d] to the queries [..., n, query width].

        Raises:
            RuntimeError: the module is in training mode, or a gradient is wanted for X.
        """
        if self.training or (torch.is_grad_enabled() and source.requires_grad):
            raise RuntimeError(
                "the model is folded, for inference only: call unfold() to train, "
                "or run under torch.no_grad() with the model in eval mode"
            )
        call = self._call()
        call.source = source
        call.slices = F.linear(source, self.input_weight, self.input_bias).split(self.widths, dim=-1)
        return call.slices[0]

    def project_key(self, source: Tensor) -> Tensor:
        """X [..., n, d] to the keys."""
        return self._project(1, source)

    def project_value(self, source: Tensor) -> Tensor:
        """X [..., n, d] to the values."""
        return self._project(2, source)

    def _project(self, index: int, source: Tensor) -> Tensor:
        """The slice that ``project_query`` has computed, if that was from the same ``source``."""
        call = self._call()
        if source is call.source:
            return call.slices[index]
        start = sum(self.widths[:index])
        rows = slice(start, start + self.widths[index])
        return F.linear(source, self.input_weight[rows], self.input_bias[rows])

    def project_output(self, heads: Tensor) -> Tensor:
        """The heads' output [..., n, value width] to Y [..., n, d]."""
        call = self._call()
        scores = call.slices[-1]
        call.source, call.slices = None, ()
        diffusion = ACTIVATIONS[self.activation](scores)
        diffusion.mul_(ROW_WEIGHTS[self.row_weight](diffusion))
        hidden = F.linear(heads, self.output_weight, self.output_bias)
        # Two accumulating products: 0.5 ms less than one over the concatenated [O, w R] (M=1,480, d=768, p=200).
        rows, terms = hidden.flatten(0, -2), diffusion.flatten(0, -2)
        rows.addmm_(terms.to(hidden.dtype), self.prompts.to(hidden.dtype))
        return hidden


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
