"""What the tests compile, kept between runs and between checkouts, by content.

A result is found again by all that it is made of: the command, the sources and what they include, and what the tool
calls itself. It lies in ``$FAST_PROMPT_TEST_CACHE``, by default ``$XDG_CACHE_HOME/fast_prompt``; what no run has
wanted for 30 days is removed.

    folder = cached(["nvcc", "-cubin", "-arch=sm_90", str(source), "-o", "kernels.cubin"], [source], [headers])
    code = (folder / "kernels.cubin").read_bytes()
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SECONDS_KEPT = 30 * 24 * 3600
OBJECTS = (".o", ".a", ".so", ".cubin")
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*[<\"]([^>\"]+)[>\"]", re.MULTILINE)


class CompilationError(RuntimeError):
    """A command failed; the message is what it said."""


def cached(command: Sequence[str], inputs: Sequence[Path], folders: Sequence[Path] = ()) -> Path:
    """The folder that ``command`` was run in, successfully, now or earlier; what it printed is in its file ``log``.

    Args:
        command: what to run, the tool first; it names its results relative to the folder. Where the inputs and folders
            lie is no part of the key.
        inputs: the files it reads: sources, whose includes are followed, or objects.
        folders: where includes are looked for, besides the including file's own folder. What is in none of them, as a
            system's headers are, counts as part of the tool.
    """
    target = root() / "compiled" / key(command, inputs, folders)
    if not target.exists():
        with _locked(target):
            if not target.exists():
                _run(command, target, lambda: key(command, inputs, folders) == target.name)
    os.utime(target)
    return target


def root() -> Path:
    """The folder of all that tests keep; compiled results lie in ``compiled`` within."""
    if named := os.environ.get("FAST_PROMPT_TEST_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fast_prompt"


def key(command: Sequence[str], inputs: Sequence[Path], folders: Sequence[Path] = ()) -> str:
    """The SHA-256 of all that a result depends on."""
    text = "\n".join(command[1:])
    names = {str(path): f"<{number}>" for number, path in enumerate((*inputs, *folders))}
    for path in sorted(names, key=len, reverse=True):  # a folder's files before the folder
        text = text.replace(path, names[path])
    if "-march=native" in command:
        text += _processor()
    digest = hashlib.sha256(f"{_version(command[0])}\n{text}".encode())
    for path in closure(inputs, folders):
        digest.update(f"\n{path.name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def closure(inputs: Iterable[Path], folders: Sequence[Path] = ()) -> list[Path]:
    """The inputs, and every file they include, directly or not; those under conditions too."""
    found: dict[Path, None] = {}
    left = list(inputs)
    while left:
        path = left.pop(0)
        if path not in found:
            found[path] = None
            left += _included(path, folders)
    return list(found)


def _included(path: Path, folders: Sequence[Path]) -> list[Path]:
    """Whatever an include may mean: that several folders have it does no harm here."""
    if path.suffix in OBJECTS:
        return []
    candidates = (folder / name for name in INCLUDE.findall(path.read_text()) for folder in (path.parent, *folders))
    return [candidate for candidate in candidates if candidate.is_file()]


@functools.cache
def _version(tool: str) -> str:
    return subprocess.run([tool, "--version"], text=True, capture_output=True, check=True).stdout


@functools.cache
def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _run(command: Sequence[str], target: Path, unchanged: Callable[[], bool]) -> None:
    """Runs the command in a folder of its own, which becomes ``target`` if it succeeds on unchanged inputs."""
    _remove_old(target.parent)
    folder = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
    try:
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise CompilationError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        if not unchanged():
            raise CompilationError(f"changed while it was compiled: {' '.join(command)}")
        (folder / "log").write_text(done.stdout + done.stderr)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_old(folder: Path) -> None:
    now = time.time()
    for path in folder.iterdir():
        try:
            old = now - path.stat().st_mtime > SECONDS_KEPT
        except FileNotFoundError:  # another process was faster
            continue
        if old and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif old:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process at a time for each result."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
