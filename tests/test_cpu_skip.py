"""``skip_adapter`` in C++ against the float64 reference, on every instruction set this machine has."""

from dataclasses import replace

import pytest
import torch

from fast_prompt import ops, reference
from fast_prompt.backends import BackendError, SkipAdapterCall, cpu, use_backend
from fast_prompt.parity.problem import evaluate
from fast_prompt.parity.skip_adapter import PARAMETERS, Case, draw
from fast_prompt.tolerances import TOLERANCES, relative_error

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.usefixtures("poisoned_memory", "cpu_restored"),
]
LEVELS = [] if cpu.unavailable() else cpu.isa_levels()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DIFFERENTIABLE = ("x", *PARAMETERS, "gates")


def make(case, dtype=F32):
    """A problem whose gradient is partly along what the adapter adds: else that of the scale is a sum to nearly 0.

    A norm behind undoes the scale, and a single gate: their gradients are 0, and not asked for.
    """
    problem = draw(case, dtype)
    wide = problem.double()
    added = evaluate(reference.skip_adapter, wide, backward=False)["forward"] - wide.tensors["x"]
    undone = {"scale", "gates"} if case.experts == 1 else {"scale"}
    untrained = undone if case.norm == "layer_after" else set()
    trained = tuple(name for name in case.trained if name in problem.tensors and name not in untrained)
    return replace(problem, grad=(wide.grad + added).to(dtype), trained=trained)


def assert_matches(problem):
    tolerance = TOLERANCES[problem.tensors["x"].dtype]
    right = evaluate(reference.skip_adapter, problem.double())
    with use_backend("cpu"):
        found = evaluate(ops.skip_adapter, problem)
    for name, value in right.items():
        like = problem.tensors["x" if name == "forward" else name]
        assert found[name].dtype == like.dtype and found[name].is_contiguous(), name
        assert relative_error(found[name], value) < tolerance, name


def arguments(problem):
    """What the backend is given: x to gates, then the route and the seed; and the settings."""
    tensors, options = problem.tensors, problem.options
    stack = tensors["down_weight"].dim() == 2
    parameters = [tensors.get(name) for name in PARAMETERS]
    parameters = [value[None] if stack and value is not None and value.dim() else value for value in parameters]
    if parameters[-1] is not None:
        parameters[-1] = parameters[-1].reshape(-1)
    route = None if options.get("route") is None else torch.tensor(options["route"])
    seed = torch.tensor(options["seed"]) if "seed" in options else None
    settings = (options["norm"], options["activation"], options["residual"], 1e-5, options["dropout_p"])
    return [tensors["x"], *parameters, tensors.get("gates"), route, seed], settings


def run(given, settings, grad, needs=None):
    """Output, hidden layer and gradients, straight from the backend; rows left alone stay NaN."""
    output = torch.full(given[0].shape, torch.nan, dtype=given[0].dtype)
    hidden = cpu.skip_adapter(output, *given, *settings, True)
    needs = [value is not None for value in given[:9]] if needs is None else needs
    return [output, hidden, *cpu.skip_adapter_backward(grad, *given, hidden, *settings, needs)]


def same_bits(found, right):
    """Equal, NaN where there is NaN."""
    pairs = zip(found, right, strict=True)
    return all(
        a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for a, b in pairs
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize(
    "norm, residual",
    [
        (norm, residual)
        for norm in ("none", "layer", "rms", "layer_after")
        for residual in ("input", "normed", "none")
        if residual != "normed" or norm in ("layer", "rms")
    ],
)
def test_every_setting(level, norm, residual, activation, dtype):
    case = Case("", (2, 9), 36, 21, norm=norm, residual=residual, activation=activation, dropout_p=0.25)
    assert_matches(make(case, dtype))


SIZES = [  # rows, d, w: ends of registers, panels, blocks and tiles; widths that leave no room for a full tile
    ((1, 1), 1, 1),
    ((1, 2), 2, 3),
    ((2, 3), 15, 17),
    ((1, 11), 16, 16),
    ((3, 16), 33, 31),
    ((1, 49), 65, 33),
    ((2, 97), 47, 5),
    ((1, 13), 4100, 7),
    ((1, 14), 20, 1000),
    ((2, 25), 768, 96),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rows, width, hidden", SIZES)
def test_ragged_sizes(level, rows, width, hidden, dtype):
    assert_matches(make(Case("", rows, width, hidden, norm="none" if width == 1 else "layer"), dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("count", range(1, 27))
def test_any_number_of_rows(count, dtype):
    assert_matches(make(Case("", (1, count), 40, 12), dtype))


GROUPS = [(1, 1), (2, 1), (2, 2), (3, 3), (2, 6), (4, 2)]  # experts, groups


FEW_ROWS_FORMS = {
    "plain": {"norm": "layer"},
    "run": {"adapters": 3, "norm": "rms", "residual": "normed", "activation": "silu", "dropout_p": 0.25},
    "nothing added": {"norm": "none", "residual": "none", "without": ("down_bias", "up_bias")},
}


@pytest.mark.parametrize("form", FEW_ROWS_FORMS)
@pytest.mark.parametrize("count", [1, 5, 6, 7, 48, 49, 96, 97])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_few_rows_of_whole_words(level, dtype, count, form):
    """Widths in whole panels: the weights are read where they lie, up to 96 rows (AVX-512) or 48."""
    assert_matches(make(Case("", (1, count), 96, 64, **FEW_ROWS_FORMS[form]), dtype))


def test_few_rows_whose_results_go_past_the_cache(level):
    assert_matches(make(Case("", (1, 48), 12288, 32, trained=("x",)), F32))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_few_rows_of_weights_within_larger_ones(level, dtype):
    problem = make(Case("", (2, 3), 64, 32, 2), dtype)
    for name in ("x", "down_weight", "up_weight"):
        whole = torch.full((*problem.tensors[name].shape[:-1], 103), torch.nan, dtype=dtype)
        whole[..., 3 : 3 + problem.tensors[name].shape[-1]] = problem.tensors[name]
        problem.tensors[name] = whole[..., 3 : 3 + problem.tensors[name].shape[-1]]
    assert_matches(problem)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("norm", ["layer", "layer_after"])
@pytest.mark.parametrize("experts, groups", GROUPS)
def test_mixtures(level, experts, groups, norm, dtype):
    assert_matches(make(Case("", (3, 14), 42, 18, norm=norm, experts=experts, groups=groups), dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("adapters, norm", [(1, "layer"), (2, "none"), (3, "layer"), (2, "layer_after")])
def test_runs(level, adapters, norm, dtype):
    assert_matches(make(Case("", (2, 53), 40, 12, adapters, norm=norm), dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("route", [(0, -1, 2), (1, 1, 1), (-1, -1, 0), (-1, -1, -1)])
def test_a_route_touches_no_other_row(level, route, dtype):
    problem = make(Case("", (3, 13), 48, 12, 3, route=route), dtype)
    assert_matches(problem)
    given, settings = arguments(problem)
    away = torch.tensor(route) < 0
    given[0][away] = torch.nan  # nor reads it
    problem.grad[away] = torch.nan
    output, hidden, *gradients = run(given, settings, problem.grad)
    for rows in (output, hidden[0], gradients[0]):
        assert rows[away].isnan().all() and rows[~away].isfinite().all()
    assert all(value.isfinite().all() for value in gradients[1:] if value is not None)


STRIDED = {
    "batch slice": lambda x: torch.cat([x, x])[::2],
    "token slice": lambda x: torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    "columns of a wider tensor": lambda x: torch.cat([x, x], dim=2)[..., x.shape[2] :],
    "odd columns of a wider tensor": lambda x: torch.cat([x[..., :1], x, x[..., :2]], dim=2)[..., 1:-2],
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dimension strided": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded over the batch": lambda x: x[:1].expand(x.shape),
    "expanded over everything": lambda x: x[:1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_any_strides_give_the_contiguous_result(view, norm, dtype):
    problem = make(Case("", (4, 29), 64, 20, norm=norm), dtype)
    given, settings = arguments(problem)
    given[0], grad = view(given[0]), view(problem.grad)
    given[1] = given[1].transpose(1, 2).contiguous().transpose(1, 2)
    given[2] = torch.cat([given[2], given[2]], dim=2)[..., :20]
    copies = [None if value is None else value.contiguous() for value in given]
    assert same_bits(run(given, settings, grad), run(copies, settings, grad.contiguous()))


def test_offsets_beyond_2_to_the_31(tmp_path):
    problem = make(Case("", (2, 3), 32, 4))
    given, settings = arguments(problem)
    right = run(given, settings, problem.grad)
    stride = 2**31 + 64
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + 128, dtype=F32)  # a file of holes
    given[0] = storage.as_strided(given[0].shape, (stride, 32, 1)).copy_(given[0])
    assert same_bits(run(given, settings, problem.grad), right)


NEEDS = [  # each alone, each left out, and some of the pairs that share a step
    *({name} for name in DIFFERENTIABLE),
    *(set(DIFFERENTIABLE) - {name} for name in DIFFERENTIABLE),
    {"x", "norm_weight"},
    {"down_weight", "up_weight"},
    {"norm_weight", "norm_bias"},
    {"up_bias", "gates"},
    set(),
]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", [{"experts": 2, "groups": 2}, {"adapters": 2}, {"adapters": 2, "norm": "layer_after"}])
@pytest.mark.parametrize("names", NEEDS, ids=lambda names: " ".join(sorted(names)))
def test_unwanted_gradients_are_not_computed_and_change_nothing(names, kind, dtype):
    problem = make(Case("", (2, 13), 48, 12, **kind), dtype)
    given, settings = arguments(problem)
    needs = [name in names and value is not None for name, value in zip(DIFFERENTIABLE, given[:9], strict=True)]
    everything, some = run(given, settings, problem.grad), run(given, settings, problem.grad, needs)
    for needed, found, right in zip(needs, some[2:], everything[2:], strict=True):
        assert torch.equal(found, right) if needed else found is None


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_hidden_layer_is_what_it_is_called(level, dtype):
    problem = make(Case("", (2, 30), 64, 20, 1, dropout_p=0.25), dtype)
    given, settings = arguments(problem)
    _, hidden, *_ = run(given, settings, problem.grad)
    x, weight, bias, norm_weight, norm_bias = (given[index].double() for index in (0, 1, 3, 5, 6))
    normed = torch.nn.functional.layer_norm(x, (64,), norm_weight[0], norm_bias[0])
    right = torch.nn.functional.linear(normed, weight[0], bias[0])
    assert hidden.shape == (1, 2, 30, 20) and hidden.is_contiguous()
    assert hidden.dtype == (F32 if dtype == F16 else dtype)  # float16 would end before what it is made of does
    assert relative_error(hidden[0], right) < TOLERANCES[dtype]


@pytest.mark.parametrize("width, hidden", [(67, 9), (96, 32)])
@pytest.mark.parametrize("norm", ["layer", "layer_after"])
def test_a_row_of_one_value_is_normed_to_the_norms_bias(level, norm, width, hidden):
    """Its variance is 0, and 1 / sqrt(eps) times any error in its mean would be no rounding error any more."""
    problem = draw(Case("", (2, 30), width, hidden, norm=norm, residual="none"), F32)
    tensors = problem.tensors
    tensors["x"] = torch.linspace(100, 1000, 60).view(2, 30, 1).expand(2, 30, width)
    if norm == "layer_after":
        tensors["up_weight"] = tensors["up_weight"][:1].expand(width, hidden)
        tensors["up_bias"] = tensors["up_bias"][:1].expand(width)
    problem.options["eps"] = 1e-12
    right = evaluate(reference.skip_adapter, problem.double(), backward=False)["forward"]
    with use_backend("cpu"):
        found = evaluate(ops.skip_adapter, problem, backward=False)["forward"]
    assert relative_error(found, right) < TOLERANCES[F32]


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("size", [2.0**18, 2.0**-18])
def test_a_hidden_layer_beyond_float16_has_its_gradients(level, size, adapters):
    """All that is stored as float16 is of ordinary size; what the hidden layer is made of and goes into is float32."""
    problem = draw(Case("", (2, 9), 48, 12, adapters, without=("down_bias", "scale"), wide_weights=True), F16)
    problem.tensors["down_weight"] *= size
    problem.tensors["up_weight"] /= size
    problem.tensors["norm_bias"] *= 0.25
    assert_matches(replace(problem, trained=tuple(problem.tensors)))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [BF16, F16])
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


SHARED = [  # rows a thread would have: too few, not evenly, several tiles; samples told apart
    Case("", (1, 5), 16, 4),
    Case("", (3, 67), 64, 20),
    Case("", (2, 301), 96, 24),
    Case("", (3, 60), 64, 20, 3),
    Case("", (5, 40), 64, 20, 2, route=(0, -1, 1, 1, 0)),
    Case("", (3, 77), 64, 20, experts=2, groups=2),
]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("case", SHARED, ids=lambda case: f"{case.rows} {case.adapters} {case.experts}")
def test_threads(level, case, dtype):
    """Rows do not depend on the number of threads, sums do; with one number every run gives the same bits."""
    problem = make(case, dtype)
    given, settings = arguments(problem)
    right = evaluate(reference.skip_adapter, problem.double())
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(given, settings, problem.grad))
        assert same_bits(run(given, settings, problem.grad), results[-1])
        assert same_bits(results[-1][:3], results[0][:3])
        for name, found in zip(DIFFERENTIABLE[1:], results[-1][3:], strict=True):
            if found is not None:
                assert relative_error(found.view(right[name].shape), right[name]) < TOLERANCES[dtype], name


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [32, 37, 768])
def test_nothing_beyond_the_ends_is_read(level, width, dtype):
    """Every input lies between NaNs; the results are those of tensors that do not."""
    problem = make(Case("", (2, 7), width, 5, experts=1), dtype)
    given, settings = arguments(problem)

    def fenced(tensor):
        fence = tensor.new_full((64,), torch.nan)
        return torch.cat([fence, tensor.flatten(), fence])[64 : 64 + tensor.numel()].view(tensor.shape)

    apart = [None if value is None else fenced(value) for value in given]
    assert same_bits(run(apart, settings, fenced(problem.grad)), run(given, settings, problem.grad))


@pytest.mark.parametrize("kind", [{"adapters": 3}, {"experts": 2}, {"norm": "layer_after"}], ids=str)
def test_inputs_are_left_alone_and_results_are_new(level, kind):
    problem = make(Case("", (3, 33), 64, 20, dropout_p=0.5, **kind))
    given, settings = arguments(problem)
    tensors = [value for value in (*given, problem.grad) if value is not None]
    before = [value.clone() for value in tensors]
    results = run(given, settings, problem.grad)
    assert same_bits(tensors, before)
    addresses = [value.untyped_storage().data_ptr() for value in (*tensors, *results) if value is not None]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_large_results_go_past_the_cache_whole(level, dtype):
    """Large enough for streaming stores, with a width that leaves the rows unaligned, and one that does not."""
    for width in (500, 512):
        assert_matches(make(Case("", (3, 1100), width, 3, trained=("x", "up_bias")), dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("norm", ["none", "layer", "rms", "layer_after"])
def test_nan_stays_in_its_row(level, norm, dtype):
    problem = make(Case("", (2, 31), 64, 20, norm=norm), dtype)
    given, settings = arguments(problem)
    clean = run(given, settings, problem.grad)
    given[0] = given[0].clone()
    given[0][1, 5, 3] = torch.nan
    found = run(given, settings, problem.grad)
    others = torch.ones(2, 31, dtype=torch.bool)
    others[1, 5] = False
    assert found[0][1, 5].isnan().all()
    assert same_bits([found[0][others], found[2][others]], [clean[0][others], clean[2][others]])
    assert found[3].isnan().any() and found[4].isnan().any()


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_over_their_whole_range(level, activation):
    """One hidden column that is the input itself: from where nothing is let through to where everything is."""
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.linspace(-4, 4, 4001)]).view(1, -1, 1)
    one = torch.ones(1, 1, 1)
    given = [x, one, one, *[None] * 8]
    settings = ("none", activation, "none", 1e-5, 0.0)
    output, _, grad, *_ = run(given, settings, torch.ones_like(x), [True] + [False] * 8)
    wide = x.double().requires_grad_()
    function = {"relu": torch.relu, "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[activation]
    right = function(wide)
    (right_grad,) = torch.autograd.grad(right.sum(), wide)
    near = (x.abs() <= 4) & (x != 0)  # relative to the largest there is, an error near 0 would not show
    assert relative_error(output, right) < TOLERANCES[F32]
    assert relative_error(output[near], right[near]) < TOLERANCES[F32]
    assert relative_error(grad[x != 0], right_grad[x != 0]) < TOLERANCES[F32]


def test_each_level_runs_code_of_its_own():
    """Register widths and bf16 products change the order or the rounding of sums, so bits tell levels apart."""

    def fingerprint(name):
        cpu.select_isa(name)
        results = []
        for dtype in (F32, BF16):
            problem = make(Case("", (2, 60), 768, 48, trained=()), dtype)
            given, settings = arguments(problem)
            output, *_ = run(given, settings, problem.grad)
            results.append(output.double().sum().item())
        return tuple(results)

    assert len({fingerprint(name) for name in LEVELS}) == len(LEVELS)


@pytest.mark.parametrize("index", range(9), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("wrong", [torch.zeros(5, 6, 7), torch.zeros(3, 6), torch.zeros(9)], ids=lambda x: str(x.dim()))
def test_native_op_checks_what_it_is_given(index, wrong):
    given, settings = arguments(make(Case("", (2, 3), 8, 4, experts=2)))
    given[index] = wrong
    with pytest.raises(RuntimeError):
        cpu.skip_adapter(torch.empty(2, 3, 8), *given, *settings, True)


@pytest.mark.parametrize(
    "change",
    [
        {9: torch.tensor([0, 2])},
        {9: torch.tensor([0.0, 1.0])},
        {9: torch.tensor([0])},
        {7: torch.ones(3)},
        {7: torch.ones(2, dtype=torch.float64)},
        {8: torch.ones(2, 2)},
        {5: None},
        {1: torch.zeros(2, 4, 8, dtype=torch.bfloat16)},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_native_op_checks_what_does_not_go_together(change):
    given, settings = arguments(make(Case("", (2, 3), 8, 4, 2)))
    for index, value in change.items():
        given[index] = value
    with pytest.raises(RuntimeError):
        cpu.skip_adapter(torch.empty(2, 3, 8), *given, *settings, True)


@pytest.mark.parametrize(
    "settings",
    [
        ("none", "relu", "input", 1e-5, 0.0),
        ("rms", "relu", "input", 1e-5, 0.0),
        ("layer_after", "relu", "normed", 1e-5, 0.0),
        ("layer", "relu", "input", 1e-5, 0.5),
    ],
)
def test_native_op_checks_its_options(settings):
    given, _ = arguments(make(Case("", (2, 3), 8, 4)))
    with pytest.raises(RuntimeError):
        cpu.skip_adapter(torch.empty(2, 3, 8), *given, *settings, True)


@pytest.mark.parametrize("wrong", [torch.empty(2, 3, 9), torch.empty(2, 8, 3).mT, torch.empty(2, 3, 8).double()])
def test_native_op_checks_where_it_writes(wrong):
    given, settings = arguments(make(Case("", (2, 3), 8, 4)))
    with pytest.raises(RuntimeError, match="output"):
        cpu.skip_adapter(wrong, *given, *settings, True)


@pytest.mark.parametrize(
    "hidden", [torch.empty(1, 2, 3, 5), torch.empty(1, 2, 4, 3).mT, torch.empty(1, 2, 3, 4).half()]
)
def test_native_op_checks_what_was_kept(hidden):
    problem = make(Case("", (2, 3), 8, 4))
    given, settings = arguments(problem)
    with pytest.raises(RuntimeError, match="hidden"):
        cpu.skip_adapter_backward(problem.grad, *given, hidden, *settings, [True] * 8 + [False])


@pytest.mark.parametrize("needs", [[True] * 9, [True] * 8])
def test_native_op_checks_what_is_asked_for(needs):
    problem = make(Case("", (2, 3), 8, 4))
    given, settings = arguments(problem)
    hidden = cpu.skip_adapter(torch.empty(2, 3, 8), *given, *settings, True)
    with pytest.raises(RuntimeError, match="needs"):
        cpu.skip_adapter_backward(problem.grad, *given, hidden, *settings, needs)


def test_other_devices_and_dtypes_are_refused_by_name():
    call = SkipAdapterCall(torch.device("cuda"), F32, F32, width=8, adapter_width=4)
    assert cpu.refuses("skip_adapter", call) == "runs on cpu, not on cuda"
    problem = make(Case("", (2, 3), 8, 4)).double()
    with use_backend("cpu"), pytest.raises(BackendError, match="not torch.float64"):
        ops.skip_adapter(**problem.tensors, **problem.options)
