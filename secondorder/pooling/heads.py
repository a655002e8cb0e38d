"""Pooling heads: from the last feature map of a network to the vector that its classifier reads."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from secondorder.errors import MOST, InputError, check_known, check_whole, short
from secondorder.pooling.adaptive_channel_dropout import AdaptiveChannelDropout
from secondorder.pooling.covariance import Covariance
from secondorder.pooling.head import PoolingHead
from secondorder.pooling.layout import check_layout
from secondorder.pooling.matrix_function import MatrixLogarithm, MatrixPower, MatrixSquareRoot
from secondorder.pooling.random_lift import RandomLift
from secondorder.pooling.upper_triangle import UpperTriangle
from secondorder.untouched import undrawn_if_refused


def global_average(channels: int) -> list[nn.Module]:
    """GAP: the mean of each channel over all positions, C numbers."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def plain_covariance(channels: int) -> list[nn.Module]:
    """Second-order pooling without normalisation: the upper triangle of the covariance S, C (C + 1) / 2 numbers."""
    return [Covariance(), UpperTriangle()]


def newton_schulz_root(channels: int, num_iter: int = 5, method: str = "auto") -> list[nn.Module]:
    """GCP as published (iSQRT-COV, Li et al. 2018): S^(1/2) by `num_iter` Newton-Schulz steps, its upper triangle."""
    return [Covariance(), MatrixSquareRoot(method, num_iter), UpperTriangle()]


def exact_root(channels: int) -> list[nn.Module]:
    """GCP with the exact square root S^(1/2) of the covariance, its upper triangle."""
    return [Covariance(), MatrixSquareRoot("eigh"), UpperTriangle()]


def power(channels: int, exponent: float = 0.5) -> list[nn.Module]:
    """GCP with a matrix power S^p, p = `exponent` (MPN-COV, Li et al. 2017), its upper triangle."""
    return [Covariance(), MatrixPower(exponent), UpperTriangle()]


def logarithm(channels: int, eps: float = 1e-3) -> list[nn.Module]:
    """GCP with the log-Euclidean map: the upper triangle of log(S + eps I) - log(eps) I (log S on its range for eps = 0)."""
    return [Covariance(), MatrixLogarithm(eps), UpperTriangle()]


def dropped_covariance(channels: int, kernel_size: int = 3) -> list[nn.Module]:
    """DropCov (Wang et al. 2022): adaptive channel dropout, then plain covariance."""
    return [AdaptiveChannelDropout(channels, kernel_size), Covariance(), UpperTriangle()]


def lifted_average(channels: int, seed: int = 0) -> list[nn.Module]:
    """GAP with as many outputs as GCP, the dimension control: products of fixed random projections of the mean."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), RandomLift(channels, seed)]


POOLINGS: dict[str, Callable[..., list[nn.Module]]] = {
    "gap": global_average,
    "covariance": plain_covariance,
    "gcp": newton_schulz_root,
    "gcp_exact": exact_root,
    "gcp_power": power,
    "gcp_log": logarithm,
    "dropcov": dropped_covariance,
    "gap_lifted": lifted_average,
}
"""Name -> leaf modules of the head for a number of channels and options."""

MOST_CHANNELS = 2**20
"""Channels of features: a bound on what a size by mistake would allocate."""


def pooling_head(
    name: str,
    in_channels: int,
    reduced_channels: int | None = None,
    *,
    layout: str = "NCHW",
    activation: Callable[[], nn.Module] = nn.ReLU,
    **options: Any,
) -> PoolingHead:
    """The head called `name`, a key of POOLINGS, after a 1x1 reduction to `reduced_channels` unless that is None.

    Args:
        name: key of POOLINGS.
        in_channels: channels of the features.
        reduced_channels: channels that are pooled, after the reduction: convolution + batch normalisation + `activation`; None:
            no reduction.
        layout: key of `layout.LAYOUTS`, e.g. "NLC" for tokens `[N, L, C]`, "NCL" for sequences, "NCTHW" for video.
        activation: makes the end of the reduction (ReLU6 for MobileNetV2).
        options: those of the pooling, e.g. `num_iter` for "gcp".

    Raises:
        InputError: for an unknown name, option, layout or size; torch's random numbers are then as before.
    """
    check_pooling_name(name)
    check_options("pooling_head", name, options, inspect.signature(pooling_head).parameters)
    check_layout(layout)
    check_whole("in_channels", in_channels, most=MOST_CHANNELS)
    if reduced_channels is not None:
        check_whole("reduced_channels", reduced_channels, most=min(MOST_CHANNELS, MOST // in_channels))
    channels, reduction = in_channels, nn.Sequential()
    with undrawn_if_refused():
        if reduced_channels is not None:
            channels, reduction = reduced_channels, _reduction(in_channels, reduced_channels, activation)
        layers = nn.Sequential(*POOLINGS[name](channels, **options))
        return PoolingHead(in_channels, reduction, layers, _out_features(name, layers, channels), layout)


def check_pooling_name(name: object) -> None:
    """Raises InputError unless this is a key of POOLINGS."""
    check_known("pooling", name, POOLINGS)


def check_options(function: str, pooling: str, options: Mapping[str, Any], parameters: Iterable[str]) -> None:
    """Raises InputError for an option that the pooling lacks; `parameters` of the function that got it may be what was meant."""
    allowed = [name for name in inspect.signature(POOLINGS[pooling]).parameters if name != "channels"]
    wrong = next((option for option in options if option not in allowed), None)
    if wrong is not None:
        near = difflib.get_close_matches(wrong, [*allowed, *parameters], n=1)
        raise InputError(
            f"unknown option {wrong[:40]!r} of pooling {pooling!r}; allowed: {', '.join(allowed) or 'none'}; {function} has no "
            "option of this name either" + (f", did you mean {near[0]}?" if near else "")
        )


def output_size(module: nn.Module, features: torch.Tensor) -> int:
    """The F of a module that makes `[N, F]` of features, found by a run in eval mode. Raises InputError for other results."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad():
            shape = list(module.eval()(features).shape)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise InputError(
            f"{type(module).__name__} as pooling fails for features {list(features.shape)} ({reason})"
        ) from error
    finally:
        for part, mode in modes:
            part.training = mode
    if len(shape) != 2 or shape[0] != features.shape[0]:
        raise InputError(
            f"{type(module).__name__} as pooling makes {shape} of features {list(features.shape)}, not [N, F]; end in Flatten"
        )
    return shape[1]


def _out_features(name: str, layers: nn.Sequential, channels: int) -> int:
    """The size of the pooled vector: known for layers that end in a triangle or a lift and for the mean, else found by a run."""
    if len(layers) == 0:
        raise InputError(f"pooling {name!r} has no layers: a row of POOLINGS gives at least one")
    if type(layers[-1]) is UpperTriangle:
        return channels * (channels + 1) // 2
    if type(layers[-1]) is RandomLift:
        return layers[-1].out_features
    if [type(layer) for layer in layers] == [nn.AdaptiveAvgPool2d, nn.Flatten]:
        return channels
    return output_size(layers, torch.ones(2, channels, 4, 4))


def _reduction(in_channels: int, channels: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """1x1 convolution + batch normalisation + activation, initialised as in ResNet."""
    if not callable(activation):
        raise InputError(f"activation {short(activation)}: must make an nn.Module, e.g. nn.ReLU")
    end = activation()
    if not isinstance(end, nn.Module):
        raise InputError(f"activation {short(activation)}: must make an nn.Module, made {short(end)}")
    convolution = nn.Conv2d(in_channels, channels, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), end)
