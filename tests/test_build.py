"""setup.py: compiles where it can, says what is missing where it cannot, fails where it must not go on without."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import build_native  # noqa: E402 (lives beside setup.py, outside the package)


@pytest.fixture
def project(tmp_path):
    """A copy of what a build needs."""
    for name in ("setup.py", "build_native.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fast_prompt").mkdir()
    shutil.copy(ROOT / "fast_prompt" / "__init__.py", tmp_path / "fast_prompt")
    kernels = tmp_path / "kernels" / "fast_prompt_kernels"
    kernels.mkdir(parents=True)
    (kernels / "__init__.py").touch()
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    return tmp_path


def run_setup(project, *command, **environment):
    without_nvcc = {"NVCC": "/nonexistent/nvcc"}  # the CUDA kernels take minutes
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | without_nvcc | environment
    command = [sys.executable, "setup.py", "-q", *command]
    return subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True, check=False)


def wheel_of(project):
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("fast_prompt/_build.json"))
    return wheel.name, names, record


def test_no_compiler_gives_a_pure_wheel_that_says_so(project):
    done = run_setup(project, "bdist_wheel", CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "without the native library: no C++ compiler: looked for /nonexistent/c++" in done.stderr
    name, names, record = wheel_of(project)
    assert name.endswith("-py3-none-any.whl") and not any(entry.endswith(".so") for entry in names)
    assert record["built"] is False and "/nonexistent/c++" in record["reason"]


def test_no_torch_gives_a_pure_wheel_that_says_so(project):
    hidden = project / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('no torch here')")
    done = run_setup(project, "bdist_wheel", PYTHONPATH=str(hidden))
    assert done.returncode == 0, done.stderr
    record = wheel_of(project)[2]
    assert record["built"] is False and "--no-build-isolation" in record["reason"]


def test_required_library_fails_loudly(project):
    done = run_setup(project, "bdist_wheel", CXX="/nonexistent/c++", FAST_PROMPT_BUILD="1")
    assert done.returncode != 0 and "no C++ compiler" in done.stderr
    assert not (project / "dist").exists()


def test_unknown_mode_is_refused(project):
    done = run_setup(project, "--version", FAST_PROMPT_BUILD="yes")
    assert done.returncode != 0 and "'yes'" in done.stderr


def test_build_can_be_switched_off_and_removes_a_stale_library(project):
    stale = project / "fast_prompt" / "_native.so"
    stale.touch()
    done = run_setup(project, "bdist_wheel", FAST_PROMPT_BUILD="0")
    assert done.returncode == 0, done.stderr
    _, names, record = wheel_of(project)
    assert not any(entry.endswith(".so") for entry in names)
    assert "FAST_PROMPT_BUILD=0" in record["reason"]


@pytest.fixture
def fake_compiler(tmp_path):
    """A compiler that writes empty objects at once, or fails when told to."""
    script = tmp_path / "c++"
    script.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && { echo "fake 1.0"; exit 0; }\n'
        '[ -n "$FAKE_FAILS" ] && { echo "fake: no such flag"; exit 1; }\n'
        'for last; do :; done; echo > "$last"\n'
    )
    script.chmod(0o755)
    return str(script)


def test_wheel_holds_the_library_for_every_python(project, fake_compiler):
    done = run_setup(project, "bdist_wheel", CXX=fake_compiler, FAST_PROMPT_BUILD="1")
    assert done.returncode == 0, done.stderr
    name, names, record = wheel_of(project)
    assert "-py3-none-linux" in name
    assert "fast_prompt/_native.so" in names
    assert record["built"] and record["compiler"] == "fake 1.0"
    assert str(project) not in json.dumps(record)


def test_failed_compilation_is_recorded(project, fake_compiler):
    done = run_setup(project, "build_ext", "--inplace", CXX=fake_compiler, FAKE_FAILS="1")
    assert done.returncode == 0, done.stderr
    record = json.loads((project / "fast_prompt" / "_build.json").read_text())
    assert record["built"] is False and "fake: no such flag" in record["reason"]
    done = run_setup(project, "build_ext", "--inplace", CXX=fake_compiler, FAKE_FAILS="1", FAST_PROMPT_BUILD="1")
    assert done.returncode != 0 and "fake: no such flag" in done.stderr


def test_kernels_share_no_symbol_between_instruction_sets():
    """A symbol that two levels both define would be merged, and AVX-512 code could run where there is none."""
    objects = {level: build_native.BUILD_DIR / f"prompt_diffusion.{level}.o" for level in build_native.INSTRUCTION_SETS}
    if not all(path.exists() for path in objects.values()) or shutil.which("nm") is None:
        pytest.skip("needs nm and the object files of a build in this checkout")
    for level, path in objects.items():
        listing = subprocess.run(["nm", "-C", "--defined-only", path], text=True, capture_output=True, check=True)
        shared = [line for line in listing.stdout.splitlines() if line.split()[1] not in "trdb"]
        assert [line.split()[-1] for line in shared] == [f"fast_prompt::cpu::{level}::prompt_diffusion"]
