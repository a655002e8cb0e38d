"""The scale |S|_F^2 / tr S that relative damping is a multiple of: the mean eigenvalue where each counts with its size.

Why not the plain mean: see `secondorder.kfac.inverses.inverse`.
"""

import torch
from torch import Tensor


def squares_over(total: Tensor, values: Tensor) -> Tensor:
    """sum of squares of values `[G, m, n]` / total `[G]`, 0 where the total is; squares of tiny numbers do not vanish."""
    parts = values / torch.where(total > 0, total, 1.0)[:, None, None]
    return parts.square().sum((1, 2)) * total


def floor(dtype: torch.dtype) -> float:
    """The square root of the smallest normal number; dividing by it does not overflow."""
    return torch.finfo(dtype).tiny ** 0.5


def usable(scale: Tensor) -> Tensor:
    """The scales as `[G, 1, 1]`, 1 for those that are too small."""
    return torch.where(scale > floor(scale.dtype), scale, 1.0)[:, None, None]
