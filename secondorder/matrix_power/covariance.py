"""The covariance of features in plain operations."""

import torch
from torch import Tensor


def covariance_matrix(x: Tensor) -> Tensor:
    """S = Xc Xc^T / M of features `[..., C, M]` with M positions, Xc centred: `[..., C, C]`."""
    x = centred(x)
    return x @ (x / x.shape[-1]).mT


def centred(x: Tensor) -> Tensor:
    """Features `[..., C, M]` less the mean over their positions; exactly zero where all positions are equal.

    The mean of equal numbers is off by rounding, so the first position is taken off before: centring does not see a constant.
    """
    x = x - x[..., :1].detach()
    return x - x.mean(-1, keepdim=True)


def centred_in_units(x: Tensor, c: Tensor) -> Tensor:
    """`centred(x / c)` for units c `[..., 1, 1]` (`units`), in the same number of passes over x."""
    shifted = torch.addcdiv(x[..., :1] / -c, x, c)
    shifted -= shifted.mean(-1, keepdim=True)
    return shifted
