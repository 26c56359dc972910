"""The build: compiles where it can, says what is missing where it cannot, fails where it must not go on without."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import build_native  # noqa: E402 (lives beside setup.py, outside the package)


@pytest.fixture
def project(tmp_path):
    """A copy of what a build needs, in a folder whose name a shell would take apart."""
    root = tmp_path / "a project"
    root.mkdir()
    for name in (
        "setup.py",
        "build_native.py",
        "pyproject.toml",
        "constraints.txt",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, root)
    (root / "fast_prompt").mkdir()
    shutil.copy(ROOT / "fast_prompt" / "__init__.py", root / "fast_prompt")
    kernels = root / "kernels" / "fast_prompt_kernels"
    kernels.mkdir(parents=True)
    (kernels / "__init__.py").touch()
    shutil.copytree(ROOT / "csrc", root / "csrc")
    return root


# The CUDA kernels take minutes, and ccache would see through the fake compilers.
QUICK = {"NVCC": "/nonexistent/nvcc", "CCACHE_DISABLE": "1"}


def environment_of(**changes):
    ours = ("CXX", *build_native.SETTINGS, build_native.ARCHS)
    return {name: value for name, value in os.environ.items() if name not in ours} | QUICK | changes


def run(project, *command, **changes):
    command = [sys.executable, *command]
    return subprocess.run(
        command, cwd=project, env=environment_of(**changes), text=True, capture_output=True, check=False
    )


def run_setup(project, *command, **changes):
    return run(project, "setup.py", "-q", *command, **changes)


def record_of(project):
    return json.loads((project / "fast_prompt" / "_build.json").read_text())


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


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("FAST_PROMPT_BUILD", "yes", "auto, 0, 1"),
        ("FAST_PROMPT_CUDA", "1", "auto, on, off"),
        ("FAST_PROMPT_CUDA_ARCHS", "80;86", "all, or some of 80;90;100"),
    ],
)
def test_unknown_setting_is_refused(project, name, value, expected):
    done = run_setup(project, "--version", **{name: value})
    assert done.returncode != 0 and f"{name}: expected {expected}; got {value!r}" in done.stderr


def test_build_can_be_switched_off_and_removes_a_stale_library(project):
    stale = project / "fast_prompt" / "_native.so"
    stale.touch()
    done = run_setup(project, "bdist_wheel", FAST_PROMPT_BUILD="0")
    assert done.returncode == 0, done.stderr
    _, names, record = wheel_of(project)
    assert not any(entry.endswith(".so") for entry in names)
    assert "FAST_PROMPT_BUILD=0" in record["reason"]


def script(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def fake_compiler(tmp_path):
    """Writes empty objects at once and logs that it did; fails when told to, and links when it may."""
    return script(
        tmp_path / "c++",
        '[ "$1" = --version ] && { echo "fake 1.0"; exit 0; }',
        '[ -n "$FAKE_FAILS" ] && { echo "fake: no such flag"; exit 1; }',
        f'echo "$@" >> {tmp_path}/compiled',
        'if [ "$1" = -shared ] && [ -n "$FAKE_WAITS_FOR" ]; then',
        '  for i in $(seq 100); do [ -e "$FAKE_WAITS_FOR" ] && break; sleep 0.1; done',
        "fi",
        'for last; do :; done; echo > "$last"',
    )


@pytest.fixture
def fake_cuda(tmp_path):
    """What the environment says where there are an nvcc and GPUs of 8.6 and 12.0."""
    nvcc = script(
        tmp_path / "nvcc",
        "case $1 in",
        '  --list-gpu-code) printf "sm_80\\nsm_90\\nsm_100\\n" ;;',
        "  --version) echo nvcc; echo Build 13 ;;",
        "  --dryrun) echo '#$ LIBRARIES=  \"-L/cuda/lib\"' >&2 ;;",
        '  *) for last; do :; done; echo > "$last" ;;',
        "esac",
    )
    programs = tmp_path / "programs"
    programs.mkdir()
    script(programs / "nvidia-smi", 'printf "8.6\\n12.0\\n"')
    return {"NVCC": nvcc, "PATH": f"{programs}:{os.environ['PATH']}"}


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
    record = record_of(project)
    assert record["built"] is False and "fake: no such flag" in record["reason"]
    done = run_setup(project, "build_ext", "--inplace", CXX=fake_compiler, FAKE_FAILS="1", FAST_PROMPT_BUILD="1")
    assert done.returncode != 0 and "fake: no such flag" in done.stderr


# ---- CUDA ----

CUDA = build_native.Cuda("/cuda/nvcc", "Build 13", build_native.CUDA_CHIPS, "-L/cuda/lib")


@pytest.mark.parametrize(
    ("mode", "torch_cuda", "expected"),
    [
        ("auto", "13.0", CUDA),
        ("auto", None, "torch 2.13 has no CUDA (FAST_PROMPT_CUDA=on compiles the kernels all the same)"),
        ("on", None, CUDA),
        ("off", "13.0", "FAST_PROMPT_CUDA=off when it was built"),
    ],
)
def test_cuda_kernels_are_for_a_torch_that_has_cuda_unless_told_otherwise(monkeypatch, mode, torch_cuda, expected):
    monkeypatch.setenv("FAST_PROMPT_CUDA", mode)
    monkeypatch.setattr(build_native, "find_torch", lambda: build_native.Torch(Path("torch"), "2.13", torch_cuda))
    monkeypatch.setattr(build_native, "find_cuda", lambda chips: CUDA._replace(chips=chips))
    assert build_native.choose_cuda() == expected


def test_no_nvcc_is_a_reason_for_auto_and_the_end_for_on(project, fake_compiler):
    torch = project / "with_cuda" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("__version__, cuda = '2.13.0+cu130', '13.0'")
    settings = {"CXX": fake_compiler, "PYTHONPATH": str(torch.parent)}
    assert run(project, "build_native.py", **settings).returncode == 0
    expected = {"built": False, "reason": "no nvcc: looked for /nonexistent/nvcc"}
    assert record_of(project)["torch"] == "2.13.0+cu130" and record_of(project)["cuda"] == expected
    done = run(project, "build_native.py", FAST_PROMPT_CUDA="on", **settings)
    assert done.returncode != 0 and "FAST_PROMPT_CUDA=on: no nvcc: looked for /nonexistent/nvcc" in done.stderr


@pytest.mark.parametrize(
    ("value", "chips"),
    [
        ("", ("80", "90", "100")),
        ("all", ("80", "90", "100")),
        ("90", ("90",)),
        ("100;80", ("80", "100")),
        ("80,90", ("80", "90")),
        ("80 90", ("80", "90")),
    ],
)
def test_archs(monkeypatch, value, chips):
    monkeypatch.setenv("FAST_PROMPT_CUDA_ARCHS", value)
    assert build_native.asked_chips() == chips


def test_a_wheel_is_for_all_chips_and_a_checkout_for_those_that_are_here(project, fake_compiler, fake_cuda):
    settings = {"CXX": fake_compiler, "FAST_PROMPT_CUDA": "on", **fake_cuda}
    assert run_setup(project, "bdist_wheel", **settings).returncode == 0
    assert wheel_of(project)[2]["cuda"] == {"built": True, "nvcc": "Build 13", "chips": ["sm_80", "sm_90", "sm_100"]}
    done = run(project, "build_native.py", **settings)
    assert record_of(project)["cuda"]["chips"] == ["sm_80", "sm_100"]
    assert done.stdout.endswith("CUDA kernels: sm_80, sm_100\n")
    for archs, chips in (("90", ["sm_90"]), ("all", ["sm_80", "sm_90", "sm_100"])):
        run(project, "build_native.py", FAST_PROMPT_CUDA_ARCHS=archs, **settings)
        assert record_of(project)["cuda"]["chips"] == chips


def test_each_gpu_gets_the_newest_chip_that_it_is_no_older_than():
    tools = build_native.Toolchain("c++", "ninja", Path("torch"), "2.13", CUDA)
    found = [build_native.narrow(tools, [gpu]).cuda.chips for gpu in (80, 86, 89, 90, 100, 103, 120)]
    assert found == [("80",), ("80",), ("80",), ("90",), ("100",), ("100",), ("100",)]
    assert build_native.narrow(tools, [90, 86, 75]).cuda.chips == ("80", "90")
    assert build_native.narrow(tools, []) == tools
    assert build_native.narrow(tools, [75]).cuda == "there are kernels for sm_80, sm_90, sm_100, not for sm_75"


# ---- Ninja ----


def commands_of(tools, directory, monkeypatch):
    """What ninja reads in the file that we write, word for word."""
    monkeypatch.setattr(build_native, "ROOT", directory)
    monkeypatch.setattr(build_native, "BUILD_DIR", directory / "build")
    (directory / "build").mkdir()
    (directory / "build" / "build.ninja").write_text(build_native.ninja_file(tools))
    command = [build_native.find_toolchain("not asked").ninja, "-t", "commands"]
    done = subprocess.run(command, cwd=directory / "build", text=True, capture_output=True, check=True)
    return [shlex.split(line.split(" > ")[0]) for line in done.stdout.splitlines()]


def test_ninja_reads_every_command_as_it_was_meant(project, monkeypatch):
    torch = project / "$torch: one"
    tools = build_native.Toolchain("/my tools/c++", "ninja", torch, "2.13", CUDA, "/my tools/ccache")
    *compiled, linked = commands_of(tools, project, monkeypatch)
    elements, levels = build_native.CUDA_ELEMENTS, build_native.INSTRUCTION_SETS
    by_nvcc = [line for line in compiled if line[1] == CUDA.nvcc]
    assert len(by_nvcc) == len(build_native.CUDA_KERNELS) * len(elements)
    bindings = (*build_native.BINDINGS, *build_native.CUDA_BINDINGS)
    assert len(compiled) - len(by_nvcc) == len(bindings) + len(build_native.KERNELS) * len(levels)
    assert {line[0] for line in compiled} == {"/my tools/ccache"} and linked[0] == "/my tools/c++"
    assert str(torch / "include") in compiled[0] and f"-L{torch / 'lib'}" in linked
    for line in by_nvcc:
        assert line.count("-gencode") == 4 and "arch=compute_100,code=compute_100" in line
    for line in compiled:
        source = line[line.index("-c") + 1]
        assert (project / "build" / source).exists() and not Path(source).is_absolute()


def test_no_package_ninja_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(build_native.BuildError, match="pip install ninja"):
        build_native.find_toolchain("not asked")


def test_progress_is_seen_while_it_compiles(project, fake_compiler, tmp_path):
    gate = tmp_path / "gate"
    environment = environment_of(CXX=fake_compiler, FAKE_WAITS_FOR=str(gate))
    command = [sys.executable, "build_native.py"]
    with subprocess.Popen(command, cwd=project, env=environment, text=True, stdout=subprocess.PIPE) as process:
        first = process.stdout.readline()
        still_linking = not (project / "fast_prompt" / "_native.so").exists()
        gate.touch()
        rest = process.stdout.read()
    assert still_linking and process.returncode == 0
    count = len(build_native.BINDINGS) + len(build_native.KERNELS) * len(build_native.INSTRUCTION_SETS) + 1
    assert re.fullmatch(rf"\[1/{count}\] compile \w+(\.\w+)?\.o\n", first)
    assert f"[{count}/{count}] link _native.so\n" in rest


def test_nothing_is_done_twice(project, fake_compiler, tmp_path):
    """An editable install finds the library of the checkout as it left it, and compiles only what has changed."""
    log, library = tmp_path / "compiled", project / "fast_prompt" / "_native.so"
    assert run(project, "build_native.py", CXX=fake_compiler).returncode == 0
    compiled, made = log.read_text(), library.stat().st_mtime_ns
    hook = "from setuptools import build_meta; build_meta.build_editable('dist')"
    assert run(project, "-c", hook, CXX=fake_compiler).returncode == 0
    assert "no work to do" in run(project, "build_native.py", CXX=fake_compiler).stdout
    assert log.read_text() == compiled and library.stat().st_mtime_ns == made and record_of(project)["built"]
    (project / "csrc" / "cpu" / "skip_adapter.cpp").touch()
    run(project, "build_native.py", CXX=fake_compiler)
    again = log.read_text().removeprefix(compiled).splitlines()
    assert len(again) == len(build_native.INSTRUCTION_SETS) + 1


def test_ccache_runs_the_compiler_where_it_is(project, fake_compiler, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    # Only what the fake compiler and the shell need: this machine may have a ccache of its own.
    for name in ("sh", "seq", "sleep"):
        (programs / name).symlink_to(shutil.which(name))
    run(project, "build_native.py", CXX=fake_compiler, PATH=str(programs))
    assert record_of(project)["built"] and record_of(project)["ccache"] is False
    script(programs / "ccache", f'echo "$1" >> {tmp_path}/cached', 'exec "$@"')
    run(project, "build_native.py", CXX=fake_compiler, PATH=str(programs))
    assert record_of(project)["ccache"] is True
    compiled = len(build_native.BINDINGS) + len(build_native.KERNELS) * len(build_native.INSTRUCTION_SETS)
    assert (tmp_path / "cached").read_text().splitlines() == [fake_compiler] * compiled


# ---- What is handed on ----


def test_source_archive_can_be_built_and_holds_no_library(project):
    for name in ("_native.so", "_build.json"):
        (project / "fast_prompt" / name).touch()
    done = run_setup(project, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (project / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = {str(path.relative_to(project)) for path in (project / "csrc").rglob("*.*")}
    needed = {"build_native.py", "constraints.txt", "setup.py", "pyproject.toml", "LICENSE"}
    assert names >= sources | needed | {"kernels/fast_prompt_kernels/__init__.py"}
    assert not any(name.endswith((".so", "_build.json")) for name in names)


def test_everything_that_is_asked_for_is_pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no version of one machine, as +cpu is
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    asked += [text for extra in project["project"]["optional-dependencies"].values() for text in extra]
    for requirement in map(Requirement, asked):
        if requirement.name != "fast-prompt":
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_kernels_share_no_symbol_between_instruction_sets():
    """A symbol that two levels both define would be merged, and AVX-512 code could run where there is none."""
    objects = {
        (Path(source).stem, level): build_native.BUILD_DIR / f"{Path(source).stem}.{level}.o"
        for source in build_native.KERNELS
        for level in build_native.INSTRUCTION_SETS
    }
    if not all(path.exists() for path in objects.values()) or shutil.which("nm") is None:
        pytest.skip("needs nm and the object files of a build in this checkout: make native")
    for (op, level), path in objects.items():
        listing = subprocess.run(["nm", "-C", "--defined-only", path], text=True, capture_output=True, check=True)
        shared = [line.split(maxsplit=2)[2] for line in listing.stdout.splitlines() if line.split()[1] not in "trdb"]
        assert shared == [f"fast_prompt::cpu::{level}::{op}"]
