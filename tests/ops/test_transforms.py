"""Forward mode and ``torch.func``: the definition's derivatives, or an error; never a derivative that is silently 0."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fast_prompt
from fast_prompt import ops
from fast_prompt.nn import (
    FoldedPromptDiffusion,
    PromptCompressor,
    PromptDiffusion,
    SkipAdapter,
    route_block,
    run_adapters,
)

D, W = 4, 3
X = (2, 3, D)


def prompt_diffusion(*shapes, **options):
    shapes = shapes or (X, X, (5, D), (5, D), ())
    return lambda *tensors: ops.prompt_diffusion(*tensors, **options), shapes


def prompt_compress(**options):
    shapes = ((2, 2, D), (2, 6, D + 1), (D, D + 1), (D, D + 1), (D,), (D,))
    return lambda *tensors: ops.prompt_compress(*tensors, num_heads=2, **options), shapes


def skip_adapter(*lead, **options):
    shapes = (X, (*lead, W, D), (*lead, D, W), (*lead, W), (*lead, D))
    return lambda *tensors: ops.skip_adapter(*tensors, **options), shapes


def normed_skip_adapter(norm, residual="input"):
    shapes = (X, (W, D), (D, W), (W,), (D,), (D,), *([(D,)] if norm != "rms" else []), ())

    def call(*tensors):
        *parameters, scale = tensors
        return ops.skip_adapter(*parameters, scale=scale, norm=norm, residual=residual, activation="silu")

    return call, shapes


def mixture():
    shapes = (X, (W, D), (D, 2 * W), (W,), (2, D), (2, 2))
    return lambda x, down, up, low, high, gates: ops.skip_adapter(x, down, up, low, high, gates=gates), shapes


def routed():
    shapes = (X, (2, W, D), (2, D, W), (1, 3, D))
    return lambda x, down, up, kept: ops.skip_adapter(x, down, up, kept=kept, route=[1, -1]), shapes


def module(made, *shapes):
    """A module as a function of its inputs and its parameters."""
    named = dict(made.named_parameters())

    def call(*tensors):
        inputs, parameters = tensors[: len(shapes)], tensors[len(shapes) :]
        return functional_call(made, dict(zip(named, parameters, strict=True)), inputs)

    return call, (*shapes, *(parameter.shape for parameter in named.values()))


PADDING = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
ADAPTERS = [SkipAdapter(D, W), SkipAdapter(D, W)]

CALLS = {
    "prompt_diffusion": prompt_diffusion(),
    "prompt_diffusion, softmax": prompt_diffusion(activation="softmax", row_weight="none"),
    "prompt_diffusion, dropout": prompt_diffusion(dropout_p=0.5, seed=3),
    "prompt_diffusion, rows": prompt_diffusion((3, D), (3, D), (5, D), (5, D), ()),
    "prompt_compress, absorbed": prompt_compress(form="absorbed"),
    "prompt_compress, projected": prompt_compress(form="projected"),
    "prompt_compress, padding": prompt_compress(form="projected", key_padding_mask=PADDING),
    "prompt_compress, dropout": prompt_compress(dropout_p=0.5, seed=3, key_padding_mask=PADDING),
    "skip_adapter": skip_adapter(),
    "skip_adapter, run": skip_adapter(2, activation="gelu"),
    "skip_adapter, dropout": skip_adapter(dropout_p=0.5, seed=3, residual="none"),
    "skip_adapter, layer": normed_skip_adapter("layer", "normed"),
    "skip_adapter, rms": normed_skip_adapter("rms"),
    "skip_adapter, layer_after": normed_skip_adapter("layer_after"),
    "skip_adapter, gates": mixture(),
    "skip_adapter, route": routed(),
    "PromptDiffusion": module(PromptDiffusion(D, 3), X, X),
    "PromptCompressor": module(PromptCompressor(D, 2), X, X),
    "SkipAdapter": module(SkipAdapter(D, W, num_experts=2, norm="rms", learn_scale=True), X),
    "run_adapters": (lambda x: run_adapters(x, ADAPTERS), (X,)),
    "route_block": (lambda x: route_block(x, [0, -1], ADAPTERS, torch.tanh), (X,)),
}
every_call = pytest.mark.parametrize("call", CALLS)


def problem(call):
    """The function, and for each of its tensors a value, with a direction."""
    function, shapes = CALLS[call]
    generator = torch.Generator().manual_seed(0)
    values, directions = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    return function, values, directions


def reverse_mode(function, values, cotangent):
    """Through the kernels, where there are any."""
    values = [value.clone().requires_grad_() for value in values]
    return torch.autograd.grad(function(*values), values, cotangent)


def drawn_like(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))


def inner(left, right):
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@every_call
def test_tangents_are_the_definitions(call):
    """A tangent J v is right if, for any u, u · J v is v · Jᵀ u."""
    function, values, directions = problem(call)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(values, directions, strict=True)]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
    cotangent = drawn_like(tangent)
    close((tangent * cotangent).sum(), inner(directions, reverse_mode(function, values, cotangent)))


@every_call
def test_no_arguments_tangent_is_overlooked(call):
    function, values, directions = problem(call)
    output = function(*values)
    cotangent = drawn_like(output)
    gradients = reverse_mode(function, values, cotangent)
    for position, (value, direction, gradient) in enumerate(zip(values, directions, gradients, strict=True)):
        before, after = values[:position], values[position + 1 :]
        primal, tangent = jvp(lambda own: function(*before, own, *after), (value,), (direction,))  # noqa: B023
        close(primal, output)
        close((tangent * cotangent).sum(), (direction * gradient).sum())


@every_call
def test_gradients_of_torch_func_are_those_of_the_kernels(call):
    function, values, _ = problem(call)
    cotangent = drawn_like(function(*values))
    every = tuple(range(len(values)))
    actual = grad(lambda *tensors: (function(*tensors) * cotangent).sum(), every)(*values)
    for one, other in zip(actual, reverse_mode(function, values, cotangent), strict=True):
        close(one, other)


@every_call
def test_vmap_is_a_loop(call):
    function, values, directions = problem(call)
    stacked = [torch.stack(pair) for pair in zip(values, directions, strict=True)]
    close(vmap(function)(*stacked), torch.stack([function(*values), function(*directions)]))


@every_call
def test_forward_over_reverse_is_the_definitions_second_derivative(call):
    function, values, directions = problem(call)
    cotangent = drawn_like(function(*values))
    every = tuple(range(len(values)))
    gradients = grad(lambda *tensors: (function(*tensors) * cotangent).sum(), every)
    _, actual = jvp(gradients, tuple(values), tuple(directions))
    doubled = [value.clone().requires_grad_() for value in values]
    with fast_prompt.use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad((function(*doubled) * cotangent).sum(), doubled, create_graph=True)
    expected = torch.autograd.grad(inner(first, directions), doubled, materialize_grads=True)
    for one, other in zip(actual, expected, strict=True):
        close(one, other)


def test_a_folded_module_has_the_tangents_of_what_it_folds():
    adapter, query, output = PromptDiffusion(D, 3), nn.Linear(D, D), nn.Linear(D, D)
    nn.init.normal_(adapter.prompts)
    folded = FoldedPromptDiffusion(adapter, query, [], output)
    x, direction = torch.randn(2, *X).unbind()
    _, actual = jvp(lambda x: folded.project_output(folded.project_query(x)), (x,), (direction,))
    _, expected = jvp(lambda x: adapter(output(query(x)), x), (x,), (direction,))
    close(actual, expected)


def test_a_backward_pass_of_the_kernels_refuses_a_tangent():
    for call in ("prompt_diffusion", "prompt_compress, absorbed", "skip_adapter"):
        function, values, _ = problem(call)
        inputs = [value.requires_grad_() for value in values]
        output = function(*inputs)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output))
            with pytest.raises(RuntimeError, match=f"{call.split(',')[0]}: its kernels have no second derivatives"):
                torch.autograd.grad(output, inputs, dual, retain_graph=True)
        with pytest.raises(RuntimeError, match="a gradient with a tangent"):
            jvp(lambda given: torch.autograd.grad(output, inputs, given)[0], (output,), (output,))  # noqa: B023


def test_a_backend_by_name_refuses_a_transform():
    function, values, directions = problem("skip_adapter, gates")
    with fast_prompt.use_backend("cpu"), pytest.raises(fast_prompt.BackendError, match="no rules for torch.func"):
        jvp(function, tuple(values), tuple(directions))


def test_a_call_is_explained_within_a_transform():
    function, values, directions = problem("skip_adapter, gates")
    said = []

    def explained(x, down, up, low, high, gates):
        arguments = (x, down, up, low, high, None, None, None, gates)
        said.append(ops.explain("skip_adapter", *arguments))
        return ops.skip_adapter(*arguments)

    jvp(explained, tuple(values), tuple(directions))
    assert said[0].chosen == "reference" and "torch.func" in said[0].reasons["cpu"]


@pytest.mark.gate
def test_compiled_transforms_are_the_definitions():
    function, values, directions = problem("prompt_diffusion, softmax")

    def tangent(*tensors):
        return jvp(function, tensors, tuple(directions))[1]

    def gradient(*tensors):
        return grad(lambda *inner: function(*inner).sum())(*tensors)

    for transformed in (tangent, gradient):
        close(torch.compile(transformed, fullgraph=True, backend="aot_eager")(*values), transformed(*values))


@pytest.mark.gate
def test_a_compiled_call_is_compiled_anew_for_tangents():
    function, values, directions = problem("prompt_diffusion, softmax")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled(*values)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(values, directions, strict=True)]
        actual, expected = (forward_ad.unpack_dual(each(*duals)).tangent for each in (compiled, function))
        close(actual, expected)
