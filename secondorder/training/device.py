"""Where and in which precision a run computes: device, automatic mixed precision, threads, random numbers."""

import contextlib
import re
from collections.abc import Iterator

import numpy as np
import torch

from secondorder.accelerator import (
    ACCELERATORS,
    accelerator_type,
    accelerators,
    fork_random_numbers,
    seed_random_numbers,
)
from secondorder.errors import InputError
from secondorder.training.launch import launch_number

DTYPES = {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_device(device: str, amp: str) -> None:
    """Raise InputError unless ``device`` is a device's name and ``amp`` can run there.

    Names are auto, cpu, and an accelerator (of ACCELERATORS, or of the type that this machine has), with or without ":N".
    Whether the device exists, `resolve_device` says: a run may be described on another machine.
    """
    here = accelerator_type()
    kinds = [*ACCELERATORS, *([here] if here is not None and here not in ACCELERATORS else [])]
    found = re.fullmatch(rf"(auto|cpu|({'|'.join(map(re.escape, kinds))})(:[0-9]+)?)", str(device))
    if not isinstance(device, str) or found is None:
        raise InputError(
            f"device is {str(device)[:40]!r}; choose one of: auto, cpu, {', '.join(kinds)}, or one of several as "
            f"{kinds[0]}:N; available: {_available()}"
        )
    if amp == "float16" and device == "cpu":
        raise InputError("amp float16 needs an accelerator such as CUDA; on the cpu choose one of: off, bfloat16")
    kind = device.partition(":")[0]
    if amp != "off" and kind in kinds and not torch.amp.is_autocast_available(kind):
        raise InputError(f"amp {amp}: torch has no mixed precision on {kind}; choose off")


def resolve_device(name: str) -> torch.device:
    """The device of this process: ``auto`` is the accelerator, else the CPU; under torchrun ``cuda`` is that of its local rank.

    Raises:
        InputError: for another name, and when the device is not there, naming those that are.
    """
    check_device(name, "off")
    here = accelerators()
    if name == "cpu" or (name == "auto" and not here):
        return torch.device("cpu")
    kind, _, number = (here[0].type if name == "auto" else name).partition(":")
    processes = launch_number("LOCAL_WORLD_SIZE", 1, 1)
    if number and processes > 1:
        raise InputError(f"device {name!r} is one device but torchrun started {processes} processes; choose {kind}")
    index = int(number) if number else launch_number("LOCAL_RANK", 0)
    device = next((device for device in here if (device.type, device.index) == (kind, index)), None)
    if device is None:
        raise InputError(f"device {name[:40]!r} (number {str(index)[:20]}) is not available; available: {_available()}")
    return device


def _available() -> str:
    """The names of this machine's devices."""
    return ", ".join(["cpu", *map(str, accelerators())])


def autocast(device: torch.device, amp: str) -> torch.amp.autocast:
    """The automatic mixed precision of a run; does nothing for ``off``."""
    return torch.amp.autocast(device.type, dtype=DTYPES[amp], enabled=amp != "off")


@contextlib.contextmanager
def isolated(device: torch.device, threads: int | None) -> Iterator[None]:
    """Give back the caller's random-number state and number of threads at the end; use ``threads`` meanwhile."""
    before = torch.get_num_threads()
    with fork_random_numbers([device] if device.type != "cpu" else []):
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the random numbers of one step (dropout masks) a function of (seed, step, rank).

    So no generator's state has to be saved: a resumed step draws what the uninterrupted one drew, on every device.
    """
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
    seed_random_numbers(number)
