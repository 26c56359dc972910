"""Facts about this machine: versions, devices, and what its processor can do."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from fast_prompt import __version__

PACKAGES = ("torch", "transformers", "triton", "peft", "numpy")

# The CPU flags that decide which code path runs, as Linux names them.
CPU_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "neon",
    "asimd",
    "sve",
    "bf16",
)


def versions() -> dict[str, str | None]:
    """Versions by name; None for a package that is not installed."""
    found: dict[str, str | None] = {"fast_prompt": __version__, "python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    return found | {"cuda": torch.version.cuda}


def devices() -> list[dict[str, Any]]:
    """Every device that torch can use: its name here, its product name, and its memory in bytes (None for the CPU)."""
    found: list[dict[str, Any]] = [{"device": "cpu", "name": cpu()["model"], "memory": None}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({"device": f"cuda:{index}", "name": properties.name, "memory": properties.total_memory})
    return found


def cpu() -> dict[str, Any]:
    """The processor: model, architecture, threads torch uses, torch's own code path, and the features that matter."""
    table = _cpuinfo()
    flags = set((table.get("flags") or table.get("Features") or "").split())
    return {
        "model": table.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
    }


def describe(device: torch.device) -> dict[str, Any]:
    """What a benchmark's figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu()["model"]
    return {"device": str(device), "name": name, "cpu": cpu(), "versions": versions()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of Linux's table; empty on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", maxsplit=1)[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
