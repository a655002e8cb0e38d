"""The covariance of features in plain operations."""

from torch import Tensor


def covariance_matrix(x: Tensor) -> Tensor:
    """S = Xc Xc^T / M of features `[..., C, M]` with M positions, Xc centred: `[..., C, C]`."""
    centred = x - x.mean(-1, keepdim=True)
    return centred @ (centred / x.shape[-1]).mT
