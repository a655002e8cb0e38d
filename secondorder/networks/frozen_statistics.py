"""A network with the batch-norm statistics of given images as constants."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secondorder.errors import InputError


def frozen_at(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the model in eval mode whose batch-norm statistics are those of `images` [N, C, H, W].

    On these images it computes what the model computes in training mode, but each sample on its own: a Jacobian of one
    sample exists, and so does the Gauss-Newton matrix of a mean over samples. Dropout is off.

    Args:
        model: any network; it is left as it is.
        images: on the model's device.
        dtype: number format of the copy, in which the statistics are taken, too; None: the model's.

    Raises:
        InputError: for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model {type(model).__name__}: must be a torch.nn.Module")
    frozen = copy.deepcopy(model).eval()
    if dtype is not None:
        frozen, images = frozen.to(dtype), images.to(dtype)
    norms = [part for part in frozen.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    hooks = [part.register_forward_pre_hook(_take_statistics) for part in norms]
    try:
        with torch.no_grad():
            frozen(images)
    finally:
        for hook in hooks:
            hook.remove()
    return frozen


def _take_statistics(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Make mean and variance of the layer's input its constants; the variance is the biased one, as in training mode."""
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    dims = [0, *range(2, arguments[0].ndim)]
    variance, mean = torch.var_mean(arguments[0], dims, correction=0)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)
