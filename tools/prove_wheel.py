"""Builds a wheel into dist/, then proves it where nothing could be compiled: ``make wheel``.

The proof is a fresh environment with the wheel and what it asks for, no compiler on its PATH, and the checkout out of
sight. There the CPU's kernels must be available, and right for one op.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from setuptools import build_meta

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
EXPECTED = (
    "fast_prompt/__init__.py",
    "fast_prompt/_build.json",
    "fast_prompt/_native.so",
    "fast_prompt/py.typed",
    "fast_prompt_kernels/__init__.py",
)


def main() -> None:
    """Builds, looks inside, installs, runs."""
    wheel = build()
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as directory:
        prove(wheel, Path(directory))
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 2**20:.1f} MiB, proved without a compiler")


def build() -> Path:
    """The wheel of what the checkout holds now, and of nothing that it once held."""
    os.chdir(ROOT)
    os.environ["FAST_PROMPT_BUILD"] = "1"
    for leftover in (*(ROOT / "build").glob("lib*"), *(ROOT / "build").glob("bdist*")):
        shutil.rmtree(leftover)
    return DIST / build_meta.build_wheel(str(DIST), {"--global-option": "--quiet"})


def check_contents(wheel: Path) -> None:
    """Ends the program where something is missing."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    missing = [name for name in EXPECTED if name not in names]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        missing.append("LICENSE")
    if missing:
        raise SystemExit(f"{wheel.name} lacks {', '.join(missing)}")


def prove(wheel: Path, directory: Path) -> None:
    """Installs the wheel into ``directory`` and runs it there."""
    venv.create(directory, with_pip=True)
    binaries = directory / "bin"
    bare = {"PATH": str(binaries), "HOME": str(directory)}  # neither a compiler nor what would name one

    def run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
        line = [binaries / command[0], *command[1:]]
        done = subprocess.run(line, cwd=directory, env=environment, text=True, stdout=subprocess.PIPE, check=False)
        if done.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}")
        return done.stdout

    run("pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    backends = json.loads(run("fast-prompt", "info", "--json", environment=bare))["backends"]
    for name, entry in backends.items():
        print(f"{name}: {entry['reason'] or 'available'}")
    if not backends["cpu"]["available"]:
        raise SystemExit(f"{wheel.name} has no CPU kernels")
    parity = ("parity", "--op", "prompt_diffusion", "--backend", "cpu")
    print(run("fast-prompt", *parity, environment=bare).splitlines()[-1])


if __name__ == "__main__":
    main()
