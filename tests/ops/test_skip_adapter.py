"""``skip_adapter`` whatever the backend: its definition and its API."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from compiled import assert_compiles_to_one_graph
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fast_prompt
from fast_prompt import backends, ops, reference
from fast_prompt.parity.skip_adapter import CASES, KINK_MARGINS, draw
from fast_prompt.tolerances import TOLERANCES, relative_error

CPU = torch.device("cpu")
B, N, D, W = 3, 5, 8, 4

needs_cpu_backend = pytest.mark.skipif(
    backends.BACKENDS["cpu"].unavailable() is not None, reason=f"CPU backend: {backends.BACKENDS['cpu'].unavailable()}"
)


def arguments(adapters=(), dtype=torch.float32, **more):
    """Every parameter of one adapter, or of a stack of them, by name."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (B, N, D),
        "down_weight": (*adapters, W, D),
        "up_weight": (*adapters, D, W),
        "down_bias": (*adapters, W),
        "up_bias": (*adapters, D),
        "norm_weight": (*adapters, D),
        "norm_bias": (*adapters, D),
        "scale": adapters,
        **more,
    }
    return {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for name, shape in shapes.items()
        if shape is not None
    }


def mixture(experts=2, groups=2, **more):
    up = {"up_weight": (D, experts * W // groups), "up_bias": (experts, D), "gates": (B, experts)}
    return arguments(**{**up, **more})


# The definition


def test_the_definition_is_the_papers_adapter():
    torch.manual_seed(0)
    norm, down, up = nn.LayerNorm(D), nn.Linear(D, W), nn.Linear(W, D)
    nn.init.normal_(norm.weight)
    x = torch.randn(B, N, D)
    parameters = (down.weight, up.weight, down.bias, up.bias, norm.weight, norm.bias)
    output = reference.skip_adapter(x, *parameters, torch.tensor(0.3), norm="layer")
    torch.testing.assert_close(output, x + 0.3 * up(torch.relu(down(norm(x)))))


def test_llamas_form_adds_the_normed_rows():
    torch.manual_seed(0)
    norm, down, up = nn.RMSNorm(D, eps=1e-6), nn.Linear(D, W), nn.Linear(W, D)
    nn.init.normal_(norm.weight)
    x = torch.randn(B, N, D)
    parameters = (down.weight, up.weight, down.bias, up.bias, norm.weight)
    output = reference.skip_adapter(x, *parameters, norm="rms", residual="normed", activation="silu", eps=1e-6)
    z = norm(x)
    torch.testing.assert_close(output, x + (z + up(F.silu(down(z)))))


def test_the_norm_may_come_after():
    torch.manual_seed(0)
    norm, down, up = nn.LayerNorm(D), nn.Linear(D, W), nn.Linear(W, D)
    nn.init.normal_(norm.bias)
    x = torch.randn(B, N, D)
    parameters = (down.weight, up.weight, down.bias, up.bias, norm.weight, norm.bias)
    output = reference.skip_adapter(x, *parameters, norm="layer_after", activation="gelu", residual="none")
    torch.testing.assert_close(output, norm(up(F.gelu(down(x)))))


def test_a_run_is_one_adapter_after_the_other():
    inputs = arguments((3,))
    x = inputs.pop("x")
    expected = x
    for index in range(3):
        one = {name: value[index] for name, value in inputs.items()}
        expected = reference.skip_adapter(expected, **one, norm="layer")
    torch.testing.assert_close(reference.skip_adapter(x, **inputs, norm="layer"), expected)


def test_a_route_sends_every_sample_through_its_own_adapter():
    inputs = arguments((2,))
    x = inputs.pop("x")
    kept = torch.randn(1, N, D)
    output = reference.skip_adapter(x, **inputs, kept=kept, norm="layer", route=[1, -1, 0])
    assert torch.equal(output[1], kept[0])
    for sample, index in ((0, 1), (2, 0)):
        one = {name: value[index] for name, value in inputs.items()}
        torch.testing.assert_close(output[sample], reference.skip_adapter(x[sample], **one, norm="layer"))


def test_a_mixture_weighs_grouped_convolutions_as_lavin_does():
    """Its own code: one shared down projection, two grouped ones up, each scaled by the sample's gate."""
    torch.manual_seed(0)
    down = nn.Conv1d(D, W, 1)
    ups = [nn.Conv1d(W, D, 1, groups=2) for _ in range(2)]
    x, gates = torch.randn(B, N, D), torch.rand(B, 2)
    hidden = torch.relu(down(x.transpose(1, 2)))
    expected = sum(gates[:, e, None, None] * up(hidden) for e, up in enumerate(ups)).transpose(1, 2)
    output = reference.skip_adapter(
        x,
        down.weight[..., 0],
        torch.cat([up.weight[..., 0] for up in ups], dim=1),
        down.bias,
        torch.stack([up.bias for up in ups]),
        gates=gates,
        residual="none",
    )
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layer", "activation": "gelu"},
        {"norm": "layer_after", "activation": "silu", "residual": "none"},
        {"norm": "layer", "activation": "silu", "residual": "normed", "dropout_p": 0.4, "seed": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("adapters", [(), (2,)])
def test_gradcheck(options, adapters):
    inputs = arguments(adapters, torch.float64)

    def run(*tensors):
        return reference.skip_adapter(**dict(zip(inputs, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_gradcheck_of_a_mixture_and_of_a_route():
    mixed = {name: value.detach().double().requires_grad_() for name, value in mixture().items()}
    routed = arguments((2,), torch.float64, kept=(1, N, D))
    for inputs, options in ((mixed, {}), (routed, {"route": [1, -1, 0]})):

        def run(*tensors, inputs=inputs, options=options):
            named = dict(zip(inputs, tensors, strict=True))
            return reference.skip_adapter(**named, norm="layer", activation="silu", **options)

        assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_no_case_comes_near_relus_kink():
    """The parity cases decide the sign of every hidden element beyond doubt; else two right programs could differ."""
    case = next(case for case in CASES if case.name == "run of three")
    problem = draw(case, torch.bfloat16)
    wide = problem.double().tensors
    x, signs = wide.pop("x"), []
    for index in range(3):
        one = {name: value[index] for name, value in wide.items()}
        normed = F.layer_norm(x, x.shape[-1:], one["norm_weight"], one["norm_bias"])
        hidden = normed @ one["down_weight"].T + one["down_bias"]
        signs.append((hidden.abs() / hidden.std()).min())
        x = reference.skip_adapter(x, **one, norm="layer")
    assert min(signs) > KINK_MARGINS[torch.bfloat16] / 2


# All backends


@needs_cpu_backend
def test_saves_little_besides_its_inputs():
    inputs = arguments()
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.skip_adapter(**inputs, norm="layer")
    assert sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own) == B * N * W


@pytest.mark.parametrize("shape", [(0, 5, D), (2, 0, D)])
def test_empty_calls_give_empty_results_and_zero_gradients(shape):
    inputs = arguments(x=shape)
    output = ops.skip_adapter(**inputs, norm="layer")
    assert output.shape == shape
    output.sum().backward()
    assert all(not tensor.grad.any() for tensor in inputs.values())


def test_only_the_asked_gradients_are_computed():
    for wanted in mixture():
        inputs = mixture()
        for name, tensor in inputs.items():
            tensor.requires_grad_(name == wanted)
        ops.skip_adapter(**inputs, norm="layer").square().sum().backward()
        assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [wanted]


def test_inputs_and_gradient_are_never_written_to():
    inputs = arguments((2,), kept=(1, N, D))
    copies = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    output = ops.skip_adapter(**inputs, norm="layer", route=[1, 0, -1])
    grad = torch.randn_like(output)
    grad_copy = grad.clone()
    output.backward(grad)
    assert torch.equal(grad, grad_copy)
    assert all(torch.equal(inputs[name], copy) for name, copy in copies.items())


def test_kept_samples_come_through_and_get_their_gradient():
    inputs = arguments((2,), kept=(2, N, D))
    output = ops.skip_adapter(**inputs, norm="layer", route=[-1, 1, -1])
    assert torch.equal(output[[0, 2]], inputs["kept"])
    grad = torch.randn_like(output)
    output.backward(grad)
    assert torch.equal(inputs["kept"].grad, grad[[0, 2]])
    assert not inputs["x"].grad[[0, 2]].any()
    assert not inputs["down_weight"].grad[0].any()
    assert inputs["down_weight"].grad[1].any()


def test_a_route_may_be_a_tensor_of_any_whole_dtype():
    inputs = arguments((2,))
    expected = ops.skip_adapter(**inputs, norm="layer", route=[1, 0, 0])
    for dtype in (torch.uint8, torch.int32, torch.int64):
        route = torch.tensor([1, 0, 0], dtype=dtype)
        assert torch.equal(ops.skip_adapter(**inputs, norm="layer", route=route), expected)


def test_dropout_follows_torch_manual_seed():
    inputs = arguments()
    torch.manual_seed(5)
    first, second = (ops.skip_adapter(**inputs, norm="layer", dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, ops.skip_adapter(**inputs, norm="layer", dropout_p=0.5))
    assert not torch.equal(first, second)


def test_autocast_casts_activations_and_keeps_float32_weights():
    inputs = mixture()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.skip_adapter(**inputs, norm="layer")
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert [tensor.grad.dtype for tensor in inputs.values()] == [torch.float32] * len(inputs)


@needs_cpu_backend
def test_second_derivatives_of_the_kernels_are_refused():
    inputs = arguments()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(ops.skip_adapter(**inputs, norm="layer").sum(), inputs["x"], create_graph=True)
    with fast_prompt.use_backend("reference"):
        torch.autograd.grad(ops.skip_adapter(**inputs, norm="layer").sum(), inputs["x"], create_graph=True)


COMPILED = [
    (arguments, {}, "aot_eager"),
    (arguments, {"dropout_p": 0.25, "seed": 9, "activation": "gelu"}, "aot_eager"),
    (arguments, {"dropout_p": 0.25, "seed": 9, "activation": "gelu"}, "inductor"),
    (lambda: arguments((3,)), {"residual": "normed"}, "aot_eager"),
    (mixture, {}, "aot_eager"),
    (lambda: arguments((2,), kept=(1, N, D)), {"route": (1, -1, 0)}, "aot_eager"),
]


# Inductor's C++ compiler takes many seconds: it gets one setting, without the reference, of which it makes much code.
@pytest.mark.gate
@pytest.mark.parametrize(
    ("make", "options", "compiler"), COMPILED, ids=["plain", "dropout", "dropout in C++", "run", "mixture", "route"]
)
def test_compiles_to_one_graph(make, options, compiler):
    torch._dynamo.reset()  # one code for all: it would take sizes that differ between these calls for dynamic ones
    inputs = make()
    names = list(inputs)

    def step(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return ops.skip_adapter(**named, norm="layer", **options).square().sum()

    assert_compiles_to_one_graph(step, inputs.values(), compiler, ops.explain("skip_adapter", **inputs))


@needs_cpu_backend
def test_flops_are_counted():
    importlib.import_module("fast_prompt.ops.flops")
    product = 2 * B * N * D * W
    for inputs, options, forward, backward in (
        (arguments(), {}, 2, 4),
        (arguments((3,)), {}, 6, 12 + 2),
        (arguments((2,), kept=(1, N, D)), {"route": [1, -1, 0]}, 2 * 2 / 3, 4 * 2 / 3),
        (mixture(), {}, 2, 4),
    ):
        with FlopCounterMode(display=False) as counter:
            output = ops.skip_adapter(**inputs, norm="layer", **options)
        assert counter.get_total_flops() == pytest.approx(forward * product)
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        assert counter.get_total_flops() == pytest.approx(backward * product)


@needs_cpu_backend
def test_the_compiled_library_runs_on_the_cpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ops.explain("skip_adapter", **arguments(dtype=dtype), norm="layer").chosen == "cpu"


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_strided_and_expanded_inputs_agree_with_contiguous_ones(name):
    if backends.BACKENDS[name].unavailable():
        pytest.skip(str(backends.BACKENDS[name].unavailable()))
    inputs = {key: value.detach() for key, value in arguments().items()}
    views = {
        "x": inputs["x"].transpose(0, 1).contiguous().transpose(0, 1),
        "down_weight": inputs["down_weight"].T.contiguous().T,
        "norm_bias": torch.stack([inputs["norm_bias"]] * 2, 1)[:, 1],
    }
    with fast_prompt.use_backend(name):
        expected = ops.skip_adapter(**inputs, norm="layer")
        actual = ops.skip_adapter(**{**inputs, **views}, norm="layer")
    assert relative_error(actual, expected) < TOLERANCES[torch.float32]


# Bad calls


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("x", lambda t: t.int(), TypeError, "x: expected float32"),
        ("x", lambda t: t[..., :3], ValueError, r"down_weight: expected shape \[w, 3\] or \[adapters, w, 3\]"),
        ("x", lambda t: t.bfloat16(), TypeError, None),
        ("down_weight", lambda t: t[0], ValueError, r"down_weight: expected shape .* got \(8,\)"),
        ("down_weight", lambda t: t[:0], ValueError, "with every size at least 1"),
        ("down_weight", lambda t: t.half(), TypeError, r"down_weight: expected dtype torch.float32"),
        ("up_weight", lambda t: t.T, ValueError, r"up_weight: expected shape \(8, 4\) .*, got \(4, 8\)"),
        ("up_weight", lambda t: t.double(), TypeError, "up_weight: expected dtype torch.float32 .that of down_weight."),
        ("up_weight", lambda t: None, TypeError, "up_weight: expected a torch.Tensor, got NoneType"),
        ("down_bias", lambda t: t[:2], ValueError, r"down_bias: expected shape \(4,\)"),
        ("up_bias", lambda t: [1.0], TypeError, "up_bias: expected a torch.Tensor, got list"),
        ("norm_weight", lambda t: None, ValueError, "norm_weight: expected a tensor with norm='layer', got NoneType"),
        ("norm_bias", lambda t: t.to("meta"), ValueError, "norm_bias: expected device cpu"),
        ("scale", lambda t: torch.ones(2), ValueError, r"scale: expected one element an adapter, got shape \(2,\)"),
    ],
)
def test_bad_tensors_are_named(name, change, error, message):
    inputs = {key: value.detach() for key, value in arguments().items()}
    inputs[name] = change(inputs[name])
    if message is None:  # float32 weights beside bfloat16 activations are allowed
        assert ops.skip_adapter(**inputs, norm="layer").dtype == torch.bfloat16
        return
    with pytest.raises(error, match=message):
        ops.skip_adapter(**inputs, norm="layer")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"norm": "batch"}, ValueError, "norm: expected one of 'none', 'layer', 'rms', 'layer_after', got 'batch'"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of 'relu', 'silu', 'gelu', got 'tanh'"),
        ({"residual": True}, ValueError, "residual: expected one of 'input', 'normed', 'none', got True"),
        ({"residual": "normed", "norm": "layer_after"}, ValueError, "residual: expected a norm before"),
        ({"norm": "rms"}, ValueError, "norm_bias: expected None with norm='rms', got a tensor"),
        ({"norm": "none"}, ValueError, "norm_weight: expected None with norm='none', got Tensor"),
        ({"eps": -1e-5}, ValueError, "eps: expected a number from 0"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"kept": torch.zeros(1, N, D)}, ValueError, "kept: expected None without a route"),
        ({"route": [0, 0]}, ValueError, r"route: expected one number for each sample .*, got 2 for x \(3, 5, 8\)"),
        ({"route": [0, 1, 0]}, ValueError, "route: expected adapters from 0 to 0, or -1 for none, got 1"),
        ({"route": [0, -2, 0]}, ValueError, "route: expected adapters from 0 to 0, or -1 for none, got -2"),
        ({"route": [0.0, 0.0, 0.0]}, TypeError, r"route: expected whole numbers, got \[0.0, 0.0, 0.0\]"),
        ({"route": [0, -1, 0]}, ValueError, "kept: expected the results of the 1 samples of route -1, got None"),
        ({"route": [0, 0, 0], "kept": torch.zeros(1, N, D)}, ValueError, r"kept: expected shape \(0, 5, 8\)"),
        ({"gates": torch.ones(2, 2)}, ValueError, r"gates: expected shape \[B, experts\] .*, got \(2, 2\)"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ops.skip_adapter(**{**arguments(), "norm": "layer", **options})


def test_a_mixture_is_of_one_adapter_without_a_route():
    with pytest.raises(ValueError, match="gates: expected None with several adapters"):
        ops.skip_adapter(**arguments((2,), gates=(B, 2)), norm="layer")
    with pytest.raises(ValueError, match="route: expected None with gates, got a route"):
        ops.skip_adapter(**mixture(), norm="layer", route=[0, 0, 0])
    with pytest.raises(ValueError, match=r"up_weight: expected shape \(8, 8\) or \(8, 4\) or \(8, 2\)"):
        ops.skip_adapter(**mixture(up_weight=(D, 3)), norm="layer")
