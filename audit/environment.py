"""Where a scan or a repair runs: versions, device and memory, for its record."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from audit.errors import UsageError

_PACKAGES = ("layermend", "torch", "torchvision", "timm", "numpy", "scikit-image")


def choose_device(asked: str) -> str:
    """Return `cpu` or `cuda` for `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: An unknown device, or cuda where there is none.
    """
    available = torch.cuda.is_available()
    if asked == "auto":
        return "cuda" if available else "cpu"
    if asked not in ("cpu", "cuda"):
        raise UsageError(f"--device is {asked!r}; expected auto, cpu or cuda")
    if asked == "cuda" and not available:
        raise UsageError("--device cuda, but torch finds no CUDA device here; use --device cpu")
    return asked


def versions(*further: str) -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *further):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_record(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "type": device,
        "name": name or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def peak_memory_mib() -> float | None:
    """Return the most memory that this process has held, None where the system does not say."""
    # getrusage would tell what the process that started this one has held, where that is more.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
