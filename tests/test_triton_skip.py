"""``skip_adapter`` in Triton against the float64 reference: on a GPU where there is one, else in the interpreter.

What the parity cases (test_parity.py) do not reach: what is kept, needs, rows that no one may touch, offsets, tiles.
"""

import pytest
import torch

from fast_prompt.backends import SkipAdapterCall, use_backend
from fast_prompt.backends import triton as backend
from fast_prompt.ops import skip_adapter
from fast_prompt.parity.skip_adapter import Case, draw
from fast_prompt.reference import skip_adapter as reference
from fast_prompt.tolerances import TOLERANCES, relative_error

pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable())),
    pytest.mark.usefixtures("poisoned_memory"),
]
if backend.unavailable() is None:
    from fast_prompt_kernels import skip_adapter as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = (
    "x",
    "down_weight",
    "up_weight",
    "down_bias",
    "up_bias",
    "norm_weight",
    "norm_bias",
    "scale",
    "gates",
)
UNDONE = {"layer_after": ("scale",)}  # a layer norm behind it undoes any scale: its gradient is a rounding error


def make_inputs(samples, length, width, hidden, adapters=1, experts=0, dtype=F32, weight_dtype=None):
    """The nine tensors as a launcher takes them, and a gradient."""
    random = torch.Generator().manual_seed(samples + length + width + hidden)
    weight_dtype = weight_dtype or dtype

    def normal(*shape):
        return torch.randn(shape, generator=random)

    parameters = [
        normal(adapters, hidden, width) / width**0.5,
        normal(adapters, width, max(experts, 1) * hidden) / hidden**0.5,
        normal(adapters, hidden) / 4,
        normal(adapters, max(experts, 1), width) / 4,
        1 + normal(adapters, width) / 4,
        normal(adapters, width) / 4,
    ]
    if not experts:
        parameters[3] = parameters[3][:, 0]
    inputs = [normal(samples, length, width).to(dtype), *(parameter.to(weight_dtype) for parameter in parameters)]
    inputs += [0.8 + normal(adapters).abs() / 4, normal(samples, experts).softmax(-1) if experts else None]
    grad = (normal(samples, length, width) + inputs[0].float() / 2).to(dtype)
    return [None if tensor is None else tensor.to(DEVICE) for tensor in inputs], grad.to(DEVICE)


def settings(norm="layer", activation="gelu", residual="input", eps=1e-5, dropout_p=0.0):
    return norm, activation, residual, eps, dropout_p


def seed_of(dropout_p):
    return torch.tensor(-(2**40) - 7, device=DEVICE) if dropout_p else None


def forward(inputs, options, route=None, keep_hidden=True):
    """The output, NaN wherever the kernels leave it alone, and the hidden layer."""
    output = torch.full_like(inputs[0], torch.nan, memory_format=torch.contiguous_format)
    return output, backend.skip_adapter(output, *inputs, route, seed_of(options[-1]), *options, keep_hidden)


def backward(inputs, grad, options, route=None, needs=None):
    output, hidden = forward(inputs, options, route)
    needs = [tensor is not None for tensor in inputs] if needs is None else needs
    return output, backend.skip_adapter_backward(grad, *inputs, route, seed_of(options[-1]), hidden, *options, needs)


def expected(inputs, grad, options):
    """The reference's output and gradients, of a call without a route."""
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in inputs]
    single = inputs[8] is not None
    given = [tensor[0] if single and 1 <= index <= 6 else tensor for index, tensor in enumerate(wide)]
    norm, activation, residual, eps, dropout_p = options
    choices = {"norm": norm, "activation": activation, "residual": residual, "eps": eps}
    output = reference(*given, **choices, dropout_p=dropout_p, seed=seed_of(dropout_p))
    leaves = [tensor for tensor in wide if tensor is not None]
    return output.detach(), torch.autograd.grad(output, leaves, grad.double(), materialize_grads=True)


def assert_matches(inputs, grad, options, without=()):
    tolerance = TOLERANCES[inputs[0].dtype]
    if options[0] != "layer_after":  # whose gradient has nothing along its result
        # Partly along the result, so that the sums over everything are no small differences of large terms.
        grad = (grad + expected(inputs, grad, options)[0] / 2).to(grad.dtype)
    output, gradients = expected(inputs, grad, options)
    actual, results = backward(inputs, grad, options)
    assert relative_error(actual, output) < tolerance
    given = [(*both, result) for *both, result in zip(NAMES, inputs, results, strict=True) if both[1] is not None]
    for (name, tensor, result), right in zip(given, gradients, strict=True):
        assert result.dtype == tensor.dtype and result.shape == tensor.shape and result.is_contiguous()
        assert name in without or relative_error(result, right) < tolerance, name


@pytest.mark.parametrize("norm", ["layer", "layer_after"])
def test_a_row_of_one_value_is_normed_to_the_norms_bias(norm):
    """Its variance is 0, and 1 / sqrt(eps) times any error in its mean would be no rounding error any more."""
    problem = draw(Case("", (1, 9), 67, 9, norm=norm, residual="none"), F32)
    problem.options["eps"] = 1e-12
    tensors = {name: tensor.to(DEVICE) for name, tensor in problem.tensors.items()}
    tensors["x"] = torch.linspace(100, 1000, 9, device=DEVICE).sqrt().view(1, 9, 1).expand(1, 9, 67)
    if norm == "layer_after":
        tensors["up_weight"] = tensors["up_weight"][:1].expand(67, 9)
        tensors["up_bias"] = tensors["up_bias"][:1].expand(67)
    right = reference(**{name: tensor.double() for name, tensor in tensors.items()}, **problem.options)
    with use_backend("triton"):
        found = skip_adapter(**tensors, **problem.options)
    assert relative_error(found, right) < TOLERANCES[F32]


@pytest.mark.parametrize(
    ("length", "width", "hidden", "dtype"),
    [(37, 40, 40, F32), (10, 20, 260, F32), (37, 40, 130, BF16), (10, 16, 520, BF16), (37, 600, 20, F16)],
)
def test_row_tiles_and_hidden_blocks(length, width, hidden, dtype, monkeypatch):
    """The widest tiles of the tables, in several blocks of hidden columns."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 1)
    inputs, grad = make_inputs(2, length, width, hidden, dtype=dtype)
    # A sum over everything, and small beside its terms: in half precision it depends on how x is rounded for products.
    assert_matches(inputs, grad, settings(), without=() if dtype == F32 else ("scale",))


@pytest.mark.parametrize(("norm", "offset"), [("layer", 300.0), ("layer_after", 30.0)])
def test_an_offset_of_rows_does_not_count(norm, offset):
    """A mean of many deviations: what sums of squares, and products with the mean in them, would lose."""
    inputs, grad = make_inputs(2, 13, 50, 7)
    inputs[0 if norm == "layer" else 4].add_(offset)
    assert_matches(inputs, grad, settings(norm, residual="none"), without=UNDONE.get(norm, ()))


def test_no_epsilon():
    """Rows of a tile that do not exist have no deviation to divide by."""
    inputs, grad = make_inputs(1, 5, 40, 7)
    assert_matches(inputs, grad, settings("layer", eps=0.0))
    assert_matches(inputs, grad, settings("layer_after", eps=0.0), without=UNDONE["layer_after"])


@pytest.mark.parametrize(("route", "adapters"), [(None, 1), (None, 2), ((1, -1, 0), 2)])
def test_what_is_kept(route, adapters):
    inputs, _ = make_inputs(3, 5, 40, 7, adapters)
    route = None if route is None else torch.tensor(route, device=DEVICE)
    output, hidden = forward(inputs, settings(), route)
    again, nothing = forward(inputs, settings(), route, keep_hidden=False)
    assert nothing is None and torch.equal(output.nan_to_num(), again.nan_to_num())
    x, down_weight, _, down_bias, _, norm_weight, norm_bias, *_ = inputs
    assert hidden.shape == (adapters if route is None else 1, 3, 5, 7)
    for sample in range(3):
        adapter = 0 if route is None else int(route[sample])
        if adapter >= 0:
            normed = torch.nn.functional.layer_norm(x[sample], (40,), norm_weight[adapter], norm_bias[adapter])
            right = normed.double() @ down_weight[adapter].double().T + down_bias[adapter]
            assert relative_error(hidden[0, sample], right) < TOLERANCES[F32]
        else:
            assert output[sample].isnan().all() and hidden[0, sample].isnan().all()


@pytest.mark.parametrize("norm", ["none", "layer", "layer_after"])
def test_kept_samples_are_neither_read_nor_written(norm):
    """Their rows of x and of the gradient hold NaN, as the memory does that they would be written to."""
    inputs, grad = make_inputs(4, 9, 40, 7, adapters=3)
    if norm == "none":
        inputs[5:7] = None, None
    options, route = settings(norm, dropout_p=0.25), torch.tensor([2, -1, 0, -1], device=DEVICE)
    output, results = backward(inputs, grad, options, route)
    for tensor in (inputs[0], grad):
        tensor[route < 0] = torch.nan
    spoilt, others = backward(inputs, grad, options, route)
    assert spoilt[route < 0].isnan().all() and torch.equal(spoilt[route >= 0], output[route >= 0])
    for one, two in zip(results[1:8], others[1:8], strict=True):
        assert one is None or (torch.equal(one, two) and one.isfinite().all() and one[1].eq(0).all())
    assert torch.equal(results[0][route >= 0], others[0][route >= 0])


CALLS = {
    "run": ({"adapters": 2}, settings(dropout_p=0.3)),
    "after": ({}, settings("layer_after", dropout_p=0.3)),
    "mixture": ({"experts": 2}, settings(residual="normed")),
}


@pytest.mark.parametrize("name", CALLS)
def test_only_what_is_needed(name):
    sizes, options = CALLS[name]
    inputs, grad = make_inputs(2, 11, 20, 6, **sizes)
    given = [index for index, tensor in enumerate(inputs) if tensor is not None]
    _, every = backward(inputs, grad, options)
    for wanted in ([], *([index] for index in given), [1, 3, 5], [2, 4, 7]):
        needs = [index in wanted for index in range(9)]
        _, results = backward(inputs, grad, options, needs=needs)
        for needed, result, right in zip(needs, results, every, strict=True):
            assert torch.equal(result, right) if needed else result is None


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_twice_and_nothing_overwritten(name):
    sizes, options = CALLS[name]
    inputs, grad = make_inputs(2, 21, 40, 8, dtype=BF16, **sizes)
    tensors = [tensor for tensor in (*inputs, grad) if tensor is not None]
    before = [tensor.clone() for tensor in tensors]
    (output, first), (again, second) = (backward(inputs, grad, options) for _ in range(2))
    assert torch.equal(output, again)
    assert all(one is two is None or torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(before, tensors, strict=True))


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_nan_spoils_its_own_row_alone(activation):
    inputs, _ = make_inputs(1, 6, 20, 6, adapters=2)
    inputs[0][0, 2, 3] = torch.nan
    output, _ = forward(inputs, settings(activation=activation))
    spoilt = output.isnan().any(-1)[0]
    assert spoilt.tolist() == [row == 2 for row in range(6)] and output[0, 2].isnan().all()


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_far_from_zero(activation):
    """Neither infinity times zero nor a derivative of NaN."""
    inputs, grad = make_inputs(1, 6, 20, 6)
    inputs[3] *= 400
    assert_matches(inputs, grad, settings(activation=activation))


def test_a_tile_for_every_hidden_width():
    """A block of at least 16 hidden columns covers all, no block is idle, and rows fill a tensor core's 16."""
    for width in range(1, kernels.MOST_HIDDEN + 1):
        block, chunks = kernels.hidden_blocks(width)
        assert block >= 16 and block * (chunks - 1) < width <= block * chunks <= kernels.MOST_HIDDEN
        for dtype in (F32, BF16):
            tiles = [kernels.row_tile(width, dtype, mixed, True) for mixed in (False, True)]
            assert 16 <= tiles[1].rows <= tiles[0].rows <= kernels.row_tile(width, dtype, False, False).rows
    assert backend._MOST_HIDDEN == kernels.MOST_HIDDEN


def call(**changes):
    facts = {"device": torch.device(DEVICE), "dtype": BF16, "weight_dtype": BF16, "width": 768, "adapter_width": 96}
    return SkipAdapterCall(**(facts | changes))


REFUSED = {
    "meta": {"device": torch.device("meta")},
    "float64": {"dtype": torch.float64, "weight_dtype": torch.float64},
    "769": {"adapter_width": 769},
    "70000": {"num_adapters": 70_000},
    "4000000": {"width": 4_000_000, "adapter_width": 600},
    "2000000": {"width": 2_000_000, "adapter_width": 600, "num_experts": 2},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses(reason):
    assert backend.refuses("skip_adapter", call()) is None
    assert reason in backend.refuses("skip_adapter", call(**REFUSED[reason]))
