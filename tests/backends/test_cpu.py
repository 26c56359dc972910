"""The C++ backend: what is its own beside the contract (test_every_backend.py), on every instruction set here."""

import os
import subprocess
import sys
from dataclasses import replace

import backend_proof as proof
import pytest
import torch
from backend_proof import BF16, DTYPES, F16, F32, LEVELS, assert_matches, build, changed, results, same_bits

from fast_prompt import ops, reference
from fast_prompt.backends import BackendError, cpu, native, use_backend
from fast_prompt.backends.call import Call
from fast_prompt.ops.declaration import OPS, Option
from fast_prompt.parity.problem import evaluate
from fast_prompt.parity.prompt_compress import Case as CompressCase
from fast_prompt.parity.prompt_diffusion import Case as DiffusionCase
from fast_prompt.parity.skip_adapter import Case as SkipCase
from fast_prompt.reference.prompt_diffusion import ACTIVATIONS, ROW_WEIGHTS
from fast_prompt.reference.skip_adapter import ACTIVATIONS as SKIP_ACTIVATIONS
from fast_prompt.reference.skip_adapter import NORMS, RESIDUALS
from fast_prompt.tolerances import TOLERANCES, relative_error

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.usefixtures("poisoned_memory", "cpu_restored"),
]


def names(cases):
    return [f"{op} {number}" for number, (op, _) in enumerate(cases)]


# ---- Sizes: every end of a register, a panel, a block, a group and a tile ----

SIZES = [
    *(
        ("prompt_diffusion", DiffusionCase("", rows, width, prompts, dropout_p=0.1))
        for rows, width, prompts in (
            ((1, 1), 1, 1),
            ((3, 5), 5, 3),
            ((2, 17), 16, 4),
            ((1, 131), 48, 16),
            ((2, 65), 65, 17),
            ((1, 149), 768, 33),
            ((3, 7), 768, 200),
            ((1, 13), 65, 1024),
            ((1, 1), 768, 200),
        )
    ),
    *(
        ("prompt_compress", CompressCase("", *size, 0.1))
        for size in (
            (2, 3, 2, 1, 5, 7),
            (3, 2, 5, 3, 3, 17),
            (1, 7, 17, 5, 33, 31),
            (70, 1, 3, 2, 8, 32),
            (9, 20, 6, 2, 4, 33),
            (1, 130, 5, 1, 6, 12),
            (1, 1, 197, 12, 64, 768),
            (2, 5, 50, 12, 64, 512),
        )
    ),
    *(
        ("skip_adapter", SkipCase("", rows, width, hidden))
        for rows, width, hidden in (
            ((1, 2), 2, 3),
            ((2, 3), 15, 17),
            ((1, 11), 16, 16),
            ((3, 16), 33, 31),
            ((1, 49), 65, 33),
            ((2, 97), 47, 5),
            ((1, 13), 4100, 7),
            ((1, 14), 20, 1000),
            ((2, 25), 768, 96),
        )
    ),
    # Mixtures and runs.
    *(
        ("skip_adapter", SkipCase("", (3, 14), 42, 18, norm=norm, experts=experts, groups=groups))
        for norm in ("layer", "layer_after")
        for experts, groups in ((2, 1), (2, 2), (3, 3), (2, 6), (4, 2))
    ),
    *(("skip_adapter", SkipCase("", (2, 53), 40, 12, count, norm=norm)) for count, norm in ((3, "layer"), (2, "none"))),
    # Widths in whole panels: the weights are read where they lie, up to 96 rows (AVX-512) or 48.
    *(
        ("skip_adapter", SkipCase("", (1, count), 96, 64, **form))
        for count in (1, 5, 6, 7, 48, 49, 96, 97)
        for form in (
            {"norm": "layer"},
            {"adapters": 3, "norm": "rms", "residual": "normed", "activation": "silu", "dropout_p": 0.25},
            {"norm": "none", "residual": "none", "without": ("down_bias", "up_bias", "scale")},
        )
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), SIZES, ids=names(SIZES))
def test_sizes(level, op, case, dtype):
    assert_matches(op, case, dtype, "cpu")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("count", range(1, 27))
def test_any_number_of_rows(count, dtype):
    assert_matches("prompt_compress", CompressCase("", 2, count, 19, 3, 16, 96), dtype, "cpu")
    assert_matches("skip_adapter", SkipCase("", (1, count), 40, 12), dtype, "cpu")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_large_results_go_past_the_cache_whole(level, dtype):
    """Large enough for streaming stores, with a width that leaves the rows unaligned, and one that does not."""
    for rows, width, hidden in (((3, 1100), 500, 3), ((3, 1100), 512, 3), ((1, 48), 12288, 32)):
        case = SkipCase("", rows, width, hidden, trained=("x", "up_bias"))
        assert_matches("skip_adapter", case, dtype, "cpu")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_weights_within_larger_ones(level, dtype):
    problem = build("skip_adapter", SkipCase("", (2, 3), 64, 32, 2), dtype)
    within = {}
    for name in ("x", "down_weight", "up_weight"):
        tensor = problem.tensors[name]
        whole = torch.full((*tensor.shape[:-1], 103), torch.nan, dtype=dtype)
        whole[..., 3 : 3 + tensor.shape[-1]] = tensor
        within[name] = whole[..., 3 : 3 + tensor.shape[-1]]
    assert_matches("skip_adapter", changed(problem, **within), dtype, "cpu")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("width", [32, 37, 768])
def test_nothing_beyond_the_ends_is_read(level, width, dtype):
    """Every input lies between NaNs; the results are those of tensors that do not."""
    for op, case in (
        ("prompt_diffusion", DiffusionCase("", (2, 7), width, 5)),
        ("prompt_compress", CompressCase("", 2, 3, 7, 2, 5, width, 0.1)),
        ("skip_adapter", SkipCase("", (2, 7), width, 5)),
        ("skip_adapter", SkipCase("", (2, 7), width, 5, experts=1)),
    ):
        problem = build(op, case, dtype)
        apart = {name: proof.fenced(tensor) for name, tensor in problem.tensors.items()}
        found = results(op, changed(problem, **apart, grad=proof.fenced(problem.grad)), "cpu")
        assert same_bits(found, results(op, problem, "cpu")), op


# ---- Threads ----

SHARED = [  # what a thread would have: too little, not evenly, several tiles or groups; samples told apart
    ("prompt_diffusion", DiffusionCase("", (2, 333), 64, 40)),
    ("prompt_diffusion", DiffusionCase("", (3, 301), 64, 40, "softmax", dropout_p=0.1)),
    *(
        ("prompt_compress", CompressCase("", *size, 16, 768, 0.1))
        for size in ((1, 1, 197, 12), (1, 5, 70, 4), (3, 2, 33, 4), (4, 3, 20, 4), (7, 40, 9, 2), (130, 1, 5, 2))
    ),
    ("skip_adapter", SkipCase("", (1, 5), 16, 4)),
    ("skip_adapter", SkipCase("", (3, 67), 64, 20)),
    ("skip_adapter", SkipCase("", (2, 301), 96, 24)),
    ("skip_adapter", SkipCase("", (3, 60), 64, 20, 3)),
    ("skip_adapter", SkipCase("", (5, 40), 64, 20, 2, route=(0, -1, 1, 1, 0))),
    ("skip_adapter", SkipCase("", (3, 77), 64, 20, experts=2, groups=2)),
]
ROWS = ("forward", "hidden", "source", "x", "kept")  # which do not depend on the number of threads


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("op", "case"), SHARED, ids=names(SHARED))
def test_threads(level, op, case, dtype):
    """Rows do not depend on the number of threads, and nothing of prompt_compress; sums do, as rounding does."""
    problem = build(op, case, dtype)
    right = evaluate(OPS[op].definition, problem.double())
    first = None
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = results(op, problem, "cpu")
        assert same_bits(results(op, problem, "cpu"), found)
        first = first or found
        alike = found if op == "prompt_compress" else [name for name in found if name in ROWS]
        assert same_bits({name: found[name] for name in alike}, {name: first[name] for name in alike})
        assert all(relative_error(found[name], right[name]) < TOLERANCES[dtype] for name in found)


# ---- Numbers at their ends ----


def test_infinite_scores_do_not_poison_the_padding(level):
    """An infinity times the zeros that pad p = 3 would be NaN."""
    problem = build("prompt_diffusion", DiffusionCase("", (1, 4), 16, 3), BF16)
    tensors = {name: problem.tensors[name].abs() for name in ("prompts", "keys")}
    tensors["source"] = problem.tensors["source"].clone()
    tensors["source"][0, 2] = float("inf")
    with proof.on("cpu"):
        output = ops.prompt_diffusion(**(problem.tensors | tensors))
    assert (output[0, 2] == float("inf")).all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_extreme_values_round_as_torch_rounds(level, dtype):
    """With zero prompts the output is hidden itself, converted up and down: every bit pattern must survive."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    if dtype == BF16:  # the bf16 instructions take subnormal numbers for zero
        patterns = patterns[~(patterns.abs() < torch.finfo(dtype).tiny) | (patterns == 0)]
    hidden = patterns[: len(patterns) // 16 * 16].view(1, -1, 16)
    zeros = torch.zeros(1, 16, dtype=dtype)
    for scale in (0.0, 0.1):  # with 0.1 results fall between two numbers of the format, or beyond its largest
        log_scale = torch.tensor(scale)
        with proof.on("cpu"):
            output = ops.prompt_diffusion(hidden, torch.zeros_like(hidden), zeros, zeros, log_scale)
        right = (hidden.float() * log_scale.exp()).to(dtype)
        torch.testing.assert_close(output, right, rtol=0, atol=0, equal_nan=True)


def test_large_scores_of_tokens_do_not_overflow_the_softmax(level):
    problem = build("prompt_compress", CompressCase("", 2, 3, 9, 2, 16, 64))
    query, visual, weight = (problem.tensors[name].round() for name in ("query", "visual", "key_weight"))
    visual[..., 0], weight[:, 0] = 64, 1  # the same large number for every token
    problem = changed(problem, query=query.abs(), visual=visual, key_weight=weight)
    found = results("prompt_compress", problem, "cpu")
    right = evaluate(reference.prompt_compress, problem.double())
    assert relative_error(found["forward"], right["forward"]) < TOLERANCES[F32]
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("size", [2.0**18, 2.0**-18])
def test_a_hidden_layer_beyond_float16_has_its_gradients(level, size, adapters):
    """All that is stored as float16 is of ordinary size; what the hidden layer is made of and goes into is float32."""
    case = SkipCase("", (2, 9), 48, 12, adapters, without=("down_bias", "scale"), wide_weights=True)
    problem = build("skip_adapter", case, F16)
    tensors = problem.tensors
    sized = {"down_weight": tensors["down_weight"] * size, "up_weight": tensors["up_weight"] / size}
    assert_matches("skip_adapter", changed(problem, **sized, norm_bias=tensors["norm_bias"] / 4), F16, "cpu")


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_normed_residual_is_added_before_it_is_rounded(level, dtype, norm):
    """Where x and its norm nearly cancel, a norm of half precision would be all that is seen."""
    x = torch.randn((2, 9, 48), generator=torch.Generator().manual_seed(0)).to(dtype)
    zeros, minus = torch.zeros(12, 48, dtype=dtype), torch.full((48,), -1.0, dtype=dtype)
    arguments = {"x": x, "down_weight": zeros, "up_weight": zeros.t(), "norm_weight": minus}
    options = {"norm": norm, "residual": "normed"}
    right = reference.skip_adapter(**{name: value.double() for name, value in arguments.items()}, **options)
    with use_backend("cpu"):
        found = ops.skip_adapter(**arguments, **options)
    torch.testing.assert_close(found.double(), right, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_over_their_whole_range(level, activation):
    """One hidden column that is the input itself: from where nothing is let through to where everything is."""
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.linspace(-4, 4, 4001)]).view(1, -1, 1).requires_grad_()
    with proof.on("cpu"):
        output = ops.skip_adapter(x, torch.ones(1, 1), torch.ones(1, 1), activation=activation, residual="none")
        (grad,) = torch.autograd.grad(output.sum(), x)
    wide = x.detach().double().requires_grad_()
    function = {"relu": torch.relu, "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[activation]
    right = function(wide)
    (right_grad,) = torch.autograd.grad(right.sum(), wide)
    near = (x.abs() <= 4) & (x != 0)  # relative to the largest there is, an error near 0 would not show
    assert relative_error(output, right) < TOLERANCES[F32]
    assert relative_error(output[near], right[near]) < TOLERANCES[F32]
    assert relative_error(grad[x != 0], right_grad[x != 0]) < TOLERANCES[F32]


# ---- Instruction sets ----


@pytest.mark.parametrize(
    ("op", "case", "what"),
    [
        ("prompt_diffusion", DiffusionCase("", (1, 60), 768, 48, "softmax"), "source"),
        ("prompt_compress", CompressCase("", 2, 2, 60, 3, 64, 768), "forward"),
        ("skip_adapter", SkipCase("", (2, 60), 768, 48), "forward"),
    ],
    ids=list(OPS),
)
def test_each_level_runs_code_of_its_own(op, case, what):
    """Register widths and bf16 products change the order or the rounding of sums, so bits tell levels apart."""

    def fingerprint(name):
        cpu.select_isa(name)
        assert cpu.isa() == name
        return tuple(results(op, build(op, case, dtype), "cpu")[what].double().sum().item() for dtype in (F32, BF16))

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


# ---- The library ----


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


def test_other_devices_and_dtypes_are_refused_by_name():
    call = Call(torch.device("cuda"), F32, F32, {"width": 8, "adapter_width": 4})
    assert cpu.refuses(call) == "runs on cpu, not on cuda"
    for op in OPS:
        problem = build(op, type(SIZES[0][1])("") if op == "prompt_diffusion" else SMALL[op]).double()
        with use_backend("cpu"), pytest.raises(BackendError, match="not torch.float64"):
            OPS[op].api(**problem.tensors, **problem.options)


# ---- What the registered ops refuse, whoever calls them: wrong sizes would read wild memory ----

SMALL = {
    "prompt_diffusion": DiffusionCase("", (2, 4), 8, 3),
    "prompt_compress": CompressCase("", 2, 3, 4, 2, 4, 8, padding=(1, 0)),
    "skip_adapter": SkipCase("", (2, 3), 8, 4, experts=2),
}


def registered(op, case, direction, **changes):
    """Calls a registered op with an argument changed."""
    declared = OPS[op]
    problem = build(op, case)
    named = declared.arguments_of(**problem.tensors, **problem.options)
    plan = declared.plan(*named.values())
    given = dict.fromkeys(tensor.name for tensor in declared.tensors) | {
        tensor.name: value
        for tensor, value in zip(
            declared.tensors, plan.cast(*(named.get(tensor.name) for tensor in declared.tensors)), strict=True
        )
    }
    given |= dict(zip((option.name for option in declared.options), plan.numbers, strict=True))
    forward = given | {"keep": [True] * len(declared.kept)}
    if direction == "":
        return declared.registered("cpu", "")(*[(forward | changes)[each.name] for each in declared.forward_arguments])
    output, *kept = declared.registered("cpu", "")(*[forward[each.name] for each in declared.forward_arguments])
    given |= dict(zip(declared.kept, kept, strict=True)) | {"output": output, "grad": problem.grad}
    given["needs"] = [given[each.name] is not None for each in declared.differentiable]
    arguments = [(given | changes)[each.name] for each in declared.backward_arguments]
    return declared.registered("cpu", "_backward")(*arguments)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("direction", ["", "_backward"], ids=["forward", "backward"])
@pytest.mark.parametrize("wrong", [torch.zeros(5, 6, 7), torch.zeros(3, 6), torch.zeros(9)], ids=lambda x: str(x.dim()))
def test_a_tensor_of_wrong_sizes(op, direction, wrong):
    registered(op, SMALL[op], direction)
    arguments = OPS[op].backward_arguments if direction else OPS[op].forward_arguments
    unread = ("seed", "kept_samples", "kept", "key_bias")  # without dropout and without a route; it changes nothing
    for argument in arguments:
        if not isinstance(argument, Option) and argument.name not in unread:
            with pytest.raises(RuntimeError):
                registered(op, SMALL[op], direction, **{argument.name: wrong})


@pytest.mark.parametrize(
    ("op", "changes"),
    [
        ("prompt_compress", {"key_padding_mask": torch.zeros(2, 4)}),
        ("prompt_compress", {"num_heads": 3}),
        ("prompt_compress", {"num_heads": 0}),
        *((op, {"dropout_p": 0.5}) for op in OPS),
        ("skip_adapter", {"route": torch.tensor([0, 2]), "gates": None}),
        ("skip_adapter", {"route": torch.tensor([0.0, 1.0]), "gates": None}),
        ("skip_adapter", {"route": torch.tensor([0, 0])}),
        ("skip_adapter", {"scale": torch.ones(3)}),
        ("skip_adapter", {"scale": torch.ones((), dtype=torch.float64)}),
        ("skip_adapter", {"norm_weight": None}),
        ("skip_adapter", {"norm": 0}),
        ("skip_adapter", {"norm": 2}),  # RMS has no bias
        ("skip_adapter", {"norm": 3, "residual": 1}),
        ("skip_adapter", {"down_weight": torch.zeros(4, 8, dtype=torch.bfloat16)}),
        ("skip_adapter", {"keep": []}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_does_not_go_together(op, changes):
    with pytest.raises(RuntimeError):
        registered(op, SMALL[op], "", **changes)


@pytest.mark.parametrize(
    ("op", "name"), [("prompt_compress", name) for name in OPS["prompt_compress"].kept] + [("skip_adapter", "hidden")]
)
def test_what_was_kept_is_checked(op, name):
    found = proof.kept(op, build(op, replace(SMALL[op], **({"tokens": 40} if op == "prompt_compress" else {}))), "cpu")
    kept = found.get(name, torch.zeros(2, 2, 3, 4))
    for wrong in (kept[..., :1], kept.double(), kept.transpose(0, -1).contiguous().transpose(0, -1)):
        with pytest.raises(RuntimeError, match=name):
            registered(op, SMALL[op], "_backward", **{name: wrong})


@pytest.mark.parametrize("op", OPS)
def test_what_is_asked_for_is_checked(op):
    count = len(OPS[op].differentiable)
    for needs in ([True] * (count + 1), [True] * (count - 1)):
        with pytest.raises(RuntimeError, match="needs"):
            registered(op, SMALL[op], "_backward", needs=needs)
    with pytest.raises(RuntimeError, match="needs: there is no argument"):
        registered("skip_adapter", SkipCase("", (2, 3), 8, 4, norm="none"), "_backward", needs=[True] * 9 + [False])


def test_what_is_written_over_is_contiguous():
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.fast_prompt.prompt_diffusion_.default(
            torch.zeros(2, 8, 4).mT, *(torch.zeros(size) for size in ((2, 4, 8), (3, 8), (3, 8), ())), None, 0, 0, 0.0
        )


def test_options_are_those_of_the_definition():
    tables = {
        ("prompt_diffusion", "activation"): ACTIVATIONS,
        ("prompt_diffusion", "row_weight"): ROW_WEIGHTS,
        ("skip_adapter", "norm"): NORMS,
        ("skip_adapter", "activation"): SKIP_ACTIVATIONS,
        ("skip_adapter", "residual"): RESIDUALS,
    }
    for (op, name), table in tables.items():
        (option,) = (option for option in OPS[op].options if option.name == name)
        assert set(option.choices) == set(table)
        registered(op, SMALL[op], "")
        count = len(option.choices)
        with pytest.raises(RuntimeError, match=f"{name}: expected a number from 0 to {count - 1}, got {count}"):
            registered(op, SMALL[op], "", **{name: count})
