"""Other versions of packages for tests that run a process of their own with them: folders to put on its PYTHONPATH.

They are kept in the tests' cache (``build_cache.root``). Where pip cannot fetch a package, the test fails, unless
``FAST_PROMPT_TEST_OFFLINE=1`` says that this machine has no network: then it is skipped.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from build_cache import root


def overlay(*requirements: str) -> Path:
    """A folder with exactly the packages asked for, none of what those depend on; made by the first who asks."""
    name = "+".join(sorted(requirements)) + f"-{sys.implementation.cache_tag}"
    folder = root() / "overlays" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{name}.lock")):
        if not folder.exists():
            if os.environ.get("FAST_PROMPT_TEST_OFFLINE") == "1":
                pytest.skip(f"FAST_PROMPT_TEST_OFFLINE=1, and the cache has no {' '.join(requirements)}")
            _install(requirements, folder)
    return folder


def _install(requirements, folder):
    """The folder appears when all of it is there."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", unfinished, *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip could not install {' '.join(requirements)}:\n{done.stderr}")
    unfinished.rename(folder)


@contextmanager
def _locked(path):
    """One process at a time; the lock goes with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
