"""The machine's accelerator (a GPU of CUDA or XPU, Apple's MPS, or another that torch knows), by torch's common interface.

What only some of them have is asked for here: memory that can be measured, numbers of 64 bits, states of random numbers.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from secondorder.errors import InputError

ACCELERATORS = ("cuda", "mps", "xpu")
"""Types of devices that may be asked for by name, whether this machine has one or not."""
WITHOUT_FLOAT64 = {"mps"}
"""Types of devices that have no numbers of 64 bits."""


def accelerator_type() -> str | None:
    """The type of this machine's accelerator, e.g. "cuda"; None when there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def accelerators() -> list[torch.device]:
    """All devices of the accelerator's type, [] when there is none."""
    kind = accelerator_type()
    return [] if kind is None else [torch.device(kind, index) for index in range(torch.accelerator.device_count())]


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def with_random_numbers() -> list[torch.device]:
    """The accelerators whose random numbers may have been drawn from: those of a runtime that has been started."""
    kind = accelerator_type()
    if kind is None or not getattr(torch.get_device_module(kind), "is_initialized", lambda: True)():
        return []  # asking a CUDA device for its state would start it: 0.5 GB of memory
    return accelerators()


def random_states(devices: list[torch.device]) -> list[Tensor]:
    """The state of each device's generator, uint8 on the CPU."""
    return [torch.get_device_module(device).get_rng_state(device) for device in devices]


def set_random_states(devices: list[torch.device], states: list[Tensor]) -> None:
    """Give each device's generator a state of `random_states`, in the same order."""
    for device, state in zip(devices, states, strict=True):
        torch.get_device_module(device).set_rng_state(state, device)


def fork_random_numbers(devices: list[torch.device]) -> AbstractContextManager[None]:
    """A context that gives the CPU and the devices, all of one type, their random numbers back."""
    numbers = [device.index or 0 for device in devices]
    return torch.random.fork_rng(numbers, device_type=devices[0].type if devices else None)


def seed_random_numbers(seed: int) -> None:
    """Seed torch's random numbers of the CPU and of every accelerator, as torch.manual_seed does.

    For each kind of device that is not there torch writes down the whole stack, which takes as long as a small forward pass.
    """
    if accelerator_type() is None:
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in double precision."""
    return device.type not in WITHOUT_FLOAT64


def widest(device: torch.device) -> torch.dtype:
    """The longest floating-point numbers of the device, in which sums are taken."""
    return torch.float64 if has_float64(device) else torch.float32


def check_float64(device: torch.device, what: str) -> None:
    """InputError when `what`, which needs double precision, is asked of a device without it."""
    if not has_float64(device):
        raise InputError(f"{what} needs float64, which the device {device} does not have; use the cpu")
