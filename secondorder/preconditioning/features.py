"""Features of images as matrices: checked and centred, what every function of this package starts from.

Index letters of the package: N images, C channels, H x W = M positions, P = C (C + 1) / 2 entries of a symmetric matrix.
"""

import torch
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError
from secondorder.matrix_power.transforms import widened

CONSTANT = 1e-12
"""Features whose variance is at most this share of their mean square are constant."""


def check_features(features: Tensor) -> None:
    """InputError unless features are finite real numbers `[N, C, H, W]` with at least 2 positions H W."""
    if not isinstance(features, Tensor) or not features.is_floating_point() or features.dtype.itemsize < 2:
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise InputError(
            f"needs features [N, C, H, W] of real floating-point numbers, got {kind}; convert with .float()"
        )
    if features.ndim != 4 or 0 in features.shape:
        raise InputError(f"needs features [N, C, H, W] with no empty dimension, got shape {list(features.shape)}")
    if features.shape[2] * features.shape[3] < 2:
        raise InputError(f"features {list(features.shape)} have 1 position, their covariance is zero; use larger maps")
    if features.is_meta:
        raise InputError("needs features with values, got a tensor on the meta device; compute them on another")
    if not features.isfinite().all():
        raise NonFiniteError(f"needs finite features, got {int((~features.isfinite()).sum())} non-finite entries")


def varying_images(features: Tensor) -> Tensor:
    """Which images, bool `[N]`, have features `[N, C, H, W]` that are not the same at all positions.

    Only these have a covariance that is not zero.
    """
    x = features.flatten(2)
    return x.var(-1, correction=0).sum(1) > CONSTANT * x.square().mean(-1).sum(1)


def centred(features: Tensor) -> Tensor:
    """Xc = X (I - 1 1^T / M), the features `[N, C, H, W]` less the mean of each channel: `[N, C, M]`, 16 bits in float32."""
    x = widened(features.detach()).flatten(2)
    return x - x.mean(-1, keepdim=True)


def svec_scale(channels: int, like: Tensor) -> Tensor:
    """Factors `[P]` from the upper triangle to svec: 1 on the diagonal and sqrt(2) off it, so that |svec(Z)| = |Z|_F."""
    row, column = torch.triu_indices(channels, channels, device=like.device)
    return torch.where(row == column, like.new_tensor(1.0), like.new_tensor(2.0).sqrt())
