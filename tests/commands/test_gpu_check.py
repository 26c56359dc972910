"""``make gpu-check`` as far as a machine without a GPU goes: its steps, their failures, and what is told of them."""

import io
import json
import sys
import time
import traceback
from contextlib import redirect_stdout

import pytest
import torch

from fast_prompt import bench, parity
from fast_prompt.backends import cpu
from fast_prompt.bench import prompt_diffusion as diffusion_bench
from fast_prompt.ops.declaration import OPS
from gpu_check import machine, page, report, runner
from gpu_check.__main__ import main as gpu_check_main
from gpu_check.place import DRY, GPU
from gpu_check.steps import Step, steps

OP = "prompt_diffusion"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_exits_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check_main() == 2
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and "no CUDA GPU" in output


# ---- A dry run ----


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The command's record and output. All steps but one run here: a process of its own spends its time on imports."""
    out, printed = tmp_path_factory.mktemp("gpu_check"), io.StringIO()
    in_a_process = runner._run_process

    def run_process(step, place, figures, log, limit):
        if step.stage == "cold":  # the one that needs an environment most
            return in_a_process(step, place, figures, log, limit)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in step.environment.items():
                patch.setenv(name, value)
            try:
                return runner.run_here(step, place, figures)
            except Exception:
                log.write_text(traceback.format_exc())
                return 1

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(runner, "_run_process", run_process)
        patch.setattr(runner, "_workers", lambda: 1)  # which backend is in use is the same for all threads
        patch.setattr(sys, "argv", ["gpu_check", "--dry-run", "--op", OP, "--out", str(out)])
        code = gpu_check_main()
    content = json.loads((out / runner.RECORD).read_text())
    assert code == 0, [entry for entry in content["steps"] if entry["status"] != "passed"]
    return content, printed.getvalue()


needs_library = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@needs_library
def test_a_dry_run_passes_every_step(dry_run):
    content, output = dry_run
    expected = [step.name for step in steps(DRY, [OP])]
    assert sorted(entry["name"] for entry in content["steps"]) == sorted(expected)
    assert {entry["status"] for entry in content["steps"]} == {"passed"}
    progress = [line for line in output.splitlines() if " passed " in line and " s  " in line]
    assert len(progress) == len(expected)


@needs_library
def test_the_record_says_what_ran_where(dry_run):
    content, _ = dry_run
    assert content["dry_run"] is True and content["seconds"] > 0
    facts = content["machine"]
    assert facts.keys() >= {"device", "compute_capability", "l2_bytes", "versions", "revision", "sources"}
    assert facts["versions"].keys() >= {"torch", "triton", "nvcc", "driver", "python", "cuda"}
    assert facts["sources"][OP].keys() == {"triton", "cuda"}
    for entry in content["steps"]:
        assert entry.keys() == {"name", "stage", "op", "backend", "variant", "status", "seconds", "figures"}


@needs_library
def test_every_step_left_its_figures(dry_run):
    content, _ = dry_run
    figures = {entry["stage"]: entry["figures"] for entry in content["steps"]}
    assert figures["build"]["planned"] > 3
    assert figures["parity"]["comparisons"] > 100 and not figures["parity"]["failures"]
    stress = {"cuda_graph", "cuda_graph_of_numbers", "two_streams", "other_device", "torch_compile", "same_bits"}
    assert figures["stress"].keys() == stress
    assert figures["huge"]["elements"] > DRY.huge and figures["huge"]["last"] == "passed"
    for stage in ("cold", "launched", "tuned"):
        rows = figures[stage]["rows"]
        assert {row["pass"] for row in rows} == {"fwd", "fwdbwd"} and "cpu" in {row["contender"] for row in rows}
        assert figures[stage]["gemm_tflops"] > 0 and figures[stage]["copy_gb_s"] > 0
    assert figures["cold"]["cold_bytes"] > 0 and figures["launched"]["cold_bytes"] == 0


@needs_library
def test_a_dry_run_is_never_taken_for_a_measurement(dry_run, monkeypatch, tmp_path):
    content, _ = dry_run
    folder = tmp_path / "bench" / "results" / "some-gpu"
    folder.mkdir(parents=True)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    for dry, found in ((True, 0), (False, 1)):
        (folder / runner.RECORD).write_text(json.dumps(content | {"dry_run": dry}))
        assert len(page.records()) == found


# ---- The table of steps ----


def test_an_op_in_the_tables_of_parity_and_bench_has_every_step(monkeypatch):
    """Nothing else needs to be told of a new op."""
    monkeypatch.setitem(bench.OPS, "another", diffusion_bench)
    monkeypatch.setitem(OPS, "another", OPS[OP])
    assert [step.name for step in steps(GPU, ["another"]) if step.op] == [
        step.name.replace(OP, "another") for step in steps(GPU, [OP]) if step.op
    ]


def test_a_gpu_gets_every_backend_dtype_and_tool():
    names = [step.name for step in steps(GPU, [OP])]
    for backend in ("triton", "cuda"):
        assert [f"parity {OP} {backend} {dtype}" in names for dtype in parity.DTYPES] == [True] * 3
        assert f"stress {OP} {backend}" in names and f"huge {OP} {backend}" in names
    assert f"sanitizer {OP} cuda memcheck" in names and f"sanitizer {OP} cuda racecheck" in names
    assert len(set(names)) == len(names)


def test_what_is_timed_runs_alone():
    for batch in runner.batches(steps(GPU)):
        assert len(batch) == 1 or {step.stage for step in batch} <= set(runner.SIDE_BY_SIDE)


def test_the_shapes_of_the_aims_are_timed():
    shapes = GPU.shapes(OP)
    assert [shape["p"] for shape in shapes if shape["B"] == 64] == [16, 64, 200]
    assert {shape["n"] for shape in shapes} == {577} and {shape["B"] for shape in shapes} == {64, 1}


# ---- Steps that do not end well ----

SCRIPTS = {
    "fails": "print('before'); raise SystemExit('what was wrong')",
    "hangs": "import time; print('started', flush=True); time.sleep(60)",
    "dies": "import os, pathlib; pathlib.Path(FIGURES).write_text('{\"rows\": [1]}'); os.abort()",
    "lacks": "print('no such tool'); raise SystemExit(3)",
    "works": "pass",
}


@pytest.fixture
def outcomes(monkeypatch, tmp_path):
    """The entries of one step of each kind, and how many were on disk after each."""
    on_disk = []

    def command(step, place, figures):
        return [sys.executable, "-c", SCRIPTS[step.stage].replace("FIGURES", repr(str(figures)))]

    def write(path, content):
        on_disk.append([entry["stage"] for entry in content["steps"]])

    monkeypatch.setattr(runner, "command", command)
    monkeypatch.setattr(runner, "write_json", write)
    table = [Step(stage, 1 if stage == "hangs" else 60, lambda place, figures: None) for stage in SCRIPTS]
    record = runner.run_all(table, DRY, tmp_path)
    return {entry["stage"]: entry for entry in record.content["steps"]}, on_disk, record


def test_no_step_stops_the_later_ones(outcomes):
    entries, on_disk, record = outcomes
    expected = {"fails": "failed", "hangs": "failed", "dies": "failed", "lacks": "absent", "works": "passed"}
    assert {stage: entry["status"] for stage, entry in entries.items()} == expected
    assert [entry["stage"] for entry in record.failed] == ["fails", "hangs", "dies"]
    assert on_disk == [list(SCRIPTS)[:count] for count in range(1, len(SCRIPTS) + 1)]


def test_a_failure_keeps_its_last_lines_and_its_figures(outcomes):
    entries, _, _ = outcomes
    assert entries["fails"]["output"] == ["before", "what was wrong"]
    assert entries["hangs"]["output"] == ["not done within 1 s", "started"]
    assert entries["dies"]["figures"] == {"rows": [1]}
    assert entries["lacks"]["output"] == ["no such tool"]
    assert "output" not in entries["works"]


def test_steps_after_the_time_for_all_are_failures(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "TOTAL_SECONDS", 0)
    record = runner.run_all([Step("machine", 60, machine.describe)], DRY, tmp_path)
    assert record.failed[0]["output"] == ["no time was left for it"]


def test_an_interruption_stops_what_runs_and_what_waits(monkeypatch, tmp_path):
    def interrupted(record, entry):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Record, "add", interrupted)
    script = {"works": SCRIPTS["works"], "hangs": SCRIPTS["hangs"]}
    monkeypatch.setattr(runner, "command", lambda step, *_: [sys.executable, "-c", script[step.variant]])
    table = [Step("parity", 60, lambda place, figures: None, variant=name) for name in ("hangs", "works", "hangs")]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner.run_all(table, DRY, tmp_path)
    assert time.monotonic() - start < 30 and not runner._processes


def test_a_missing_package_is_absence_and_a_missing_module_of_ours_is_not(tmp_path):
    def lacking(name):
        def run(place, figures):
            raise ModuleNotFoundError(name=name)

        return Step("stage", 1, run)

    assert runner.run_here(lacking("transformers"), DRY, tmp_path / "figures") == runner.ABSENT
    with pytest.raises(ModuleNotFoundError):
        runner.run_here(lacking("fast_prompt.nothing"), DRY, tmp_path / "figures")


# ---- What is told of a record ----


def timed(stage, **milliseconds):
    """A step whose rows are these contenders' times, with a floor of 1 ms."""
    rows = [
        {"op": OP, "shape": "B=64", "pass": "fwd", "contender": name, "ms": ms, "floor_ms": 1.0, "speedup": 1.0}
        | {"kind": "ours" if name in ("triton", "cuda") else "baseline"}
        for name, ms in milliseconds.items()
    ]
    return {
        "stage": stage,
        "op": OP,
        "backend": "",
        "figures": {"rows": rows, "gemm_tflops": 700.0, "copy_gb_s": 3000.0},
    }


def proved(stage, variant="", status="passed"):
    return {"stage": stage, "op": OP, "backend": "cuda", "variant": variant, "status": status, "figures": {}}


def measured(*step_entries, sources):
    facts = {"device": "GPU 9000", "compute_capability": "9.0", "revision": "abc", "sources": {OP: sources}}
    facts["versions"] = dict.fromkeys(("driver", "torch", "triton", "nvcc"), "1.2")
    return {"dry_run": False, "machine": facts, "steps": list(step_entries)}


def test_speed_ups_are_of_the_faster_of_ours():
    cold = timed("cold", reference=9, eager_addmm=5, compiled_eager=4, triton=1.25, cuda=2)
    tuned = timed("tuned", compiled_eager=3, eager_addmm=1, triton=1.5)
    content = measured(cold, tuned, sources={})
    line = dict(zip(report.SPEED_HEADERS, report.speed_rows(content)[0], strict=True))
    assert line["floor us"] == "1000.0" and line["triton us"] == "1250.0" and line["cuda us"] == "2000.0"
    assert (line["% of floor"], line["x eager"], line["x compile"], line["x tuned"]) == ("80%", "4.00", "3.20", "2.00")


def test_a_contender_that_fails_parity_gives_no_speed_up():
    cold = timed("cold", eager_addmm=5, triton=1.25, cuda=0.1)
    cold["figures"]["rows"][-1]["speedup"] = None
    line = dict(zip(report.SPEED_HEADERS, report.speed_rows(measured(cold, sources={}))[0], strict=True))
    assert line["x eager"] == "4.00" and line["x tuned"] == "-"


def test_the_page_in_the_repository_is_what_the_records_say():
    assert page.PAGE.read_text() == page.render(page.records()), "run `make docs`"


def test_a_kernel_no_gpu_has_run_is_marked_so():
    text = page.render([])
    assert text.count(page.NOT_YET) == sum(len(machine.kernel_files(op)) for op in OPS) > 1
    assert "Not measured on any GPU yet" in text


def test_a_gpu_s_record_says_what_passed_what_failed_and_whether_the_kernel_has_changed():
    entries = (proved("parity", "bf16"), proved("parity", "fp32", "failed"), proved("stress"))
    current = {"cuda": machine.digest(OP, "cuda")}
    lines = {}
    for name, sources in (("same", current), ("changed", {"cuda": "0" * 12})):
        text = page.render([measured(*entries, timed("cold", triton=2.0), sources=sources)])
        lines[name] = next(line for line in text.splitlines() if "GPU 9000" in line)
    assert "`csrc/cuda/prompt_diffusion.cu`" in lines["same"]
    assert "parity passed (bf16); parity FAILED (fp32); stress passed" in lines["same"]
    assert "before its last change" in lines["changed"] and "before its last change" not in lines["same"]
    assert "700 TFLOP/s" in text and "Not measured" not in text


def test_a_digest_tells_any_change_of_a_kernel_s_files(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    header = tmp_path / "csrc" / "cuda" / "tile.cuh"
    header.parent.mkdir(parents=True)
    header.write_text("one")
    before = machine.digest(OP, "cuda")
    header.with_name("prompt_compress.cu").write_text("another op's")
    assert machine.digest(OP, "cuda") == before
    header.write_text("two")
    assert machine.digest(OP, "cuda") != before


def test_names_of_folders():
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
