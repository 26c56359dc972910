"""Runs the tests of the methods on other versions of transformers: the oldest supported, and the newest there is.

``python tests/support/compat.py [VERSION ...]``; a version may be ``oldest`` or ``newest``, and by default both are
run. Each lives in a folder of its own, with whatever else it needs in another version than this environment has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from overlays import overlay

from fast_prompt.models.contract import OLDEST_TRANSFORMERS, installed_transformers

TESTS = Path(__file__).parents[1]
OLDEST, NEWEST = "oldest", "newest"
REQUIREMENTS = {OLDEST: f"transformers=={OLDEST_TRANSFORMERS}", NEWEST: "transformers"}

# What the methods do with a model, and what no version of transformers changes.
FOLDERS = ("methods", "search")
WITHOUT = ("test_atomic_saving.py", "test_hostile_files.py", "test_search_state.py", "test_threads.py")


def packages(requirement):
    """``name==version`` of all that ``requirement`` would change in this environment."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--upgrade",
        "--report",
        "-",
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"pip cannot resolve {requirement}:\n{done.stderr}")
    found = [each["metadata"] for each in json.loads(done.stdout)["install"]]
    return [f"{each['name']}=={each['version']}" for each in found]


def run(version):
    """The exit status of the methods' tests on one version of transformers; 0 where it is the one installed."""
    changed = packages(REQUIREMENTS.get(version, f"transformers=={version}"))
    if not any(each.startswith("transformers==") for each in changed):
        print(f"transformers {version} is the installed {installed_transformers()}: make test runs on it")
        return 0
    environment = os.environ | {"PYTHONPATH": str(overlay(*changed)), "OMP_NUM_THREADS": "1"}
    print(f"the methods' tests on {', '.join(changed)}", flush=True)
    seen = [sys.executable, "-c", "import transformers; print(f'transformers=={transformers.__version__}')"]
    if subprocess.check_output(seen, env=environment, text=True).strip() not in changed:
        raise SystemExit(f"the folder of {', '.join(changed)} is not what Python imports")
    tests = [str(TESTS / name) for name in FOLDERS]
    without = [f"--ignore-glob=*/{name}" for name in WITHOUT]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *tests,
        *without,
        "-n",
        "2",
        "--dist",
        "loadfile",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-k", "not compile"]  # which concerns torch
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(max(run(version) for version in sys.argv[1:] or (OLDEST, NEWEST)))
