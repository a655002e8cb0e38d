"""Time and memory of actions on a shared machine: cases take turns, so that a busy moment meets all of them."""

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from secondorder.accelerator import wait_for
from studies.engine.records import Row

Action = Callable[[], object]
Case = TypeVar("Case")
MILLISECONDS, PEAK = "milliseconds", "peak MiB"


def costs(actions: Mapping[str, Action], repeats: int, device: torch.device) -> Iterator[Row]:
    """Records of each action, a layer: peak memory, and milliseconds in every repeat, in turn with the others."""
    for name, action in actions.items():
        yield {"layer": name, "quantity": PEAK, "value": peak_bytes(action, device) / 2**20}
    for repeat, name in in_turn([*actions], repeats):
        yield {"layer": name, "quantity": MILLISECONDS, "index": repeat, "value": 1e3 * seconds(actions[name], device)}


def in_turn(cases: Sequence[Case], repeats: int) -> Iterator[tuple[int, Case]]:
    """(repeat, case): each repeat has every case once, beginning with another one each time."""
    for repeat in range(repeats):
        for place in range(len(cases)):
            yield repeat, cases[(repeat + place) % len(cases)]


def seconds(action: Action, device: torch.device) -> float:
    """Wall-clock seconds of `action`, waiting for the device."""
    wait_for(device)
    start = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - start


def peak_bytes(action: Action, device: torch.device) -> float:
    """Largest memory that `action` holds at once beyond what was held before, as torch's allocator counts it.

    NaN on a device whose allocator keeps no such count (MPS).
    """
    gc.collect()
    if device.type != "cpu":
        return _peak_of_accelerator(action, device)
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        action()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _peak_of_accelerator(action: Action, device: torch.device) -> float:
    wait_for(device)
    try:
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        counted = bool(torch.accelerator.memory_stats(device))
    except RuntimeError:
        before, counted = 0, False
    action()
    wait_for(device)
    return torch.accelerator.max_memory_allocated(device) - before if counted else math.nan


@contextmanager
def _quiet() -> Iterator[None]:
    """Send the process's standard error to nowhere: the profiler's C++ part reports its own start and stop there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
