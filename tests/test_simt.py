"""The CUDA kernels run on the CPU by tests/simt, against the float64 reference; and bugs planted in them, caught."""

import json
import re
from pathlib import Path

import pytest
import torch
from simt import harness

from fast_prompt.reference import prompt_diffusion as reference
from fast_prompt.tolerances import TOLERANCES, relative_error

pytestmark = [
    pytest.mark.skipif(not harness.has_compiler(), reason="no C++ compiler to build the emulated kernels with"),
    pytest.mark.gate,
]

NAMES = ("hidden", "source", "prompts", "keys", "log_scale")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]  # activations, weights
ALL = [True] * 5
# Threads forwards, copies as late as they may come; and the reverse of both.
ORDERS = {"forward": {"reverse": False, "late_copies": True}, "reverse": {"reverse": True, "late_copies": False}}
H100 = {"multiprocessors": 2, "shared_bytes": 227 << 10}  # but for its 132 multiprocessors
SMALL = 99 << 10  # shared memory of sm_86 and sm_89


@pytest.fixture(scope="session")
def built():
    return harness.Backend("prompt_diffusion", harness.build("prompt_diffusion"))


@pytest.fixture(params=ORDERS.values(), ids=ORDERS.keys())
def kernels(built, request):
    built.configure(**H100, **request.param)
    return built


def make_inputs(batch, rows, width, prompts, dtype=BF16, weight_dtype=None):
    """Five inputs and a gradient; scores of order one, and a diffusion term that hidden does not drown."""
    random = torch.Generator().manual_seed(batch + rows + width + prompts)

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=random) * scale

    hidden, source, grad = (normal(batch, rows, width, scale=scale).to(dtype) for scale in (0.1, 1, 1))
    prompt, key = (normal(prompts, width, scale=scale).to(weight_dtype or dtype) for scale in (1, width**-0.5))
    return [hidden, source, prompt, key, torch.tensor(0.3)], grad


def settings(activation="relu", row_weight="max", dropout_p=0.0):
    seed = torch.tensor(-(2**40) - 7) if dropout_p else None
    return seed, activation, row_weight, dropout_p


def expected(inputs, grad, seed, activation, row_weight, dropout_p):
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    options = {"activation": activation, "row_weight": row_weight, "dropout_p": dropout_p, "seed": seed}
    output = reference(*wide, **options)
    return output.detach(), torch.autograd.grad(output, wide, grad.double())


def errors(kernels, inputs, grad, *options):
    """By result: its error in units of what is allowed."""
    tolerance = TOLERANCES[inputs[0].dtype]
    output, gradients = expected(inputs, grad, *options)
    found = {"forward": relative_error(kernels.prompt_diffusion(*inputs, *options), output) / tolerance}
    results = kernels.prompt_diffusion_backward(grad, *inputs, *options, ALL)
    for name, result, right in zip(NAMES[:4], results, gradients, strict=False):
        zero = right.abs().max() < 1e-9  # softmax over one prompt is constant: what is left is rounding
        found[name] = (result.abs().max().item() if zero else relative_error(result, right)) / tolerance
    # The gradient of log_scale is sum(grad * output), whose terms may cancel; their norm is its natural size.
    size = torch.maximum(gradients[4].abs(), (grad.double() * output).norm())
    found["log_scale"] = ((results[4] - gradients[4]).abs() / size).item() / tolerance
    return found


def assert_matches(kernels, inputs, grad, *options):
    found = errors(kernels, inputs, grad, *options)
    assert all(error < 1 for error in found.values()), found


# ---- Right results ----


@pytest.mark.parametrize("dtype, weight_dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("row_weight", ["max", "none"])
@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_every_setting(kernels, activation, row_weight, dropout_p, dtype, weight_dtype):
    inputs, grad = make_inputs(2, 37, 80, 33, dtype, weight_dtype)
    assert_matches(kernels, inputs, grad, *settings(activation, row_weight, dropout_p))


SIZES = [  # batch, rows, width, prompts, multiprocessors: every layout, every tail, more row tiles than blocks
    (1, 1, 1, 1, 2),
    (3, 5, 5, 3, 2),
    (2, 90, 64, 16, 1),  # Wide16
    (1, 149, 130, 17, 1),  # Wide64, Both64
    (1, 150, 65, 200, 1),  # Tall208, Both208
    (1, 70, 328, 208, 1),
    (1, 70, 72, 256, 1),  # Wide256
    (1, 90, 72, 500, 1),  # Wide256 and Both208 in blocks
    (3, 7, 33, 64, 4),  # Small64
    (2, 16, 328, 200, 4),  # Small256
    (1, 13, 65, 1024, 4),  # Small256 in blocks
    (1, 1, 768, 200, 4),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ragged_sizes(kernels, size, dtype):
    *shape, multiprocessors = size
    kernels.configure(multiprocessors=multiprocessors)
    for activation in ("relu", "softmax"):
        assert_matches(kernels, *make_inputs(*shape, dtype), *settings(activation, dropout_p=0.1))


@pytest.mark.parametrize("dtype, prompts", [(F32, 200), (F32, 768), (BF16, 200), (BF16, 1024), (F16, 1024)])
def test_little_shared_memory(kernels, prompts, dtype):
    """As many prompts as backends/cuda.py promises on the smallest chips."""
    kernels.configure(shared_bytes=SMALL)
    assert_matches(kernels, *make_inputs(1, 50, 48, prompts, dtype), *settings("softmax"))


BUDGETS = json.loads((Path(__file__).parent / "kernel_budgets.json").read_text())["prompt_diffusion"]["cuda"][
    "shared_memory"
]


@pytest.mark.parametrize("case", BUDGETS)
def test_shared_memory_within_budget(built, case):
    """Dynamic shared memory, which ptxas does not see: what the launches ask for, many rows or few."""
    built.configure(**ORDERS["forward"], **H100)
    element, prompts, rows = re.fullmatch(r"(\w+) p=(\d+) (many|few) rows", case).groups()
    dtype = {"fp32": F32, "bf16": BF16, "fp16": F16}[element]
    inputs, grad = make_inputs(1, 33 if rows == "many" else 3, 16, int(prompts), dtype)
    used = {}
    for direction, call in {
        "forward": lambda: built.prompt_diffusion(*inputs, *settings()),
        "backward": lambda: built.prompt_diffusion_backward(grad, *inputs, *settings(), ALL),
    }.items():
        built.configure(most_shared_bytes=0)
        call()
        used[direction] = built.settings.most_shared_bytes
    assert all(0 < used[direction] <= BUDGETS[case][direction] for direction in used), used


def test_too_little_shared_memory_is_an_error(kernels):
    kernels.configure(shared_bytes=16 << 10)
    inputs, grad = make_inputs(1, 5, 48, 200)
    with pytest.raises(RuntimeError, match="too little shared memory"):
        kernels.prompt_diffusion(*inputs, *settings())
    with pytest.raises(RuntimeError, match="too little shared memory"):
        kernels.prompt_diffusion_backward(grad, *inputs, *settings(), ALL)


def between_nans(tensor):
    """The tensor as the middle of a wider and longer one that is NaN elsewhere."""
    wide = torch.full((tensor.shape[0] * 2, tensor.shape[1] + 3, tensor.shape[2] + 8), torch.nan, dtype=tensor.dtype)
    view = wide[::2, 1:-2, 8:]
    return view.copy_(tensor)


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
    (hidden, source, *weights), grad = make_inputs(3, 29, 40, 19, dtype)
    hidden, source, grad = view(hidden), view(source), view(grad)
    weights[0] = between_nans(weights[0][None])[0]
    options = settings(dropout_p=0.2)
    copies = [tensor.contiguous() for tensor in (hidden, source, *weights)]
    output = kernels.prompt_diffusion(hidden, source, *weights, *options)
    assert torch.equal(output, kernels.prompt_diffusion(*copies, *options))
    strided = kernels.prompt_diffusion_backward(grad, hidden, source, *weights, *options, ALL)
    plain = kernels.prompt_diffusion_backward(grad.contiguous(), *copies, *options, ALL)
    for name, a, b in zip(NAMES, strided, plain, strict=True):
        if name == "log_scale":  # summed in another order where rows are not aligned
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(a, b), name


def test_offsets_beyond_2_to_the_31(kernels, tmp_path):
    (hidden, source, *weights), _ = make_inputs(2, 3, 8, 4, F32)
    stride = 2**31 + 64
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + 64, dtype=F32)  # a file of holes
    far = storage.as_strided(source.shape, (stride, 8, 1)).copy_(source)
    output = kernels.prompt_diffusion(hidden, far, *weights, *settings())
    assert torch.equal(output, kernels.prompt_diffusion(hidden, source, *weights, *settings()))


@pytest.mark.parametrize("weight_dtype", [BF16, F32])
@pytest.mark.parametrize("number", range(32))
def test_unwanted_gradients_are_not_computed_and_change_nothing(kernels, number, weight_dtype):
    needs = [bool(number >> i & 1) for i in range(5)]
    inputs, grad = make_inputs(2, 23, 24, 18, BF16, weight_dtype)
    options = settings(dropout_p=0.2)
    everything = kernels.prompt_diffusion_backward(grad, *inputs, *options, ALL)
    hidden = inputs[0] if needs[4] else None
    some = kernels.prompt_diffusion_backward(grad, hidden, *inputs[1:], *options, needs)
    for needed, result, right in zip(needs, some, everything, strict=True):
        assert torch.equal(result, right) if needed else result is None


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_nan_stays_in_its_row(kernels, activation, dtype):
    inputs, grad = make_inputs(1, 31, 40, 17, dtype)
    options = settings(activation)
    clean = kernels.prompt_diffusion(*inputs, *options)
    inputs[1][0, 5, 3] = float("nan")
    output = kernels.prompt_diffusion(*inputs, *options)
    assert output[0, 5].isnan().all()
    others = [i for i in range(31) if i != 5]
    assert torch.equal(output[0, others], clean[0, others])
    _, source, prompts, keys, _ = kernels.prompt_diffusion_backward(grad, *inputs, *options, ALL)
    assert source[0, 5].isnan().all() and source[0, others].isfinite().all()
    assert prompts.isnan().all() and keys.isnan().all()


def test_large_scores_do_not_overflow_the_softmax(kernels):
    inputs, grad = make_inputs(1, 9, 32, 300, F32)
    inputs[1] *= 300
    assert_matches(kernels, inputs, grad, *settings("softmax"))


@pytest.mark.parametrize("factor", [2.0**-14, 2.0**10])
def test_fp16_gradients_of_any_size_keep_their_precision(kernels, factor):
    """The coefficients of dX, dP and dK would underflow or overflow in fp16 if they were not scaled."""
    inputs, grad = make_inputs(1, 40, 64, 24, F16, F32)
    options = settings(dropout_p=0.1)
    inputs[4] = torch.tensor(-4.0)
    _, gradients = expected(inputs, grad * factor, *options)
    results = kernels.prompt_diffusion_backward(grad * factor, *inputs, *options, ALL)
    for name, result, right in list(zip(NAMES, results, gradients, strict=True))[2:]:
        assert relative_error(result, right) < TOLERANCES[F16], name


def test_order_of_threads_does_not_show(built):
    """A result that depends on it is a race."""
    results = []
    for order in ORDERS.values():
        built.configure(**H100, **order)
        inputs, grad = make_inputs(2, 50, 96, 100)
        options = settings("softmax", dropout_p=0.2)
        backward = built.prompt_diffusion_backward(grad, *inputs, *options, ALL)
        results.append([built.prompt_diffusion(*inputs, *options), *backward])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- Planted bugs: what they would do to a GPU, the emulator must show ----

FORWARD, BACKWARD, TILE = "prompt_diffusion_forward.cuh", "prompt_diffusion_backward.cuh", "tile.cuh"
PLANTED = {
    "removed_barrier_before_a_stage_is_read": (
        FORWARD,
        "    ptx::copy_wait<L::STAGES - 2>();\n    __syncthreads();\n",
        "    ptx::copy_wait<L::STAGES - 2>();\n",
    ),
    "removed_wait_for_a_copy": (FORWARD, "    ptx::copy_wait<L::STAGES - 2>();\n", ""),
    "off_by_one_tile": (
        BACKWARD,
        "for (int64_t row = begin; row < end; row += SPLIT_STEP)",
        "for (int64_t row = begin; row + SPLIT_STEP < end; row += SPLIT_STEP)",
    ),
    "missing_mask_of_absent_prompts": (
        FORWARD,
        "      hide_absent_prompts<L>(problem, scores, first_prompt, place);\n",
        "",
    ),
    "swapped_fragment": (
        TILE,
        "lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);\n    right[n] = {parts[0], parts[1]};",
        "lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);\n    right[n] = {parts[1], parts[0]};",
    ),
    "barrier_that_only_some_warps_reach": (
        FORWARD,
        "    if (problem.softmax && blocks > 1) align_shifts",
        "    if (threadIdx.x < 32) __syncthreads();\n    if (problem.softmax && blocks > 1) align_shifts",
    ),
    "store_beyond_the_last_row": (
        TILE,
        "const int left = first_row + row < rows ? width - first_column - column : 0;",
        "const int left = first_row + row <= rows ? width - first_column - column : 0;",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_caught(name):
    broken = harness.Backend("prompt_diffusion", harness.build_planted("prompt_diffusion", *PLANTED[name]))
    assert any(shows_a_bug(broken, order) for order in ORDERS.values())


def test_no_bug_is_seen_where_none_is_planted(built):
    assert not any(shows_a_bug(built, order) for order in ORDERS.values())


def shows_a_bug(kernels, order):
    """Whether the emulator stops, something is written out of bounds, or a result is wrong."""
    kernels.configure(**H100, **order)
    inputs, grad = make_inputs(2, 71, 80, 33)
    try:
        found = errors(kernels, inputs, grad, *settings("softmax"))
    except (RuntimeError, AssertionError):
        return True
    return not all(error < 1 for error in found.values())


def test_planted_barrier_bug_is_named(built):
    """What a divergent barrier is reported as: a person must find it from the message."""
    name = "barrier_that_only_some_warps_reach"
    broken = harness.Backend("prompt_diffusion", harness.build_planted("prompt_diffusion", *PLANTED[name]))
    broken.configure(**H100, **ORDERS["forward"])
    inputs, _ = make_inputs(2, 71, 80, 33)
    with pytest.raises(RuntimeError, match="diverge"):
        broken.prompt_diffusion(*inputs, *settings())
