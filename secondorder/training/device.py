"""Where and in which precision a run computes: device, automatic mixed precision, threads, random numbers."""

import contextlib
import re
from collections.abc import Iterator

import numpy as np
import torch

from secondorder.errors import InputError
from secondorder.training.launch import launch_number

DTYPES = {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_device(device: str, amp: str) -> None:
    """Raise InputError unless ``device`` is a device's name and ``amp`` can run there."""
    if not re.fullmatch(r"cpu|auto|cuda(:\d+)?", str(device)):
        raise InputError(f"device is {device!r}; choose one of: cpu, cuda, cuda:N, auto")
    if amp == "float16" and device == "cpu":
        raise InputError("amp float16 needs CUDA; on the cpu choose one of: off, bfloat16")


def resolve_device(name: str) -> torch.device:
    """The device of this process; under torchrun ``cuda`` is the GPU of its local rank.

    Raises:
        InputError: when the device is not there, naming those that are.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    device = torch.device("cuda" if name == "auto" else name)
    processes = launch_number("LOCAL_WORLD_SIZE", 1, 1)
    if device.index is not None and processes > 1:
        raise InputError(f"device {name!r} is one GPU but torchrun started {processes} processes; choose cuda")
    index = launch_number("LOCAL_RANK", 0) if device.index is None else device.index
    if index >= count:
        available = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        raise InputError(f"device {name!r} (GPU {index}) is not available; available: {available}")
    return torch.device("cuda", index)


def autocast(device: torch.device, amp: str) -> torch.amp.autocast:
    """The automatic mixed precision of a run; does nothing for ``off``."""
    return torch.amp.autocast(device.type, dtype=DTYPES[amp], enabled=amp != "off")


@contextlib.contextmanager
def isolated(device: torch.device, threads: int | None) -> Iterator[None]:
    """Give back the caller's random-number state and number of threads at the end; use ``threads`` meanwhile."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the random numbers of one step (dropout masks) a function of (seed, step, rank).

    So no generator's state has to be saved: a resumed step draws what the uninterrupted one drew, on CPU and CUDA.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))
