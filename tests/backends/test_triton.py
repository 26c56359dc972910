"""The Triton backend: what is its own beside the contract. On a GPU where there is one, else interpreted."""

import importlib.util
import itertools
from dataclasses import replace

import backend_proof as proof
import pytest
import torch
from backend_proof import BF16, F16, F32, assert_matches, changed

from fast_prompt import reference
from fast_prompt.backends import Call
from fast_prompt.backends import triton as backend
from fast_prompt.ops.declaration import OPS
from fast_prompt.ops.skip_adapter import _MOST_WIDTH
from fast_prompt.parity.problem import compare, evaluate
from fast_prompt.parity.prompt_compress import Case as CompressCase
from fast_prompt.parity.prompt_diffusion import Case as DiffusionCase
from fast_prompt.parity.skip_adapter import Case as SkipCase
from fast_prompt.reference.philox import philox
from fast_prompt.tolerances import TOLERANCES

pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable())),
]
if backend.unavailable() is None:
    import triton
    import triton.language as tl
    from fast_prompt_kernels import prompt_compress, prompt_diffusion, skip_adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(op, case, dtype=F32):
    return proof.build(op, case, dtype, "triton")


# ---- Tiles, splits and blocks ----

SIZES = [
    *(("prompt_diffusion", DiffusionCase("", (2, 5), 20, count)) for count in (1, 16, 33, 65, 200, 257, 1024)),
    *(("prompt_diffusion", DiffusionCase("", (3, 7), width, 5, "softmax")) for width in (1, 3, 16, 63, 64, 65, 200)),
    *(
        ("prompt_compress", CompressCase("", 1, queries, 20, heads, 5, width, 0.2))
        for queries, heads, width in ((1, 4, 1), (9, 2, 100), (9, 2, 300), (1, 1, 1100))
    ),
]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("op", "case"), SIZES)
def test_sizes(op, case, dtype):
    assert_matches(op, case, dtype, "triton")


@pytest.mark.parametrize("multiprocessors", [1, 1000], ids=["whole", "split"])
def test_rows_and_tokens_in_one_program_or_in_several(multiprocessors, monkeypatch):
    """More rows than a tile and a split hold; a sample's tokens in several programs, of which the last is short."""
    for kernels in (prompt_diffusion, prompt_compress):
        monkeypatch.setattr(kernels, "multiprocessors", lambda device: multiprocessors)
    for dtype in (F32, BF16, F16) if multiprocessors == 1 else (F32,):
        assert_matches("prompt_diffusion", DiffusionCase("", (2, 145), 40, 18, dropout_p=0.2), dtype, "triton")
    case = CompressCase("", 2, 1, 77, 3, 8, 40, 0.25, padding=(77, 20))
    problem = build("prompt_compress", case)
    sizes = prompt_compress.Sizes.of(problem.tensors["query"], problem.tensors["visual"], 3)
    splits = prompt_compress.TokenPass.of(sizes, problem.tensors["visual"], None, None, 0.0, 1).splits
    assert (splits > 1) == (multiprocessors > 1)
    assert_matches("prompt_compress", problem, F32, "triton")


@pytest.mark.parametrize(
    ("length", "width", "hidden", "dtype"),
    [(37, 40, 40, F32), (10, 20, 260, F32), (37, 40, 130, BF16), (10, 16, 520, BF16), (37, 600, 20, F16)],
)
def test_row_tiles_and_hidden_blocks(length, width, hidden, dtype, monkeypatch):
    """The widest tiles of the tables, in several blocks of hidden columns."""
    monkeypatch.setattr(skip_adapter, "multiprocessors", lambda device: 1)
    assert_matches("skip_adapter", SkipCase("", (2, length), width, hidden), dtype, "triton")


def test_a_tile_fits_every_chip():
    """Whatever the width, some tile does, in the least shared memory of any chip."""
    for width, dtype, operands, masked in itertools.product((1, 768, 1024, 4096), (F32, BF16), (1, 2), (False, True)):
        tile = prompt_compress.token_tile(width, 12, dtype, operands, masked, 65536)
        assert tile.whole == (tile.chunks * tile.width >= width)


def test_a_tile_for_every_hidden_width():
    """A block of at least 16 hidden columns covers all, no block is idle, and rows fill a tensor core's 16."""
    for width in range(1, skip_adapter.MOST_HIDDEN + 1):
        block, chunks = skip_adapter.hidden_blocks(width)
        assert block >= 16 and block * (chunks - 1) < width <= block * chunks <= skip_adapter.MOST_HIDDEN
        for dtype in (F32, BF16):
            tiles = [skip_adapter.row_tile(width, dtype, mixed, True) for mixed in (False, True)]
            assert 16 <= tiles[1].rows <= tiles[0].rows <= skip_adapter.row_tile(width, dtype, False, False).rows
    assert skip_adapter.MOST_HIDDEN == _MOST_WIDTH


@pytest.mark.parametrize("arrangement", ["rows sliced", "batch second", "expanded inputs", "expanded gradient"])
def test_strides_are_followed_without_a_copy(arrangement):
    problem = build("prompt_diffusion", DiffusionCase("", (3, 13), 24, 9, arrangement=arrangement))
    for tensor in (problem.tensors["source"], problem.grad):
        if tensor.stride(-1) == 1:
            assert prompt_diffusion.Rows.of(tensor).tensor is tensor


# ---- Numbers at their ends ----


@pytest.mark.parametrize(
    ("activation", "row_weight", "key_scale", "prompt_scale", "grad_scale"),
    [("softmax", "max", 1e-2, 1.0, 64.0), ("relu", "max", 400.0, 1e-3, 2**-10), ("relu", "none", 5e4, 1e-3, 2**-6)],
)
def test_float16_keeps_its_range(activation, row_weight, key_scale, prompt_scale, grad_scale):
    """A flat softmax over 1000 prompts has squared weights of 1e-6, scores of 1000 have 1e6; others exceed 65504."""
    problem = build("prompt_diffusion", DiffusionCase("", (1, 33), 32, 1000, activation, row_weight), F16)
    scaled = {"keys": problem.tensors["keys"] * key_scale, "prompts": problem.tensors["prompts"] * prompt_scale}
    scaled["prompts"] /= problem.tensors["prompts"].float().std().item() * 32**0.5
    assert_matches("prompt_diffusion", changed(problem, **scaled, grad=problem.grad * grad_scale), F16, "triton")


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_float32_keys_decide_relu_exactly(dtype):
    """A score that is positive only by what rounding the key to half would take from it."""
    problem = build("prompt_diffusion", DiffusionCase("", (1, 3), 16, 8, row_weight="none", wide_weights=True), dtype)
    source, keys = problem.tensors["source"], problem.tensors["keys"]
    source[0, 0], keys[0] = 0, 0
    source[0, 0, :2] = torch.tensor([1.0, -1.0])
    keys[0, :2] = torch.tensor([1 + 2**-13, 1.0])
    assert source[0, 0].float() @ keys[0] > 0 and source[0, 0] @ keys[0].to(dtype) == 0
    assert_matches("prompt_diffusion", problem, dtype, "triton")


def test_log_scale_far_from_zero():
    problem = build("prompt_diffusion", DiffusionCase("", (1, 6), 20, 6))
    assert_matches("prompt_diffusion", changed(problem, log_scale=torch.tensor(-4.0, device=DEVICE)), F32, "triton")


@pytest.mark.parametrize(("norm", "offset"), [("layer", 300.0), ("layer_after", 30.0)])
def test_an_offset_of_rows_does_not_count(norm, offset):
    """A mean of many deviations: what sums of squares, and products with the mean in them, would lose."""
    problem = build("skip_adapter", SkipCase("", (2, 13), 50, 7, norm=norm, activation="gelu", residual="none"))
    name = "x" if norm == "layer" else "up_bias"
    problem = changed(problem, **{name: problem.tensors[name] + offset})
    found = compare(
        proof.results("skip_adapter", problem, "triton"), evaluate(reference.skip_adapter, problem.double())
    )
    assert all(error < 10 * TOLERANCES[F32] for error in found.values()), found  # x itself is as much less exact


@pytest.mark.parametrize("norm", ["layer", "layer_after"])
def test_no_epsilon(norm):
    """Rows of a tile that do not exist have no deviation to divide by."""
    problem = build("skip_adapter", SkipCase("", (1, 5), 40, 7, norm=norm, activation="gelu"))
    assert_matches("skip_adapter", replace(problem, options=problem.options | {"eps": 0.0}), F32, "triton")


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_far_from_zero(activation):
    """Neither infinity times zero nor a derivative of NaN."""
    problem = build("skip_adapter", SkipCase("", (1, 6), 20, 6, activation=activation))
    assert_matches("skip_adapter", changed(problem, down_bias=problem.tensors["down_bias"] * 400), F32, "triton")


if backend.unavailable() is None:

    @triton.jit
    def _signs_kernel(output, first_row, seed, threshold: tl.uint32, p, BLOCK: tl.constexpr):  # noqa: N803
        lane = tl.arange(0, BLOCK)
        row = first_row.to(tl.int64) + lane
        full = tl.full([BLOCK, BLOCK], 1.0, tl.float32)
        sign = prompt_diffusion._negate_dropped(full, row, lane, p, tl.load(seed), threshold)
        tl.store(output + lane[:, None] * BLOCK + lane[None, :], sign)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 17, -(2**63)])
@pytest.mark.parametrize("first_row", [2, 2**32 // 1000 - 4, 2**40])
def test_mask_is_philox_of_row_times_p_plus_column(first_row, seed):
    """Counters on both sides of 2**32, and seeds of both signs."""
    threshold, p, block = 2**31 + 2**30, 1000, 16
    seed = torch.tensor(seed, device=DEVICE)
    signs = torch.empty(block, block, device=DEVICE)
    _signs_kernel[(1,)](signs, first_row, seed, threshold, p, BLOCK=block)
    lane = torch.arange(block, device=DEVICE)
    kept = philox(seed, (first_row + lane)[:, None] * p + lane) >= threshold
    assert torch.equal(signs > 0, kept) and 0 < kept.sum() < kept.numel()


# ---- Refusals ----

FACTS = {
    "prompt_diffusion": {"width": 768, "num_prompts": 200},
    "prompt_compress": {"num_queries": 1, "num_heads": 12, "head_width": 64, "visual_width": 768},
    "skip_adapter": {"width": 768, "adapter_width": 96, "num_adapters": 1, "num_experts": 0},
}
REFUSED = [
    *((op, "meta", {"device": torch.device("meta")}, {}) for op in OPS),
    *((op, "float64", {"dtype": torch.float64, "weight_dtype": torch.float64}, {}) for op in OPS),
    ("prompt_diffusion", "float16", {"weight_dtype": F16}, {}),
    ("prompt_diffusion", "1025", {}, {"num_prompts": 1025}),
    ("prompt_diffusion", "4000000", {}, {"width": 4_000_000, "num_prompts": 1024}),
    ("prompt_compress", "65536", {}, {"num_heads": 65536}),
    ("skip_adapter", "769", {}, {"adapter_width": 769}),
    ("skip_adapter", "70000", {}, {"num_adapters": 70_000}),
    ("skip_adapter", "4000000", {}, {"width": 4_000_000, "adapter_width": 600}),
    ("skip_adapter", "2000000", {}, {"width": 2_000_000, "adapter_width": 600, "num_experts": 2}),
]


def refusal(op, sizes=None, **facts):
    call = Call(torch.device(DEVICE), BF16, BF16, FACTS[op] | (sizes or {}))._replace(**facts)
    return backend.refuses(call) or OPS[op].kernels["triton"].refuses(call)


@pytest.mark.parametrize(("op", "reason", "facts", "sizes"), REFUSED)
def test_refuses(op, reason, facts, sizes):
    assert refusal(op) is None
    assert reason in refusal(op, sizes, **facts)


@pytest.fixture
def uncached():
    backend.unavailable.cache_clear()
    yield
    backend.unavailable.cache_clear()


def test_unavailable_without_triton(monkeypatch, uncached):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in backend.unavailable()


def test_unavailable_without_device_or_interpreter(monkeypatch, uncached):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in backend.unavailable()
    assert "runs on cuda" in refusal("prompt_diffusion", device=torch.device("cpu"))
