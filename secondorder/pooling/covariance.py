"""Covariance of the channels of a feature map."""

import math

import torch
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.matrix_power import covariance
from secondorder.matrix_power.covariance import covariance_matrix
from secondorder.matrix_power.transforms import full_precision, known_shape, result_dtype, widened
from secondorder.pooling.layout import channels_first, check_features, check_layout
from secondorder.pooling.weights import position_weights, weighted_covariance


class Covariance(nn.Module):
    """S = (1/M) Xc Xc^T over the M positions, Xc centred: `[N, C, H, W] -> [N, C, C]`, N = 0 included.

    The divisor is M, as in MPN-COV (not M - 1). With weights w `[N, M]` or `[N, H, W]` (bool: a mask), over sum w instead:
    S = sum_m w_m (x_m - mu) (x_m - mu)^T / sum_m w_m, mu the weighted mean. `layout` is a key of `layout.LAYOUTS`, e.g. "NLC"
    for tokens `[N, L, C]`; InputError for another. Computed in float32 under autocast.
    """

    def __init__(self, layout: str = "NCHW") -> None:
        super().__init__()
        self.layout = check_layout(layout)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """One covariance matrix for each sample, `[N, C, C]`, of features x `[N, C, H, W]` (or of the layout).

        Args:
            x: the features.
            weights: of the positions, `[N, M]` or the layout without C; bool: a mask; None: equal ones.

        Raises:
            InputError: for other shapes and types, and a single position.
        """
        return covariance_of(x, weights, self.layout)

    def extra_repr(self) -> str:
        """The divisor, which implementations differ in, and another layout than that of maps, as text."""
        return "divisor=H*W" if self.layout == "NCHW" else f"divisor=M, layout={self.layout}"


def positions(x: Tensor, layout: str = "NCHW") -> Tensor:
    """Features as `[N, C, M]`. Raises InputError unless x has this layout, and at least 2 positions to vary over."""
    check_features(x, layout, "covariance pooling")
    x = channels_first(x, layout).flatten(2)
    check_positions(x)
    return x


def check_positions(x: Tensor) -> None:
    """Raises InputError for features `[N, C, ...]` of a single position."""
    if math.prod(known_shape(x)[2:]) < 2:
        raise InputError(
            "covariance pooling of a single position gives zeros without a gradient; use larger inputs, smaller strides "
            '(last_stride=1) or pooling "gap"'
        )


def covariance_of(x: Tensor, weights: Tensor | None, layout: str) -> Tensor:
    """The covariance `[N, C, C]` of features x in this layout, with weights of the positions unless they are None."""
    features = positions(x, layout)
    if weights is not None:
        return weighted_covariance(features, position_weights(weights, x, layout))
    if known_shape(features)[0] == 0:
        dtype = result_dtype(x)
        with full_precision(x):
            return covariance_matrix(widened(features)).to(dtype)
    return covariance(features)


torch.fx.wrap("covariance_of")
