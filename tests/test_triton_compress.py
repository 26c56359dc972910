"""``prompt_compress`` in Triton against the float64 reference: on a GPU where there is one, else in the interpreter.

What the parity cases (test_parity.py) do not reach: what is kept, needs, splits of the tokens, column blocks.
"""

import itertools

import pytest
import torch

from fast_prompt.backends import PromptCompressCall
from fast_prompt.backends import triton as backend
from fast_prompt.reference import prompt_compress as reference
from fast_prompt.reference.prompt_compress import masked_softmax, split_heads
from fast_prompt.tolerances import TOLERANCES, relative_error

pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable())),
    pytest.mark.usefixtures("poisoned_memory"),
]
if backend.unavailable() is None:
    from fast_prompt_kernels import prompt_compress as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]  # activations, weights
NAMES = ("query", "visual", "key_weight", "value_weight", "value_bias")
KEPT, NOT_KEPT = (True, True), (False, False)
ALL = [True] * 5


def make_inputs(batch, queries, tokens, heads, head_dim, width, dtype=F32, weight_dtype=None):
    """Five inputs and a gradient. Tokens share an offset, as those of image encoders do."""
    random = torch.Generator().manual_seed(batch + queries + tokens + width)
    inner, weight_dtype = heads * head_dim, weight_dtype or dtype

    def normal(*shape):
        return torch.randn(shape, generator=random)

    query, grad = (normal(batch, queries, inner).to(dtype) for _ in range(2))
    visual = (normal(batch, tokens, width) + normal(width)).to(dtype)
    weights = [(normal(inner, width) / width**0.5).to(weight_dtype) for _ in range(2)]
    inputs = [query, visual, *weights, normal(inner).to(weight_dtype)]
    return [tensor.to(DEVICE) for tensor in inputs], grad.to(DEVICE)


def settings(heads, dropout_p=0.0, mask=None):
    """What stands between the tensors and the kept results."""
    seed = torch.tensor(-(2**40) - 7, device=DEVICE) if dropout_p else None
    return mask, seed, heads, dropout_p


def padding(batch, tokens):
    """The first sample of padding alone, the others with some."""
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[0] = True
    return mask.to(DEVICE)


def expected(inputs, grad, mask, seed, heads, dropout_p):
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in inputs]
    given = [tensor for tensor in wide if tensor is not None]
    options = {"num_heads": heads, "key_padding_mask": mask, "dropout_p": dropout_p, "seed": seed}
    output = reference(*wide[:4], None, wide[4], **options)
    return output.detach(), torch.autograd.grad(output, given, grad.double())


def backward(inputs, grad, options, keep, needs=ALL):
    output, *kept = backend.prompt_compress(*inputs, *options, *keep)
    return output, backend.prompt_compress_backward(grad, *inputs, *options, *kept, needs)


def assert_matches(inputs, grad, options, keep=KEPT):
    tolerance = TOLERANCES[inputs[0].dtype]
    output, gradients = expected(inputs, grad, *options)
    needs = [tensor is not None for tensor in inputs]
    actual, results = backward(inputs, grad, options, keep, needs)
    assert actual.dtype == inputs[0].dtype and actual.is_contiguous()
    assert relative_error(actual, output) < tolerance
    given = [
        (name, tensor, result)
        for name, tensor, result in zip(NAMES, inputs, results, strict=True)
        if tensor is not None
    ]
    for (name, tensor, result), right in zip(given, gradients, strict=True):
        assert result.dtype == tensor.dtype and result.shape == tensor.shape and result.is_contiguous()
        assert relative_error(result, right) < tolerance, name


@pytest.mark.parametrize("keep", [KEPT, NOT_KEPT], ids=["kept", "not kept"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_options(dropout_p, masked, keep):
    inputs, grad = make_inputs(2, 2, 37, 3, 20, 50)
    assert_matches(inputs, grad, settings(3, dropout_p, padding(2, 37) if masked else None), keep)


@pytest.mark.parametrize("keep", [KEPT, NOT_KEPT], ids=["kept", "not kept"])
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES[1:])
def test_dtypes(dtype, weight_dtype, keep):
    inputs, grad = make_inputs(2, 2, 37, 3, 20, 50, dtype, weight_dtype)
    assert_matches(inputs, grad, settings(3, 0.3, padding(2, 37)), keep)


@pytest.mark.parametrize("keep", [KEPT, NOT_KEPT, (True, False), (False, True)])
@pytest.mark.parametrize("multiprocessors", [1, 1000], ids=["whole", "split"])
def test_splits(multiprocessors, keep, monkeypatch):
    """All tokens in one program, and a sample's tokens in several, of which the last is short."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: multiprocessors)
    inputs, grad = make_inputs(2, 1, 77, 3, 8, 40)
    options = settings(3, 0.25, padding(2, 77))
    assert (kernels.TokenPass.of(kernels.Sizes.of(*inputs[:2], 3), inputs[1], None, None, 0.0, 1).splits > 1) == (
        multiprocessors > 1
    )
    assert_matches(inputs, grad, options, keep)


@pytest.mark.parametrize(
    ("queries", "heads", "width", "dtype"),
    [(1, 4, 1, F32), (9, 2, 100, F32), (9, 2, 300, BF16), (1, 1, 1100, BF16), (1, 1, 1100, F32)],
)
def test_row_and_column_blocks(queries, heads, width, dtype):
    inputs, grad = make_inputs(1, queries, 20, heads, 5, width, dtype)
    assert_matches(inputs, grad, settings(heads, 0.2), NOT_KEPT)


def test_no_bias():
    inputs, grad = make_inputs(2, 2, 37, 3, 20, 50)
    assert_matches([*inputs[:4], None], grad, settings(3, 0.3))


def test_what_is_kept():
    inputs, _ = make_inputs(3, 2, 37, 3, 20, 50)
    mask = padding(3, 37)
    _, logsumexp, probabilities, attended = backend.prompt_compress(*inputs, *settings(3, 0.0, mask), True, True)
    query, visual, key_weight = (tensor.double() for tensor in inputs[:3])
    scores = split_heads(query, 3) @ split_heads(visual @ key_weight.T, 3).mT / 20**0.5
    right = masked_softmax(scores, mask)
    assert relative_error(probabilities, right) < TOLERANCES[F32]
    assert relative_error(attended, right @ visual[:, None]) < TOLERANCES[F32]
    sums = scores.masked_fill(mask[:, None, None, :], -torch.inf).logsumexp(-1)
    assert relative_error(logsumexp, sums) < TOLERANCES[F32]
    assert (logsumexp[0] == -torch.inf).all() and probabilities[0].eq(0).all()


ONE_OR_ALL_BUT_ONE = [needs for needs in itertools.product([False, True], repeat=5) if sum(needs) in (1, 4)]


@pytest.mark.parametrize("needs", ONE_OR_ALL_BUT_ONE)
def test_only_what_is_needed(needs):
    inputs, grad = make_inputs(2, 1, 11, 2, 6, 20)
    _, every = backward(inputs, grad, settings(2, 0.3), KEPT)
    _, results = backward(inputs, grad, settings(2, 0.3), KEPT, needs)
    for needed, result, right in zip(needs, results, every, strict=True):
        assert torch.equal(result, right) if needed else result is None


def test_same_bits_twice_and_nothing_overwritten():
    inputs, grad = make_inputs(2, 3, 77, 4, 8, 40, BF16)
    options = settings(4, 0.3)
    before = [tensor.clone() for tensor in (*inputs, grad)]
    (_, first), (_, second) = (backward(inputs, grad, options, NOT_KEPT) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(before, (*inputs, grad), strict=True))


@pytest.mark.parametrize("keep", [KEPT, NOT_KEPT], ids=["kept", "not kept"])
def test_padding_may_hold_nan(keep):
    inputs, grad = make_inputs(3, 2, 37, 3, 20, 50, BF16)
    mask = padding(3, 37)
    zeroed = inputs[1].masked_fill(mask[..., None], 0)
    inputs[1] = inputs[1].masked_fill(mask[..., None], torch.nan)
    options = settings(3, 0.3, mask)
    output, results = backward(inputs, grad, options, keep)
    inputs[1] = zeroed
    clean, right = backward(inputs, grad, options, keep)
    assert torch.equal(output, clean) and all(torch.equal(one, two) for one, two in zip(results, right, strict=True))
    assert output[0].eq(0).all() and results[1][mask].eq(0).all()


@pytest.mark.parametrize("grad_scale", [2**-12, 2**12])
def test_float16_keeps_its_range(grad_scale):
    """dy of the smallest gradients would vanish beside 1 in float16, of the largest exceed 65504."""
    inputs, grad = make_inputs(1, 1, 300, 2, 64, 32, F16)
    inputs[3] *= 8
    assert_matches(inputs, grad * grad_scale / 8, settings(2), NOT_KEPT)


def call(**changes):
    facts = {"device": torch.device(DEVICE), "dtype": BF16, "weight_dtype": BF16, "num_queries": 1, "num_heads": 12}
    return PromptCompressCall(**(facts | {"head_dim": 64, "visual_width": 768} | changes))


REFUSED = {
    "meta": {"device": torch.device("meta")},
    "float64": {"dtype": torch.float64, "weight_dtype": torch.float64},
    "65536": {"num_heads": 65536},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses(reason):
    assert backend.refuses("prompt_compress", call()) is None
    assert reason in backend.refuses("prompt_compress", call(**REFUSED[reason]))


def test_a_tile_fits_every_chip():
    """Whatever the width, some tile does, in the least shared memory of any chip."""
    for width, dtype, operands, masked in itertools.product((1, 768, 1024, 4096), (F32, BF16), (1, 2), (False, True)):
        tile = kernels.token_tile(width, 12, dtype, operands, masked, 65536)
        assert tile.whole == (tile.chunks * tile.width >= width)
