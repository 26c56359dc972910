"""The step ``machine``: which GPU this is, with which versions, and what exactly was checked there."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from fast_prompt.bench import machine
from fast_prompt.ops.declaration import OPS
from gpu_check.outcome import Figures
from gpu_check.place import ROOT, Place

# Each backend's folder of kernels. A file there is an op's by its name, or shared by all.
FOLDERS = {"triton": "kernels/fast_prompt_kernels", "cuda": "csrc/cuda"}
FILES = {"triton": "{op}.py", "cuda": "{op}.cu"}
SOURCES = (".py", ".cu", ".cuh", ".h")

REVISION = ("describe", "--always", "--dirty", "--abbrev=40", "--match", "")


def describe(place: Place, figures: Figures) -> None:
    """Device, capability, memory, cache, versions, revision; and a digest of every kernel's source."""
    figures.save(**(_cpu() if place.dry else _gpu(place.device)))
    figures.save(
        versions=machine.versions() | {"nvcc": nvcc_version(), "driver": _driver()},
        cpu=machine.cpu(),
        revision=_run("git", "-C", str(ROOT), "-c", "safe.directory=*", *REVISION),
        sources=sources(),
    )


def sources() -> dict[str, dict[str, str]]:
    """By op and backend, a digest of the kernels' source: a record holds for these files and no others."""
    return {op: {backend: digest(op, backend) for backend in kernel_files(op)} for op in OPS}


def kernel_files(op: str) -> dict[str, str]:
    """By backend, the op's file of kernels for GPUs, from the root of the checkout; only those that are there."""
    files = {backend: f"{folder}/{FILES[backend].format(op=op)}" for backend, folder in FOLDERS.items()}
    return {backend: file for backend, file in files.items() if (ROOT / file).exists()}


def digest(op: str, backend: str) -> str:
    """Twelve hexadecimal digits of the SHA-256 of all source that an op's kernels may be made of."""
    others = tuple(other for other in OPS if other != op)
    folder = sorted((ROOT / FOLDERS[backend]).iterdir())
    files = [path for path in folder if path.suffix in SOURCES and not path.name.startswith(others)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def nvcc_version() -> str | None:
    """``13.0``, or None where there is no nvcc."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    found = re.search(r"release ([\d.]+)", _run(nvcc, "--version") or "")
    return found[1] if found else None


def slug(name: str) -> str:
    """A device's name as that of a folder: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "gpus": torch.cuda.device_count(),
    }


def _cpu() -> dict[str, Any]:
    absent = ("compute_capability", "memory_bytes", "l2_bytes", "multiprocessors")
    return {"device": machine.cpu()["model"], **dict.fromkeys(absent), "gpus": 0}


def _driver() -> str | None:
    answer = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def _run(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    if not (shutil.which(command[0]) or Path(command[0]).exists()):
        return None
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
