"""Batch normalisation over the images of all processes.

With the images of a step split over R processes, each with n positions per channel:
mean = (1/R) sum_r mean_r, variance = (1/R) sum_r (1/n) sum_i (x_i - mean)^2, that is the statistics of the whole batch.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secondorder.errors import InputError


class _SumOverProcesses(torch.autograd.Function):
    """y = sum_r x_r; since every process's loss depends on y, dL/dx = sum_r dL_r/dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the statistics of all processes in training mode, by ``all_reduce``, on any device.

    Parameters, buffers and their names are those of ``nn.BatchNorm2d``: a layer changes its class back and forth.
    Every process must hold the same number of images.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x `[N, C, H, W]` normalised, in training mode by the statistics of all processes, in the type of x."""
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        shape = (1, -1, 1, 1)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = _SumOverProcesses.apply(wide.sum((0, 2, 3))) / count
        centred = wide - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        self._update_running(mean.detach(), variance.detach() * count / max(count - 1, 1))
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased: Tensor) -> None:
        """Exponential (or, with ``momentum=None``, cumulative) averages, as ``nn.BatchNorm2d`` keeps them."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)


class CudaSynchronisedBatchNorm(nn.SyncBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the statistics of all processes by ``nn.SyncBatchNorm``, which refuses CPU tensors."""

    process_group = None  # the default group: a layer without a group of its own can be copied and pickled


SYNCHRONISED: dict[str, type[nn.BatchNorm2d]] = {"cpu": SynchronisedBatchNorm, "cuda": CudaSynchronisedBatchNorm}
"""By the type of the device; others have the first."""


def synchronise(model: nn.Module, device: torch.device) -> None:
    """Let every ``nn.BatchNorm2d`` of the model use the statistics of all processes, in place.

    Raises:
        InputError: for another kind of batch normalisation, naming the layer.
    """
    for name, layer in model.named_modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SYNCHRONISED.get(device.type, SynchronisedBatchNorm)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"layer {name!r} is a {type(layer).__name__}, which several processes cannot synchronise; use "
                "nn.BatchNorm2d or train in one process"
            )


def desynchronise(model: nn.Module) -> None:
    """Make every layer that ``synchronise`` has changed a plain ``nn.BatchNorm2d`` again, in place."""
    for layer in model.modules():
        if type(layer) in SYNCHRONISED.values():
            layer.__class__ = nn.BatchNorm2d


@contextlib.contextmanager
def without_synchronisation(model: nn.Module) -> Iterator[None]:
    """Plain ``nn.BatchNorm2d`` layers meanwhile, so that one process can use the model while the others wait."""
    kinds = {layer: type(layer) for layer in model.modules() if type(layer) in SYNCHRONISED.values()}
    desynchronise(model)
    try:
        yield
    finally:
        for layer, kind in kinds.items():
            layer.__class__ = kind
