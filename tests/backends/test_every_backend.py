"""One contract for every op on every backend: instruction sets, Triton's interpreter, the CUDA kernels emulated."""

import itertools
from dataclasses import replace

import backend_proof as proof
import pytest
import torch
from backend_proof import BF16, DTYPES, F16, F32, build, changed, results, same_bits

from fast_prompt import ops, parity
from fast_prompt.ops.declaration import OPS
from fast_prompt.parity.problem import evaluate
from fast_prompt.parity.prompt_compress import Case as CompressCase
from fast_prompt.parity.prompt_diffusion import Case as DiffusionCase
from fast_prompt.parity.skip_adapter import Case as SkipCase
from fast_prompt.reference.prompt_compress import masked_softmax, split_heads
from fast_prompt.tolerances import TOLERANCES, relative_error

pytestmark = pytest.mark.usefixtures("cpu_restored")
NAMES = {dtype: name for name, dtype in parity.DTYPES.items()}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def backend(request):
    request.param.enter()
    return request.param.backend


on_every = pytest.mark.parametrize("backend", proof.ways(), indirect=True)
every_op = pytest.mark.parametrize("op", OPS)


@on_every
@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
def test_parity(backend, op, dtype):
    """Every case: options, dtypes, ragged sizes, strides, what is trained, NaN in padding, empty inputs.

    Interpreted ones are slow: there each case has one dtype, by turns.
    """
    cases = []
    for number, case in enumerate(parity.cases_of(op).CASES):
        dtypes = [each for each in DTYPES if case.applies_to(each)]
        if dtype in ([dtypes[number % len(dtypes)]] if backend == "triton" and DEVICE == "cpu" else dtypes):
            cases.append(case.name)
    report = parity.run([op], [backend], [NAMES[dtype]], cases)
    assert {row.case for row in report.rows} == set(cases) and not report.raised and not report.refused
    assert [(row.case, row.what, row.error) for row in report.failures] == []


# By op, calls that take every path: dropout, several adapters or tokens, and what they share out.
CALLS = {
    "prompt_diffusion": [
        DiffusionCase("relu", (2, 71), 40, 18, dropout_p=0.25),
        DiffusionCase("softmax", (2, 37), 40, 33, "softmax", dropout_p=0.25, wide_weights=True),
    ],
    "prompt_compress": [
        CompressCase("all kept", 4, 2, 37, 3, 8, 48, 0.25, padding=(0, 5, 37, 12)),
        CompressCase("nothing kept", 3, 20, 21, 4, 16, 64, 0.25),
    ],
    "skip_adapter": [
        SkipCase("run", (2, 21), 48, 12, 2, dropout_p=0.25),
        SkipCase("mixture", (2, 21), 48, 12, experts=2, groups=2, residual="normed"),
        SkipCase("norm after", (2, 21), 48, 12, 2, norm="layer_after", dropout_p=0.25),
        SkipCase("route", (4, 11), 48, 12, 3, route=(2, -1, 0, 2), dropout_p=0.25),
    ],
}
each_call = pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=f"{op}, {case.name}") for op, cases in CALLS.items() for case in cases]
)


@on_every
@each_call
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_unwanted_gradients_are_not_computed_and_change_nothing(backend, op, case, dtype):
    if backend == "triton":  # interpreted, so it gets the smallest
        sizes = {"batch": 2, "tokens": 5} if op == "prompt_compress" else {"rows": (case.rows[0], 5)}
        case, dtype = replace(case, **sizes, **({"padding": None} if op == "prompt_compress" else {})), F32
    problem = build(op, case, dtype, backend)
    every, trained = results(op, problem, backend), problem.trained
    alone = [(name,) for name in trained]
    for some in (*alone, *(tuple(name for name in trained if name != one[0]) for one in alone)):
        found = results(op, replace(problem, trained=some), backend)
        right = {name: every[name] for name in ("forward", *some)}
        if backend == "simt" and op == "skip_adapter":  # rows are split by how many gradients share the kernel
            assert all(relative_error(found[name], right[name].double()) < TOLERANCES[dtype] / 4 for name in right), (
                some
            )
        else:
            assert same_bits(found, right), some


@on_every
@each_call
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
def test_same_bits_twice_and_inputs_left_alone(backend, op, case, dtype):
    problem = build(op, case, dtype, backend)
    before = {name: tensor.clone() for name, tensor in problem.tensors.items()}, problem.grad.clone()
    first = results(op, problem, backend)
    assert same_bits(results(op, problem, backend), first)
    assert same_bits(problem.tensors, before[0]) and torch.equal(problem.grad, before[1])
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (*problem.tensors.values(), problem.grad)}
    made = [value.untyped_storage().data_ptr() for value in first.values()]
    assert not inputs & set(made)


@on_every
@every_op
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_any_strides_give_the_contiguous_result(backend, op, dtype):
    for case in parity.cases_of(op).CASES:
        if case.arrangement == "plain" or getattr(case, "form", "absorbed") != "absorbed" or not case.applies_to(dtype):
            continue
        problem = build(op, case, dtype, backend)
        plain = {name: tensor.contiguous() for name, tensor in problem.tensors.items()}
        found, right = (
            results(op, each, backend)
            for each in (problem, replace(problem, tensors=plain, grad=problem.grad.contiguous()))
        )
        if "log_scale" in found:  # where rows are not aligned it may be summed in another order
            torch.testing.assert_close(found.pop("log_scale"), right.pop("log_scale"), rtol=1e-5, atol=1e-4)
        assert same_bits(found, right), case.name


FAR = {"prompt_diffusion": "source", "prompt_compress": "visual", "skip_adapter": "x"}


@pytest.mark.parametrize("backend", proof.ways("cpu", "simt"), indirect=True)
@every_op
def test_offsets_beyond_2_to_the_31(backend, op, tmp_path):
    case = {"rows": (2, 3)} if op != "prompt_compress" else {"batch": 2, "tokens": 3}
    problem = build(op, type(CALLS[op][0])("", **case))
    far = changed(problem, **{FAR[op]: proof.far_apart(problem.tensors[FAR[op]], tmp_path)})
    assert same_bits(results(op, far, backend), results(op, problem, backend))


# What is made NaN, where, and which results are of its row or sample alone.
SPOILT = {
    "prompt_diffusion": ("source", (0, 5, 3), ("forward", "source")),
    "prompt_compress": ("visual", (1, 5, 3), ("forward", "query", "visual")),
    "skip_adapter": ("x", (1, 5, 3), ("forward", "x")),
}
SPOILT_CASES = [
    *(
        ("prompt_diffusion", DiffusionCase(activation, (1, 31), 40, 17, activation))
        for activation in ("relu", "softmax")
    ),
    ("prompt_compress", CompressCase("", 3, 2, 31, 2, 16, 64)),
    *(("skip_adapter", SkipCase(norm, (2, 31), 64, 20, norm=norm)) for norm in ("none", "layer", "rms", "layer_after")),
    *(("skip_adapter", SkipCase(each, (2, 9), 40, 12, 2, activation=each)) for each in ("silu", "gelu")),
]


@on_every
@pytest.mark.parametrize(("op", "case"), SPOILT_CASES, ids=[f"{op} {case.name}".strip() for op, case in SPOILT_CASES])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
def test_nan_stays_in_its_row(backend, op, case, dtype):
    name, place, own = SPOILT[op]
    problem = build(op, case, dtype, backend)
    clean = results(op, problem, backend)
    spoilt = problem.tensors[name].clone()
    spoilt[place] = torch.nan
    found = results(op, changed(problem, **{name: spoilt}), backend)
    depth = 1 if op == "prompt_compress" else 2  # a sample of its own, or a row
    for result in own:
        others = torch.ones(found[result].shape[:depth], dtype=torch.bool, device=found[result].device)
        others[place[:depth]] = False
        assert torch.equal(found[result][others], clean[result][others]), result
    assert found["forward"][place[:depth]].isnan().all()
    assert all(found[each].isnan().any() for each in ("prompts", "keys", "key_weight", "down_weight") if each in found)


@on_every
def test_large_scores_do_not_overflow_the_softmax(backend):
    """exp of these scores is infinite in float32; as whole numbers the scores themselves have no rounding error."""
    problem = build("prompt_diffusion", DiffusionCase("", (1, 9), 32, 21, "softmax"), F32, backend)
    whole = {"source": (problem.tensors["source"] * 4).round(), "keys": (problem.tensors["keys"] * 32).round()}
    assert (whole["source"] @ whole["keys"].T).max() > 89
    problem = changed(problem, **whole)
    assert proof.errors("prompt_diffusion", problem, backend)["forward"] <= 1
    assert all(value.isfinite().all() for value in results("prompt_diffusion", problem, backend).values())


@on_every
@pytest.mark.parametrize("factor", [2.0**-12, 2.0**8])
@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("prompt_diffusion", DiffusionCase("", (1, 40), 64, 24, dropout_p=0.1, wide_weights=True)),
        ("prompt_compress", CompressCase("", 2, 2, 37, 2, 16, 40, 0.1, wide_weights=True)),
    ],
    ids=["prompt_diffusion", "prompt_compress"],
)
def test_float16_gradients_of_any_size_keep_their_precision(backend, op, case, factor):
    """What they are made of would underflow or overflow in float16 if it were not scaled."""
    problem = build(op, case, F16, backend)
    weights = tuple(name for name in problem.trained if problem.tensors[name].dtype == F32 and name != "log_scale")
    found = proof.errors(op, replace(problem, grad=problem.grad * factor, trained=weights), backend)
    assert all(found[name] <= 1 for name in weights), found


@on_every
@pytest.mark.parametrize("p", [24, 300])
def test_activations_beyond_float16s_largest_number(backend, p):
    """ReLU has no bound; what they are multiplied by brings them back."""
    case = DiffusionCase("", (1, 21), 64, p, row_weight="none", trained=("source", "prompts"))
    problem = build("prompt_diffusion", case, F16, backend)
    tensors = problem.tensors
    large = {"source": tensors["source"] * 300, "keys": tensors["keys"] * 300, "prompts": tensors["prompts"] * 2e-5}
    problem = changed(problem, **large)
    assert (large["source"].float() @ large["keys"].float().T).max() > 2 * torch.finfo(F16).max
    assert proof.errors("prompt_diffusion", problem, backend)["forward"] <= 1


@on_every
@pytest.mark.parametrize(("width", "hidden"), [(67, 9), (96, 32)])
@pytest.mark.parametrize("norm", ["layer", "layer_after"])
def test_a_row_of_one_value_is_normed_to_the_norms_bias(backend, norm, width, hidden):
    """Its variance is 0, and 1 / sqrt(eps) times any error in its mean would be no rounding error any more."""
    case = SkipCase("", (2, 9), width, hidden, norm=norm, residual="none", trained=("down_bias",))
    problem = build("skip_adapter", case, F32, backend)
    values = torch.linspace(100, 1000, 18, device=problem.grad.device).sqrt().view(2, 9, 1)
    tensors = {"x": values.expand(2, 9, width)}
    if norm == "layer_after":
        tensors |= {
            name: problem.tensors[name][:1].expand_as(problem.tensors[name]) for name in ("up_weight", "up_bias")
        }
    problem = replace(changed(problem, **tensors), options=problem.options | {"eps": 1e-12})
    assert proof.errors("skip_adapter", problem, backend)["forward"] <= 1


@on_every
@pytest.mark.parametrize("norm", ["none", "layer", "layer_after"])
def test_kept_samples_are_neither_read_nor_counted(backend, norm):
    """Their rows of x and of the gradient hold NaN; what they are given is what comes out."""
    case = SkipCase("", (4, 9), 40, 12, 3, norm=norm, route=(2, -1, 0, -1), dropout_p=0.25)
    problem = build("skip_adapter", case, F32, backend)
    clean, away = results("skip_adapter", problem, backend), torch.tensor([1, 3])
    spoilt = {"x": problem.tensors["x"].clone(), "grad": problem.grad.clone()}
    for tensor in spoilt.values():
        tensor[away] = torch.nan
    found = results("skip_adapter", changed(problem, **spoilt), backend)
    clean["kept"][:] = torch.nan  # its own rows of the gradient
    assert same_bits(found, clean) and torch.equal(found["forward"][away], problem.tensors["kept"])
    assert found["x"][away].eq(0).all() and found["down_weight"][1].eq(0).all()


@on_every
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_what_prompt_compress_keeps_is_what_it_is_called(backend, dtype, dropout_p):
    case = CompressCase("", 4, 1, 61, 2, 16, 50, dropout_p, padding=(0, 5, 61, 12))
    problem = build("prompt_compress", case, dtype, backend)
    found = proof.kept("prompt_compress", problem, backend)
    query, visual, weight = (problem.tensors[name].double() for name in ("query", "visual", "key_weight"))
    mask = problem.options["key_padding_mask"]
    scores = split_heads(query, 2) @ split_heads(visual @ weight.T, 2).mT / 4
    right = masked_softmax(scores, mask)
    sums = scores.masked_fill(mask[:, None, None], -torch.inf).logsumexp(-1)
    assert relative_error(found["logsumexp"], sums) < TOLERANCES[dtype]
    if "probabilities" in found:
        assert relative_error(found["probabilities"], right) < TOLERANCES[dtype]
        assert not found["probabilities"].masked_select(mask[:, None, None]).any()
    if "attended" in found and dropout_p == 0:
        assert relative_error(found["attended"], right @ visual.nan_to_num()[:, None]) < TOLERANCES[dtype]


@on_every
def test_what_prompt_compress_keeps_changes_nothing(backend, monkeypatch):
    case = CompressCase("", 2, 1, 77, 3, 8, 40, 0.25, padding=(77, 20))
    found = []
    for keep in itertools.product((False, True), repeat=2):
        monkeypatch.setattr(OPS["prompt_compress"], "keep", lambda keep=keep, **_: (True, *keep))
        monkeypatch.setattr(OPS["prompt_compress"], "_plans", {})
        proof.assert_matches("prompt_compress", case, F32, backend)
        found.append(results("prompt_compress", build("prompt_compress", case, F32, backend), backend))
    if backend != "triton":  # which sums what it computes again in another order
        assert all(same_bits(each, found[0]) for each in found)


@on_every
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
def test_the_hidden_layer_that_skip_adapter_keeps_is_what_it_is_called(backend, dtype):
    problem = build("skip_adapter", SkipCase("", (2, 30), 64, 20, dropout_p=0.25), dtype, backend)
    (hidden,) = proof.kept("skip_adapter", problem, backend).values()
    x, weight, bias, *norm = (
        problem.tensors[name].double() for name in ("x", "down_weight", "down_bias", "norm_weight", "norm_bias")
    )
    right = torch.nn.functional.linear(torch.nn.functional.layer_norm(x, (64,), *norm), weight, bias)
    assert hidden.shape == (1, 2, 30, 20) and hidden.is_contiguous()
    wide = backend == "cpu" and dtype == F16  # float16 would end before what it is made of does
    assert hidden.dtype == (F32 if wide else dtype) and relative_error(hidden[0], right) < TOLERANCES[dtype]


@on_every
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
@pytest.mark.parametrize("case", CALLS["prompt_diffusion"], ids=lambda case: case.name)
def test_a_result_written_over_its_input_has_the_same_bits(backend, case, dtype):
    problem = build("prompt_diffusion", case, dtype, backend)
    right = results("prompt_diffusion", problem, backend)
    leaves = problem.leaves()
    hidden = leaves["hidden"].clone()  # as a site's linear layer makes it: no leaf, of no other use
    with proof.on(backend):
        output = ops.prompt_diffusion(**(leaves | {"hidden": hidden}), **problem.options, inplace=True)
        gradients = torch.autograd.grad(output, [leaves[name] for name in problem.trained], problem.grad)
    assert output.data_ptr() == hidden.data_ptr()
    assert same_bits({"forward": output.detach(), **dict(zip(problem.trained, gradients, strict=True))}, right)
    with proof.on(backend), torch.no_grad():
        whole = problem.tensors | {"hidden": problem.tensors["hidden"].clone()}
        assert torch.equal(ops.prompt_diffusion(**whole, **problem.options, inplace=True), right["forward"])
        apart = whole | {"hidden": problem.tensors["hidden"].mT.contiguous().mT}
        assert torch.equal(ops.prompt_diffusion(**apart, **problem.options, inplace=True), right["forward"])


@pytest.mark.parametrize("backend", proof.ways("cpu"), indirect=True)
@each_call
@pytest.mark.parametrize("dtype", [F32, F16], ids=["fp32", "fp16"])
def test_opcheck(backend, op, case, dtype):
    """Schemas, fake tensors and autograd of the registered ops, on the very calls that the API makes of them."""
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function).startswith("fast_prompt."):
                seen.append((function, [a.detach() if isinstance(a, torch.Tensor) else a for a in args]))
            return function(*args, **(kwargs or {}))

    problem = build(op, case, dtype)
    with Record(), proof.on(backend):
        evaluate(OPS[op].api, problem)
    assert [function.name() for function, _ in seen] == [f"fast_prompt::{op}", f"fast_prompt::{op}_backward"]
    for function, call in seen:
        torch.library.opcheck(function, call)
