"""Pooling heads: from the last feature map of a network to the vector that its classifier reads."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from secondorder.errors import InputError, unknown
from secondorder.pooling.adaptive_channel_dropout import AdaptiveChannelDropout
from secondorder.pooling.covariance import Covariance, positions
from secondorder.pooling.matrix_function import MatrixFunction, MatrixLogarithm, MatrixPower, MatrixSquareRoot
from secondorder.pooling.upper_triangle import UpperTriangle


def global_average(channels: int) -> list[nn.Module]:
    """GAP: the mean of each channel."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def plain_covariance(channels: int) -> list[nn.Module]:
    """Second-order pooling without normalisation."""
    return [Covariance(), UpperTriangle()]


def newton_schulz_root(channels: int, num_iter: int = 5, method: str = "auto") -> list[nn.Module]:
    """GCP as published (iSQRT-COV, Li et al. 2018): 5 Newton-Schulz steps."""
    return [Covariance(), MatrixSquareRoot(method, num_iter), UpperTriangle()]


def exact_root(channels: int) -> list[nn.Module]:
    """GCP with the exact square root."""
    return [Covariance(), MatrixSquareRoot("eigh"), UpperTriangle()]


def power(channels: int, exponent: float = 0.5) -> list[nn.Module]:
    """GCP with a matrix power (MPN-COV, Li et al. 2017)."""
    return [Covariance(), MatrixPower(exponent), UpperTriangle()]


def logarithm(channels: int, eps: float = 1e-3) -> list[nn.Module]:
    """GCP with the log-Euclidean map."""
    return [Covariance(), MatrixLogarithm(eps), UpperTriangle()]


def dropped_covariance(channels: int, kernel_size: int = 3) -> list[nn.Module]:
    """DropCov (Wang et al. 2022): adaptive channel dropout, then plain covariance."""
    return [AdaptiveChannelDropout(channels, kernel_size), Covariance(), UpperTriangle()]


POOLINGS: dict[str, Callable[..., list[nn.Module]]] = {
    "gap": global_average,
    "covariance": plain_covariance,
    "gcp": newton_schulz_root,
    "gcp_exact": exact_root,
    "gcp_power": power,
    "gcp_log": logarithm,
    "dropcov": dropped_covariance,
}
"""Name -> leaf modules of the head for a number of channels and options."""


class PoolingHead(nn.Module):
    """Optional 1x1 reduction of the channels, then pooling: `[N, in_channels, H, W] -> [N, out_features]`.

    `forward` fuses covariance, matrix function and triangle into one step. `chain` is the same head, with the same
    parameters, as leaf modules one after the other, for tools that work module by module (BackPACK).
    """

    def __init__(self, in_channels: int, reduction: nn.Sequential, layers: nn.Sequential, out_features: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_features = out_features
        self.reduction = reduction
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """The pooled features. Raises InputError for another shape."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape:
            raise InputError(f"pooling head needs features [N, {self.in_channels}, H, W], got shape {list(x.shape)}")
        x = self.reduction(x)
        function = self.layers[-2]
        return function.of_features(positions(x)) if isinstance(function, MatrixFunction) else self.layers(x)

    def chain(self) -> nn.Sequential:
        """The same head as leaf modules that share its parameters."""
        return nn.Sequential(*self.reduction, *self.layers)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_channels={self.in_channels}, out_features={self.out_features}"


def pooling_head(
    name: str,
    in_channels: int,
    reduced_channels: int | None = None,
    *,
    activation: Callable[[], nn.Module] = nn.ReLU,
    **options: Any,
) -> PoolingHead:
    """The head called `name`, a key of POOLINGS, after a 1x1 reduction to `reduced_channels` unless that is None.

    The reduction is convolution + batch normalisation + `activation` (ReLU6 for MobileNetV2 and ShuffleNetV2). `options` are
    those of the pooling, e.g. `num_iter` for "gcp". Raises InputError for an unknown name, option or size.
    """
    if name not in POOLINGS:
        raise unknown("pooling", name, POOLINGS)
    _check_options(name, options)
    _check_channels("in_channels", in_channels)
    channels, reduction = in_channels, nn.Sequential()
    if reduced_channels is not None:
        _check_channels("reduced_channels", reduced_channels)
        channels, reduction = reduced_channels, _reduction(in_channels, reduced_channels, activation)
    layers = nn.Sequential(*POOLINGS[name](channels, **options))
    matrix = any(isinstance(layer, UpperTriangle) for layer in layers)
    return PoolingHead(in_channels, reduction, layers, channels * (channels + 1) // 2 if matrix else channels)


def _reduction(in_channels: int, channels: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """1x1 convolution + batch normalisation + activation, initialised as in ResNet."""
    convolution = nn.Conv2d(in_channels, channels, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), activation())


def _check_options(name: str, options: dict[str, Any]) -> None:
    allowed = [parameter for parameter in inspect.signature(POOLINGS[name]).parameters if parameter != "channels"]
    if wrong := [option for option in options if option not in allowed]:
        raise InputError(f"unknown option {wrong[0]!r} of pooling {name!r}; allowed: {', '.join(allowed) or 'none'}")


def _check_channels(name: str, channels: int) -> None:
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {channels!r}")
