"""The benchmark's machinery: who is timed, how, and what is derived from it."""

import math

import pytest
import torch

from fast_prompt import bench, parity, reference
from fast_prompt.bench import probes as bench_probes
from fast_prompt.bench import prompt_diffusion, runner
from fast_prompt.bench.contender import backends_for
from fast_prompt.bench.memory import saved_bytes
from fast_prompt.bench.probes import Probe, probes, rates
from fast_prompt.bench.timing import Timing, interleave, rotation, stopwatch_for
from fast_prompt.tolerances import TOLERANCES

CPU = torch.device("cpu")
SHAPE = {"B": 2, "n": 19, "d": 32, "p": 8}


@pytest.fixture
def quick(monkeypatch):
    """Nothing is compiled, and the machine's rates are measured on little: neither is what these tests are about."""
    monkeypatch.setattr(prompt_diffusion, "COMPILED", {})
    monkeypatch.setattr(bench_probes, "SQUARE", {"cpu": 64})
    monkeypatch.setattr(bench_probes, "COPY_BYTES", 2**16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking threads for so little costs more than the work
    yield
    torch.set_num_threads(threads)


def test_median_and_spread():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 5.0))
    assert timing.median == 3.0
    assert timing.spread == pytest.approx(2.0 / 3.0)  # quartiles 2 and 4
    assert Timing((1.0,)).spread == 0.0


def test_the_interpreter_is_not_timed():
    """TRITON_INTERPRET is set for these tests, so Triton can take the call."""
    assert not {"triton", "reference"} & set(
        backends_for("prompt_diffusion", CPU, torch.float32, width=32, num_prompts=8)
    )


def test_contenders_take_turns_in_changing_order():
    seen = []

    def stopwatch(function, repeats):
        function()
        return 1.0

    timings = interleave({name: lambda name=name: seen.append(name) for name in "abc"}, stopwatch, rounds=20)
    rounds = ["".join(seen[i : i + 3]) for i in range(len(seen) - 60, len(seen), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) > 1
    assert {len(timing.seconds) for timing in timings.values()} == {20}


def test_stopwatch_gives_seconds_a_call():
    calls = []
    seconds = stopwatch_for(CPU)(lambda: calls.append(1), 1000)
    assert len(calls) == 1000
    assert 0 < seconds < 1e-3


def test_floor_is_the_tighter_of_work_and_traffic():
    probed = {"slow": Probe(int, flops=100), "fast": Probe(int, flops=400), "copy": Probe(int, bytes=100)}
    best = rates(probed, {"slow": Timing((1.0,)), "fast": Timing((2.0,)), "copy": Timing((1.0,))})
    assert (best.flops, best.bytes) == (200, 100)
    assert best.floor(1000, 100) == 5.0
    assert best.floor(100, 1000) == 10.0


def test_probes_count_their_own_work():
    probed = probes(torch.bfloat16, CPU, [(6, 5, 4)], traffic=120)
    assert probed["mm torch.bfloat16 6x5x4"].flops == 240
    assert probed["copy 120 bytes"].bytes == 120
    assert "mm torch.float32 6x5x4" in probed
    for name in ("mm torch.bfloat16 6x5x4", "copy 120 bytes"):
        probed[name].function()


def test_flops_and_traffic():
    rows = SHAPE["B"] * SHAPE["n"]
    forward = sum(2 * m * k * n for m, k, n in prompt_diffusion.products(SHAPE))
    assert prompt_diffusion.flops(SHAPE, backward=False) == forward
    assert prompt_diffusion.flops(SHAPE, backward=True) == 3 * forward
    assert prompt_diffusion.traffic(SHAPE, torch.bfloat16, backward=False) == 2 * (3 * rows * 32 + 2 * 8 * 32)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_eager_baseline_computes_the_op(dtype, backward):
    """A baseline that computes something else would make any speed-up a lie."""
    problem = prompt_diffusion.problem(SHAPE, dtype, CPU)
    expected = parity.evaluate(reference.prompt_diffusion, problem.double(), backward)
    forms = prompt_diffusion.EAGER_WITH_BACKWARD if backward else prompt_diffusion.EAGER_FORWARD
    forms = forms | {f"{name} in float32": prompt_diffusion.in_float32(form) for name, form in forms.items()}
    for name, form in forms.items():
        errors = parity.compare(parity.evaluate(form, problem, backward), expected)
        assert max(errors.values()) <= TOLERANCES[dtype], (name, errors)


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    tensors = {"x": torch.randn(10, 4), "weight": torch.randn(4, 3)}
    problem = parity.Problem(tensors, torch.ones(10, 3), trained=("x", "weight"))
    assert saved_bytes(lambda x, weight: x @ weight, problem, ("weight",)) == 10 * 4 * 4
    assert saved_bytes(lambda x, weight: x @ weight, problem, ()) == 10 * 4 * 4 + 4 * 3 * 4
    assert saved_bytes(lambda x, weight: (x * x) @ weight, problem, ("weight",)) == 2 * 10 * 4 * 4


@pytest.mark.gate
def test_the_whole_model_contenders_compute_what_they_claim(quick):
    """Prompts as tokens and as keys and values are one function; folded APT is unfolded APT."""
    setting = bench.Setting("apt_model", {"B": 2, "n": 9, "p": 5, "layers": 2}, "fp32", "fwd")
    rows, _, raised = runner.measure(setting, CPU, rounds=1)
    assert raised == []
    assert {row.contender: row.failure for row in rows if row.failure} == {}
    assert {row.contender for row in rows if row.kind == "baseline"} == {
        "untouched",
        "untouched_sdpa",
        "prompts_as_tokens",
        "prompts_as_tokens_sdpa",
        "prompts_as_keys_values",
    }
    if "cpu" in {row.contender.split("_")[0] for row in rows}:
        assert {"cpu_unfolded", "cpu_folded"} <= {row.contender for row in rows}


def test_a_routed_batch_is_what_the_usual_way_computes(quick):
    setting = bench.Setting("route_block", {"B": 5, "n": 3, "d": 64, "width": 8}, "fp32", "fwd")
    rows, _, raised = runner.measure(setting, CPU, rounds=1)
    assert raised == []
    assert {row.contender: row.failure for row in rows if row.failure} == {}
    assert {row.contender for row in rows if row.kind == "baseline"} == {"halves_apart", "both_and_select"}


def test_speedup_is_the_best_baseline_over_this_one(quick):
    setting = bench.Setting("prompt_diffusion", SHAPE, "fp32", "fwdbwd")
    rows, best, _ = runner.measure(setting, CPU, rounds=3)
    baselines = [row for row in rows if row.kind == "baseline"]
    fastest = min(row.ms for row in baselines)
    assert {row.contender for row in baselines} == {"reference", "eager_addmm", "eager_function"}
    for row in rows:
        assert row.speedup == pytest.approx(fastest / row.ms)
        assert row.gemm_share == pytest.approx(
            prompt_diffusion.flops(SHAPE, True) / (row.ms * 1e-3) / best.flops, rel=1e-6
        )
        assert row.saved_bytes is not None
    assert math.isclose(max(row.speedup for row in baselines), 1.0)


def test_a_rotation_calls_each_once_and_keeps_every_result():
    made = []

    def call():
        made.append(torch.zeros(8))
        return made[-1]

    results = rotation([call] * 3, CPU)()
    assert len(made) == len(results) == 3
    assert len({result.data_ptr() for result in results}) == 3


def test_cold_inputs_are_copies_that_fill_the_cache():
    problem = prompt_diffusion.problem(SHAPE, torch.float32, CPU)
    size = sum(tensor.nbytes for tensor in problem.tensors.values())
    for cold_bytes, different in ((1, 2), (25 * size - 1, 25)):
        inputs = runner.cold_copies(problem, cold_bytes)
        assert len({one.tensors["hidden"].data_ptr() for one in inputs}) == different
        assert len(inputs) >= runner.FEWEST_COLD_CALLS and len(inputs) % different == 0
        assert all(torch.equal(one.tensors["hidden"], problem.tensors["hidden"]) for one in inputs)


def test_cold_times_are_of_one_call(quick, monkeypatch):
    """What is timed is a whole rotation; what is told is a call."""
    monkeypatch.setattr(runner, "stopwatch_for", lambda device: lambda function, repeats: 1.0)
    setting = bench.Setting("prompt_diffusion", SHAPE, "fp32", "fwd")
    rows, _, raised = runner.measure(setting, CPU, rounds=2, cold_bytes=1)
    assert not raised
    assert {row.ms for row in rows} == {1e3 / runner.FEWEST_COLD_CALLS}


def test_what_cannot_be_rotated_is_told_and_the_others_are_timed(quick, monkeypatch):
    def refuse_the_reference(calls, device):
        names.append(len(calls))
        if len(names) == 1:
            raise RuntimeError("not while capturing")
        return rotation(calls, device)

    names = []
    monkeypatch.setattr(runner, "rotation", refuse_the_reference)
    setting = bench.Setting("prompt_diffusion", SHAPE, "fp32", "fwd")
    rows, _, raised = runner.measure(setting, CPU, rounds=1, cold_bytes=1)
    assert [(entry.contender, entry.message) for entry in raised] == [
        ("reference", "RuntimeError: not while capturing")
    ]
    assert rows and "reference" not in {row.contender for row in rows}
