"""Deep prompt tuning, in the forms that are counted: what a learned prompt takes part in, one form more than the other.

For counting: every token is real, none is hidden from another, and prompts have no rotary position. None of that takes
a multiply-add.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fast_prompt.models import AttentionSite, find_attention_sites
from fast_prompt.models.blocks import find_blocks

# Arguments that have a row for every token, and those that say which token sees which.
ROWS = ("hidden_states", "encoder_hidden_states", "position_embeddings")
MASKS = ("attention_mask", "encoder_attention_mask")


class PromptedKeys(nn.Module):
    """An attention to whose keys and values learned prompts are appended; they ask nothing themselves.

    Args:
        attention: what it takes the place of.
        site: where its projections are.
        num_prompts: p.

    Attributes:
        prompts: [p, d].
    """

    def __init__(self, attention: nn.Module, site: AttentionSite, num_prompts: int) -> None:
        super().__init__()
        self.attention, self.site = attention, site
        self.prompts = new_prompts(attention, num_prompts, site.width)

    def forward(
        self, hidden_states: Tensor, *args: Any, encoder_hidden_states: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """H of the queries of `hidden_states` [B, n, d] over its own n, or the m of another stream, and p more rows."""
        layout = self.site.projections
        assert layout is not None
        memory = append(hidden_states if encoder_hidden_states is None else encoder_hidden_states, self.prompts)
        query, key, value = (
            self._heads(path, source)
            for path, source in zip((layout.query, *layout.memory), (hidden_states, memory, memory), strict=True)
        )
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        scores = query @ key.mT * query.shape[-1] ** -0.5
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        if self.site.host != self.site.name:  # BERT's: the output's module also takes the residual
            return self.attention.get_submodule("output")(context, hidden_states), None
        return self.attention.get_submodule(layout.output)(context), None

    def _heads(self, path: str, source: Tensor) -> Tensor:
        """A projection of `source` [B, n, d] by heads, [B, h, n, width]."""
        width = next(size for module in self.attention.modules() if (size := _head_width(module)))
        return self.attention.get_submodule(path)(source).unflatten(-1, (-1, width)).transpose(1, 2)


class PromptedRows(nn.Module):
    """A module that runs on learned prompts behind its own rows, and gives back its own.

    Args:
        module: what it takes the place of, an attention or a whole block.
        rows: names of the arguments that get p rows more.
        num_prompts: p.
        width: d.

    Attributes:
        prompts: [p, d].
    """

    def __init__(self, module: nn.Module, rows: tuple[str, ...], num_prompts: int, width: int) -> None:
        super().__init__()
        self.module, self.rows = module, rows
        self.prompts = new_prompts(module, num_prompts, width)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns of its own rows."""
        call = inspect.signature(self.module.forward).bind(*args, **kwargs)
        length = call.arguments["hidden_states"].shape[1]
        for name in call.arguments.keys() & {*self.rows, *MASKS}:
            given = call.arguments[name]
            if name in MASKS or given is None:
                call.arguments[name] = None
            elif isinstance(given, tuple):  # cosines and sines, as many as the tokens
                rows = given[0][:, :1].expand(-1, len(self.prompts), -1)
                call.arguments[name] = tuple(torch.cat([each, rows], dim=1) for each in given)
            else:
                call.arguments[name] = append(given, self.prompts)
        output = self.module(*call.args, **call.kwargs)
        return (output[0][:, :length], *output[1:]) if isinstance(output, tuple) else output[:, :length]


def append(tokens: Tensor, prompts: Tensor) -> Tensor:
    """[B, n, d] and [p, d] to [B, n + p, d]."""
    return torch.cat([tokens, prompts.expand(len(tokens), -1, -1)], dim=1)


def new_prompts(module: nn.Module, number: int, width: int) -> nn.Parameter:
    """[number, width], where the module's weights are."""
    return nn.Parameter(next(module.parameters()).new_empty(number, width))


def _head_width(module: nn.Module) -> int:
    return int(getattr(module, "head_dim", 0) or getattr(module, "attention_head_size", 0))


def prompt_keys(model: nn.Module, num_prompts: int, attentions: list[str] | None) -> None:
    """Every attention gets prompts as keys and values."""
    for site in find_attention_sites(model, attentions):
        attention = model.get_submodule(site.name)
        model.set_submodule(site.name, PromptedKeys(attention, site, num_prompts))


def prompt_queries(model: nn.Module, num_prompts: int, attentions: list[str] | None) -> None:
    """Every self-attention runs on its rows and the prompts; a cross-attention sees them with the other stream."""
    for site in find_attention_sites(model, attentions):
        rows = ("encoder_hidden_states",) if site.is_cross else ("hidden_states", "position_embeddings")
        attention = model.get_submodule(site.name)
        model.set_submodule(site.name, PromptedRows(attention, rows, num_prompts, site.width))


def prompt_blocks(model: nn.Module, num_prompts: int, attentions: list[str] | None) -> None:
    """Every block runs on its rows and the prompts."""
    for block in find_blocks(model):
        module = model.get_submodule(block.path)
        model.set_submodule(block.path, PromptedRows(module, ROWS, num_prompts, block.width))


# What takes part, by what it is called: how prompts get into a model.
FORMS: dict[str, Callable[[nn.Module, int, list[str] | None], None]] = {
    "prompts as keys and values": prompt_keys,
    "prompts with their own queries": prompt_queries,
    "prompts as tokens of whole blocks": prompt_blocks,
}
