"""Runs steps, each in a process of its own, and keeps the record of them up to date on disk."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from gpu_check.machine import slug
from gpu_check.outcome import AbsentError, Figures, write_json
from gpu_check.place import ROOT, Place, environment_of_a_process
from gpu_check.steps import Step

TOTAL_SECONDS = 530
SIDE_BY_SIDE = ("parity", "stress", "sanitizer")  # stages that time nothing
MOST_WORKERS = 12  # each has a context on the GPU
LAST_LINES = 25  # of a failed step's output
RECORD = "gpu_check.json"
ABSENT = 3  # a step's exit code when the machine lacks what it needs
STATUSES: dict[int | None, str] = {0: "passed", ABSENT: "absent"}  # by exit code; every other is a failure

Entry = dict[str, Any]

_processes: set["subprocess.Popen[bytes]"] = set()  # of the steps that run now


class Record:
    """What is known so far, on disk from the first step on.

    Attributes:
        content: as it is on disk: ``dry_run``, ``seconds``, ``machine``, and ``steps`` with each one's name, stage,
            op, backend, variant, status (passed, failed or absent), seconds, figures, and the last lines of its output
            if it did not pass.
        path: the file; None until the first step has said which machine this is.
    """

    def __init__(self, place: Place, out: Path | None):
        self.content: Entry = {"dry_run": place.dry, "seconds": 0.0, "machine": {}, "steps": []}
        self.path: Path | None = None
        self._out = out
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    @property
    def failed(self) -> list[Entry]:
        """The steps that ran and did not pass."""
        return [entry for entry in self.content["steps"] if entry["status"] == "failed"]

    def add(self, entry: Entry) -> None:
        """Adds a step and writes everything."""
        if entry["stage"] == "machine":
            self.content["machine"] = entry["figures"]
        self.content["steps"].append(entry)
        self.content["seconds"] = round(self.seconds, 1)
        if self.path is None:
            self.path = self._choose_path()
        write_json(self.path, self.content)

    def _choose_path(self) -> Path:
        """A dry run's record lies where no measured one does."""
        gpu = ROOT / "bench" / "results" / slug(self.content["machine"].get("device", "unknown"))
        folder = self._out or (ROOT / "runs" / "gpu_check" if self.content["dry_run"] else gpu)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / RECORD


def run_all(steps: Sequence[Step], place: Place, out: Path | None) -> Record:
    """Runs every step, prints one line for each, and returns the record."""
    record = Record(place, out)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(_workers()) as pool:
        for batch in batches(steps):
            left = TOTAL_SECONDS - record.seconds
            running = [pool.submit(run_step, step, place, Path(directory), left) for step in batch]
            try:
                for done in as_completed(running):
                    record.add(done.result())
                    _print_progress(record)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                while not all(step.done() for step in running):  # one may be starting just now
                    for process in list(_processes):
                        _stop(process)
                    time.sleep(0.1)
                raise
    return record


def _print_progress(record: Record) -> None:
    entry = record.content["steps"][-1]
    print(f"{record.seconds:6.1f} s  {entry['status']:<7} {entry['seconds']:6.1f} s  {entry['name']}", flush=True)


def batches(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps that may run side by side, together; every other one alone."""
    for together, group in itertools.groupby(steps, key=lambda step: step.stage in SIDE_BY_SIDE):
        members = list(group)
        yield from [members] if together else [[step] for step in members]


def _workers() -> int:
    return min(MOST_WORKERS, os.cpu_count() or 1)


def run_step(step: Step, place: Place, directory: Path, seconds_left: float) -> Entry:
    """Runs one step within its limit and what is left of the time for all; never raises for what the step does."""
    start = time.monotonic()
    limit = min(step.seconds, seconds_left)
    figures, log = directory / f"{step.name}.json", directory / f"{step.name}.log"
    code = _run_process(step, place, figures, log, limit) if limit > 0 else None
    entry = {field: getattr(step, field) for field in ("name", "stage", "op", "backend", "variant")}
    entry["status"] = STATUSES.get(code, "failed")
    entry["seconds"] = round(time.monotonic() - start, 1)
    entry["figures"] = json.loads(figures.read_text()) if figures.exists() else {}
    if code is None:
        entry["output"] = [f"not done within {limit:.0f} s" if limit > 0 else "no time was left for it"]
    if code != 0 and log.exists():
        entry["output"] = entry.get("output", []) + log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return entry


def _run_process(step: Step, place: Place, figures: Path, log: Path, limit: float) -> int | None:
    """The exit code of the step's process, or None if it had to be stopped."""
    environment = {**environment_of_a_process(), **step.environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            command(step, place, figures), stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        _processes.add(process)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            _stop(process)
            process.wait()
            return None
        finally:
            _processes.remove(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """With the compilers and the sanitizer that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def command(step: Step, place: Place, figures: Path) -> list[str]:
    """What starts a step's process."""
    words = [sys.executable, "-m", "gpu_check", "--step", step.name, "--figures", str(figures)]
    return [*words, "--dry-run"] if place.dry else words


def run_here(step: Step, place: Place, figures: Path) -> int:
    """Runs a step in this process and returns its exit code; what it raises otherwise is for the log."""
    try:
        step.run(place, Figures(figures))
    except AbsentError as reason:
        print(reason)
        return ABSENT
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("fast_prompt", "gpu_check")):
            raise
        print(f"the package {error.name} is not installed")
        return ABSENT
    return 0
