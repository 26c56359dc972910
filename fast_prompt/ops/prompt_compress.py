"""The API of ``prompt_compress``: checks the call, chooses a form and a backend, runs it under autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from fast_prompt import reference
from fast_prompt.backends import BACKENDS, PromptCompressCall, choose
from fast_prompt.ops import checks
from fast_prompt.ops.autocast import activation_dtype, autocast
from fast_prompt.ops.seeds import seed_tensor
from fast_prompt.ops.transforms import is_transformed, refuse_derivatives_of_backward
from fast_prompt.reference.autocast import without_autocast
from fast_prompt.reference.prompt_compress import FORMS, optional_to, split_heads

# What the absorbed form keeps for its backward pass is at most this part of the projected keys and values.
KEPT_SHARE = 1 / 10


def prompt_compress(
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    num_heads: int,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    form: str = "auto",
) -> Tensor:
    """Compresses visual tokens into m prompts: multi-head attention of m queries over n tokens.

    For every head, with its slices of query and projections, ``a = dropout(softmax(q @ (X @ W_k.T + b_k).T /
    sqrt(d_h)))`` and ``output = a @ (X @ W_v.T + b_v)``. Two forms compute exactly this. The *absorbed* one never
    projects the tokens: it takes the few queries through ``W_k`` and the few results through ``W_v``, and reads the
    tokens once, in float32 arithmetic whatever the storage. The *projected* one projects every token, as
    ``nn.MultiheadAttention`` does, with torch's own matrix products and attention: in half precision the projections,
    and the keys and values that it forms, are rounded to the dtype of ``query``, and end where that ends. Under
    autocast query and tokens are cast to the autocast dtype; the projections may stay float32.

    Args:
        query: [B, m, E] float32, bfloat16, float16 or float64; projected queries, head by head: E = num_heads * d_h.
            Any strides.
        visual: [B, n, d_v], dtype of ``query``; the visual tokens X. Any strides. Their gradient is computed only
            where they ask for it.
        key_weight: [E, d_v], dtype of ``query`` or float32; W_k.
        value_weight: [E, d_v], dtype of ``key_weight``; W_v.
        key_bias: [E], dtype of ``key_weight``, or None; b_k. It shifts a row's scores alike, so that it changes
            nothing and its gradient is 0.
        value_bias: [E], dtype of ``key_weight``, or None; b_v.
        num_heads: h, at least 1.
        key_padding_mask: bool [B, n], True where a token is padding, or None. A sample of padding alone gives 0 and
            no gradients.
        dropout_p: probability in [0, 1) that an attention weight is dropped; the rest are divided by
            ``1 - dropout_p``.
        seed: int64 number or one-element tensor that fixes the dropout mask; drawn from torch's generator when None.
        form: ``"absorbed"``, ``"projected"``, or ``"auto"`` for the one of fewer FLOPs.

    Returns:
        [B, m, E], dtype of ``query`` (the autocast dtype under autocast): the heads side by side, before any output
        projection. An empty batch gives an empty result and zero gradients; no tokens give 0.

    Raises:
        TypeError: an argument is not a tensor, or dtypes do not go together.
        ValueError: a shape, device or option does not fit; the message names it.
        fast_prompt.BackendError: a backend was forced that cannot take the call.

    Source: "Adapting Pre-trained Language Models to Vision-Language Tasks via Dynamic Visual Prompting",
    arXiv 2306.00409, section 3; the absorbed form is exact algebra.
    """
    biases = key_bias, value_bias
    _check(query, visual, key_weight, value_weight, *biases, num_heads, key_padding_mask, dropout_p, form)
    query, visual = autocast(query), autocast(visual)
    _check_dtypes(query, visual, key_weight, value_weight, *biases)
    seed = seed_tensor(seed, dropout_p, query.device)
    empty = query.numel() == 0 or visual.numel() == 0
    if form == "auto":
        form = cheaper_form(*_sizes(query, visual), num_heads)
    facts = call_facts(query, visual, key_weight, value_weight, *biases, num_heads=num_heads)
    # Torch's attention has no forward mode.
    if form == "projected" and dropout_p == 0 and not empty and not facts.transformed:
        return _projected(query, visual, key_weight, value_weight, *biases, num_heads, key_padding_mask)
    backend = choose("prompt_compress", facts)
    if form == "projected" or backend == "reference" or empty:
        return reference.prompt_compress(
            query,
            visual,
            key_weight,
            value_weight,
            *biases,
            num_heads=num_heads,
            key_padding_mask=key_padding_mask,
            dropout_p=dropout_p,
            seed=seed,
        )
    options = (key_padding_mask, seed, num_heads, float(dropout_p))
    tensors = (query, visual, key_weight, value_weight, value_bias)
    inputs = (*tensors, key_bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _PromptCompress.apply(*inputs, *options, backend)
    return torch.ops.fast_prompt.prompt_compress.default(*tensors, *options, False, False, backend)[0]


def _sizes(query: Tensor, visual: Tensor) -> tuple[int, int, int, int]:
    """m, n, E and d_v."""
    return query.shape[1], visual.shape[1], query.shape[2], visual.shape[2]


def cheaper_form(num_queries: int, num_tokens: int, inner_width: int, visual_width: int, num_heads: int) -> str:
    """``"absorbed"`` or ``"projected"``: the one of fewer FLOPs a sample.

    Args:
        num_queries: m.
        num_tokens: n.
        inner_width: E, of all heads together.
        visual_width: d_v.
        num_heads: h.
    """
    absorbed = flops(num_queries, num_tokens, inner_width, visual_width, num_heads)
    projected = 4 * num_tokens * inner_width * (visual_width + num_queries)
    return "absorbed" if absorbed <= projected else "projected"


def flops(num_queries: int, num_tokens: int, inner_width: int, visual_width: int, num_heads: int) -> int:
    """The absorbed form's FLOPs a sample: through W_k and W_v, then scores and weighted tokens for every head."""
    return 4 * num_queries * visual_width * (inner_width + num_heads * num_tokens)


def call_facts(
    query: Tensor, visual: Tensor, key_weight: Tensor, *others: Any, num_heads: int, **options: Any
) -> PromptCompressCall:
    """What the choice of a backend depends on, from the arguments of ``prompt_compress``."""
    return PromptCompressCall(
        device=visual.device,
        dtype=activation_dtype(visual),
        weight_dtype=key_weight.dtype,
        num_queries=query.shape[1],
        num_heads=num_heads,
        head_dim=query.shape[2] // num_heads,
        visual_width=visual.shape[2],
        transformed=is_transformed(query, visual, key_weight, *others, *options.values()),
    )


def _projected(
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    num_heads: int,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """Torch's own matrix products and attention; without dropout, whose mask torch's attention would draw itself."""
    mask = None
    # b_k changes nothing: times 0 it does not round the keys away either, and its gradient is 0.
    no_bias = None if key_bias is None else 0 * key_bias
    if key_padding_mask is not None:
        visual = visual.masked_fill(key_padding_mask.unsqueeze(-1), 0)
        # A sample of padding alone attends to its zeroed tokens, and its result is replaced by 0.
        empty = key_padding_mask.all(-1)
        mask = (~key_padding_mask | empty[:, None])[:, None, None, :]
    with without_autocast(query.device):
        k = linear(visual, key_weight.to(query.dtype), optional_to(no_bias, query.dtype))
        v = linear(visual, value_weight.to(query.dtype), optional_to(value_bias, query.dtype))
        # Torch's attention makes garbage of a query whose elements overlap.
        q, k, v = (split_heads(tensor, num_heads) for tensor in (query.contiguous(), k, v))
        output = scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    return output if key_padding_mask is None else output.masked_fill(empty[:, None, None], 0)


@checks.once_a_kind
def _check(
    query: Tensor,
    visual: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    num_heads: int,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    form: str,
) -> None:
    for name, value in (("query", query), ("visual", visual)):
        checks.check_tensor(name, value)
        if value.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions [batch, tokens, width], got shape {tuple(value.shape)}")
    if query.shape[0] != visual.shape[0]:
        raise ValueError(f"visual: expected a batch of {query.shape[0]} (that of query), got {visual.shape[0]}")
    inner_width, visual_width = query.shape[2], visual.shape[2]
    checks.check_count("num_heads", num_heads)
    if inner_width == 0 or inner_width % num_heads:
        raise ValueError(f"query: expected a width that num_heads={num_heads} divides, got {inner_width}")
    if visual_width == 0:
        raise ValueError(f"visual: expected a width of at least 1, got shape {tuple(visual.shape)}")
    parameters = {
        "key_weight": key_weight,
        "value_weight": value_weight,
        "key_bias": key_bias,
        "value_bias": value_bias,
    }
    for name, parameter in parameters.items():
        if parameter is None and name.endswith("bias"):
            continue
        checks.check_tensor(name, parameter)
        assert parameter is not None
        expected = (inner_width,) if name.endswith("bias") else (inner_width, visual_width)
        checks.check_shape(name, parameter, expected, "from the widths of query and visual")
        checks.check_device(name, parameter, query.device, "that of query")
    checks.check_device("visual", visual, query.device, "that of query")
    checks.check_probability("dropout_p", dropout_p)
    checks.check_choice("form", form, FORMS)
    if key_padding_mask is not None:
        checks.check_mask("key_padding_mask", key_padding_mask)
        checks.check_shape("key_padding_mask", key_padding_mask, tuple(visual.shape[:2]), "that of visual's tokens")
        checks.check_device("key_padding_mask", key_padding_mask, query.device, "that of query")


@checks.once_a_kind
def _check_dtypes(query: Tensor, visual: Tensor, key_weight: Tensor, *others: Tensor | None) -> None:
    checks.check_dtype("visual", visual, (query.dtype,), "that of query")
    weight_dtypes = (query.dtype,) if query.dtype == torch.float64 else (query.dtype, torch.float32)
    checks.check_dtype("key_weight", key_weight, weight_dtypes, "that of query, or float32")
    for name, value in zip(("value_weight", "key_bias", "value_bias"), others, strict=True):
        if value is not None:
            checks.check_dtype(name, value, (key_weight.dtype,), "that of key_weight")


def kept_for_backward(
    num_queries: int, num_tokens: int, inner_width: int, visual_width: int, num_heads: int
) -> tuple[bool, bool]:
    """Whether the probabilities, and the weighted tokens as well, stay within ``KEPT_SHARE``; else they are computed
    again in the backward pass."""
    allowed = KEPT_SHARE * 2 * num_tokens * inner_width
    rows = num_queries * num_heads
    return rows * num_tokens <= allowed, rows * (num_tokens + visual_width) <= allowed


class _PromptCompress(torch.autograd.Function):
    """Ties the two registered ops together."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        visual: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
        value_bias: Tensor | None,
        key_bias: Tensor | None,
        *options: Any,
    ) -> Tensor:
        tensors = (query, visual, key_weight, value_weight, value_bias)
        mask, seed, num_heads, dropout_p, backend = options
        keep = kept_for_backward(*_sizes(query, visual), num_heads)
        output, *kept = torch.ops.fast_prompt.prompt_compress.default(*tensors, *options[:4], *keep, backend)
        ctx.numbers, ctx.backend = (num_heads, dropout_p), backend
        ctx.save_for_backward(*tensors, key_bias if ctx.needs_input_grad[5] else None, mask, seed, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_derivatives_of_backward("prompt_compress", grad)
        *tensors, key_bias, mask, seed, logsumexp, probabilities, attended = ctx.saved_tensors
        kept = logsumexp, probabilities, attended
        needs = ctx.needs_input_grad[:5]
        grads = torch.ops.fast_prompt.prompt_compress_backward.default(
            grad, *tensors, mask, seed, *ctx.numbers, *kept, ctx.backend, needs
        )
        found = (value if need else None for value, need in zip(grads, needs, strict=True))
        options = (None,) * 5
        return (*found, None if key_bias is None else torch.zeros_like(key_bias), *options)


_library = torch.library.Library("fast_prompt", "FRAGMENT")
_ARGUMENTS = (
    "Tensor query, Tensor visual, Tensor key_weight, Tensor value_weight, Tensor? value_bias, "
    "Tensor? key_padding_mask, Tensor? seed, int num_heads, float dropout_p"
)
_library.define(
    f"prompt_compress({_ARGUMENTS}, bool keep_probabilities, bool keep_attended, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"prompt_compress_backward(Tensor grad, {_ARGUMENTS}, Tensor logsumexp, Tensor probabilities, Tensor attended, "
    "str backend, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(*args: Any) -> tuple[Tensor, ...]:
    *arguments, backend = args
    results = BACKENDS[backend].prompt_compress(*arguments)
    return tuple(args[0].new_empty(0, dtype=torch.float32) if value is None else value for value in results)


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    *arguments, logsumexp, probabilities, attended, backend, needs = args
    kept = logsumexp, *(value if value.numel() else None for value in (probabilities, attended))
    grads = BACKENDS[backend].prompt_compress_backward(*arguments, *kept, tuple(needs))
    return tuple(args[0].new_empty(0) if value is None else value for value in grads)


def _fake(query: Tensor, visual: Tensor, *args: Any) -> tuple[Tensor, ...]:
    num_heads, _, keep_probabilities, keep_attended, _ = args[-5:]
    rows = (query.shape[0], num_heads, query.shape[1])
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty((*rows, visual.shape[1]) if keep_probabilities else 0, dtype=torch.float32),
        query.new_empty((*rows, visual.shape[2]) if keep_attended else 0, dtype=torch.float32),
    )


def _fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    gradients_of, needs = args[:5], args[-1]
    return tuple(
        torch.empty_like(value, memory_format=torch.contiguous_format) if need else grad.new_empty(0)
        for value, need in zip(gradients_of, needs, strict=True)
    )


_library.impl("prompt_compress", _run, "CompositeExplicitAutograd")
_library.impl("prompt_compress_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fast_prompt::prompt_compress", _fake, lib=_library)
torch.library.register_fake("fast_prompt::prompt_compress_backward", _fake_backward, lib=_library)
