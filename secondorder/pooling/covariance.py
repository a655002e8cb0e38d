"""Covariance of the channels of a feature map."""

from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.matrix_power import covariance


class Covariance(nn.Module):
    """S = (1/M) Xc Xc^T over the M = H W positions, Xc centred: `[N, C, H, W]` or `[N, C, M]` -> `[N, C, C]`.

    The divisor is M, as in MPN-COV (not M - 1). Computed in float32 under autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """One covariance matrix for each sample. Raises InputError for other shapes."""
        return covariance(positions(x))

    def extra_repr(self) -> str:
        """The divisor, which implementations differ in."""
        return "divisor=H*W"


def positions(x: Tensor) -> Tensor:
    """Feature maps `[N, C, H, W]` as `[N, C, M]`. Raises InputError unless x has 3 or 4 dimensions."""
    if x.ndim not in (3, 4):
        raise InputError(f"covariance pooling needs features [N, C, H, W] or [N, C, M], got shape {list(x.shape)}")
    return x.flatten(2)
