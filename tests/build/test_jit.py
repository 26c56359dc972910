"""Every Triton kernel compiled by Triton's own JIT as on a GPU machine, in each version of Triton that may be there."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_cache import root
from overlays import overlay

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.gate
PROGRAM = Path(__file__).with_name("jit_compile.py")
ROOT = PROGRAM.parents[2]
OLDEST = "3.6.0"  # comes with torch 2.11


@pytest.fixture(scope="module", params=[triton.__version__, OLDEST])
def compiled(request):
    """What tests/build/jit_compile.py says, or said of the same sources."""
    kept = root() / "jit" / f"{digest(request.param)}.json"
    if not kept.exists():
        result = compile_with(request.param)
        if result["errors"]:
            return result
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(result))
        fresh.replace(kept)
    return json.loads(kept.read_text())


def digest(version):
    """A digest of all that a result follows from."""
    files = [
        PROGRAM,
        *(path for folder in ("fast_prompt", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))),
    ]
    facts = (version, torch.__version__, sys.version, *((str(path), path.read_bytes()) for path in files))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def compile_with(version):
    """In another process, where Triton compiles and does not interpret."""
    folders = [] if version == triton.__version__ else [str(overlay(f"triton=={version}"))]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*folders, *sys.path])
    environment["TRITON_CACHE_DIR"] = str(root() / "triton")
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["triton"] == version
    return result


def test_every_launch_compiles(compiled):
    assert compiled["compiled"] > 200 and not compiled["errors"], "\n\n".join(compiled["errors"][:5])


def test_the_calls_launch_every_kernel_in_every_form(compiled):
    """Each option on and off, each pointer that may be missing given as well, in every dtype."""
    one_sided = [
        (kernel, argument, kinds)
        for kernel, arguments in compiled["seen"].items()
        for argument, kinds in arguments.items()
        if kinds in ([True], [False], [None])
    ]
    assert not one_sided and all(compiled["seen"].values())
    for kernel, arguments in compiled["seen"].items():
        pointers = {kind for kinds in arguments.values() for kind in kinds if str(kind).startswith("*")}
        assert {"*fp32", "*bf16", "*fp16"} <= pointers, kernel
