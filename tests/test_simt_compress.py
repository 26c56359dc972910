"""The CUDA kernels of prompt_compress run on the CPU by tests/simt, against the float64 reference."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from simt import harness

from fast_prompt.reference import prompt_compress as reference
from fast_prompt.reference.philox import dropout_mask
from fast_prompt.reference.prompt_compress import split_heads
from fast_prompt.tolerances import TOLERANCES, relative_error

pytestmark = [
    pytest.mark.skipif(not harness.has_compiler(), reason="no C++ compiler to build the emulated kernels with"),
    pytest.mark.gate,
]

NAMES = ("query", "visual", "key_weight", "value_weight", "value_bias")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]  # activations, weights
ALL = (True,) * 5
KEPT = [(True, True), (True, False), (False, False)]  # probabilities, attended
# Threads forwards, copies as late as they may come; and the reverse of both.
ORDERS = {"forward": {"reverse": False, "late_copies": True}, "reverse": {"reverse": True, "late_copies": False}}
H100 = {"multiprocessors": 2, "shared_bytes": 227 << 10}  # but for its 132 multiprocessors
SMALL = 99 << 10  # shared memory of sm_86 and sm_89


@pytest.fixture(scope="session")
def built():
    return harness.Backend("prompt_compress", harness.build("prompt_compress"))


@pytest.fixture(params=ORDERS.values(), ids=ORDERS.keys())
def kernels(built, request):
    built.configure(**H100, **request.param)
    return built


class Case:
    """Inputs of one call and a gradient of its output; scores of order one."""

    def __init__(self, batch, queries, tokens, heads, head_width, width, dtype=BF16, weight_dtype=None, dropout_p=0.0):
        self.random = torch.Generator().manual_seed(batch + queries + tokens + heads + head_width + width)
        inner = heads * head_width
        self.query = self.normal(batch, queries, inner).to(dtype)
        self.visual = self.normal(batch, tokens, width).to(dtype)
        self.weights = [self.normal(inner, width, scale=width**-0.5).to(weight_dtype or dtype) for _ in range(2)]
        self.bias = self.normal(inner).to(weight_dtype or dtype)
        self.grad = self.normal(batch, queries, inner).to(dtype)
        self.mask = None
        self.heads, self.dropout_p = heads, dropout_p
        self.seed = torch.tensor(-(2**40) - 7) if dropout_p else None

    def normal(self, *shape, scale=1.0):
        return torch.randn(shape, generator=self.random) * scale

    def inputs(self):
        return self.query, self.visual, *self.weights, self.bias

    def arguments(self):
        return *self.inputs(), self.mask, self.seed, self.heads, self.dropout_p

    def expected(self):
        """The output and five gradients in float64; for padding alone, probabilities are 0 and so is all else."""
        wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in self.inputs()]
        options = {"num_heads": self.heads, "key_padding_mask": self.mask, "dropout_p": self.dropout_p}
        output = reference(*wide[:4], None, wide[4], **options, seed=self.seed)
        given = [tensor for tensor in wide if tensor is not None]
        found = iter(torch.autograd.grad(output, given, self.grad.double()))
        return output.detach(), [None if tensor is None else next(found) for tensor in wide]


def run(kernels, case, keep=(True, True), needs=ALL):
    """The output, what was kept, and the gradients."""
    if case.bias is None:
        needs = (*needs[:4], False)
    output, *kept = kernels.prompt_compress(*case.arguments(), *keep)
    return output, kept, kernels.prompt_compress_backward(case.grad, *case.arguments(), *kept, needs)


def errors(kernels, case, keep=(True, True)):
    """By result: its error in units of what is allowed."""
    tolerance = TOLERANCES[case.query.dtype]
    right_output, right_gradients = case.expected()
    output, _, gradients = run(kernels, case, keep)
    found = {"forward": relative_error(output, right_output) / tolerance}
    for name, result, right in zip(NAMES, gradients, right_gradients, strict=True):
        if right is not None:
            zero = right.abs().max() < 1e-9  # softmax over one token is constant: what is left is rounding
            found[name] = (result.abs().max().item() if zero else relative_error(result, right)) / tolerance
    return found


def assert_matches(kernels, case, keep=(True, True)):
    found = errors(kernels, case, keep)
    assert all(error < 1 for error in found.values()), found


def pad(case, lengths):
    """The samples' last tokens as padding, full of NaN."""
    case.mask = torch.arange(case.visual.shape[1]) >= torch.tensor(lengths)[:, None]
    case.visual = case.visual.masked_fill(case.mask[:, :, None], torch.nan)


# ---- Right results ----


@pytest.mark.parametrize("dtype, weight_dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("keep", KEPT, ids=["all kept", "probabilities kept", "nothing kept"])
def test_every_setting(kernels, keep, dropout_p, dtype, weight_dtype):
    case = Case(2, 2, 37, 3, 16, 80, dtype, weight_dtype, dropout_p)
    pad(case, [37, 21])
    assert_matches(kernels, case, keep)


SIZES = [  # batch, queries, tokens, heads, head width, visual width, multiprocessors
    (1, 1, 1, 1, 1, 1, 2),
    (3, 2, 5, 2, 5, 3, 2),
    (2, 1, 53, 12, 8, 256, 16),  # Columns256, in splits
    (1, 1, 40, 4, 24, 300, 1),  # Columns512
    (1, 2, 33, 2, 40, 768, 4),  # Columns768, in splits
    (1, 1, 19, 3, 8, 1000, 1),  # Columns1024
    (1, 1, 35, 2, 16, 1032, 2),  # two groups of columns
    (2, 7, 20, 5, 3, 24, 1),  # three row tiles
    (1, 40, 18, 1, 33, 17, 8),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ragged_sizes(kernels, size, dtype):
    *shape, multiprocessors = size
    kernels.configure(multiprocessors=multiprocessors)
    assert_matches(kernels, Case(*shape, dtype, dropout_p=0.1))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_little_shared_memory(kernels, dtype):
    """A token that the chips with the least take in groups of columns: three in float32, two in the half types."""
    kernels.configure(shared_bytes=SMALL)
    case = Case(1, 1, 20, 2, 8, 768 if dtype == F32 else 800, dtype)
    pad(case, [18])
    assert_matches(kernels, case)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_padding_is_not_read_and_padding_alone_gives_zero(kernels, dtype):
    kernels.configure(multiprocessors=8)
    case = Case(3, 2, 40, 2, 8, 40, dtype, dropout_p=0.2)
    pad(case, [0, 40, 17])
    assert_matches(kernels, case)
    output, (logsumexp, probabilities, attended), gradients = run(kernels, case)
    assert (logsumexp[0] == -torch.inf).all()
    for zero in (output[0], probabilities[0], attended[0], gradients[0][0], gradients[1][case.mask]):
        assert (zero == 0).all()


@pytest.mark.parametrize("multiprocessors", [1, 16])
def test_what_is_kept(kernels, multiprocessors):
    """Probabilities before dropout, attended tokens after it, from one split of the tokens or several."""
    kernels.configure(multiprocessors=multiprocessors)
    case = Case(2, 3, 41, 2, 8, 24, F32, dropout_p=0.3)
    pad(case, [41, 9])
    _, (logsumexp, probabilities, attended), _ = run(kernels, case)
    visual = case.visual.double().masked_fill(case.mask[..., None], 0)
    keys = split_heads(visual @ case.weights[0].double().T, 2)
    scores = split_heads(case.query.double(), 2) @ keys.mT / 8**0.5
    scores = scores.masked_fill(case.mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    kept = dropout_mask(case.seed, 2 * 2 * 3, 41, case.dropout_p, torch.device("cpu")).view(weights.shape)
    right = (scores.logsumexp(-1), weights, (weights * kept / (1 - case.dropout_p)) @ visual[:, None])
    for result, expected in zip((logsumexp, probabilities, attended), right, strict=True):
        assert relative_error(result, expected) < TOLERANCES[F32]


@pytest.mark.parametrize("keep", list(itertools.product((False, True), repeat=2)))
def test_keeping_changes_nothing(kernels, keep):
    case = Case(2, 2, 37, 3, 8, 40, BF16, dropout_p=0.2)
    pad(case, [37, 5])
    output, _, gradients = run(kernels, case)
    same_output, kept, same_gradients = run(kernels, case, keep)
    assert [tensor is not None for tensor in kept] == [True, *keep]
    assert torch.equal(output, same_output)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=5)))
def test_unwanted_gradients_are_not_computed_and_change_nothing(built, needs):
    built.configure(**H100, **ORDERS["forward"])
    case = Case(1, 2, 21, 2, 8, 24, BF16, F32, dropout_p=0.2)
    *_, everything = run(built, case)
    *_, some = run(built, case, needs=needs)
    for needed, result, right in zip(needs, some, everything, strict=True):
        assert torch.equal(result, right) if needed else result is None


@pytest.mark.parametrize("dtype", [F32, F16])
def test_without_bias(kernels, dtype):
    case = Case(2, 1, 19, 2, 8, 24, dtype, dropout_p=0.2)
    case.bias = None
    assert_matches(kernels, case)


def between_nans(tensor):
    """The tensor as the middle of a wider and longer one that is NaN elsewhere."""
    wide = torch.full((tensor.shape[0] * 2, tensor.shape[1] + 3, tensor.shape[2] + 8), torch.nan, dtype=tensor.dtype)
    return wide[::2, 1:-2, 8:].copy_(tensor)


STRIDED = {
    "between NaNs": between_nans,
    "odd address": lambda x: between_nans(torch.nn.functional.pad(x, (1, 0)))[..., 1:],
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded over the batch": lambda x: x[:1].expand(x.shape),
    "one row": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_any_strides_give_the_contiguous_result(kernels, view, dtype):
    case = Case(3, 2, 29, 2, 8, 40, dtype, dropout_p=0.2)
    case.query, case.visual, case.grad = view(case.query), view(case.visual), view(case.grad)
    case.weights = [between_nans(weight[None])[0] for weight in case.weights]
    case.mask = (torch.rand(29, 3, generator=case.random) < 0.3).T
    output, _, gradients = run(kernels, case)
    for name in ("query", "visual", "grad", "mask"):
        setattr(case, name, getattr(case, name).contiguous())
    case.weights = [weight.contiguous() for weight in case.weights]
    same_output, _, same_gradients = run(kernels, case)
    assert torch.equal(output, same_output)
    for name, a, b in zip(NAMES, gradients, same_gradients, strict=True):
        assert torch.equal(a, b), name


def test_offsets_beyond_2_to_the_31(kernels, tmp_path):
    case = Case(2, 1, 3, 1, 4, 8, F32)
    near = run(kernels, case)
    stride = 2**31 + 64
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + 64, dtype=F32)  # a file of holes
    case.visual = storage.as_strided(case.visual.shape, (stride, 8, 1)).copy_(case.visual)
    far = run(kernels, case)
    assert torch.equal(near[0], far[0])
    assert all(torch.equal(a, b) for a, b in zip(near[2], far[2], strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_nan_stays_in_its_sample(kernels, dtype):
    case = Case(3, 1, 19, 2, 8, 24, dtype)
    clean, *_ = run(kernels, case)
    case.visual[1, 5, 3] = torch.nan
    output, _, (query, visual, *weights) = run(kernels, case)
    assert output[1].isnan().all() and query[1].isnan().all() and visual[1].isnan().all()
    assert torch.equal(output[::2], clean[::2]) and query[::2].isfinite().all() and visual[::2].isfinite().all()
    assert all(weight.isnan().any() for weight in weights[:2])


def test_large_scores_do_not_overflow_the_softmax(kernels):
    case = Case(1, 1, 40, 2, 8, 32, F32)
    case.query *= 300
    output, _, gradients = run(kernels, case)
    assert relative_error(output, case.expected()[0]) < TOLERANCES[F32]
    assert all(gradient.isfinite().all() for gradient in gradients)  # near one-hot: differences of equal numbers


@pytest.mark.parametrize("factor", [2.0**-14, 2.0**10])
def test_fp16_gradients_of_any_size_keep_their_precision(kernels, factor):
    """dY and dS would underflow or overflow in fp16 if they were not scaled."""
    case = Case(2, 2, 37, 2, 16, 40, F16, F32, dropout_p=0.1)
    case.grad *= factor
    _, gradients = case.expected()
    for name, result, right in list(zip(NAMES, run(kernels, case)[2], gradients, strict=True))[2:]:
        assert relative_error(result, right) < TOLERANCES[F16], name


def test_order_of_threads_does_not_show(built):
    """A result that depends on it is a race."""
    results = []
    for order in ORDERS.values():
        built.configure(**H100, **order)
        output, kept, gradients = run(built, Case(2, 3, 50, 4, 8, 96, dropout_p=0.2))
        results.append([output, *kept, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


BUDGETS = json.loads((Path(__file__).parent / "kernel_budgets.json").read_text())["prompt_compress"]["cuda"][
    "shared_memory"
]


@pytest.mark.parametrize("name", BUDGETS)
def test_shared_memory_within_budget(built, name):
    """Dynamic shared memory, which ptxas does not see: what the launches ask for."""
    built.configure(**ORDERS["forward"], **H100)
    element, width = re.fullmatch(r"(\w+) d=(\d+)", name).groups()
    case = Case(1, 1, 3, 1, 4, int(width), {"fp32": F32, "bf16": BF16, "fp16": F16}[element])
    built.configure(most_shared_bytes=0)
    run(built, case)
    used = built.settings.most_shared_bytes
    assert 0 < used <= BUDGETS[name]


# ---- Planted bugs: what they would do to a GPU, the emulator must show ----

TOKENS, ROWS = "prompt_compress_tokens.cuh", "prompt_compress_rows.cuh"
PLANTED = {
    "removed_barrier_before_scores_are_added_up": (
        TOKENS,
        "    __syncthreads();\n    float score = 0;",
        "    float score = 0;",
    ),
    "removed_wait_for_a_slice": (TOKENS, "    ptx::copy_wait<L::STAGES - 2>();\n", ""),
    "padding_that_is_read": (TOKENS, "is_padding(pass, share.sample, token + row)", "token + row < 0"),
    "sums_that_keep_an_old_shift": (TOKENS, "first *= decay;", "first *= 1;"),
    "forgotten_split": (ROWS, "    weighted += expf", "    if (split + 1 < all.splits) weighted += expf"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_caught(name):
    broken = harness.Backend("prompt_compress", harness.build_planted("prompt_compress", *PLANTED[name]))
    assert any(shows_a_bug(broken, order) for order in ORDERS.values())


def test_no_bug_is_seen_where_none_is_planted(built):
    assert not any(shows_a_bug(built, order) for order in ORDERS.values())


def shows_a_bug(kernels, order):
    """Whether the emulator stops, something is written out of bounds, or a result is wrong."""
    kernels.configure(**(H100 | order | {"multiprocessors": 4}))
    case = Case(2, 2, 71, 3, 16, 80)
    pad(case, [71, 40])
    try:
        found = errors(kernels, case)
    except (RuntimeError, AssertionError):
        return True
    return not all(error < 1 for error in found.values())
