"""How much memory there is, and refusing what does not fit before anything is computed."""

import math
import os
from pathlib import Path

import torch

from secondorder.curvature.resuming.long_run import kept
from secondorder.errors import InputError, check_number

SHARE = 0.8
"""The part of the free memory that one computation may take when the user gives no budget."""
BLOCK_BYTES = 256 * 2**20
"""Most bytes of rows, output gradients or patches that are held at one time, beside the graph; less in a small budget."""
BLOCK_COPIES = 4
"""Such blocks at a time: gradients, rows, what both are made of, and their squares."""
GIB = 2**30
UNLIMITED = 2**62
"""Bytes beyond which a budget is none."""


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: the GPU's, or the machine's within the limit of its control group."""
    machine = min(_machine_memory(), _group_memory())
    if device.type == "cpu":
        return machine
    if device.type == "mps":  # has the machine's memory, and a share of it that it may use
        return min(machine, max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()))
    try:
        free, _ = torch.accelerator.get_memory_info(device)
        held = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    except (RuntimeError, NotImplementedError):  # a backend that does not count
        return machine
    return free + held


def budget(memory: int | None, device: torch.device) -> int:
    """The user's budget in bytes, by default a share of what is available. InputError unless it is a positive number."""
    if memory is None:
        # A run that goes on divides its data as it did before.
        return kept("memory", dict, lambda: int(SHARE * available_memory(device)))
    check_number("memory", memory, 0, math.inf, "(]", hint="; in bytes, or None (what is available)")
    return int(min(memory, UNLIMITED))


def check_memory(needed: float, available: int, what: str, way_out: str) -> None:
    """InputError with both numbers when `what` needs more bytes than are available."""
    if needed > available:
        raise InputError(
            f"{what} needs about {needed / GIB:.3g} GiB, {available / GIB:.3g} GiB are available; {way_out}"
        )


def _machine_memory() -> int:
    """Free memory including the page cache where the system tells (Linux), else free pages."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 4 * GIB


def _group_memory() -> int:
    """What a control group (container) leaves, or as good as infinity."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" without a limit: ValueError
        return max(0, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return 2**62
