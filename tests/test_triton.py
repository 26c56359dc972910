"""The Triton backend against the float64 reference: on a GPU where there is one, else in Triton's interpreter."""

import importlib.util
import itertools

import pytest
import torch

from fast_prompt.backends import PromptDiffusionCall
from fast_prompt.backends import triton as backend
from fast_prompt.reference import prompt_diffusion as reference
from fast_prompt.reference.philox import philox
from fast_prompt.tolerances import TOLERANCES, relative_error

pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable())),
    pytest.mark.usefixtures("poisoned_memory"),
]
if backend.unavailable() is None:
    import triton
    import triton.language as tl
    from fast_prompt_kernels import prompt_diffusion as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("hidden", "source", "prompts", "keys", "log_scale")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]  # activations, weights
ALL = [True] * 5
KINK_MARGIN = 1e-5  # no score so near ReLU's kink that rounding decides its gradient


def make_inputs(batch, rows, width, prompts, dtype=F32, weight_dtype=None):
    """Five inputs and a gradient; scores of order one, and a diffusion term of the size of hidden."""
    random = torch.Generator().manual_seed(batch + rows + width + prompts)
    weight_dtype = weight_dtype or dtype

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=random) * scale

    hidden, source, grad = (normal(batch, rows, width).to(dtype) for _ in range(3))
    prompt, key = (normal(prompts, width, scale=width**-0.5).to(weight_dtype) for _ in range(2))
    near = (source.double() @ key.double().T).abs().amin(-1, keepdim=True) < KINK_MARGIN
    source = torch.where(near, torch.zeros((), dtype=dtype), source)
    inputs = [hidden, source, prompt, key, torch.tensor(0.3)]
    return [tensor.to(DEVICE) for tensor in inputs], grad.to(DEVICE)


def settings(activation="relu", row_weight="max", dropout_p=0.0):
    seed = torch.tensor(-(2**40) - 7, device=DEVICE) if dropout_p else None
    return seed, activation, row_weight, dropout_p


def expected(inputs, grad, seed, activation, row_weight, dropout_p):
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    options = {"activation": activation, "row_weight": row_weight, "dropout_p": dropout_p, "seed": seed}
    output = reference(*wide, **options)
    return output.detach(), torch.autograd.grad(output, wide, grad.double())


def assert_matches(inputs, grad, *options):
    tolerance = TOLERANCES[inputs[0].dtype]
    output, gradients = expected(inputs, grad, *options)
    actual = backend.prompt_diffusion(*inputs, *options)
    assert actual.dtype == inputs[0].dtype and actual.is_contiguous()
    assert relative_error(actual, output) < tolerance
    results = backend.prompt_diffusion_backward(grad, *inputs, *options, ALL)
    for name, tensor, result, right in zip(NAMES, inputs, results, gradients, strict=True):
        assert result.dtype == tensor.dtype and result.shape == tensor.shape and result.is_contiguous()
        assert relative_error(result, right) < tolerance, name


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("row_weight", ["max", "none"])
@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_options(activation, row_weight, dropout_p):
    inputs, grad = make_inputs(2, 13, 50, 21)
    assert_matches(inputs, grad, *settings(activation, row_weight, dropout_p))


@pytest.mark.parametrize(("activation", "row_weight"), [("relu", "max"), ("softmax", "none")])
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES[1:])
def test_dtypes(dtype, weight_dtype, activation, row_weight):
    inputs, grad = make_inputs(2, 13, 50, 21, dtype, weight_dtype)
    assert_matches(inputs, grad, *settings(activation, row_weight, 0.3))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("prompts", [1, 16, 33, 65, 200, 257, 1024])
def test_numbers_of_prompts(prompts, dtype):
    inputs, grad = make_inputs(1, 19, 40, prompts, dtype)
    assert_matches(inputs, grad, *settings(dropout_p=0.2))


@pytest.mark.parametrize("width", [1, 3, 16, 63, 64, 65, 200])
def test_widths(width):
    inputs, grad = make_inputs(3, 7, width, 5)
    assert_matches(inputs, grad, *settings("softmax"))


@pytest.mark.parametrize(("fill", "dtype"), [(True, F32), (True, BF16), (True, F16), (False, F32)])
def test_many_rows(fill, dtype, monkeypatch):
    """More rows than a tile and a split hold."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 1 if fill else 1000)
    inputs, grad = make_inputs(2, 145, 40, 18, dtype)
    assert_matches(inputs, grad, *settings(dropout_p=0.2))


def sliced(tensor):
    return torch.stack((torch.full_like(tensor, torch.nan), tensor), 2)[:, :, 1]


ARRANGEMENTS = {
    "rows sliced": sliced,
    "batch second": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "one sample expanded": lambda tensor: tensor[:1].expand_as(tensor),
    "one row expanded": lambda tensor: tensor[:1, :1].expand_as(tensor),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_strides_are_followed_without_a_copy(arrangement, dtype):
    inputs, grad = make_inputs(3, 13, 24, 9, dtype)
    arrange = ARRANGEMENTS[arrangement]
    inputs[:2] = arrange(inputs[0]), arrange(inputs[1])
    grad = arrange(grad)
    assert kernels.Rows.of(grad).tensor is grad
    assert_matches(inputs, grad, *settings())


def test_columns_apart():
    inputs, grad = make_inputs(3, 13, 24, 9)
    inputs = [tensor.mT.contiguous().mT if tensor.ndim else tensor for tensor in inputs]
    assert_matches(inputs, torch.ones((), device=DEVICE).expand_as(grad), *settings())


ONE_OR_ALL_BUT_ONE = [needs for needs in itertools.product([False, True], repeat=5) if sum(needs) in (1, 4)]


@pytest.mark.parametrize("needs", ONE_OR_ALL_BUT_ONE)
def test_only_what_is_needed(needs):
    inputs, grad = make_inputs(2, 5, 20, 6)
    options = settings("softmax", dropout_p=0.3)
    every = backend.prompt_diffusion_backward(grad, *inputs, *options, ALL)
    if not needs[4]:
        inputs[0] = None
    results = backend.prompt_diffusion_backward(grad, *inputs, *options, list(needs))
    for needed, result, right in zip(needs, results, every, strict=True):
        assert torch.equal(result, right) if needed else result is None


def test_same_bits_twice_and_nothing_overwritten():
    inputs, grad = make_inputs(2, 145, 40, 18, BF16)
    options = settings(dropout_p=0.3)
    before = [tensor.clone() for tensor in (*inputs, grad)]
    first, second = (backend.prompt_diffusion_backward(grad, *inputs, *options, ALL) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(before, (*inputs, grad), strict=True))


@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_nan_spoils_its_own_row_alone(activation):
    inputs, _ = make_inputs(1, 6, 20, 6)
    inputs[1][0, 2, 3] = torch.nan
    output = backend.prompt_diffusion(*inputs, *settings(activation))
    spoilt = output.isnan().any(-1)[0]
    assert spoilt.tolist() == [row == 2 for row in range(6)] and output[0, 2].isnan().all()


@pytest.mark.parametrize(
    ("activation", "row_weight", "key_scale", "prompt_scale", "grad_scale"),
    [("softmax", "max", 1e-2, 1.0, 64.0), ("relu", "max", 400.0, 1e-3, 2**-8), ("relu", "none", 5e4, 1e-3, 2**-6)],
)
def test_float16_keeps_its_range(activation, row_weight, key_scale, prompt_scale, grad_scale):
    """A flat softmax over 1000 prompts has squared weights of 1e-6, scores of 1000 have 1e6; others exceed 65504."""
    inputs, grad = make_inputs(1, 33, 32, 1000, F16)
    inputs[3] *= key_scale
    inputs[2] *= prompt_scale
    grad *= grad_scale
    assert_matches(inputs, grad, *settings(activation, row_weight))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_float32_keys_decide_relu_exactly(dtype):
    """A score that is positive only by what rounding the key to half would take from it."""
    inputs, grad = make_inputs(1, 3, 16, 8, dtype, F32)
    source, keys = inputs[1], inputs[3]
    source[0, 0], keys[0] = 0, 0
    source[0, 0, :2] = torch.tensor([1.0, -1.0])
    keys[0, :2] = torch.tensor([1 + 2**-13, 1.0])
    assert source[0, 0].float() @ keys[0] > 0 and source[0, 0] @ keys[0].to(dtype) == 0
    assert_matches(inputs, grad, *settings(row_weight="none"))


def test_log_scale_far_from_zero():
    inputs, grad = make_inputs(1, 6, 20, 6)
    inputs[4].fill_(-4.0)
    assert_matches(inputs, grad, *settings())


if backend.unavailable() is None:

    @triton.jit
    def _signs_kernel(output, first_row, seed, threshold: tl.uint32, p, BLOCK: tl.constexpr):  # noqa: N803
        lane = tl.arange(0, BLOCK)
        row = first_row.to(tl.int64) + lane
        sign = kernels._negate_dropped(tl.full([BLOCK, BLOCK], 1.0, tl.float32), row, lane, p, tl.load(seed), threshold)
        tl.store(output + lane[:, None] * BLOCK + lane[None, :], sign)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 17, -(2**63)])
@pytest.mark.parametrize("first_row", [2, 2**32 // 1000 - 4, 2**40])
def test_mask_is_philox_of_row_times_p_plus_column(first_row, seed):
    """Counters on both sides of 2**32, and seeds of both signs."""
    threshold, p, block = 2**31 + 2**30, 1000, 16
    seed = torch.tensor(seed, device=DEVICE)
    signs = torch.empty(block, block, device=DEVICE)
    _signs_kernel[(1,)](signs, first_row, seed, threshold, p, BLOCK=block)
    lane = torch.arange(block, device=DEVICE)
    kept = philox(seed, (first_row + lane)[:, None] * p + lane) >= threshold
    assert torch.equal(signs > 0, kept) and 0 < kept.sum() < kept.numel()


def call(**changes):
    facts = {"device": torch.device(DEVICE), "dtype": BF16, "weight_dtype": BF16, "width": 768, "num_prompts": 200}
    return PromptDiffusionCall(**(facts | changes))


REFUSED = {
    "meta": {"device": torch.device("meta")},
    "float64": {"dtype": torch.float64, "weight_dtype": torch.float64},
    "float16": {"weight_dtype": F16},
    "1025": {"num_prompts": 1025},
    "4000000": {"width": 4_000_000, "num_prompts": 1024},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses(reason):
    assert backend.refuses("prompt_diffusion", call()) is None
    assert reason in backend.refuses("prompt_diffusion", call(**REFUSED[reason]))


@pytest.fixture
def uncached():
    backend.unavailable.cache_clear()
    yield
    backend.unavailable.cache_clear()


def test_unavailable_without_triton(monkeypatch, uncached):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in backend.unavailable()


def test_unavailable_without_device_or_interpreter(monkeypatch, uncached):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in backend.unavailable()
    assert "runs on cuda" in backend.refuses("prompt_diffusion", call(device=torch.device("cpu")))
