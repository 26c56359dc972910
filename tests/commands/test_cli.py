"""The command line: what it prints where, its exit codes, and its documented JSON."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from planted_backend import plant

import fast_prompt
from fast_prompt.backends import BACKENDS
from fast_prompt.bench import probes, prompt_diffusion
from fast_prompt.cli import main
from fast_prompt.ops.declaration import OPS
from fast_prompt.reference.skip_adapter import Adapter

BENCH = ("bench", "--op", "prompt_diffusion", "--rounds", "2")
SMALL = "B=2,n=9,d=32,p=4"
PARITY_KEYS = ["op", "backend", "dtype", "case", "what", "error", "tolerance", "ok"]
BENCH_KEYS = ["op", "shape", "dtype", "pass", "contender", "kind", "ms", "spread", "speedup", "floor_ms"]


def scaled_forward(factor):
    """For ``plant``: multiplies the right output by ``factor``."""
    return lambda what, value, tensors: value * factor if what == "forward" else value


@pytest.fixture
def quick(monkeypatch):
    """Nothing is compiled, and the machine's rates are measured on little: neither is what these tests are about."""
    monkeypatch.setattr(prompt_diffusion, "COMPILED", {})
    monkeypatch.setattr(probes, "SQUARE", {"cpu": 64})
    monkeypatch.setattr(probes, "COPY_BYTES", 2**16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking threads for so little costs more than the work
    yield
    torch.set_num_threads(threads)


def run_json(capsys, *argv):
    """Exit code, the JSON that is all of stdout, and stderr."""
    code = main([*argv, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


# Wrong arguments


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), "COMMAND"),
        (("nonsense",), "'nonsense'"),
        (("parity", "--op", "nonsense"), "--op"),
        (("parity", "--backend", "nonsense"), "--backend"),
        (("parity", "--dtype", "fp8"), "--dtype"),
        (("parity", "--nonsense"), "--nonsense"),
        (("bench",), "--op"),
        ((*BENCH, "--shape", "B=8,n=2"), "--shape"),
        ((*BENCH, "--shape", "B=8,n=2,d=4,p=2,q=1"), "--shape"),
        ((*BENCH, "--shape", "B=8,n=2,d=4,p=0"), "--shape"),
        ((*BENCH, "--shape", "B=8,n=2,d=4,p=-3"), "--shape"),
        ((*BENCH, "--shape", "B=8,n=2,d=4,p=2,p=2"), "--shape"),
        ((*BENCH, "--shape", "8x2x4"), "--shape"),
        ((*BENCH, "--shape", "B=8,n=2,d=4,p=2000"), "--shape"),
        ((*BENCH, "--dtype", "int8"), "--dtype"),
        ((*BENCH, "--pass", "bwd"), "--pass"),
        (("bench", "--op", "apt_model", "--pass", "fwdbwd"), "--pass"),
        ((*BENCH, "--rounds", "0"), "--rounds"),
        ((*BENCH, "--rounds", "many"), "--rounds"),
        ((*BENCH, "--device", "nonsense"), "--device"),
        (("info", "extra"), "extra"),
        (("answer", "--image", "a.png", "--question", "why?"), "--adapter"),
    ],
)
def test_wrong_arguments_give_one_line_that_names_them(capsys, argv, expected):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize("command", ["demo", "answer", "search", "cost", "parity", "bench", "info"])
def test_help_has_examples(capsys, command):
    for argv in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 0
        assert f"fast-prompt {command}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fast-prompt {fast_prompt.__version__}\n"


def test_a_missing_package_breaks_only_the_command_that_needs_it(capsys, monkeypatch):
    genuine = importlib.import_module

    def without_sklearn(name, *args):
        if name == "fast_prompt.cli.demo":
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return genuine(name, *args)

    monkeypatch.setattr(importlib, "import_module", without_sklearn)
    assert main(["info"]) == 0
    capsys.readouterr()
    assert main(["demo"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "sklearn" in captured.err


def test_interrupting_ends_quietly(capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fast_prompt.parity.run", interrupted)
    assert main(["parity", "--json"]) == 130
    assert capsys.readouterr().out == ""


# info


def test_info_says_of_every_backend_whether_it_exists_or_why_not(capsys):
    code, facts, _ = run_json(capsys, "info")
    assert code == 0
    assert set(facts) == {"versions", "devices", "cpu", "backends", "build", "transformers"}
    assert {"fast_prompt", "python", "torch", "transformers", "triton"} <= set(facts["versions"])
    assert set(facts["transformers"]) == {"installed", "oldest", "newest", "tested", "note"}
    assert facts["devices"][0]["device"] == "cpu"
    assert set(facts["backends"]) == set(BACKENDS)
    assert facts["backends"]["reference"] == {"available": True, "reason": None}
    for entry in facts["backends"].values():
        assert entry["available"] == (entry["reason"] is None)


def test_info_for_people_shows_the_same(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in ("fast_prompt", fast_prompt.__version__, "torch", *BACKENDS):
        assert word in shown


# parity


GRADIENTS = {
    "prompt_diffusion": ("hidden", "source", "prompts", "keys", "log_scale"),
    "prompt_compress": ("query", "visual", "key_weight", "value_weight", "value_bias"),
    "skip_adapter": ("x", *Adapter._fields, "gates", "kept"),
}


def test_parity_json(capsys, quick):
    code, payload, _ = run_json(capsys, "parity", "--backend", "reference", "--dtype", "fp32")
    assert code == 0
    assert list(payload) == ["rows"]
    assert all(list(row) == PARITY_KEYS for row in payload["rows"])
    found = {(row["op"], row["what"]) for row in payload["rows"]}
    assert found == {(op, what) for op, names in GRADIENTS.items() for what in ("forward", *names)}
    assert all(row["ok"] and row["error"] <= row["tolerance"] == 2e-5 for row in payload["rows"])


def test_parity_for_people_says_how_many_passed(capsys, quick):
    assert main(["parity", "--backend", "reference", "--dtype", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert "ragged" in shown
    assert ", 0 too large" in shown


def test_parity_fails_when_a_backend_is_wrong(capsys, monkeypatch):
    plant(monkeypatch, scaled_forward(1.001), "wrong").backward = None
    code, payload, errors = run_json(capsys, "parity", "--backend", "wrong", "--dtype", "fp32")
    assert code == 1
    assert not next(row for row in payload["rows"] if row["what"] == "forward")["ok"]
    source = next(row for row in payload["rows"] if row["what"] == "source")  # it has no backward at all
    assert source["error"] is None and not source["ok"]  # JSON has no infinity
    assert "FAILED: prompt_diffusion on wrong, fp32" in errors
    assert "RAISED: prompt_diffusion wrong fp32 plain: TypeError" in errors


def test_parity_fails_when_a_named_backend_cannot_run(capsys, monkeypatch):
    plant(monkeypatch, name="absent").unavailable = lambda: "no such chip"
    code, payload, errors = run_json(capsys, "parity", "--backend", "absent", "--dtype", "fp32")
    assert (code, payload) == (1, {"rows": []})
    assert "not run: prompt_diffusion on absent: no such chip" in errors


def test_parity_lists_a_backend_that_nobody_named_and_cannot_run(capsys, monkeypatch):
    for name in reversed(list(BACKENDS)):  # undone last first, so that they come back in their order of preference
        monkeypatch.delitem(BACKENDS, name)
    plant(monkeypatch, name="absent").unavailable = lambda: "no such chip"
    code, _, errors = run_json(capsys, "parity", "--dtype", "fp32")
    assert code == 0
    assert "no such chip" in errors


# bench


def test_bench_json(capsys, monkeypatch, quick):
    plant(monkeypatch)
    code, payload, _ = run_json(capsys, *BENCH, "--pass", "fwd", "--shape", SMALL, "--shape", "p=1,d=8,B=1,n=3")
    assert code == 0
    assert set(payload) == {"machine", "rows"}
    assert {"name", "cpu", "versions", "gemm_gflops", "copy_gib_s"} <= set(payload["machine"])
    assert all(list(row) == BENCH_KEYS for row in payload["rows"])
    assert list(dict.fromkeys(row["shape"] for row in payload["rows"])) == [SMALL, "B=1,n=3,d=8,p=1"]
    kinds = {row["contender"]: row["kind"] for row in payload["rows"]}
    assert kinds["reference"] == kinds["eager_in_place"] == "baseline"
    assert kinds["planted"] == "ours"
    for row in payload["rows"]:
        assert row["ms"] > 0 and row["floor_ms"] > 0 and row["spread"] >= 0 and row["speedup"] > 0


def test_bench_saved_bytes(capsys, quick):
    argv = (*BENCH, "--pass", "fwdbwd", "--shape", SMALL, "--saved-bytes")
    code, payload, _ = run_json(capsys, *argv)
    assert code == 0
    saved = {row["contender"]: row["saved_bytes"] for row in payload["rows"]}
    activations = 4 * 2 * 9 * 32
    assert saved["reference"] >= 2 * activations
    if "cpu" in saved:
        assert saved["cpu"] <= 2 * activations + 64  # X, one output, and a scalar or two


def test_bench_gives_no_speedup_where_parity_fails(capsys, monkeypatch, quick):
    plant(monkeypatch, scaled_forward(1.001), "wrong")
    code, payload, errors = run_json(capsys, *BENCH, "--pass", "fwd", "--shape", SMALL)
    assert code == 1
    speedups = {row["contender"]: row["speedup"] for row in payload["rows"]}
    assert speedups.pop("wrong") is None
    assert None not in speedups.values()
    assert f"no speed-up for wrong, {SMALL}, fp32, fwd: parity fails: forward" in errors


def test_bench_goes_on_without_a_contender_that_raises(capsys, monkeypatch, quick):
    """A baseline that cannot run here (no compiler, say) is named; one of ours fails the command too."""

    def broken(*tensors, **options):
        raise RuntimeError("no compiler")

    argv = (*BENCH, "--pass", "fwd", "--shape", SMALL)
    monkeypatch.setattr(prompt_diffusion, "COMPILED", {"broken": broken})
    code, payload, errors = run_json(capsys, *argv)
    assert code == 0
    assert "broken" not in {row["contender"] for row in payload["rows"]}
    assert "not run: broken" in errors and "no compiler" in errors
    plant(monkeypatch).forward = broken
    assert run_json(capsys, *argv)[0] == 1


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.skipif(BACKENDS["cpu"].unavailable() is not None, reason="there is no compiled library to call")
def test_bench_overhead(capsys, op):
    code, payload, _ = run_json(capsys, "bench", "--op", op, "--overhead", "--rounds", "1", "--device", "cpu")
    assert code == 0 and set(payload) == {"machine", "overhead"}
    assert [entry["call"] for entry in payload["overhead"]] == ["no gradient", "gradient recorded"]
    for entry in payload["overhead"]:
        assert entry["op"] == op and entry["registered_us"] > 0
        assert entry["python_us"] == pytest.approx(entry["call_us"] - entry["registered_us"])
    assert main(["bench", "--op", op, "--overhead", "--rounds", "1", "--device", "cpu"]) == 0
    assert f"{op}, one row, microseconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--op", "route_block"), "argument --op: op: expected one of "),
        (("--op", "prompt_diffusion", "--shape", SMALL), "argument --shape: expected none with --overhead"),
        (("--op", "prompt_diffusion", "--dtype", "bf16"), "argument --dtype: expected none with --overhead"),
        (("--op", "prompt_diffusion", "--pass", "fwd"), "argument --pass: expected none with --overhead"),
        (("--op", "prompt_diffusion", "--saved-bytes"), "argument --saved-bytes: expected none with --overhead"),
    ],
)
def test_bench_overhead_refuses_what_it_would_ignore(capsys, argv, expected):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--overhead", *argv])
    assert ended.value.code == 2 and expected in capsys.readouterr().err


def test_bench_for_people(capsys, quick):
    assert main([*BENCH, "--shape", SMALL, "--dtype", "bf16", "--dtype", "fp32"]) == 0
    shown = capsys.readouterr().out
    for dtype in ("bf16", "fp32"):
        for name in ("fwd", "fwdbwd"):
            assert f"prompt_diffusion {SMALL} {dtype} {name}, floor" in shown


@pytest.mark.gate
def test_a_process_of_its_own_prints_nothing_but_json():
    """The whole way, compilers included: python -m fast_prompt."""
    argv = [sys.executable, "-m", "fast_prompt", *BENCH, "--pass", "fwd", "--shape", SMALL, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    contenders = {row["contender"] for row in json.loads(done.stdout)["rows"]}
    assert {"compiled_reference", "compiled_eager"} <= contenders
