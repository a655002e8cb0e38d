"""Weights and masks of positions.

With weights w_m >= 0 of the positions of a sample and p_m = w_m / sum_m w_m,

    mean mu = sum_m p_m x_m,    covariance S = sum_m p_m (x_m - mu) (x_m - mu)^T.

Equal weights give plain pooling, and a position of weight 0 counts as absent. Both are differentiable in the weights.
"""

import math

import torch
from torch import Tensor

from secondorder.errors import InputError
from secondorder.matrix_power.transforms import full_precision, inside_transform, known_shape, result_dtype, widened
from secondorder.pooling.layout import LAYOUTS, channels_first


def position_weights(weights: Tensor, x: Tensor, layout: str) -> Tensor:
    """Weights `[N, M]` of the M positions of features x in this layout, given as such or in the shape of the positions.

    Raises InputError for another shape, complex numbers, and (on the CPU, where reading values is no wait) for a weight that is
    negative or not finite and for a sample without a positive weight.
    """
    if not isinstance(weights, Tensor) or weights.is_complex():
        raise InputError(
            f"weights must be a tensor of real numbers or bool, got {getattr(weights, 'dtype', weights)!r}"
        )
    n, _, *positions = known_shape(channels_first(x, layout))
    if tuple(known_shape(weights)) not in ((n, *positions), (n, math.prod(positions))):
        axes = LAYOUTS[layout].axes.replace("C", "")
        raise InputError(
            f"weights for features of shape {list(x.shape)} must be [{', '.join(axes)}] = {[n, *positions]} or "
            f"[N, M] = {[n, math.prod(positions)]}, got shape {list(weights.shape)}"
        )
    weights = weights.flatten(1)
    if readable(weights):
        check_weights(weights)
    return weights


def readable(weights: Tensor) -> bool:
    """Whether values can be read without a wait for a device, outside every trace and transform."""
    traced = inside_transform() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    return weights.device.type == "cpu" and not traced


def check_weights(weights: Tensor) -> None:
    """Raises InputError for a weight `[N, M]` that is negative or not finite, and for a sample without a positive one."""
    weights = weights.detach()
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise InputError("weights must be finite and at least 0; for a mask use bool, or 0 and 1")
    if bool((empty := ~(weights > 0).any(-1)).any()):
        raise InputError(
            f"weights of sample {int(empty.nonzero()[0, 0])} are all 0: leave out samples without a position"
        )


def normalised(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """p = w / sum w of weights `[N, M]`; 0 for a sample whose weights are all 0.

    p does not depend on the scale of w, so that the largest weight, which scales it first, counts as a constant.
    """
    weights = weights.to(dtype)
    largest = weights.detach().amax(-1, keepdim=True)
    weights = weights / torch.where(largest > 0, largest, 1)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)


def counted(x: Tensor, weights: Tensor) -> Tensor:
    """Features `[N, C, M]` with zeros where a bool mask is False: what stands there may be NaN, and has no gradient."""
    return torch.where(weights[:, None], x, 0) if weights.dtype == torch.bool else x


def weighted_mean(x: Tensor, weights: Tensor | None) -> Tensor:
    """Features `[N, C, H, W]` times M p_m, whose mean over the positions is the weighted mean; x itself without weights."""
    if weights is None:
        return x
    with full_precision(x):
        features = counted(widened(x).flatten(2), weights)
        p = normalised(weights, features.dtype)[:, None]
        return (features * p * p.shape[-1]).reshape(x.shape).to(x.dtype)


def weighted_covariance(x: Tensor, weights: Tensor) -> Tensor:
    """S `[N, C, C]` of features `[N, C, M]` with weights `[N, M]`; float32 under autocast, else of the type of x."""
    dtype = result_dtype(x)
    with full_precision(x):
        x = counted(widened(x), weights)
        p = normalised(weights, x.dtype)[:, None]
        centred = x - (x * p).sum(-1, keepdim=True)
        return (centred @ (centred * p).mT).to(dtype)
