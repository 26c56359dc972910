"""The CUDA backend as Python sees it: what the library holds, and the reasons for its absence. Kernels: test_simt."""

import subprocess
import sys
from pathlib import Path

import build_cache
import pytest
import torch

from fast_prompt.backends import BACKENDS, Call, cpu, cuda, native
from fast_prompt.ops.declaration import OPS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import build_native  # noqa: E402 (lives beside setup.py, outside the package)

CALL = Call(torch.device("cuda"), torch.bfloat16, torch.bfloat16, {"width": 768, "num_prompts": 200})


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))


def refusal(num_prompts=200, **facts):
    call = CALL._replace(sizes=CALL.sizes | {"num_prompts": num_prompts}, **facts)
    return cuda.refuses(call) or OPS["prompt_diffusion"].kernels["cuda"].refuses(call)


@pytest.mark.usefixtures("ampere")
def test_refusals_say_what_and_why():
    assert refusal() is None and refusal(weight_dtype=torch.float32) is None
    assert "not on cpu" in refusal(device=torch.device("cpu"))
    assert "float64" in refusal(dtype=torch.float64)
    assert "not in torch.float16" in refusal(weight_dtype=torch.float16)
    assert "up to 1024 prompts, not 1025" in refusal(num_prompts=1025)
    narrow = {"dtype": torch.float32, "weight_dtype": torch.float32}
    assert "up to 768 prompts" in refusal(num_prompts=769, **narrow)


def test_old_chip_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "not 7.5" in refusal()


def test_cuda_is_a_backend_before_the_reference():
    names = list(BACKENDS)
    assert names.index("cuda") < names.index("reference")


@pytest.mark.parametrize(
    "info, reason",
    [
        ({"cuda": {"built": False, "reason": "no nvcc: looked for nvcc"}}, "no nvcc: looked for nvcc"),
        ({}, "before there were any"),
    ],
)
def test_library_without_kernels_is_a_reason(monkeypatch, info, reason):
    monkeypatch.setattr(native, "unavailable", lambda: None)
    monkeypatch.setattr(native, "build_info", lambda: {"built": True, **info})
    assert reason in cuda.unavailable.__wrapped__()


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_one_library_serves_a_torch_without_cuda():
    """It is loaded, kernels and all; what it lacks is torch's CUDA, found weakly."""
    reason = cuda.unavailable.__wrapped__()
    if not native.build_info()["cuda"]["built"]:
        assert native.build_info()["cuda"]["reason"] in reason
        pytest.skip(reason)
    assert "has no CUDA" in reason
    library = Path(cpu.__file__).parent.parent / "_native.so"
    symbols = subprocess.run(["nm", "-D", library], text=True, capture_output=True, check=True).stdout
    assert any(line.split() == ["w", "aoti_torch_get_current_cuda_stream"] for line in symbols.splitlines())


def test_missing_nvcc_is_a_reason_and_leaves_cuda_out(monkeypatch):
    monkeypatch.setenv("NVCC", "/nonexistent/nvcc")
    assert build_native.find_cuda() == "no nvcc: looked for /nonexistent/nvcc"
    tools = build_native.Toolchain("c++", "ninja", Path("torch"), "2.13", build_native.find_cuda())
    text = build_native.ninja_file(tools)
    assert not any(word in text for word in ("bind/cuda", "compile_cuda", "cudart"))


def fake_nvcc(tmp_path, chips, compiles):
    script = tmp_path / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --list-gpu-code ] && {{ printf "{chips}"; exit 0; }}\n'
        f'[ "$1" = -c ] && {{ echo "unsupported GNU version" >&2; exit {0 if compiles else 1}; }}\n'
        '[ "$1" = --dryrun ] && echo "#\\$ LIBRARIES=  \\"-L/cuda/lib\\"" >&2\n'
        '[ "$1" = --version ] && printf "nvcc\\nBuild 12\\n"\n'
    )
    script.chmod(0o755)
    return str(script)


def test_nvcc_that_does_not_compile_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("NVCC", fake_nvcc(tmp_path, "sm_80\\nsm_90\\n", compiles=False))
    assert "unsupported GNU version" in build_native.find_cuda()


def test_old_nvcc_compiles_for_the_chips_it_knows(monkeypatch, tmp_path):
    monkeypatch.setenv("NVCC", fake_nvcc(tmp_path, "sm_80\\nsm_90\\n", compiles=True))
    found = build_native.find_cuda()
    assert found.chips == ("80", "90") and found.version == "Build 12" and found.library_flags == '"-L/cuda/lib"'
    text = build_native.ninja_file(build_native.Toolchain("c++", "ninja", Path("torch"), "2.13", found))
    assert "code=compute_90" in text and "sm_100" not in text and "-lcudart_static" in text


def test_nvcc_too_old_for_any_chip_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("NVCC", fake_nvcc(tmp_path, "sm_75\\n", compiles=True))
    assert "none of sm_80" in build_native.find_cuda()


@pytest.mark.gate
def test_the_bindings_compile_and_ask_for_every_kernel():
    """Where torch has no CUDA, no build compiles them; the kernels themselves are compiled by other gates."""
    tools, source = build_native.find_toolchain("not needed"), build_native.ROOT / "csrc" / "bind" / "cuda.cpp"
    includes = [tools.torch_dir / "include", tools.torch_dir / "include" / "torch" / "csrc" / "api" / "include"]
    flags = [*build_native.COMMON_FLAGS.split(), build_native.BINDING_FLAGS, *(f"-isystem{path}" for path in includes)]
    command = [tools.compiler, *flags, "-c", str(source), "-o", "cuda.o"]
    compiled = build_cache.cached(command, [source], [source.parent, *includes]) / "cuda.o"
    listing = subprocess.run(["nm", "-C", "-u", compiled], text=True, capture_output=True, check=True).stdout
    wanted = {line.split()[-1] for line in listing.splitlines() if "fast_prompt::cuda::" in line}
    assert wanted == {f"fast_prompt::cuda::{element}::{op}" for element in build_native.CUDA_ELEMENTS for op in OPS}
