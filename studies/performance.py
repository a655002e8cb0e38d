"""Performance study: forward and backward time and peak memory of the GCP head against the textbook version.

Everything is timed in one process, one CPU thread unless asked otherwise, interleaved: each repeat runs every variant once,
beginning with another one each time, so that a busy moment of a shared machine meets all of them. Medians over repeats are
compared. The bound is one batched product of C x n by n x C matrices, n = min(C, H W): neither the covariance nor its root is
formed with less.

Results: ``performance.csv``, one row for each shape, variant and repeat.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from secondorder.errors import InputError
from secondorder.matrix_power.newton_schulz import newton_schulz_sqrt
from secondorder.pooling import Covariance, UpperTriangle, pooling_head
from secondorder.training import is_main_process
from studies.results import provenance, write_table
from studies.settings import Common

NAME = "performance"
Shape = tuple[int, int, int, int]
Step = Callable[[Tensor], Tensor]


def parse_shape(text: str) -> Shape:
    """``32x256x7x7`` as (32, 256, 7, 7); InputError for anything else."""
    parts = text.split("x")
    if len(parts) != 4 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise InputError(f"shape {text!r} is not images x channels x height x width, such as 32x256x7x7")
    n, c, h, w = (int(p) for p in parts)
    return n, c, h, w


@dataclass(frozen=True)
class Settings:
    """Settings of the performance study."""

    shapes: tuple[str, ...] = ("32x256x7x7", "8x256x14x14", "32x128x8x8", "64x64x8x8")
    """Feature maps to pool, as images x channels x height x width."""
    repeats: int = 15
    """Timed repeats of each variant; the median is compared."""
    timing_threads: int = 1
    """CPU threads while timing."""

    def __post_init__(self) -> None:
        for shape in self.shapes:
            parse_shape(shape)
        if self.repeats < 1 or self.timing_threads < 1:
            raise InputError(f"--repeats {self.repeats}, --timing-threads {self.timing_threads}: both are at least 1")


PRESETS = {
    "smoke": Settings(shapes=("2x8x3x3", "2x4x4x4"), repeats=2),
    "quick": Settings(repeats=9),
    "cifar10": Settings(repeats=31),
    "paper": Settings(shapes=("256x256x14x14", "96x256x7x7", "256x128x14x14"), repeats=31),
}


def textbook(features: Tensor) -> Tensor:
    """The head as a textbook writes it: covariance, five Newton-Schulz steps, upper triangle, in plain autograd."""
    return UpperTriangle()(newton_schulz_sqrt(Covariance()(features), num_iter=5))


def _head(name: str, **options: Any) -> Callable[[int], Step]:
    return lambda channels: pooling_head(name, channels, **options)


VARIANTS: dict[str, Callable[[int], Step]] = {
    "textbook": lambda channels: textbook,
    "gcp": _head("gcp"),
    "gcp, products": _head("gcp", method="newton_schulz"),
    "gcp_exact": _head("gcp_exact"),
    "covariance": _head("covariance"),
}
BOUND = "one matrix product"


def forward_backward(step: Step, features: Tensor, cotangent: Tensor) -> None:
    """One forward and backward pass with a given gradient of the output."""
    features.grad = None
    step(features).backward(cotangent)


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of `action`, waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Largest memory that `action` holds at once beyond what was held before, as torch's allocator counts it."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        action()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


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


def measure_shape(shape: Shape, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of all variants at one shape, repeats interleaved after one untimed round that also measures memory."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator).relu_().to(device).requires_grad_()
    factor = features.detach().flatten(2)[..., : shape[1]].contiguous()
    actions: dict[str, Callable[[], object]] = {BOUND: lambda: torch.bmm(factor, factor.mT)}
    for name, build in VARIANTS.items():
        actions[name] = _action(build(shape[1]), features)
    memory = {}
    for name, action in actions.items():
        features.grad = None  # else the first to run would be charged with the gradient that the others replace
        memory[name] = peak_bytes(action, device)
    order = list(actions.items())
    return [
        {
            "images": shape[0],
            "channels": shape[1],
            "height": shape[2],
            "width": shape[3],
            "variant": name,
            "repeat": repeat,
            "milliseconds": 1e3 * seconds(action, device),
            "peak_mib": memory[name] / 2**20,
        }
        for repeat in range(repeats)
        for name, action in order[repeat % len(order) :] + order[: repeat % len(order)]
    ]


def _action(step: Step, features: Tensor) -> Callable[[], object]:
    with torch.no_grad():
        cotangent = torch.randn_like(step(features.detach()))
    return lambda: forward_backward(step, features, cotangent)


def check(common: Common, settings: Settings) -> torch.device:
    """The device, checked to exist."""
    return common.torch_device


def run(common: Common, settings: Settings, device: torch.device) -> None:
    """Time every shape and write the table; under several processes only the main one measures."""
    if not is_main_process():
        return
    start, rows, threads = time.perf_counter(), [], torch.get_num_threads()
    torch.set_num_threads(settings.timing_threads)
    try:
        for shape in tqdm(settings.shapes, desc=NAME, unit="shape", disable=not common.progress):
            rows += measure_shape(parse_shape(shape), settings.repeats, device)
        origin = provenance(
            NAME,
            asdict(settings) | {"preset": common.preset},
            [0],
            {"label": "random features"},
            device,
            time.perf_counter() - start,
        )
    finally:
        torch.set_num_threads(threads)
    write_table(common.folder, NAME, pd.DataFrame(rows), origin)


def dry_run(common: Common, settings: Settings) -> list[str]:
    """Time one repeat of every shape and state what all repeats take."""
    device = common.torch_device
    torch.set_num_threads(settings.timing_threads)
    once = sum(seconds(lambda s=s: measure_shape(parse_shape(s), 1, device), device) for s in settings.shapes)  # type: ignore[misc]
    return [
        f"{len(settings.shapes)} shapes, {settings.repeats} repeats: at most about {once * settings.repeats:.0f} s on {device}"
    ]
