"""Relative damping: lambda = damping |S|_F^2 / tr S, a multiple of the mean eigenvalue where each counts with its size.

    |S|_F^2 / tr S = sum_i lam_i (lam_i / sum_j lam_j)

Why not the plain mean tr S / n: directions without curvature lower it, and do not enter here; see
`secondorder.kfac.inverses.inverse`. Scales of blocks are `[G, 1, 1]`, one for each of G groups.
"""

import torch
from torch import Tensor


def weighted_mean_eigenvalue(entries: Tensor, trace: Tensor) -> Tensor:
    """|S|_F^2 / tr S `[G]` of matrices by their entries, or by their eigenvalues, `[G, m, n]`; 0 where the trace `[G]` is 0.

    Entries are divided by the trace before they are squared: squares of tiny numbers do not vanish.
    """
    parts = entries / torch.where(trace > 0, trace, 1.0)[:, None, None]
    return parts.square().sum((1, 2)) * trace


def scale_of_spectrum(values: Tensor) -> Tensor:
    """|S|_F^2 / tr S `[1]` of one matrix S by all its eigenvalues, or all entries of a diagonal one, in a tensor of any shape."""
    return weighted_mean_eigenvalue(values.reshape(1, 1, -1), values.sum()[None])


def norm_over_trace(squared_norm: float, trace: float) -> float:
    """|S|_F^2 / tr S of one matrix S by the numbers |S|_F^2 and tr S, or by estimates of both; 0 where tr S is not positive."""
    return squared_norm / trace if trace > 0 else 0.0


def min_scale(dtype: torch.dtype) -> float:
    """The square root of the smallest normal number of a floating-point type; dividing by it does not overflow."""
    return torch.finfo(dtype).tiny ** 0.5


def safe_scale(scale: Tensor) -> Tensor:
    """Scales `[G]` as `[G, 1, 1]`, with 1 in place of those too small to divide by (`min_scale`)."""
    return torch.where(scale > min_scale(scale.dtype), scale, 1.0)[:, None, None]


def tikhonov(scale: Tensor, damping: float, relative: bool) -> Tensor | float:
    """lambda: damping times the safe scales `[G, 1, 1]` where damping is relative to them, otherwise the damping itself."""
    return scale * damping if relative else damping
