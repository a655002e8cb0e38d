"""Gradients of a layer's parameters for each sample, from what goes into the layer and the gradients of its output.

Index letters: R columns (vectors that are pulled back at the same time), m samples, T positions, G groups, O outputs and D
inputs of a layer (of a group). Inputs a are `[m, *in]`, output gradients s are `[m, R, *out]`. A use tells the layer's type and
options and the buffers it was called with; its parameters and buffers outside of the call may have changed since.
"""

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from secondorder.curvature.kronecker.layer_kinds import layer_kind
from secondorder.curvature.matrix_free.layer_uses import LayerUse

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def linear_weight(use: LayerUse, a: Tensor, s: Tensor) -> Tensor:
    """sum_t s_t a_t^T `[m, R, O, D]` for a linear layer with T positions."""
    if a.ndim == 2:
        return s[..., None] * a[:, None, None]
    s = s.flatten(2, -2).mT
    return (s.flatten(1, 2) @ a.flatten(1, -2)).unflatten(1, s.shape[1:3])


def linear_bias(use: LayerUse, a: Tensor, s: Tensor) -> Tensor:
    """sum_t s_t `[m, R, O]` for a linear layer."""
    return s.flatten(2, -2).sum(2) if s.ndim > 3 else s


def convolution_weight(use: LayerUse, a: Tensor, s: Tensor) -> Tensor:
    """sum_t s_t a_t^T `[m, R, G, O, D]` for a convolution, a_t the patches of its input."""
    described = layer_kind(use.layer)
    return over_positions(described.output_vectors(s, 2).mT, described.input_vectors(a).mT)


def unfolded(use: LayerUse) -> int:
    """Numbers in the patches of one sample, which a convolution's weight takes."""
    if not isinstance(use.layer, CONVOLUTIONS):
        return 0
    described = layer_kind(use.layer)
    return described.groups * described.inputs * math.prod(use.output_shape[2:])


def over_positions(s: Tensor, a: Tensor) -> Tensor:
    """sum_t s_t a_t^T `[m, R, G, O, D]` for s `[m, R, G, O, T]` and a `[m, G, D, T]`: one product for all columns."""
    folded = s.transpose(1, 2)  # [m, G, R, O, T]
    return (folded.flatten(2, 3) @ a.mT).unflatten(2, folded.shape[2:4]).transpose(1, 2)


def map_bias(use: LayerUse, a: Tensor, s: Tensor) -> Tensor:
    """sum_t s_t `[m, R, O]` for a layer with maps `[m, O, *map]`."""
    return s.flatten(3).sum(-1)


def batch_norm_weight(use: LayerUse, a: Tensor, s: Tensor) -> Tensor:
    """sum_t s_t a^_t `[m, R, O]`, a^ the input normalised with the running statistics."""
    mean, variance = use.buffers["running_mean"], use.buffers["running_var"]
    assert isinstance(use.layer, nn.BatchNorm2d)
    assert mean is not None
    assert variance is not None
    normalised = (a - mean[:, None, None]) * (variance + use.layer.eps).rsqrt()[:, None, None]
    return (s * normalised[:, None]).flatten(3).sum(-1)


PER_SAMPLE: dict[type[nn.Module], dict[str, Callable[..., Tensor]]] = {
    nn.Linear: {"weight": linear_weight, "bias": linear_bias},
    **{kind: {"weight": convolution_weight, "bias": map_bias} for kind in CONVOLUTIONS},
    nn.BatchNorm2d: {"weight": batch_norm_weight, "bias": map_bias},
}
"""Layer type -> parameter -> (use, input, output gradients) -> gradients of the samples."""


def without_batch(use: LayerUse) -> bool:
    """Whether what went into a layer is a single sample, as linear layers and convolutions take it."""
    return use.input.ndim <= layer_kind(use.layer).sample


def sites(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each parameter sits: (layer, attribute), more than once for parameters that layers share."""
    found: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in parameters}
    names = {id(p): name for name, p in parameters.items()}
    for layer in network.modules():
        for attribute, p in layer._parameters.items():
            if p is not None and id(p) in names:
                found[names[id(p)]].append((layer, attribute))
    return found


def layers_with_rules(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[nn.Module, None]:
    """The layers of these parameters that PER_SAMPLE knows, in order."""
    places = [place for found in sites(network, parameters).values() for place in found]
    return {layer: None for layer, _ in places if type(layer) in PER_SAMPLE}
