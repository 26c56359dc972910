"""The C++ backend against the float64 reference, on every instruction set this machine has."""

import os
import subprocess
import sys

import pytest
import torch

from fast_prompt.backends import cpu, native
from fast_prompt.reference import prompt_diffusion as reference
from fast_prompt.reference.prompt_diffusion import ACTIVATIONS, ROW_WEIGHTS
from fast_prompt.reference.skip_adapter import ACTIVATIONS as SKIP_ACTIVATIONS
from fast_prompt.reference.skip_adapter import NORMS, RESIDUALS
from fast_prompt.tolerances import TOLERANCES, relative_error

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.usefixtures("poisoned_memory", "cpu_restored"),
]
LEVELS = [] if cpu.unavailable() else cpu.isa_levels()
NAMES = ("hidden", "source", "prompts", "keys", "log_scale")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]  # activations, weights
ALL = [True] * 5


def make_inputs(batch, rows, width, prompts, dtype=F32, weight_dtype=None):
    """Five inputs and a gradient; scores of order one, and a diffusion term of the size of hidden."""
    random = torch.Generator().manual_seed(batch + rows + width + prompts)
    weight_dtype = weight_dtype or dtype

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=random) * scale

    hidden, source, grad = (normal(batch, rows, width).to(dtype) for _ in range(3))
    prompt, key = (normal(prompts, width, scale=width**-0.5).to(weight_dtype) for _ in range(2))
    return [hidden, source, prompt, key, torch.tensor(0.3)], grad


def settings(activation="relu", row_weight="max", dropout_p=0.0):
    seed = torch.tensor(-(2**40) - 7) if dropout_p else None
    return seed, activation, row_weight, dropout_p


def expected(inputs, grad, seed, activation, row_weight, dropout_p):
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    options = {"activation": activation, "row_weight": row_weight, "dropout_p": dropout_p, "seed": seed}
    output = reference(*wide, **options)
    return output.detach(), torch.autograd.grad(output, wide, grad.double())


def assert_matches(inputs, grad, *options):
    tolerance = TOLERANCES[inputs[0].dtype]
    output, gradients = expected(inputs, grad, *options)
    actual = cpu.prompt_diffusion(*inputs, *options)
    assert actual.dtype == inputs[0].dtype and actual.is_contiguous()
    assert relative_error(actual, output) < tolerance
    results = cpu.prompt_diffusion_backward(grad, *inputs, *options, ALL)
    for name, tensor, result, right in zip(NAMES, inputs, results, gradients, strict=True):
        assert result.dtype == tensor.dtype and result.shape == tensor.shape and result.is_contiguous()
        if right.abs().max() < 1e-9:  # softmax over one prompt is constant: what is left is rounding
            assert result.abs().max() < tolerance, name
        else:
            assert relative_error(result, right) < tolerance, name


@pytest.mark.parametrize("dtype, weight_dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("row_weight", ["max", "none"])
@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_every_setting(level, activation, row_weight, dropout_p, dtype, weight_dtype):
    inputs, grad = make_inputs(2, 71, 80, 33, dtype, weight_dtype)
    assert_matches(inputs, grad, *settings(activation, row_weight, dropout_p))


SIZES = [  # batch, rows, width, prompts: every prompt count and width that ends a register or a panel differently
    (1, 1, 1, 1),
    (3, 5, 5, 3),
    (2, 17, 16, 4),
    (1, 131, 48, 16),
    (2, 65, 65, 17),
    (1, 149, 768, 33),
    (3, 7, 768, 200),
    (1, 13, 65, 1024),
    (1, 1, 768, 200),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ragged_sizes(level, size, dtype):
    assert_matches(*make_inputs(*size, dtype), *settings(dropout_p=0.1))


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
    (hidden, source, *weights), grad = make_inputs(3, 29, 40, 19, dtype)
    hidden, source, grad = view(hidden), view(source), view(grad)
    weights[0] = weights[0].t().contiguous().t()
    options = settings(dropout_p=0.2)
    copies = [tensor.contiguous() for tensor in (hidden, source, *weights)]
    assert torch.equal(
        cpu.prompt_diffusion(hidden, source, *weights, *options), cpu.prompt_diffusion(*copies, *options)
    )
    strided = cpu.prompt_diffusion_backward(grad, hidden, source, *weights, *options, ALL)
    plain = cpu.prompt_diffusion_backward(grad.contiguous(), *copies, *options, ALL)
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


def test_offsets_beyond_2_to_the_31(tmp_path):
    (hidden, source, *weights), _ = make_inputs(2, 3, 8, 4)
    stride = 2**31 + 64
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + 64, dtype=F32)  # a file of holes
    far = storage.as_strided(source.shape, (stride, 8, 1)).copy_(source)
    options = settings()
    assert torch.equal(
        cpu.prompt_diffusion(hidden, far, *weights, *options),
        cpu.prompt_diffusion(hidden, source, *weights, *options),
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("number", range(32))
def test_unwanted_gradients_are_not_computed_and_change_nothing(number, dtype):
    needs = [bool(number >> i & 1) for i in range(5)]
    inputs, grad = make_inputs(2, 23, 24, 18, dtype)
    options = settings(dropout_p=0.2)
    everything = cpu.prompt_diffusion_backward(grad, *inputs, *options, ALL)
    hidden = inputs[0] if needs[4] else None
    some = cpu.prompt_diffusion_backward(grad, hidden, *inputs[1:], *options, needs)
    for needed, result, right in zip(needs, some, everything, strict=True):
        assert torch.equal(result, right) if needed else result is None


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_bits_every_time(level, dtype, threads):
    torch.set_num_threads(threads)
    inputs, grad = make_inputs(3, 301, 64, 40, dtype)
    options = settings("softmax", dropout_p=0.1)
    assert_matches(inputs, grad, *options)
    first = (cpu.prompt_diffusion(*inputs, *options), *cpu.prompt_diffusion_backward(grad, *inputs, *options, ALL))
    again = (cpu.prompt_diffusion(*inputs, *options), *cpu.prompt_diffusion_backward(grad, *inputs, *options, ALL))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_do_not_depend_on_the_thread_count():
    inputs, grad = make_inputs(2, 333, 64, 40)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        gradients = cpu.prompt_diffusion_backward(grad, *inputs, *settings(), ALL)
        results.append((cpu.prompt_diffusion(*inputs, *settings()), *gradients[:2]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inputs_and_gradient_are_left_alone(level):
    inputs, grad = make_inputs(2, 33, 40, 17)
    before = [tensor.clone() for tensor in (*inputs, grad)]
    cpu.prompt_diffusion(*inputs, *settings(dropout_p=0.5))
    cpu.prompt_diffusion_backward(grad, *inputs, *settings(dropout_p=0.5), ALL)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, grad), before, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_nan_stays_in_its_row(level, activation, dtype):
    inputs, grad = make_inputs(1, 31, 40, 17, dtype)
    options = settings(activation)
    clean = cpu.prompt_diffusion(*inputs, *options)
    inputs[1][0, 5, 3] = float("nan")
    output = cpu.prompt_diffusion(*inputs, *options)
    assert output[0, 5].isnan().all()
    others = [i for i in range(31) if i != 5]
    assert torch.equal(output[0, others], clean[0, others])
    _, source, prompts, keys, _ = cpu.prompt_diffusion_backward(grad, *inputs, *options, ALL)
    assert source[0, 5].isnan().all() and source[0, others].isfinite().all()
    assert prompts.isnan().all() and keys.isnan().all()


def test_infinite_scores_do_not_poison_the_padding(level):
    """An infinity times the zeros that pad p = 3 would be NaN."""
    inputs, _ = make_inputs(1, 4, 16, 3, BF16)
    inputs[1][0, 2] = float("inf")
    inputs[2].abs_()
    inputs[3].abs_()
    assert (cpu.prompt_diffusion(*inputs, *settings())[0, 2] == float("inf")).all()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_extreme_values_round_as_torch_rounds(level, dtype):
    """With zero prompts the output is hidden itself, converted up and down: every bit pattern must survive."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    if dtype == BF16:  # the bf16 instructions take subnormal numbers for zero
        patterns = patterns[~(patterns.abs() < torch.finfo(dtype).tiny) | (patterns == 0)]
    hidden = patterns[: len(patterns) // 16 * 16].view(1, -1, 16)
    zeros = torch.zeros(1, 16, dtype=dtype)
    for scale in (0.0, 0.1):  # with 0.1 results fall between two numbers of the format, or beyond its largest
        log_scale = torch.tensor(scale)
        output = cpu.prompt_diffusion(hidden, torch.zeros_like(hidden), zeros, zeros, log_scale, *settings())
        right = (hidden.float() * log_scale.exp()).to(dtype)
        torch.testing.assert_close(output, right, rtol=0, atol=0, equal_nan=True)


def test_large_scores_do_not_overflow_the_softmax(level):
    """exp of these scores is infinite in float32; as whole numbers the scores themselves have no rounding error."""
    inputs, grad = make_inputs(1, 9, 32, 21)
    inputs[1] = (inputs[1] * 4).round()
    inputs[3] = (inputs[3] * 32).round()
    assert (inputs[1] @ inputs[3].T).max() > 89
    assert_matches(inputs, grad, *settings("softmax"))


def test_each_level_runs_code_of_its_own():
    """Register widths and bf16 products change the order or the rounding of sums, so bits tell levels apart."""

    def fingerprint(name):
        cpu.select_isa(name)
        assert cpu.isa() == name
        bits = []
        for dtype in (F32, BF16):
            inputs, grad = make_inputs(1, 60, 768, 48, dtype)
            _, source, *_, log_scale = cpu.prompt_diffusion_backward(grad, *inputs, *settings("softmax"), ALL)
            bits += [log_scale.item(), source.double().sum().item()]
        return tuple(bits)

    assert len({fingerprint(name) for name in LEVELS}) == len(LEVELS)


def run_with_isa(name):
    code = "from fast_prompt.backends import cpu; print(cpu.unavailable() or cpu.isa())"
    environment = os.environ | {"FAST_PROMPT_CPU_ISA": name}
    return subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True)


def test_environment_names_the_level():
    assert run_with_isa(LEVELS[-1]).stdout.strip() == LEVELS[-1] == "portable"


def test_unknown_level_in_the_environment_is_a_reason_not_a_crash():
    message = run_with_isa("sse9").stdout
    assert "sse9" in message and LEVELS[0] in message


def test_unknown_level_is_refused():
    with pytest.raises(RuntimeError, match="sse9"):
        cpu.select_isa("sse9")


def test_library_that_does_not_load_is_a_reason(tmp_path, monkeypatch):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "_LIBRARY", broken)
    reason = native.unavailable.__wrapped__()
    assert "built against torch" in reason and str(broken) in reason


def test_record_of_the_build_is_complete():
    info = native.build_info()
    assert info["built"] and set(LEVELS) <= set(info["instruction_sets"])
    assert all(info[key] for key in ("compiler", "flags", "torch", "stable_abi"))


@pytest.mark.parametrize("index", range(4), ids=NAMES[:4])
def test_native_op_checks_what_it_is_given(index):
    inputs, _ = make_inputs(2, 4, 8, 3)
    inputs[index] = torch.zeros(5, 6, 7) if index < 2 else torch.zeros(3, 6)
    with pytest.raises(RuntimeError):
        cpu.prompt_diffusion(*inputs, *settings())


def test_options_are_those_of_the_definition():
    tables = {
        "prompt_diffusion": (ACTIVATIONS, ROW_WEIGHTS),
        "skip_adapter": (NORMS, SKIP_ACTIVATIONS, RESIDUALS),
    }
    assert {op: [set(values) for values in options.values()] for op, options in native.OPTIONS.items()} == {
        op: [set(table) for table in each] for op, each in tables.items()
    }


@pytest.mark.parametrize(
    ("op", "option"), [(op, option) for op, options in native.OPTIONS.items() for option in options]
)
def test_native_op_refuses_an_option_by_a_number_too_high(op, option, monkeypatch):
    monkeypatch.setitem(native.OPTIONS[op], option, (*native.OPTIONS[op][option], "another"))
    ones = torch.ones(1, 4, 4)
    calls = {
        "prompt_diffusion": lambda **options: cpu.prompt_diffusion(
            ones, ones, ones[0], ones[0], torch.zeros(()), None, dropout_p=0, **options
        ),
        "skip_adapter": lambda **options: cpu.skip_adapter(
            ones.clone(), ones, ones, ones, *(None,) * 8, eps=1e-5, dropout_p=0, keep_hidden=False, **options
        ),
    }
    known = {name: values[0] for name, values in native.OPTIONS[op].items()}
    calls[op](**known)
    most = len(native.OPTIONS[op][option]) - 2
    with pytest.raises(RuntimeError, match=f"{option}: expected a number from 0 to {most}, got {most + 1}"):
        calls[op](**known | {option: "another"})
    with pytest.raises(ValueError, match=f"{option}: expected one of .*, got 'a third'"):
        calls[op](**known | {option: "a third"})
