"""``prompt_compress`` in C++ against the float64 reference, on every instruction set this machine has."""

import pytest
import torch

from fast_prompt.backends import cpu
from fast_prompt.reference import prompt_compress as reference
from fast_prompt.tolerances import TOLERANCES, relative_error

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.usefixtures("poisoned_memory", "cpu_restored"),
]
LEVELS = [] if cpu.unavailable() else cpu.isa_levels()
NAMES = ("query", "visual", "key_weight", "value_weight", "value_bias")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]  # activations, weights
ALL = [True] * 5
KEPT = [(True, True), (True, False), (False, False)]  # probabilities, attended


def make_inputs(batch, queries, tokens, heads, head_width, token_width, dtype=F32, weight_dtype=None):
    """Five inputs and a gradient; scores of order one."""
    random = torch.Generator().manual_seed(batch + queries + tokens + heads + head_width + token_width)
    weight_dtype = weight_dtype or dtype
    width = heads * head_width

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=random) * scale

    query, grad = (normal(batch, queries, width).to(dtype) for _ in range(2))
    visual = normal(batch, tokens, token_width).to(dtype)
    weights = [normal(width, token_width, scale=token_width**-0.5).to(weight_dtype) for _ in range(2)]
    return [query, visual, *weights, normal(width).to(weight_dtype)], grad


def make_mask(batch, tokens):
    """Padding of every kind: none, a tail, holes, and a sample of nothing else."""
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    for sample in range(batch):
        if sample % 4 == 1:
            mask[sample, tokens // 2 :] = True
        elif sample % 4 == 2:
            mask[sample, ::3] = True
        elif sample % 4 == 3:
            mask[sample] = True
    return mask


def settings(heads, mask=None, dropout_p=0.0):
    return mask, torch.tensor(-(2**40) - 7) if dropout_p else None, heads, dropout_p


def expected(inputs, grad, mask, seed, heads, dropout_p):
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in inputs]
    query, visual, key_weight, value_weight, value_bias = wide
    options = {"num_heads": heads, "key_padding_mask": mask, "dropout_p": dropout_p, "seed": seed}
    output = reference(query, visual, key_weight, value_weight, None, value_bias, **options)
    used = [tensor for tensor in wide if tensor is not None]
    found = iter(torch.autograd.grad(output, used, grad.double()))
    return output.detach(), [None if tensor is None else next(found) for tensor in wide]


def run(inputs, grad, options, keep=(True, True), needs=ALL):
    """Output and gradients."""
    needs = [need and tensor is not None for need, tensor in zip(needs, inputs, strict=True)]
    output, *kept = cpu.prompt_compress(*inputs, *options, *keep)
    return output, cpu.prompt_compress_backward(grad, *inputs, *options, *kept, needs)


def same_bits(a, b):
    if a is None or b is None:
        return a is b
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return all(same_bits(*pair) for pair in zip(a, b, strict=True))


def assert_matches(inputs, grad, options, keep=(True, True)):
    tolerance = TOLERANCES[inputs[0].dtype]
    right_output, right_gradients = expected(inputs, grad, *options)
    output, gradients = run(inputs, grad, options, keep)
    assert output.dtype == inputs[0].dtype and output.is_contiguous()
    assert relative_error(output, right_output) < tolerance
    for name, tensor, result, right in zip(NAMES, inputs, gradients, right_gradients, strict=True):
        if tensor is None:
            assert result is None
            continue
        assert result.dtype == tensor.dtype and result.shape == tensor.shape and result.is_contiguous()
        if right.abs().max() < 1e-9:  # one token, whatever the query: what is left is rounding
            assert result.abs().max() < tolerance, name
        else:
            assert relative_error(result, right) < tolerance, name


@pytest.mark.parametrize("dtype, weight_dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keep", KEPT)
def test_every_setting(level, keep, masked, dropout_p, dtype, weight_dtype):
    inputs, grad = make_inputs(5, 3, 37, 4, 16, 64, dtype, weight_dtype)
    assert_matches(inputs, grad, settings(4, make_mask(5, 37) if masked else None, dropout_p), keep)


SIZES = [  # batch, queries, tokens, heads, head width, token width: ends of registers, panels, blocks and groups
    (1, 1, 1, 1, 1, 1),
    (2, 3, 2, 1, 5, 7),
    (3, 2, 5, 3, 3, 17),
    (1, 7, 17, 5, 33, 31),
    (70, 1, 3, 2, 8, 32),
    (9, 20, 6, 2, 4, 33),
    (1, 130, 5, 1, 6, 12),
    (1, 1, 197, 12, 64, 768),
    (2, 5, 50, 12, 64, 512),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("keep", [KEPT[0], KEPT[-1]])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ragged_sizes(level, size, keep, dtype):
    inputs, grad = make_inputs(*size, dtype)
    assert_matches(inputs, grad, settings(size[3], dropout_p=0.1), keep)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("queries", range(1, 21))
def test_any_number_of_queries(queries, dtype):
    inputs, grad = make_inputs(2, queries, 19, 3, 16, 96, dtype)
    assert_matches(inputs, grad, settings(3), KEPT[queries % 3])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_without_a_bias(level, dtype):
    inputs, grad = make_inputs(3, 2, 11, 2, 24, 40, dtype)
    inputs[4] = None
    assert_matches(inputs, grad, settings(2, make_mask(3, 11), 0.2))


STRIDED = {
    "batch slice": lambda x: torch.cat([x, x])[:: 2 if len(x) > 1 else 1][: len(x)],
    "token slice": lambda x: torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    "columns of a wider tensor": lambda x: torch.cat([x, x], dim=2)[..., x.shape[2] :],
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dimension strided": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded over the batch": lambda x: x[:1].expand(x.shape),
    "expanded over everything": lambda x: x[:1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_any_strides_give_the_contiguous_result(view, dtype):
    (query, visual, key_weight, value_weight, bias), grad = make_inputs(3, 4, 29, 4, 16, 64, dtype)
    query, visual, grad = view(query), view(visual), view(grad)
    key_weight = key_weight.t().contiguous().t()
    value_weight = torch.cat([value_weight, value_weight], dim=1)[:, :64]
    bias = bias[:1].expand(64)
    mask = make_mask(29, 3).t()
    inputs = [query, visual, key_weight, value_weight, bias]
    options = settings(4, mask, 0.2)
    copies = [tensor.contiguous() for tensor in inputs]
    plain = run(copies, grad.contiguous(), (mask.contiguous(), *options[1:]))
    assert same_bits(run(inputs, grad, options), plain)


def test_offsets_beyond_2_to_the_31(tmp_path):
    (query, visual, *others), grad = make_inputs(2, 1, 3, 2, 4, 32)
    stride = 2**31 + 64
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + 128, dtype=F32)  # a file of holes
    far = storage.as_strided(visual.shape, (stride, 32, 1)).copy_(visual)
    assert same_bits(run([query, far, *others], grad, settings(2)), run([query, visual, *others], grad, settings(2)))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("number", range(32))
def test_unwanted_gradients_are_not_computed_and_change_nothing(number, keep, dtype):
    needs = [bool(number >> i & 1) for i in range(5)]
    inputs, grad = make_inputs(5, 2, 13, 3, 8, 48, dtype)
    options = settings(3, make_mask(5, 13), 0.2)
    _, everything = run(inputs, grad, options, keep)
    _, some = run(inputs, grad, options, keep, needs)
    for needed, result, right in zip(needs, some, everything, strict=True):
        assert torch.equal(result, right) if needed else result is None


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_what_is_kept_changes_nothing(level, dtype):
    inputs, grad = make_inputs(5, 2, 21, 3, 16, 64, dtype)
    options = settings(3, make_mask(5, 21), 0.2)
    assert same_bits(run(inputs, grad, options, KEPT[0]), run(inputs, grad, options, KEPT[1]))
    assert same_bits(run(inputs, grad, options, KEPT[0]), run(inputs, grad, options, KEPT[2]))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_is_kept_is_what_it_is_called(level, dtype, dropout_p):
    inputs, _ = make_inputs(4, 2, 21, 3, 16, 50, dtype)
    mask = make_mask(4, 21)
    _, logsumexp, probabilities, attended = cpu.prompt_compress(*inputs, *settings(3, mask, dropout_p), True, True)
    query, visual, key_weight = (tensor.double() for tensor in inputs[:3])
    keys = (visual @ key_weight.T).unflatten(-1, (3, 16)).transpose(1, 2)
    scores = query.unflatten(-1, (3, 16)).transpose(1, 2) @ keys.transpose(-1, -2) / 4
    scores = scores.masked_fill(mask[:, None, None], -torch.inf)
    right = scores.softmax(-1).nan_to_num(0)
    tolerance = TOLERANCES[dtype]
    assert relative_error(logsumexp, scores.logsumexp(-1)) < tolerance
    assert relative_error(probabilities, right) < tolerance
    if dropout_p == 0:
        assert relative_error(attended, right @ visual[:, None]) < tolerance
    assert not probabilities.masked_select(mask[:, None, None]).any()


# Batch, queries, tokens, heads: a sample for all threads, samples that share out evenly or not, several groups.
SHARED = [(1, 1, 197, 12), (1, 5, 70, 4), (3, 2, 33, 4), (4, 3, 20, 4), (7, 40, 9, 2), (130, 1, 5, 2)]


@pytest.mark.parametrize("shape", SHARED, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_no_bit_depends_on_the_thread_count(level, dtype, shape):
    batch, queries, tokens, heads = shape
    inputs, grad = make_inputs(batch, queries, tokens, heads, 16, 768, dtype)
    options = settings(heads, make_mask(batch, tokens), 0.1)
    torch.set_num_threads(1)
    alone = run(inputs, grad, options, KEPT[-1])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same_bits(run(inputs, grad, options, KEPT[-1]), alone)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_padding_is_never_read(level, dtype):
    inputs, grad = make_inputs(6, 2, 19, 3, 16, 64, dtype)
    mask = make_mask(6, 19)
    options = settings(3, mask, 0.1)
    clean = run(inputs, grad, options)
    inputs[1] = inputs[1].masked_fill(mask[..., None], torch.nan)
    assert same_bits(run(inputs, grad, options), clean)
    output, (query, visual, *_) = clean
    assert not output[3].any() and not query[3].any() and not visual[mask].any()


@pytest.mark.parametrize("token_width", [32, 37, 768])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_beyond_the_ends_is_read(level, dtype, token_width):
    """Every input lies between NaNs; the results are those of tensors that do not."""
    inputs, grad = make_inputs(2, 3, 7, 2, 5, token_width, dtype)

    def fenced(tensor):
        fence = tensor.new_full((64,), torch.nan)
        return torch.cat([fence, tensor.flatten(), fence])[64 : 64 + tensor.numel()].view(tensor.shape)

    options = settings(2, dropout_p=0.1)
    assert same_bits(run([fenced(tensor) for tensor in inputs], fenced(grad), options), run(inputs, grad, options))


def test_inputs_and_what_is_kept_are_left_alone(level):
    inputs, grad = make_inputs(3, 2, 33, 4, 16, 64)
    options = settings(4, make_mask(3, 33), 0.5)
    _, *kept = cpu.prompt_compress(*inputs, *options, True, True)
    tensors = (*inputs, grad, *kept, options[0])
    before = [tensor.clone() for tensor in tensors]
    cpu.prompt_compress_backward(grad, *inputs, *options, *kept, ALL)
    assert same_bits(tensors, before)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_nan_stays_in_its_sample(level, dtype):
    inputs, grad = make_inputs(3, 2, 31, 2, 16, 64, dtype)
    clean = run(inputs, grad, settings(2))
    inputs[1][1, 5, 3] = torch.nan
    output, (query, visual, key_weight, value_weight, _) = run(inputs, grad, settings(2))
    assert output[1].isnan().all() and query[1].isnan().all() and visual[1].isnan().any()
    assert same_bits(output[::2], clean[0][::2]) and same_bits(query[::2], clean[1][0][::2])
    assert same_bits(visual[::2], clean[1][1][::2])
    assert key_weight.isnan().all() and value_weight.isnan().all()


def test_large_scores_do_not_overflow_the_softmax(level):
    """exp of these scores is infinite in float32; as whole numbers the scores themselves have no rounding error."""
    inputs, grad = make_inputs(2, 3, 9, 2, 16, 64)
    query, visual, key_weight = inputs[:3]
    inputs[:3] = query.round().abs(), visual.round(), (2 * key_weight).round()
    inputs[1][..., 0], inputs[2][:, 0] = 64, 1  # the same large number for every token
    scores = inputs[0][..., :16] @ inputs[2][:16] @ inputs[1].transpose(1, 2) / 4
    assert scores.min() > 89 and 0.01 < scores.softmax(-1).amax(-1).min() < 0.99
    output, gradients = run(inputs, grad, settings(2))
    assert relative_error(output, expected(inputs, grad, *settings(2))[0]) < TOLERANCES[F32]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_each_level_runs_code_of_its_own():
    """Register widths and bf16 products change the order or the rounding of sums, so bits tell levels apart."""

    def fingerprint(name):
        cpu.select_isa(name)
        results = []
        for dtype in (F32, BF16):
            inputs, grad = make_inputs(2, 2, 60, 3, 64, 768, dtype)
            _, logsumexp, *_ = cpu.prompt_compress(*inputs, *settings(3), False, False)
            results.append(logsumexp.double().sum().item())
        return tuple(results)

    assert len({fingerprint(name) for name in LEVELS}) == len(LEVELS)


@pytest.mark.parametrize("index", range(5), ids=NAMES)
@pytest.mark.parametrize("wrong", [torch.zeros(5, 6, 7), torch.zeros(3, 6), torch.zeros(9)], ids=lambda x: str(x.dim()))
def test_native_op_checks_what_it_is_given(index, wrong):
    inputs, _ = make_inputs(2, 3, 4, 2, 4, 8)
    inputs[index] = wrong
    with pytest.raises(RuntimeError):
        cpu.prompt_compress(*inputs, *settings(2), True, True)


@pytest.mark.parametrize("index", range(3), ids=("logsumexp", "probabilities", "attended"))
def test_native_op_checks_what_was_kept(index):
    inputs, grad = make_inputs(2, 3, 4, 2, 4, 8)
    _, *kept = cpu.prompt_compress(*inputs, *settings(2), True, True)
    for wrong in (kept[index][:1], kept[index].double(), kept[index].transpose(0, -1).contiguous().transpose(0, -1)):
        others = [wrong if i == index else tensor for i, tensor in enumerate(kept)]
        with pytest.raises(RuntimeError):
            cpu.prompt_compress_backward(grad, *inputs, *settings(2), *others, ALL)


@pytest.mark.parametrize(
    "mask, seed, heads, dropout_p",
    [
        (torch.zeros(2, 5, dtype=torch.bool), None, 2, 0.0),
        (torch.zeros(2, 4), None, 2, 0.0),
        (None, None, 3, 0.0),
        (None, None, 0, 0.0),
        (None, None, 2, 0.5),
    ],
)
def test_native_op_checks_its_options(mask, seed, heads, dropout_p):
    inputs, _ = make_inputs(2, 3, 4, 2, 4, 8)
    with pytest.raises(RuntimeError):
        cpu.prompt_compress(*inputs, mask, seed, heads, dropout_p, True, True)
