"""Adaptive channel dropout, the pre-normalisation of DropCov."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import MOST, InputError, check_whole
from secondorder.matrix_power.transforms import full_precision, widened
from secondorder.pooling.layout import check_features
from secondorder.pooling.weights import counted, normalised, position_weights

MOST_KERNEL = 2**20 + 1
"""Size of the kernel along the channels; one longer than twice their number sees nothing more."""


class AdaptiveChannelDropout(nn.Module):
    """Channel dropout whose rate follows the features: `[N, C, H, W] -> [N, C, H, W]`, the identity in evaluation.

    Q. Wang, M. Gao, Z. Zhang, J. Xie, P. Li, Q. Hu, "DropCov: A Simple yet Effective Method for Improving Deep
    Architectures", NeurIPS 2022: covariance pooling without post-normalisation, but with channels dropped before it, so
    that channels are decorrelated (high rate) as long as information is preserved (low rate). With the channel means
    mu in R^C of a sample (global average pooling) and its covariance S,

        omega = softmax(conv1d(mu))                importance of the channels, one kernel along the channels
        y     = (1 + omega) x                      reweighted channels, with covariance S
        pi    = S 1                                correlation of each channel with all others
        rate  = clamp(1 - gain mean_n cos(omega_n, pi_n), 0, 1),    gain = 10 / log2(C)
        out   = y, each channel dropped with probability `rate`, the others divided by 1 - rate

    As published: these lines, one rate for the batch, no gradient through the rate, nothing at inference. Ours: pi costs
    O(C M) through S 1 = Yc (Yc^T 1) / M instead of a covariance matrix and is normalised first, so that the scale of the
    features does not matter; the rate stays on the device and is computed in float32 under autocast; a sample without
    variance counts as cos = 0 instead of NaN, and a rate of 1 gives zeros. Of several processes each has its own rate.
    With weights of the positions `[N, M]` or `[N, H, W]` (bool: a mask), mu and S are the weighted ones.

    Args:
        channels: C of the features.
        kernel_size: of the convolution along the channels, odd.

    Raises:
        InputError: for sizes that are no whole numbers or too large, and an even `kernel_size`.
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        check_whole("channels", channels, most=MOST)
        check_whole("kernel_size", kernel_size, most=MOST_KERNEL)
        if kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be an odd whole number of at least 1, got {kernel_size}")
        self.channels = channels
        self.importance = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def extra_repr(self) -> str:
        """The number of channels, which sets the gain of the rate, as text."""
        return f"channels={self.channels}"

    @torch.no_grad()
    def rate(self, y: Tensor, omega: Tensor, p: Tensor | None = None) -> Tensor:
        """Dropout rate of a batch, a scalar in [0, 1], from reweighted features y `[N, C, M]` and importances omega `[N, C]`.

        Args:
            p: the part `[N, 1, M]` of each position, None for equal ones.
        """
        return dropout_rate(y, omega, p, 10 / math.log2(max(self.channels, 2)))

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The features `[N, C, H, W]` with dropped channels while training, x itself in evaluation; always of the type of x.

        Args:
            x: features `[N, C, H, W]`.
            weights: of the positions, `[N, M]` or `[N, H, W]`; bool: a mask; None: equal ones.

        Raises:
            InputError: for other shapes and types.
        """
        if not self.training:
            return x
        return with_dropped_channels(x, weights, self.importance.weight, 10 / math.log2(max(self.channels, 2)))


def dropout_rate(y: Tensor, omega: Tensor, p: Tensor | None, gain: float) -> Tensor:
    """clamp(1 - gain mean_n cos(omega_n, pi_n), 0, 1) of features `[N, C, M]`, importances `[N, C]`, parts p `[N, 1, M]`."""
    yc = y - (y.mean(-1, keepdim=True) if p is None else (y * p).sum(-1, keepdim=True))
    yc = yc / yc.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(yc.dtype).tiny)
    total = yc.sum(1) if p is None else yc.sum(1) * p[:, 0]
    pi = F.normalize((yc @ total[..., None])[..., 0], dim=-1, eps=torch.finfo(yc.dtype).tiny)
    return (1 - gain * F.cosine_similarity(omega, pi, dim=-1).mean()).clamp(0, 1)


def with_dropped_channels(x: Tensor, weights: Tensor | None, kernel: Tensor, gain: float) -> Tensor:
    """The features `[N, C, H, W]` after a step of adaptive channel dropout with the kernel `[1, 1, k]` of the importances."""
    check_features(x, "NCHW", "adaptive channel dropout")
    with full_precision(x):
        features = widened(x).flatten(2)
        p = None
        if weights is not None:
            weights = position_weights(weights, x, "NCHW")
            features, p = counted(features, weights), normalised(weights, features.dtype)[:, None]
        mean = features.mean(-1) if p is None else (features * p).sum(-1)
        omega = F.conv1d(mean[:, None], kernel.to(features.dtype), padding=kernel.shape[-1] // 2).softmax(-1)[:, 0]
        y = (1 + omega)[..., None] * features
        with torch.no_grad():
            keep = 1 - dropout_rate(y, omega, p, gain)
        kept = torch.rand(x.shape[:2], device=x.device) < keep
        factor = torch.where(kept, 1 / keep.to(y.dtype).clamp_min(torch.finfo(y.dtype).tiny), 0)
        return (y * factor[..., None]).reshape(x.shape).to(x.dtype)


torch.fx.wrap("with_dropped_channels")
