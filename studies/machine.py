"""What computes here: code, libraries, processor, threads."""

import importlib.metadata
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("secondorder", "torch", "torchvision", "numpy", "scipy", "pandas", "scikit-learn", "pillow")


def machine(device: torch.device) -> dict[str, Any]:
    """All that is below, for a result that is computed now on this device."""
    return {
        "commit": git_commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
    }


@lru_cache(maxsize=1)  # of every measurement, and reading them takes longer than many of these
def versions() -> dict[str, str]:
    """Of Python and of the libraries that compute."""
    installed = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return installed | {"torch": torch.__version__}  # which names the build too, e.g. +cu132


def device_name(device: torch.device) -> str:
    """The processor's own name, e.g. ``cpu: AMD EPYC`` or ``cuda: NVIDIA H100``."""
    if device.type != "cpu":
        name = getattr(torch.get_device_module(device), "get_device_name", None)
        return f"{device.type}: {name(device) if name is not None else platform.processor() or platform.machine()}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"cpu: {model}"


@lru_cache(maxsize=1)
def git_commit() -> str:
    """The commit of the code that runs, ``+changes`` if files differ from it, ``unknown`` outside a git checkout.

    Read once, at the start of a command: a commit made meanwhile is not the code that computes.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "secondorder", "studies", "pyproject.toml")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
