"""Several processes under ``torchrun``: process group, who may write, results and errors that reach everybody."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secondorder.errors import InputError
from secondorder.training.batch_norm import synchronise
from secondorder.training.device import resolve_device
from secondorder.training.launch import check_environment, launch_number

T = TypeVar("T")

# The longest that processes wait for the main one, which meanwhile measures or writes.
PATIENCE = datetime.timedelta(hours=2)


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process, 0 for the main one."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Whether this process prints and writes files; under torchrun known before the process group exists."""
    return launch_number("RANK", 0) == 0 if launch_number("WORLD_SIZE", 1, 1) > 1 else rank() == 0


@contextlib.contextmanager
def distributed(device: torch.device | str = "cpu") -> Iterator[None]:
    """The process group of a ``torchrun`` launch (gloo on CPU, NCCL on CUDA, XCCL on XPU); does nothing for a single process.

    Enter it once around everything that trains; entered again inside, it does nothing. Raises InputError when the
    environment announces several processes that cannot be, that do not say where they meet or cannot meet there, and for a
    device that cannot talk to others.
    """
    check_environment()
    if launch_number("WORLD_SIZE", 1, 1) == 1 or dist.is_initialized():
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but MASTER_ADDR is not set; start with torchrun")
    device = resolve_device(device) if isinstance(device, str) else device
    try:
        dist.init_process_group(_backends(device), timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:150]
        raise InputError(
            f"the processes cannot meet at {os.environ['MASTER_ADDR']}: {reason}; start with torchrun"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _backends(device: torch.device) -> str:
    """What carries messages between processes: objects and counts always on the CPU, tensors of a device by its own."""
    if device.type == "cpu":
        return "gloo"
    own = dist.get_default_backend_for_device(device)
    if own == "gloo":  # torch's answer for a device without a backend of its own; gloo reads the CPU's memory only
        raise InputError(f"several processes cannot train together on {device.type}; start one, or choose cpu")
    torch.accelerator.set_device_index(device.index)
    return f"cpu:gloo,{device.type}:{own}"


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The network as a training step calls it: where several processes train together, gradients and batch norm are of all.

    Batch-norm layers change their class in place (`synchronise`); a single process gets the network itself.
    """
    if not is_distributed():
        return model
    synchronise(model, device)
    return DistributedDataParallel(model, device_ids=[device.index] if device.type != "cpu" else None)


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
