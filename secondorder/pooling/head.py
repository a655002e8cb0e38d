"""The pooling head: a reduction of the channels, then leaf modules that pool, run one by one or in one fused step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from secondorder.errors import InputError
from secondorder.matrix_power.transforms import known_shape
from secondorder.pooling.adaptive_channel_dropout import AdaptiveChannelDropout
from secondorder.pooling.covariance import Covariance, positions
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

    in_channels: channels of the features.
    reduction, layers: modules of maps `[N, C, H, W]`; whatever the layout, they see maps (`layout.as_maps`).
    out_features: size of the pooled vector.
    layout: key of `layout.LAYOUTS`, the layout of the features; "NCHW" unless told, "NLC" for tokens `[N, L, C]`.
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
        """The pooled features; an empty batch gives an empty result. Raises InputError for another shape or type.

        weights: of the positions, `[N, H, W]` (the layout without C) or `[N, M]`; bool: a mask, False leaves a position out (a
            tensor of numbers: at least 0). Weighted are the means and covariances of the pooling, not the batch statistics of the
            reduction. A negative weight or a sample without a positive one is refused on the CPU; elsewhere that would wait for
            the device, and a sample without weight gives what zero features do. A single position that counts has
            covariance zero.
        """
        maps = head_input(x, self.layout, self.in_channels, self._batch_statistics())
        if weights is not None:
            return self._weighted(self.reduction(maps), flat_weights(weights, x, self.layout))
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
        """Sizes, and another layout than that of maps."""
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

    def _weighted(self, maps: Tensor, weights: Tensor | None) -> Tensor:
        """The layers one by one, those that pool over positions with weights `[N, M]`."""
        taken = False
        for layer in self.layers:
            if isinstance(layer, AdaptiveChannelDropout | Covariance):
                maps, taken = layer(maps, weights), taken or isinstance(layer, Covariance)
            elif isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1)):
                maps, taken = layer(mean_of_positions(maps, weights)), True
            else:
                maps = layer(maps)
        if not taken:
            names = ", ".join(type(layer).__name__ for layer in self.layers)
            return without_weights(maps, weights, names[:150])
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


def _is_empty(x: Tensor) -> bool:
    return known_shape(x)[0] == 0


# Functions of tensors and numbers, each one node of a graph that torch.fx traces: there sizes are not known.


def head_input(x: Tensor, layout: str, in_channels: int, batch_statistics: bool) -> Tensor:
    """Features of a head as maps `[N, in_channels, H, W]`. Raises InputError for others, and too few for batch statistics."""
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
    return maps


def flat_weights(weights: Tensor | None, x: Tensor, layout: str) -> Tensor | None:
    """`position_weights`, None for None (the default of a traced head)."""
    return None if weights is None else position_weights(weights, x, layout)


def mean_of_positions(maps: Tensor, weights: Tensor | None) -> Tensor:
    """`weighted_mean` with a check of the weights against maps that modules before the pooling may have made smaller."""
    return maps if weights is None else weighted_mean(maps, position_weights(weights, maps, "NCHW"))


def without_weights(y: Tensor, weights: Tensor | None, layers: str) -> Tensor:
    """y. Raises InputError for weights, which the layers named did not use."""
    if weights is not None:
        raise InputError(f"weights: of this head's layers ({layers}) none pools with weights; pool without them")
    return y


for _function in ("head_input", "flat_weights", "mean_of_positions", "without_weights"):
    torch.fx.wrap(_function)
