"""APT in a whole model against the two usual forms of deep prompt tuning: a ViLT-shaped encoder, forward only.

ViLT-base's blocks (d = 768, 12 heads) with random weights, on random hidden states. The baselines are written as
well as they can be: prompts as tokens run every block on n + p tokens; prompts as keys and values spare what the
prompts' own rows would cost, which no real token ever sees, and so compute the very same function.
"""

import importlib
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast_prompt.bench.contender import Contender, backends_for, forced
from fast_prompt.methods import APTConfig
from fast_prompt.models.architectures.vilt import self_attention
from fast_prompt.ops.prompt_diffusion import MAX_PROMPTS
from fast_prompt.parity import Problem
from fast_prompt.tuning import get_fast_prompt_model

SHAPE_KEYS = ("B", "n", "p", "layers")
LARGEST = {"p": MAX_PROMPTS}
DEFAULT_SHAPES = ({"B": 8, "n": 185, "p": 200, "layers": 4},)
PASSES = ("fwd",)
PARAMETERS = ()

WIDTH, HEADS = 768, 12  # ViltConfig's defaults
SEED = 0

Shape = dict[str, int]
Function = Callable[..., Tensor]


def problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random hidden states [B, n, d]."""
    hidden = torch.randn(shape["B"], shape["n"], WIDTH, generator=torch.Generator().manual_seed(SEED))
    return Problem({"hidden": hidden.to(device, dtype)}, torch.empty(0))


def products(shape: Shape) -> list[tuple[int, int, int]]:
    """(m, k, n) of a block's largest matrix products: the two of its MLP."""
    rows = shape["B"] * shape["n"]
    return [(rows, WIDTH, 4 * WIDTH), (rows, 4 * WIDTH, WIDTH)]


def flops(shape: Shape, backward: bool) -> int:
    """FLOPs of the encoder with APT: projections and MLP, attention, diffusion."""
    a_row = 24 * WIDTH**2 + 4 * shape["n"] * WIDTH + 4 * shape["p"] * WIDTH
    return shape["layers"] * shape["B"] * shape["n"] * a_row


def traffic(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Bytes of the weights, and of each block's input and output."""
    weights = 12 * WIDTH**2 + 2 * shape["p"] * WIDTH
    return dtype.itemsize * shape["layers"] * (weights + 2 * shape["B"] * shape["n"] * WIDTH)


def contenders(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> list[Contender]:
    """The untouched model and both forms of prompt tuning; APT unfolded and folded on every backend."""

    def build(make: Callable[[nn.Module, Shape], Function], wide: bool = False) -> Function:
        """One form of the same model: in the dtype to be timed, or its numbers in float64 for a definition."""
        model = encoder(shape).to(device, dtype)
        return make(model.double() if wide else model, shape)

    forms = (untouched, prompts_as_tokens, apt_unfolded)
    definitions = {form: build(form, wide=True) for form in forms}
    baselines = {
        "untouched": (untouched, untouched),
        "untouched_sdpa": (with_sdpa(untouched), untouched),
        "prompts_as_tokens": (prompts_as_tokens, prompts_as_tokens),
        "prompts_as_tokens_sdpa": (with_sdpa(prompts_as_tokens), prompts_as_tokens),
        "prompts_as_keys_values": (prompts_as_keys_values, prompts_as_tokens),
    }
    found = [Contender(name, "baseline", build(make), definitions[form]) for name, (make, form) in baselines.items()]
    for backend in backends_for("prompt_diffusion", device, dtype, width=WIDTH, num_prompts=shape["p"]):
        for name, make in (("unfolded", apt_unfolded), ("folded", apt_folded)):
            function = forced(build(make), backend)
            found.append(Contender(f"{backend}_{name}", "ours", function, definitions[apt_unfolded]))
    return found


def encoder(shape: Shape) -> nn.Module:
    """A ``ViltModel`` in evaluation, the same random weights each time; only its encoder will run, so no vocabulary."""
    transformers = importlib.import_module("transformers")  # an extra, and slow to import
    torch.manual_seed(SEED)
    config = transformers.ViltConfig(num_hidden_layers=shape["layers"], vocab_size=1)
    return transformers.ViltModel(config, add_pooling_layer=False).eval()


def untouched(model: Any, shape: Shape) -> Function:
    """The blocks of ``transformers`` as they are."""
    return lambda hidden: model.encoder(hidden).last_hidden_state


def with_sdpa(make: Callable[[Any, Shape], Function]) -> Callable[[Any, Shape], Function]:
    """The same form with the attention that folding uses, which ``transformers`` does not have for ViLT."""

    def fused(model: Any, shape: Shape) -> Function:
        for block in model.encoder.layer:
            attention = block.attention.attention
            attention.forward = partial(self_attention, attention, type(attention).forward)
        return make(model, shape)

    return fused


def prompts_as_tokens(model: Any, shape: Shape) -> Function:
    """VPT-deep: p learned tokens behind the n of each block, replaced before the next."""
    prompts = _prompts(model, shape)

    def forward(hidden: Tensor) -> Tensor:
        tokens = hidden.shape[1]
        for block, prompt in zip(model.encoder.layer, prompts, strict=True):
            hidden = block(torch.cat((hidden[:, :tokens], prompt.expand(len(hidden), -1, -1)), 1))[0]
        return hidden[:, :tokens]

    return forward


def prompts_as_keys_values(model: Any, shape: Shape) -> Function:
    """The prompts' keys and values, computed once and appended in each block: n queries over n + p keys."""
    for block, prompt in zip(model.encoder.layer, _prompts(model, shape), strict=True):
        attention = block.attention.attention
        with torch.no_grad():
            normed = block.layernorm_before(prompt)
            attention.prompt_key, attention.prompt_value = attention.key(normed), attention.value(normed)
        attention.forward = MethodType(_attend_to_prompts, attention)
    return untouched(model, shape)


def _attend_to_prompts(self: Any, hidden_states: Tensor, *unused: Any, **unused_options: Any) -> tuple[Tensor]:
    def heads(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    batch = len(hidden_states)
    key = torch.cat((self.key(hidden_states), self.prompt_key.expand(batch, -1, -1)), 1)
    value = torch.cat((self.value(hidden_states), self.prompt_value.expand(batch, -1, -1)), 1)
    context = F.scaled_dot_product_attention(heads(self.query(hidden_states)), heads(key), heads(value))
    return (context.transpose(1, 2).flatten(2),)


def apt_unfolded(model: Any, shape: Shape) -> Function:
    """APT as it trains; keys apart from their prompts, as after training."""
    model = get_fast_prompt_model(model, APTConfig(num_prompts=shape["p"]))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return untouched(model, shape)


def apt_folded(model: Any, shape: Shape) -> Function:
    """The same adapter, folded into the projections."""
    function = apt_unfolded(model, shape)
    model.fold()
    return function


def _prompts(model: Any, shape: Shape) -> Tensor:
    """[layers, 1, p, d], as at the start of training, in the model's dtype."""
    weight = next(model.parameters())
    drawn = torch.randn(shape["layers"], 1, shape["p"], WIDTH, generator=torch.Generator().manual_seed(SEED))
    return (0.02 * drawn).to(weight.device, weight.dtype)
