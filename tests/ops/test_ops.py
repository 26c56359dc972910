"""The ops' APIs: checks, autograd, autocast, torch.compile, backend choice."""

import importlib
import logging

import pytest
import torch
from compiled import assert_compiles_to_one_graph
from torch.utils.flop_counter import FlopCounterMode

import fast_prompt
from fast_prompt import backends, ops, reference
from fast_prompt.ops.declaration import OPS
from fast_prompt.tolerances import TOLERANCES, relative_error


def arguments(shape=(2, 5, 16), p=7, dtype=torch.float32, weight_dtype=None, requires_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, dtype=dtype):
        return torch.randn(*size, generator=generator).to(dtype).requires_grad_(requires_grad)

    weight_dtype = weight_dtype or dtype
    width = shape[-1]
    return [
        draw(*shape),
        draw(*shape),
        draw(p, width, dtype=weight_dtype),
        draw(p, width, dtype=weight_dtype),
        torch.tensor(0.2, requires_grad=requires_grad),
    ]


def compiled_backend_exists():
    return backends.BACKENDS["cpu"].unavailable() is None


needs_cpu_backend = pytest.mark.skipif(
    not compiled_backend_exists(), reason=f"CPU backend: {backends.BACKENDS['cpu'].unavailable()}"
)


def compare_with_reference(inputs, **options):
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output = ops.prompt_diffusion(*inputs, **options)
    expected = reference.prompt_diffusion(*wide, **options)
    grad = torch.randn_like(output)
    actual_grads = torch.autograd.grad(output, inputs, grad)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    tolerance = TOLERANCES[output.dtype]
    assert relative_error(output, expected) < tolerance
    for tensor, actual, wanted in zip(inputs, actual_grads, expected_grads, strict=True):
        assert actual.dtype == tensor.dtype
        assert relative_error(actual, wanted) < tolerance


def test_a_plan_is_made_once_for_calls_alike_and_again_for_any_other(monkeypatch):
    made, op = [], OPS["prompt_diffusion"]
    monkeypatch.setattr(op, "_plans", {})
    monkeypatch.setattr(op, "_new_plan", made.append)
    tensors = [tensor.detach() for tensor in arguments()]
    for again in (tensors, [tensor.clone() for tensor in tensors], [tensor + 1 for tensor in tensors]):
        op.plan(*again, "relu", "max", 0.0)
        op._plans = dict.fromkeys(op._plans, "known")
    assert len(made) == 1
    others = [tensors[0].double(), tensors[0][:1], tensors[0].to("meta"), tensors[0].to_sparse(), None, "x"]
    for other in others:
        op.plan(other, *tensors[1:], "relu", "max", 0.0)
    op.plan(*tensors, "softmax", "max", 0.0)
    op.plan(*tensors, "relu", "max", 0)
    op.plan(*tensors, "relu", ["no", "hash"], 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        op.plan(*tensors, "relu", "max", 0.0)
    with fast_prompt.use_backend("reference"):
        op.plan(*tensors, "relu", "max", 0.0)
    assert len(made) == 1 + len(others) + 5


def test_what_autocast_allows_is_refused_without_it():
    """The same tensors: dtypes that autocast would make one."""
    hidden, source, *others = (tensor.detach() for tensor in arguments())
    with torch.autocast("cpu", torch.bfloat16):
        ops.prompt_diffusion(hidden.bfloat16(), source, *others)
    with pytest.raises(TypeError, match="source: expected dtype torch.bfloat16"):
        ops.prompt_diffusion(hidden.bfloat16(), source, *others)


# ---- Written over ----


@needs_cpu_backend
def test_a_leaf_that_trains_is_not_written_over():
    hidden, *others = arguments()
    for leaf, given in ((hidden, hidden), (hidden, hidden[:])):
        before = leaf.detach().clone()
        with pytest.raises(ValueError, match="hidden: expected a tensor to write over, got a leaf"):
            ops.prompt_diffusion(given, *others, inplace=True)
        assert torch.equal(leaf.detach(), before)


@needs_cpu_backend
def test_memory_of_another_argument_is_not_written_over():
    _, source, *others = (tensor.detach() for tensor in arguments())
    before = source.clone()
    for hidden in (source, source.view(2, 5, 16), source.flatten().view(2, 5, 16)):
        with pytest.raises(ValueError, match="hidden: expected memory to write over, got that of source"):
            ops.prompt_diffusion(hidden, source, *others, inplace=True)
    assert torch.equal(source, before)


@needs_cpu_backend
@pytest.mark.parametrize("grad", [False, True])
def test_a_backward_pass_that_needs_what_was_written_over_is_an_error(grad):
    _, source, *others = (tensor.detach() for tensor in arguments())
    saved = torch.randn(2, 5, 16, requires_grad=True).exp()  # whose backward needs its result
    others[0].requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        ops.prompt_diffusion(saved, source, *others, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@needs_cpu_backend
def test_four_dimensions_written_over():
    inputs = arguments((2, 3, 5, 16))
    hidden = inputs[0] * 1
    with fast_prompt.use_backend("cpu"):
        output = ops.prompt_diffusion(hidden, *inputs[1:], inplace=True)
        right = ops.prompt_diffusion(*inputs)
    assert output.data_ptr() == hidden.data_ptr() and torch.equal(output, right)
    found, expected = (torch.autograd.grad(each.square().sum(), inputs) for each in (output, right))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_cpu_backend
def test_written_over_in_inference_mode():
    inputs = arguments()
    right = ops.prompt_diffusion(*inputs).detach()
    with torch.inference_mode():
        hidden = inputs[0] * 1
        assert torch.equal(ops.prompt_diffusion(hidden, *inputs[1:], inplace=True), right)


@needs_cpu_backend
@pytest.mark.gate
@pytest.mark.parametrize("grad", [False, True])
def test_written_over_compiles_to_one_graph(grad):
    inputs = arguments()

    def site(x, *others):
        return ops.prompt_diffusion(x * 1, *others, inplace=True).square()

    compiled = torch.compile(site, fullgraph=True, backend="aot_eager")
    with fast_prompt.use_backend("cpu"), torch.set_grad_enabled(grad):
        found, right = compiled(*inputs), site(*inputs)
    torch.testing.assert_close(found, right)
    if grad:
        gradients = (torch.autograd.grad(each.sum(), inputs) for each in (found, right))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_inplace_is_true_or_false():
    with pytest.raises(TypeError, match="inplace: expected True or False, got str"):
        ops.prompt_diffusion(*arguments(), inplace="no")


def test_a_check_that_fails_fails_every_time():
    inputs = arguments()
    for _ in range(2):
        with pytest.raises(ValueError, match="dropout_p"):
            ops.prompt_diffusion(*inputs, dropout_p=1.5)


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 5, 16), (2, 3, 5, 16)])
def test_any_leading_dimensions(shape):
    compare_with_reference(arguments(shape))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_every_backend_computes_the_same(dropout_p):
    options = {"dropout_p": dropout_p, "seed": 11}
    inputs = arguments()
    reasons = ops.explain("prompt_diffusion", *inputs).reasons
    for name, reason in reasons.items():
        if reason is None:
            with fast_prompt.use_backend(name):
                compare_with_reference(inputs, **options)


def test_empty_batch_gives_empty_output_and_zero_gradients():
    for shape in ((0, 5, 16), (2, 0, 16)):
        inputs = arguments(shape)
        output = ops.prompt_diffusion(*inputs)
        assert output.shape == shape
        output.sum().backward()
        assert all(tensor.grad is not None and not tensor.grad.any() for tensor in inputs)


def test_strided_and_expanded_inputs_and_gradients():
    base = torch.randn(2, 9, 16)
    inputs = arguments((2, 5, 16))
    inputs[0] = base[:, 4:].requires_grad_()
    inputs[1] = torch.randn(5, 2, 16).transpose(0, 1).requires_grad_()
    compare_with_reference(inputs)
    ops.prompt_diffusion(*inputs).sum().backward()  # the gradient is an expanded scalar
    assert inputs[0].grad is not None


def test_inputs_and_gradient_are_never_written_to():
    inputs = arguments()
    copies = [tensor.detach().clone() for tensor in inputs]
    output = ops.prompt_diffusion(*inputs)
    grad = torch.randn_like(output)
    grad_copy = grad.clone()
    output.backward(grad)
    assert torch.equal(grad, grad_copy)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))


@needs_cpu_backend
def test_saves_the_source_and_hidden_and_nothing_as_large():
    def saved_elements(inputs):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            ops.prompt_diffusion(*inputs)
        return sum(size for size in sizes if size >= inputs[0].numel())

    inputs = arguments((2, 50, 16))
    assert saved_elements(inputs) == 2 * inputs[0].numel()
    inputs[4].requires_grad_(False)
    assert saved_elements(inputs) == inputs[0].numel()


def test_only_the_asked_gradients_are_computed():
    for wanted in range(5):
        inputs = arguments()
        for position, tensor in enumerate(inputs):
            tensor.requires_grad_(position == wanted)
        ops.prompt_diffusion(*inputs).square().sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == [position == wanted for position in range(5)]


def test_float64_has_second_derivatives():
    inputs = arguments((2, 3), p=2, dtype=torch.float64)
    inputs[4] = inputs[4].detach().double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *t: ops.prompt_diffusion(*t, row_weight="none"), inputs)


def test_dropout_follows_torch_manual_seed():
    inputs = arguments()
    torch.manual_seed(5)
    first, second = (ops.prompt_diffusion(*inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    again = ops.prompt_diffusion(*inputs, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    seeded = ops.prompt_diffusion(*inputs, dropout_p=0.5, seed=3)
    assert torch.equal(seeded, ops.prompt_diffusion(*inputs, dropout_p=0.5, seed=torch.tensor(3)))


def test_autocast_casts_activations_and_keeps_float32_weights():
    inputs = arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.prompt_diffusion(inputs[0].bfloat16(), *inputs[1:])  # a Linear's bf16 and a LayerNorm's float32
        assert ops.explain("prompt_diffusion", *inputs).reasons.keys() == backends.BACKENDS.keys()
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert [tensor.grad.dtype for tensor in inputs] == [torch.float32] * 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = ops.prompt_diffusion(*(tensor.detach().double() for tensor in inputs))
    assert wide.dtype == torch.float64


@needs_cpu_backend
def test_second_derivatives_of_the_kernels_are_refused():
    inputs = arguments()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(ops.prompt_diffusion(*inputs).sum(), inputs[1], create_graph=True)
    with fast_prompt.use_backend("reference"):
        torch.autograd.grad(ops.prompt_diffusion(*inputs).sum(), inputs[1], create_graph=True)


# Inductor's C++ compiler takes many seconds: it gets one setting, without the reference, of which it makes much code.
@pytest.mark.gate
@pytest.mark.parametrize(
    ("dropout_p", "compiler"),
    [(0.0, "aot_eager"), (0.25, "aot_eager"), (0.25, "inductor")],
)
def test_compiles_to_one_graph(dropout_p, compiler):
    def step(*tensors):
        return ops.prompt_diffusion(*tensors, dropout_p=dropout_p, seed=9).square().sum()

    inputs = arguments()
    assert_compiles_to_one_graph(step, inputs, compiler, ops.explain("prompt_diffusion", *inputs))


@needs_cpu_backend
def test_flops_are_counted():
    importlib.import_module("fast_prompt.ops.flops")
    inputs = arguments()
    with FlopCounterMode(display=False) as counter:
        ops.prompt_diffusion(*inputs).sum().backward()
    product = 2 * 10 * 7 * 16
    assert counter.get_total_flops() == (2 + 5) * product


@needs_cpu_backend
def test_the_compiled_library_runs_on_the_cpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ops.explain("prompt_diffusion", *arguments(dtype=dtype)).chosen == "cpu"


BAD_CALLS = {
    "wrong width of source": (lambda a: a.__setitem__(1, a[1][..., :8]), ValueError, "source: expected shape"),
    "wrong width of prompts": (
        lambda a: a.__setitem__(2, a[2][:, :8]),
        ValueError,
        r"prompts: expected shape \[p, 16\]",
    ),
    "no prompts": (lambda a: a.__setitem__(2, a[2][:0]), ValueError, r"p from 1 to 1,024"),
    "keys of another count": (lambda a: a.__setitem__(3, a[3][:3]), ValueError, "keys: expected shape"),
    "scale of two": (lambda a: a.__setitem__(4, torch.zeros(2)), ValueError, "log_scale: expected one element"),
    "dtype mix": (lambda a: a.__setitem__(1, a[1].bfloat16()), TypeError, "source: expected dtype torch.float32"),
    "half prompts": (lambda a: a.__setitem__(2, a[2].half()), TypeError, "prompts: expected dtype torch.float32"),
    "keys unlike prompts": (lambda a: a.__setitem__(3, a[3].double()), TypeError, "keys: expected dtype"),
    "integers": (lambda a: a.__setitem__(0, torch.ones(2, 5, 16).int()), TypeError, "hidden: expected float32"),
    "not a tensor": (lambda a: a.__setitem__(0, [1.0]), TypeError, "hidden: expected a torch.Tensor, got list"),
    "scalar hidden": (lambda a: a.__setitem__(0, torch.tensor(1.0)), ValueError, "hidden: expected at least 1"),
    "device mix": (lambda a: a.__setitem__(2, a[2].to("meta")), ValueError, "prompts: expected device cpu"),
    "sparse": (lambda a: a.__setitem__(2, a[2].detach().to_sparse()), TypeError, "prompts: expected a dense tensor"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_tensors_are_named(case):
    break_it, error, message = BAD_CALLS[case]
    inputs = arguments()
    break_it(inputs)
    with pytest.raises(error, match=message):
        ops.prompt_diffusion(*inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "gelu"}, ValueError, "activation: expected one of 'relu', 'softmax', got 'gelu'"),
        ({"row_weight": "mean"}, ValueError, "row_weight: expected one of 'max', 'none', got 'mean'"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number"),
        ({"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed: expected an int"),
        ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed: expected a 64-bit"),
        ({"dropout_p": 0.1, "seed": torch.zeros(2)}, TypeError, "seed: expected one int64 element"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ops.prompt_diffusion(*arguments(), **options)


def test_forced_backend_that_cannot_take_the_call_gives_every_reason():
    inputs = [tensor.detach().double() for tensor in arguments()]
    with fast_prompt.use_backend("cpu"), pytest.raises(fast_prompt.BackendError) as caught:
        ops.prompt_diffusion(*inputs)
    for name in backends.BACKENDS:
        assert name in str(caught.value)
    with fast_prompt.use_backend("cpu"):
        assert ops.explain(ops.prompt_diffusion, *inputs).chosen is None
    assert ops.explain(ops.prompt_diffusion, *inputs).chosen == "reference"
    assert "reference" in str(ops.explain("prompt_diffusion", *inputs))


def test_unknown_backend_and_op_are_named():
    with pytest.raises(ValueError, match="backend: expected one of cpu, triton, cuda, reference.*, got 'cuda13'"):  # noqa: SIM117
        with fast_prompt.use_backend("cuda13"):
            pass
    with pytest.raises(ValueError, match="op: expected one of .*prompt_diffusion"):
        ops.explain("prompt_fission")


def test_fallback_is_logged_once(monkeypatch, caplog):
    for name in ("cpu", "triton"):
        monkeypatch.setattr(backends.BACKENDS[name], "unavailable", lambda: "taken away by a test")
    monkeypatch.setattr(backends, "_reported", set())
    monkeypatch.setattr(OPS["prompt_diffusion"], "_plans", {})
    with caplog.at_level(logging.WARNING, logger="fast_prompt"):
        for _ in range(2):
            ops.prompt_diffusion(*arguments())
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "taken away by a test" in messages[0]
