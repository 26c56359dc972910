"""The CUDA kernels of skip_adapter run on the CPU by tests/simt, through the API, against the float64 reference."""

import json
import re
from pathlib import Path

import pytest
import torch
from simt import harness

from fast_prompt import ops, reference
from fast_prompt.backends import BACKENDS, use_backend
from fast_prompt.parity import skip_adapter as parity
from fast_prompt.parity.problem import DTYPES, compare, evaluate
from fast_prompt.parity.skip_adapter import CASES, Case
from fast_prompt.tolerances import TOLERANCES

pytestmark = [
    pytest.mark.skipif(not harness.has_compiler(), reason="no C++ compiler to build the emulated kernels with"),
    pytest.mark.gate,
]

# Threads forwards, copies as late as they may come; and the reverse of both. Of few multiprocessors each has several
# row tiles, for many the tiles are short.
ORDERS = {
    "forward": {"reverse": False, "late_copies": True, "multiprocessors": 2},
    "reverse": {"reverse": True, "late_copies": False, "multiprocessors": 16},
}
H100 = {"shared_bytes": 227 << 10}
SMALL = {"shared_bytes": 99 << 10}  # of sm_86 and sm_89


class Emulated(harness.Backend):
    """The kernels in the place of a backend that takes every call."""

    def unavailable(self):
        return None

    def refuses(self, op, call):
        return None


@pytest.fixture(scope="session")
def built():
    return Emulated("skip_adapter", harness.build("skip_adapter"))


@pytest.fixture(params=ORDERS.values(), ids=ORDERS.keys())
def kernels(built, request):
    built.configure(**H100, **request.param)
    return built


def results(kernels, problem):
    """The output and the gradients, by name; memory that the API allocates is full of NaN before."""
    with pytest.MonkeyPatch.context() as patch, use_backend("cuda"):
        patch.setitem(BACKENDS, "cuda", kernels)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return evaluate(ops.skip_adapter, problem)
        finally:
            torch.use_deterministic_algorithms(False)


def errors(kernels, case, dtype):
    """By result: its error in units of what is allowed."""
    problem = parity.build(case, dtype, torch.device("cpu"))
    found = compare(results(kernels, problem), evaluate(reference.skip_adapter, problem.double()))
    return {name: error / TOLERANCES[dtype] for name, error in found.items()}


def assert_matches(kernels, case, dtype):
    found = errors(kernels, case, dtype)
    assert all(error <= 1 for error in found.values()), found


# ---- Right results ----

CALLS = [(case, dtype) for case in CASES for dtype in DTYPES.values() if case.applies_to(dtype)]


@pytest.mark.parametrize("case, dtype", CALLS, ids=[f"{case.name} {harness.ELEMENTS[dtype]}" for case, dtype in CALLS])
def test_parity_cases(kernels, case, dtype):
    assert_matches(kernels, case, dtype)


STREAMED = [
    Case("too wide for the chip", (1, 67), 2056, 24, norm="rms", residual="normed", trained=("x", "norm_weight")),
    Case("run, in place", (1, 67), 2056, 8, 2, trained=("x", "down_bias", "scale")),
    Case("norm after", (1, 67), 2056, 8, norm="layer_after", residual="none", trained=("x", "norm_weight")),
    Case("hidden layer in blocks", (1, 67), 2056, 136, norm="none", trained=("x", "down_bias")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", STREAMED, ids=lambda case: case.name)
def test_rows_that_do_not_fit(built, case, dtype):
    """They come through the ring beside the weights."""
    built.configure(**H100, **ORDERS["forward"])
    assert_matches(built, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [Case("model width", (1, 40), 768, 96), Case("widest", (1, 5), 40, 640)], ids=lambda case: case.name
)
def test_little_shared_memory(kernels, case, dtype):
    kernels.configure(**SMALL)
    assert_matches(kernels, case, dtype)


def test_mean_far_from_zero(kernels):
    """A row of mean 300 and deviation 1: the variance from squares would be off by more than a part in ten."""
    problem = parity.build(Case("", (1, 9), 80, 24, activation="gelu"), torch.float32, torch.device("cpu"))
    problem.tensors["x"] += 300
    found = results(kernels, problem)
    expected = evaluate(reference.skip_adapter, problem.double())
    far = TOLERANCES[torch.float32] * 300  # x itself is as much less exact
    assert all(error < far for error in compare(found, expected).values())


@pytest.mark.parametrize("norm", ["layer", "layer_after"])
def test_a_row_of_one_value_is_normed_to_the_norms_bias(kernels, norm):
    """Its variance is 0, and 1 / sqrt(eps) times any error in its mean would be no rounding error any more."""
    case = Case("", (1, 9), 67, 9, norm=norm, residual="none", trained=("down_bias",))
    problem = parity.build(case, torch.float32, torch.device("cpu"))
    problem.options["eps"] = 1e-12
    tensors = problem.tensors
    tensors["x"] = torch.linspace(100, 1000, 9).sqrt().view(1, 9, 1).expand(1, 9, 67)
    if norm == "layer_after":
        tensors["up_weight"] = tensors["up_weight"][:1].expand(67, 9)
        tensors["up_bias"] = tensors["up_bias"][:1].expand(67)
    found = results(kernels, problem)["forward"]
    right = evaluate(reference.skip_adapter, problem.double())["forward"]
    assert compare({"forward": found}, {"forward": right})["forward"] < TOLERANCES[torch.float32]


def test_nan_stays_in_its_row(kernels):
    problem = parity.build(Case("", (1, 40), 80, 24, activation="silu"), torch.bfloat16, torch.device("cpu"))
    clean = results(kernels, problem)
    problem.tensors["x"][0, 17, 3] = torch.nan
    found = results(kernels, problem)
    others = torch.arange(40) != 17
    for name in ("forward", "x"):
        assert found[name][0, 17].isnan().all()
        assert torch.equal(found[name][0, others], clean[name][0, others])


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("run of two, ragged", "mixture, grouped")])
def test_order_of_threads_does_not_show(built, case):
    """A result that depends on it is a race."""
    problem = parity.build(case, torch.bfloat16, torch.device("cpu"))
    found = []
    for order in ORDERS.values():
        built.configure(**(H100 | order | {"multiprocessors": 2}))
        found.append(results(built, problem))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


BUDGETS = json.loads((Path(__file__).parent / "kernel_budgets.json").read_text())["skip_adapter"]["cuda"][
    "shared_memory"
]


@pytest.mark.parametrize("name", BUDGETS)
def test_shared_memory_within_budget(built, name):
    """Dynamic shared memory, which ptxas does not see: what the launches ask for."""
    built.configure(**H100, **ORDERS["forward"])
    element, width, hidden, rows = re.fullmatch(r"(\w+) d=(\d+) w=(\d+) rows=(\d+)", name).groups()
    case = Case("", (1, int(rows)), int(width), int(hidden), trained=("x",))
    built.configure(most_shared_bytes=0)
    results(built, parity.build(case, DTYPES[element], torch.device("cpu")))
    used = built.settings.most_shared_bytes
    assert 0 < used <= BUDGETS[name]


# ---- Planted bugs: what they would do to a GPU, the emulator must show ----

ROWS, FORWARD, BACKWARD = "skip_adapter_rows.cuh", "skip_adapter_forward.cuh", "skip_adapter_backward.cuh"
WEIGHTS = "skip_adapter_weights.cuh"
PLANTED = {
    "removed_wait_for_a_stage": (ROWS, "    ptx::copy_wait<L::STAGES - 2>();\n", ""),
    "removed_wait_for_the_next_tiles_rows": (FORWARD, "      ptx::copy_wait<0>();\n    }", "    }"),
    "removed_barrier_before_the_next_adapter": (
        FORWARD,
        "      __syncthreads();  // the rows are there, or the adapter before has written them\n",
        "",
    ),
    "removed_barrier_between_tiles": (
        BACKWARD,
        "    __syncthreads();  // the tile before has no more use for its operand and statistics\n",
        "",
    ),
    "weights_of_the_group_before": (ROWS, "first_column + row < group * group_width", "first_column + row < 0"),
    "kept_samples_that_are_counted": (WEIGHTS, "all->route[step / steps_per_sample] != adapter", "false"),
    "forgotten_split": (
        WEIGHTS,
        "  for (int split = 0; split < splits; ++split) sum",
        "  for (int split = 0; split + 1 < splits; ++split) sum",
    ),
}
# Several row tiles a block, adapters one after another, groups within a chunk, and samples apart.
WITNESSES = [
    Case("tiles", (2, 131), 80, 24, 2, trained=("x", "up_weight", "norm_weight")),
    Case("groups", (2, 17), 48, 24, experts=2, groups=3, trained=("x",)),
    Case("route", (4, 21), 40, 12, 2, route=(1, -1, 0, 1), trained=("x", "down_weight", "up_weight")),
]


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_caught(name):
    broken = Emulated("skip_adapter", harness.build_planted("skip_adapter", *PLANTED[name]))
    assert any(shows_a_bug(broken, order) for order in ORDERS.values())


def test_no_bug_is_seen_where_none_is_planted(built):
    assert not any(shows_a_bug(built, order) for order in ORDERS.values())


def shows_a_bug(kernels, order):
    """Whether the emulator stops, something is written out of bounds, or a result is wrong."""
    kernels.configure(**(H100 | order | {"multiprocessors": 1}))
    try:
        return any(error > 1 for case in WITNESSES for error in errors(kernels, case, torch.bfloat16).values())
    except (RuntimeError, AssertionError):
        return True
