"""The CUDA kernels run on the CPU by tests/simt: what is theirs beside the contract; and bugs planted, caught."""

import json
import re
from pathlib import Path

import backend_proof as proof
import pytest
import torch
from backend_proof import BF16, DTYPES, F32, assert_matches, build, results
from simt import backend as simt

from fast_prompt import reference
from fast_prompt.ops.declaration import OPS
from fast_prompt.parity import DTYPES as NAMED
from fast_prompt.parity.problem import compare, evaluate
from fast_prompt.parity.prompt_compress import Case as CompressCase
from fast_prompt.parity.prompt_diffusion import Case as DiffusionCase
from fast_prompt.parity.skip_adapter import Case as SkipCase
from fast_prompt.tolerances import TOLERANCES

pytestmark = [pytest.mark.skipif(simt.unavailable() is not None, reason=str(simt.unavailable())), pytest.mark.gate]


@pytest.fixture(params=simt.ORDERS)
def order(request):
    simt.configure(**simt.H100, **simt.ORDERS[request.param])


# ---- Every layout, every tail, more row tiles than blocks ----

SIZES = [  # multiprocessors, op, case
    *(
        (many, "prompt_diffusion", DiffusionCase("", (batch, rows), width, prompts, activation, dropout_p=0.1))
        for activation in ("relu", "softmax")
        for batch, rows, width, prompts, many in (
            (1, 1, 1, 3, 2),
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
        )
    ),
    *(
        (many, "prompt_compress", CompressCase("", *size, 0.1))
        for *size, many in (
            (1, 1, 2, 1, 1, 1, 2),
            (3, 2, 5, 2, 5, 3, 2),
            (2, 1, 53, 12, 8, 256, 16),  # Columns256, in splits
            (1, 1, 40, 4, 24, 300, 1),  # Columns512
            (1, 2, 33, 2, 40, 768, 4),  # Columns768, in splits
            (1, 1, 19, 3, 8, 1000, 1),  # Columns1024
            (1, 1, 35, 2, 16, 1032, 2),  # two groups of columns
            (2, 7, 20, 5, 3, 24, 1),  # three row tiles
            (1, 40, 18, 1, 33, 17, 8),
        )
    ),
    # Rows that do not fit the chip come through the ring beside the weights.
    *(
        (2, "skip_adapter", case)
        for case in (
            SkipCase("", (1, 67), 2056, 24, norm="rms", residual="normed", trained=("x", "norm_weight")),
            SkipCase("", (1, 67), 2056, 8, 2, trained=("x", "down_bias", "scale")),
            SkipCase("", (1, 67), 2056, 8, norm="layer_after", residual="none", trained=("x", "norm_weight")),
            SkipCase("", (1, 67), 2056, 136, norm="none", trained=("x", "down_bias")),
        )
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("many", "op", "case"), SIZES)
def test_sizes(order, many, op, case, dtype):
    simt.configure(multiprocessors=many)
    assert_matches(op, case, dtype, "simt")


LITTLE = [  # what is promised of the chips with the least shared memory
    *(("prompt_diffusion", DiffusionCase("", (1, 50), 48, count, "softmax")) for count in (200, 768)),
    ("prompt_compress", CompressCase("", 1, 1, 20, 2, 8, 800, padding=(2,), arrangement="NaN in padding")),
    ("skip_adapter", SkipCase("", (1, 40), 768, 96)),
    ("skip_adapter", SkipCase("", (1, 5), 40, 640)),
]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("op", "case"), LITTLE)
def test_little_shared_memory(order, op, case, dtype):
    simt.configure(**simt.SMALL)
    assert_matches(op, case, dtype, "simt")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_most_prompts_with_little_shared_memory(order, dtype):
    simt.configure(**simt.SMALL)
    assert_matches("prompt_diffusion", DiffusionCase("", (1, 50), 48, 1024, "softmax"), dtype, "simt")


def test_too_little_shared_memory_is_an_error(order):
    simt.configure(shared_bytes=16 << 10)
    problem = build("prompt_diffusion", DiffusionCase("", (1, 5), 48, 200))
    with pytest.raises(RuntimeError, match="too little shared memory"):
        results("prompt_diffusion", problem, "simt")


def test_mean_far_from_zero(order):
    """A row of mean 300 and deviation 1: the variance from squares would be off by more than a part in ten."""
    problem = build("skip_adapter", SkipCase("", (1, 9), 80, 24, activation="gelu"))
    problem.tensors["x"] += 300
    found = compare(results("skip_adapter", problem, "simt"), evaluate(reference.skip_adapter, problem.double()))
    assert all(error < TOLERANCES[F32] * 300 for error in found.values())  # x itself is as much less exact


RACES = [
    ("prompt_diffusion", DiffusionCase("", (2, 50), 96, 100, "softmax", dropout_p=0.2)),
    ("prompt_compress", CompressCase("", 2, 3, 50, 4, 8, 96, 0.2)),
    ("skip_adapter", SkipCase("", (3, 13), 50, 7, 2)),
    ("skip_adapter", SkipCase("", (3, 9), 40, 12, experts=2, groups=2)),
]


@pytest.mark.parametrize(("op", "case"), RACES)
def test_order_of_threads_does_not_show(op, case):
    """A result that depends on it is a race."""
    problem, found = build(op, case, BF16), []
    for settings in simt.ORDERS.values():
        simt.configure(**(simt.H100 | settings | {"multiprocessors": 2}))
        found.append(results(op, problem, "simt"))
    assert proof.same_bits(*found)


# ---- Dynamic shared memory, which ptxas does not see: what the launches ask for ----

BUDGETS = {
    op: figures["cuda"]["shared_memory"]
    for op, figures in json.loads((Path(__file__).parents[1] / "build" / "kernel_budgets.json").read_text()).items()
}


def case_of(op, name):
    """The call that a budget is of, from its name."""
    element, *numbers = re.findall(r"(?<![a-z])(?:fp32|bf16|fp16)|\d+(?!\w)", name)
    sizes = [int(number) for number in numbers]
    if op == "prompt_diffusion":
        return element, DiffusionCase("", (1, 33 if "many" in name else 3), 16, sizes[0])
    if op == "prompt_compress":
        return element, CompressCase("", 1, 1, 3, 1, 4, sizes[0])
    return element, SkipCase("", (1, sizes[2]), sizes[0], sizes[1], trained=("x",))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in BUDGETS for name in BUDGETS[op]])
def test_shared_memory_within_budget(op, name):
    element, case = case_of(op, name)
    simt.configure(**simt.H100, **simt.ORDERS["forward"])
    problem = build(op, case, NAMED[element])
    leaves, used = problem.leaves(), {}
    with proof.on("simt"):
        simt.configure(most_shared_bytes=0)
        output = OPS[op].api(**leaves, **problem.options)
        used["forward"] = simt.most_shared_bytes(op)
        simt.configure(most_shared_bytes=0)
        torch.autograd.grad(output, [leaves[name] for name in problem.trained], problem.grad)
        used["backward"] = simt.most_shared_bytes(op)
    budget = BUDGETS[op][name]
    if not isinstance(budget, dict):  # of both
        budget = dict.fromkeys(used, budget)
    assert all(0 < used[direction] <= budget[direction] for direction in used), used


def test_there_may_be_more_samples_than_a_grids_second_dimension_has():
    case = SkipCase("", (20, 3), 40, 12, 2, route=(0, 1) * 10)
    problem = build("skip_adapter", case, F32)
    simt.configure(**simt.H100, **simt.ORDERS["forward"])
    right = results("skip_adapter", problem, "simt")
    simt.configure(most_blocks=16)
    try:
        found = results("skip_adapter", problem, "simt")
    finally:
        simt.configure(most_blocks=65535)
    assert all(torch.equal(found[name], right[name]) for name in right)


# ---- Planted bugs: what they would do to a GPU, the emulator must show ----

PLANTED = {
    "prompt_diffusion": {
        "removed_barrier_before_a_stage_is_read": (
            "prompt_diffusion_forward.cuh",
            "    ptx::copy_wait<L::STAGES - 2>();\n    __syncthreads();\n",
            "    ptx::copy_wait<L::STAGES - 2>();\n",
        ),
        "removed_wait_for_a_copy": ("prompt_diffusion_forward.cuh", "    ptx::copy_wait<L::STAGES - 2>();\n", ""),
        "off_by_one_tile": (
            "prompt_diffusion_backward.cuh",
            "for (int64_t row = begin; row < end; row += SPLIT_STEP)",
            "for (int64_t row = begin; row + SPLIT_STEP < end; row += SPLIT_STEP)",
        ),
        "missing_mask_of_absent_prompts": (
            "prompt_diffusion_forward.cuh",
            "      hide_absent_prompts<L>(problem, scores, first_prompt, place);\n",
            "",
        ),
        "swapped_fragment": (
            "tile.cuh",
            "lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);\n    right[n] = {parts[0], parts[1]};",
            "lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);\n    right[n] = {parts[1], parts[0]};",
        ),
        "barrier_that_only_some_warps_reach": (
            "prompt_diffusion_forward.cuh",
            "    if ((problem.softmax || HAS_UNITS<T>) && blocks > 1)",
            "    if (threadIdx.x < 32) __syncthreads();\n    if ((problem.softmax || HAS_UNITS<T>) && blocks > 1)",
        ),
        "shared_memory_that_is_not_asked_for": (
            "launch.cuh",
            "shared_bytes > WITHOUT_ASKING",
            "shared_bytes > 10 * WITHOUT_ASKING",
        ),
        "launch_on_the_default_stream": ("launch.cuh", "config.stream = stream;", "config.stream = nullptr;"),
        "store_beyond_the_last_row": (
            "tile.cuh",
            "const int left = first_row + row < rows ? width - first_column - column : 0;",
            "const int left = first_row + row <= rows ? width - first_column - column : 0;",
        ),
    },
    "prompt_compress": {
        "removed_barrier_before_scores_are_added_up": (
            "prompt_compress_tokens.cuh",
            "    __syncthreads();\n    float score = 0;",
            "    float score = 0;",
        ),
        "removed_wait_for_a_slice": ("prompt_compress_tokens.cuh", "    ptx::copy_wait<L::STAGES - 2>();\n", ""),
        "padding_that_is_read": (
            "prompt_compress_tokens.cuh",
            "is_padding(pass, share.sample, token + row)",
            "token + row < 0",
        ),
        "sums_that_keep_an_old_shift": ("prompt_compress_tokens.cuh", "first *= decay;", "first *= 1;"),
        "forgotten_split": (
            "prompt_compress_rows.cuh",
            "    weighted += expf",
            "    if (split + 1 < all.splits) weighted += expf",
        ),
    },
    "skip_adapter": {
        "removed_wait_for_a_stage": ("skip_adapter_rows.cuh", "    ptx::copy_wait<L::STAGES - 2>();\n", ""),
        "removed_wait_for_the_next_tiles_rows": (
            "skip_adapter_forward.cuh",
            "      ptx::copy_wait<0>();\n    }",
            "    }",
        ),
        "removed_barrier_before_the_next_adapter": (
            "skip_adapter_forward.cuh",
            "      __syncthreads();  // the rows are there, or the adapter before has written them\n",
            "",
        ),
        "removed_barrier_between_tiles": (
            "skip_adapter_backward.cuh",
            "    __syncthreads();  // the tile before has no more use for its operand and statistics\n",
            "",
        ),
        "weights_of_the_group_before": (
            "skip_adapter_rows.cuh",
            "first_column + row < group * group_width",
            "first_column + row < 0",
        ),
        "kept_samples_that_are_counted": (
            "skip_adapter_weights.cuh",
            "all->route[step / steps_per_sample] != adapter",
            "false",
        ),
        "forgotten_split": (
            "skip_adapter_weights.cuh",
            "  for (int split = 0; split < splits; ++split) sum",
            "  for (int split = 0; split + 1 < splits; ++split) sum",
        ),
    },
}
# How many multiprocessors there are, and calls that show a bug: several row tiles a block, splits, adapters one after
# another, groups within a chunk, samples apart.
WITNESSES = {
    "prompt_diffusion": (2, [DiffusionCase("", (2, 71), 80, 33, "softmax")]),
    "prompt_compress": (4, [CompressCase("", 2, 2, 71, 3, 16, 80, padding=(0, 31), arrangement="NaN in padding")]),
    "skip_adapter": (
        1,
        [
            SkipCase("", (2, 131), 80, 24, 2, trained=("x", "up_weight", "norm_weight")),
            SkipCase("", (2, 17), 48, 24, experts=2, groups=3, trained=("x",)),
            SkipCase("", (4, 21), 40, 12, 2, route=(1, -1, 0, 1), trained=("x", "down_weight", "up_weight")),
        ],
    ),
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in PLANTED for name in PLANTED[op]])
def test_planted_bug_is_caught(op, name):
    with simt.planted(op, *PLANTED[op][name]):
        assert any(shows_a_bug(op, order) for order in simt.ORDERS)


@pytest.mark.parametrize("op", OPS)
def test_no_bug_is_seen_where_none_is_planted(op):
    assert not any(shows_a_bug(op, order) for order in simt.ORDERS)


def shows_a_bug(op, order):
    """Whether the emulator stops, something is written out of bounds, or a result is wrong."""
    many, cases = WITNESSES[op]
    simt.configure(**(simt.H100 | simt.ORDERS[order] | {"multiprocessors": many}))
    try:
        return any(error > 1 for case in cases for error in proof.errors(op, build(op, case, BF16), "simt").values())
    except (RuntimeError, AssertionError):
        return True


def test_planted_barrier_bug_is_named():
    """What a divergent barrier is reported as: a person must find it from the message."""
    op, problem = "prompt_diffusion", build("prompt_diffusion", WITNESSES["prompt_diffusion"][1][0], BF16)
    simt.configure(**simt.H100, **simt.ORDERS["forward"])
    with (
        simt.planted(op, *PLANTED[op]["barrier_that_only_some_warps_reach"]),
        pytest.raises(RuntimeError, match="diverge"),
    ):
        results(op, problem, "simt")
