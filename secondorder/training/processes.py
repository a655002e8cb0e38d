"""Several processes under ``torchrun``: process group, who may write, results and errors that reach everybody."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secondorder.errors import InputError
from secondorder.training.device import resolve_device

T = TypeVar("T")

ANNOUNCED = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}
"""Numbers that torchrun puts in the environment, and what they are for a single process."""

# The longest that processes wait for the main one, which meanwhile measures or writes.
PATIENCE = datetime.timedelta(hours=2)


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process, 0 for the main one."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Whether this process prints and writes files; under torchrun known before the process group exists."""
    return _announced("RANK", 0) == 0 if _announced("WORLD_SIZE", 1) > 1 else rank() == 0


def check_environment() -> None:
    """InputError unless what torchrun puts in the environment are whole numbers, where they are there."""
    for name, default in ANNOUNCED.items():
        _announced(name, default)
    several, own = _announced("WORLD_SIZE", 1), _announced("RANK", 0)
    if several < 1 or (several > 1 and own >= several):
        raise InputError(
            f"the process RANK {own} of WORLD_SIZE {several} cannot be; unset both, or start with torchrun"
        )


def _announced(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InputError(
            f"the environment variable {name} is {text[:50]!r}, no whole number; unset it, or start with torchrun"
        )
    return int(text)


@contextlib.contextmanager
def distributed(device: torch.device | str = "cpu") -> Iterator[None]:
    """The process group of a ``torchrun`` launch (gloo on CPU, NCCL on CUDA); does nothing for a single process.

    Enter it once around everything that trains; entered again inside, it does nothing. Raises InputError when the
    environment announces several processes without saying where they meet, or they cannot meet there.
    """
    check_environment()
    if _announced("WORLD_SIZE", 1) == 1 or dist.is_initialized():
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but MASTER_ADDR is not set; start with torchrun")
    device = resolve_device(device) if isinstance(device, str) else device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:150]
        raise InputError(
            f"the processes cannot meet at {os.environ['MASTER_ADDR']}: {reason}; start with torchrun"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_main(function: Callable[[], T]) -> T:
    """Call ``function`` in the main process alone; its result, or its InputError, reaches every process.

    Any other exception ends the main process, whereupon torchrun ends the others.
    """
    if not is_distributed():
        return function()
    outcome: list[object] = [None]
    if is_main_process():
        try:
            outcome = [function()]
        except InputError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def summed(*values: float) -> tuple[float, ...]:
    """Each value summed over the processes, in float64."""
    if not is_distributed():
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return tuple(total.tolist())


def share(indices: Tensor) -> Tensor:
    """This process's contiguous part of indices [B]; the parts differ by at most one in length."""
    size, processes, mine = len(indices), world_size(), rank()
    return indices[size * mine // processes : size * (mine + 1) // processes]
