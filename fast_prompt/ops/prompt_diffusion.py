"""The API of ``prompt_diffusion``: checks the call, chooses a backend, runs it under autograd."""

from typing import Any

import torch
from torch import Tensor

from fast_prompt import reference
from fast_prompt.backends import BACKENDS, PromptDiffusionCall, choose
from fast_prompt.ops import checks
from fast_prompt.ops.autocast import activation_dtype, autocast
from fast_prompt.ops.seeds import seed_tensor
from fast_prompt.reference.prompt_diffusion import ACTIVATIONS, ROW_WEIGHTS

MAX_PROMPTS = 1024


def prompt_diffusion(
    hidden: Tensor,
    source: Tensor,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    *,
    activation: str = "relu",
    row_weight: str = "max",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Approximated prompt tuning's diffusion step, ``exp(log_scale) * (hidden + w * (R @ prompts))``.

    ``R = dropout(activation(source @ keys.T))``; ``w`` is each row's maximum of ``R``, without gradient.
    One read of ``hidden`` and ``source``, one write of the output; the scores are recomputed in the backward
    pass, so only ``source`` and ``hidden`` are saved for it. Arithmetic is float32 whatever the storage.
    Under autocast the activations are cast to the autocast dtype; prompts and keys may stay float32.

    Args:
        hidden: [..., n, d] float32, bfloat16, float16 or float64; the attention's output projection with its
            bias, before dropout and residual. Any strides.
        source: [..., n, d], dtype of ``hidden``; the input of the attention's queries. Any strides.
        prompts: [p, d], p from 1 to 1,024; dtype of ``hidden`` or float32.
        keys: [p, d], dtype of ``prompts``.
        log_scale: one floating element; the logarithm of the output's scale.
        activation: ``"relu"`` or ``"softmax"`` (over the p prompts).
        row_weight: ``"max"``, or ``"none"`` for ``w = 1``.
        dropout_p: probability in [0, 1) that an element of ``R`` is dropped; the rest are divided by
            ``1 - dropout_p``.
        seed: int64 number or one-element tensor that fixes the dropout mask; drawn from torch's generator when None.

    Returns:
        [..., n, d], dtype of ``hidden`` (the autocast dtype under autocast), contiguous. An empty batch gives an
        empty result and zero gradients.

    Raises:
        TypeError: an argument is not a tensor, or dtypes do not go together.
        ValueError: a shape, device or option does not fit; the message names it.
        fast_prompt.BackendError: a backend was forced that cannot take the call.

    Source: "Approximated Prompt Tuning for Vision-Language Pre-trained Models", arXiv 2306.15706, section 3.
    """
    _check(hidden, source, prompts, keys, log_scale, activation, row_weight, dropout_p)
    hidden, source = autocast(hidden), autocast(source)
    _check_dtypes(hidden, source, prompts, keys)
    seed = seed_tensor(seed, hidden.device) if dropout_p > 0 else None
    backend = choose("prompt_diffusion", call_facts(hidden, source, prompts, keys, log_scale))
    if backend == "reference" or hidden.numel() == 0:
        return reference.prompt_diffusion(
            hidden,
            source,
            prompts,
            keys,
            log_scale,
            activation=activation,
            row_weight=row_weight,
            dropout_p=dropout_p,
            seed=seed,
        )
    shape = hidden.shape
    tensors = (_three_dimensional(hidden), _three_dimensional(source), prompts, keys, log_scale.float())
    # A custom Function costs as much as the op itself on few rows: only where a gradient may be asked for.
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    run = _PromptDiffusion.apply if differentiable else torch.ops.fast_prompt.prompt_diffusion.default
    output = run(*tensors, seed, activation, row_weight, float(dropout_p), backend)
    return output if len(shape) == 3 else output.view(shape)


def call_facts(
    hidden: Tensor, source: Tensor, prompts: Tensor, keys: Tensor, log_scale: Tensor, **options: Any
) -> PromptDiffusionCall:
    """What the choice of a backend depends on, from the arguments of ``prompt_diffusion``."""
    return PromptDiffusionCall(
        hidden.device, activation_dtype(hidden), prompts.dtype, hidden.shape[-1], prompts.shape[0]
    )


@checks.once_a_kind
def _check(
    hidden: Tensor,
    source: Tensor,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    activation: str,
    row_weight: str,
    dropout_p: float,
) -> None:
    checks.check_tensor("hidden", hidden, minimum_rank=1)
    checks.check_tensor("source", source, minimum_rank=1)
    checks.check_tensor("prompts", prompts)
    checks.check_tensor("keys", keys)
    checks.check_tensor("log_scale", log_scale)
    width = hidden.shape[-1]
    checks.check_shape("source", source, hidden.shape, "that of hidden")
    if prompts.dim() != 2 or prompts.shape[1] != width or not 1 <= prompts.shape[0] <= MAX_PROMPTS or width == 0:
        raise ValueError(
            f"prompts: expected shape [p, {width}] with p from 1 to {MAX_PROMPTS:,} and a width of at least 1 "
            f"(that of hidden), got {tuple(prompts.shape)}"
        )
    checks.check_shape("keys", keys, prompts.shape, "that of prompts")
    if log_scale.numel() != 1:
        raise ValueError(f"log_scale: expected one element, got shape {tuple(log_scale.shape)}")
    for name, value in (("source", source), ("prompts", prompts), ("keys", keys), ("log_scale", log_scale)):
        checks.check_device(name, value, hidden.device, "that of hidden")
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_choice("row_weight", row_weight, ROW_WEIGHTS)
    checks.check_probability("dropout_p", dropout_p)


@checks.once_a_kind
def _check_dtypes(hidden: Tensor, source: Tensor, prompts: Tensor, keys: Tensor) -> None:
    checks.check_dtype("source", source, (hidden.dtype,), "that of hidden")
    weight_dtypes = (hidden.dtype,) if hidden.dtype == torch.float64 else (hidden.dtype, torch.float32)
    checks.check_dtype("prompts", prompts, weight_dtypes, "that of hidden, or float32")
    checks.check_dtype("keys", keys, (prompts.dtype,), "that of prompts")


def _three_dimensional(activation: Tensor) -> Tensor:
    """[..., n, d] as [B, n, d]; a view wherever one exists."""
    if activation.dim() == 3:
        return activation
    if activation.dim() < 3:
        return activation.reshape(1, -1, activation.shape[-1])
    return activation.flatten(0, -3)


class _PromptDiffusion(torch.autograd.Function):
    """Ties the two registered ops together; saves ``source``, and ``hidden`` only where the scale trains."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        source: Tensor,
        prompts: Tensor,
        keys: Tensor,
        log_scale: Tensor,
        seed: Tensor | None,
        *options: Any,
    ) -> Tensor:
        ctx.save_for_backward(hidden if ctx.needs_input_grad[4] else None, source, prompts, keys, log_scale, seed)
        ctx.options = options
        return torch.ops.fast_prompt.prompt_diffusion.default(hidden, source, prompts, keys, log_scale, seed, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "prompt_diffusion: its kernels have no second derivatives (create_graph=True); "
                'with fast_prompt.use_backend("reference"): has'
            )
        needs = ctx.needs_input_grad[:5]
        grads = torch.ops.fast_prompt.prompt_diffusion_backward.default(grad, *ctx.saved_tensors, *ctx.options, needs)
        seed_and_options = (None,) * 5
        return (*(value if need else None for value, need in zip(grads, needs, strict=True)), *seed_and_options)


_library = torch.library.Library("fast_prompt", "FRAGMENT")
_ARGUMENTS = (
    "Tensor source, Tensor prompts, Tensor keys, Tensor log_scale, Tensor? seed, "
    "str activation, str row_weight, float dropout_p, str backend"
)
_library.define(f"prompt_diffusion(Tensor hidden, {_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"prompt_diffusion_backward(Tensor grad, Tensor? hidden, {_ARGUMENTS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(*args: Any) -> Tensor:
    *arguments, backend = args
    return BACKENDS[backend].prompt_diffusion(*arguments)


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    grad, *arguments, backend, needs = args
    grads = BACKENDS[backend].prompt_diffusion_backward(grad, *arguments, tuple(needs))
    return tuple(grad.new_empty(0) if value is None else value for value in grads)


def _fake(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _, source, prompts, keys, log_scale, *_, needs = args
    gradients_of = (grad, source, prompts, keys, log_scale)
    return tuple(
        torch.empty_like(value, memory_format=torch.contiguous_format) if need else grad.new_empty(0)
        for value, need in zip(gradients_of, needs, strict=True)
    )


_library.impl("prompt_diffusion", _run, "CompositeExplicitAutograd")
_library.impl("prompt_diffusion_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fast_prompt::prompt_diffusion", _fake, lib=_library)
torch.library.register_fake("fast_prompt::prompt_diffusion_backward", _fake_backward, lib=_library)
