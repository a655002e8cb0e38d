"""The pooling head: a reduction of the channels, then leaf modules that pool, run one by one or in one fused step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from secondorder.errors import InputError
from secondorder.matrix_power.transforms import known_shape
from secondorder.pooling.adaptive_channel_dropout import AdaptiveChannelDropout
from secondorder.pooling.covariance import Covariance, check_positions, positions
from secondorder.pooling.layout import LAYOUTS, AsMaps, as_maps, check_features, check_layout
from secondorder.pooling.matrix_function import MatrixLogarithm, MatrixPower, MatrixSquareRoot
from secondorder.pooling.upper_triangle import UpperTriangle
from secondorder.pooling.weights import position_weights, weighted_mean

FUSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    function: function.forward for function in (MatrixSquareRoot, MatrixPower, MatrixLogarithm)
}
"""Exact class of a matrix function between Covariance and UpperTriangle -> the forward that `of_features` stands for."""

OWN: dict[type[nn.Module], Callable[..., Tensor]] = {
    Covariance: Covariance.forward,
    UpperTriangle: UpperTriangle.forward,
    nn.Sequential: nn.Sequential.forward,
    **FUSED,
}
"""Exact class -> the forward that a fused step stands for."""


class PoolingHead(nn.Module):
    """Optional 1x1 reduction of the channels, then pooling: `[N, in_channels, H, W] -> [N, out_features]`.

    `reduction` and `layers` are ordinary containers: hooks, modules inserted or put in another's place do what they do in any
    `nn.Sequential`. As long as `layers` is exactly [Covariance, matrix function, UpperTriangle] without hooks, `forward` fuses it
    into one faster step. `chain` is the same head, with the same parameters, as leaf modules one after the other, for tools that
    work module by module (BackPACK).

    Args:
        in_channels: channels of the features.
        reduction, layers: modules of maps `[N, C, H, W]`; whatever the layout, they see maps (`layout.as_maps`).
        out_features: size of the pooled vector.
        layout: key of `layout.LAYOUTS`, the layout of the features; "NCHW" unless told, "NLC" for tokens `[N, L, C]`.

    Raises:
        InputError: for an unknown layout.
    """

    def __init__(
        self,
        in_channels: int,
        reduction: nn.Sequential,
        layers: nn.Sequential,
        out_features: int,
        layout: str = "NCHW",
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_features = out_features
        self.layout = check_layout(layout)
        self.reduction = reduction
        self.layers = layers

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The pooled features `[N, out_features]`; an empty batch gives an empty result.

        Args:
            x: features `[N, in_channels, H, W]`, or of the head's layout.
            weights: of the positions, `[N, H, W]` (the layout without C) or `[N, M]`, at least 0; bool: a mask, False leaves a
                position out. Weighted are the means and covariances of the pooling, not the batch statistics of the reduction.
                Elsewhere than on the CPU, where looking at values would wait for the device, a sample without weight gives what
                zero features do. A single position that counts has covariance zero.

        Raises:
            InputError: for another shape or type, and on the CPU for a negative weight or a sample without a positive one.
        """
        maps = head_input(x, self.layout, self.in_channels, self._batch_statistics(), self._single_position())
        if weights is not None:
            return self._weighted(maps, flat_weights(weights, x, self.layout))
        maps = self.reduction(maps)
        if self._can_fuse() and not isinstance(maps, torch.fx.Proxy) and not _is_empty(maps):
            covariance, function, _ = self.layers._modules.values()
            return function.of_features(positions(maps, covariance.layout))  # type: ignore[operator, arg-type]
        return self.layers(maps)

    def chain(self) -> nn.Sequential:
        """The same head as leaf modules that share its parameters; for another layout than "NCHW" it begins with `AsMaps`.

        It takes no weights of positions, as `nn.Sequential` takes one input.
        """
        first = [] if self.layout == "NCHW" else [AsMaps(self.layout)]
        return nn.Sequential(*first, *self.reduction, *self.layers)

    def extra_repr(self) -> str:
        """Sizes, and another layout than that of maps, as text."""
        layout = "" if self.layout == "NCHW" else f", layout={self.layout}"
        return f"in_channels={self.in_channels}, out_features={self.out_features}{layout}"

    def _batch_statistics(self) -> bool:
        """Whether the reduction normalises by statistics of the batch, for which one number a channel is too few."""
        return any(isinstance(layer, _BatchNorm) and layer.training for layer in self.reduction._modules.values())

    def _can_fuse(self) -> bool:
        """Whether the layers are exactly those of the fused step, with nothing that would see or change their tensors."""
        layers = self.layers
        children = tuple(layers._modules.values())  # not by iteration: this runs in every training step
        if len(children) != 3 or _has_any_global_hook():
            return False
        covariance, function, triangle = children
        return (
            type(covariance) is Covariance
            and type(function) in FUSED
            and type(triangle) is UpperTriangle
            and _is_plain(layers)
            and _is_plain(covariance)
            and _is_plain(function)
            and _is_plain(triangle)
        )

    def _single_position(self) -> bool:
        """Whether a single position is refused before the reduction has taken it into its running statistics.

        So it is for a covariance after a reduction that leaves the positions as they are; `Covariance` refuses the others.
        """
        convolution = next(iter(self.reduction._modules.values()), None)
        return (
            self.reduction.training
            and type(convolution) is nn.Conv2d
            and convolution.kernel_size == convolution.stride == (1, 1)
            and convolution.padding == (0, 0)
            and len(self.reduction._modules) == 3
            and any(isinstance(layer, Covariance) for layer in self.layers._modules.values())
        )

    def _weighted(self, maps: Tensor, weights: Tensor | None) -> Tensor:
        """The reduction, then the layers one by one, those that pool over positions with weights `[N, M]`."""
        if not any(isinstance(layer, Covariance) or _is_average(layer) for layer in self.layers):
            names = ", ".join(type(layer).__name__ for layer in self.layers)
            maps = without_weights(maps, weights, names[:150])
        maps = self.reduction(maps)
        for layer in self.layers:
            if isinstance(layer, AdaptiveChannelDropout | Covariance):
                maps = layer(maps, weights)
            elif _is_average(layer):
                maps = layer(mean_of_positions(maps, weights))
            else:
                maps = layer(maps)
        return maps


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs its class's own forward and nothing else."""
    state = module.__dict__
    own = "forward" not in state and OWN.get(type(module)) is type(module).forward
    hooks = (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )
    return own and not hooks


def _is_average(layer: nn.Module) -> bool:
    """Whether the layer is the mean over all positions."""
    return isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))


def _is_empty(x: Tensor) -> bool:
    return known_shape(x)[0] == 0


# Functions of tensors and numbers, each one node of a graph that torch.fx traces: there sizes are not known.


def head_input(x: Tensor, layout: str, in_channels: int, batch_statistics: bool, several: bool) -> Tensor:
    """Features of a head as maps `[N, in_channels, H, W]`. Raises InputError for others, and too few for batch statistics.

    Args:
        several: whether a single position is refused, too.
    """
    check_features(x, layout, "pooling head")
    maps = as_maps(x, layout)
    N, C, H, W = known_shape(maps)
    if in_channels != C:
        axes = LAYOUTS[layout].shape.replace("C", str(in_channels))
        raise InputError(f"pooling head needs features {axes}, got shape {list(x.shape)}")
    if batch_statistics and N * H * W == 1:
        raise InputError(
            f"features {list(x.shape)} give the reduction's batch normalisation one value per channel in training; use a larger "
            "batch, larger inputs or eval()"
        )
    if several and H * W == 1:
        check_positions(maps)
    return maps


def flat_weights(weights: Tensor | None, x: Tensor, layout: str) -> Tensor | None:
    """Weights `[N, M]` of the positions of features x as `position_weights` makes them.

    None for None (the default of a traced head).
    """
    return None if weights is None else position_weights(weights, x, layout)


def mean_of_positions(maps: Tensor, weights: Tensor | None) -> Tensor:
    """Maps `[N, C, H, W]` whose plain mean over positions is the weighted one; without weights the maps themselves.

    The weights are checked against maps that modules before the pooling may have made smaller.
    """
    return maps if weights is None else weighted_mean(maps, position_weights(weights, maps, "NCHW"))


def without_weights(y: Tensor, weights: Tensor | None, layers: str) -> Tensor:
    """y. Raises InputError for weights, which the layers named did not use."""
    if weights is not None:
        raise InputError(f"weights: of this head's layers ({layers}) none pools with weights; pool without them")
    return y


for _function in ("head_input", "flat_weights", "mean_of_positions", "without_weights"):
    torch.fx.wrap(_function)
