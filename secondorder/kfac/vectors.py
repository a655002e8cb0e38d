"""What the weight of a layer multiplies and what comes back at its output, as vectors: a `[N, G, T, D]`, g `[N, G, T, O]`.

Index letters: N samples, T positions, G groups, D inputs of a group (one more, which is 1, with a bias), O outputs of a group.
A Conv1d is seen as a Conv2d on maps of one row (`geometry`), so that there are two kinds of layer only. Low precision is
widened to float32.

The first dimension of a layer's input is the sample, with transformers too (batch_first=True). Where it is the position
instead, N and T change places: `reduce` then averages over samples, and EKFAC squares sums over samples; both are wrong.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature.kronecker.factors import UNFOLDED_BYTES, mean_patches, patches

Geometry = nn.Linear | nn.Conv2d


def geometry(module: nn.Module) -> Geometry:
    """The layer itself, or the Conv2d without memory that a Conv1d is on maps `[N, C, 1, W]`."""
    if isinstance(module, nn.Conv1d):
        padding = module.padding if isinstance(module.padding, str) else (0, module.padding[0])
        return nn.Conv2d(
            module.in_channels,
            module.out_channels,
            (1, module.kernel_size[0]),
            (1, module.stride[0]),
            padding,
            (1, module.dilation[0]),
            module.groups,
            bias=False,
            padding_mode=module.padding_mode,
            device="meta",
        )
    assert isinstance(module, nn.Linear | nn.Conv2d)
    return module


def factor_dtype(weight: Tensor) -> torch.dtype:
    """That of the weight, at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def batched(module: nn.Module, x: Tensor, leading: int = 0) -> Tensor:
    """Input or output of a call as its geometry has it, `[N, *]` also from a call without a batch, after `leading` dimensions."""
    sample = {nn.Linear: 1, nn.Conv1d: 2, nn.Conv2d: 3}[_kind(module)]
    if x.ndim == sample + leading:
        x = x.unsqueeze(leading)
    return x.unsqueeze(-2) if isinstance(module, nn.Conv1d) else x


def positions(layer: Geometry, x: Tensor) -> int:
    """T of an input."""
    if isinstance(layer, nn.Linear):
        return math.prod(x.shape[1:-1])
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    sizes = (x.shape[-2] + top + bottom, x.shape[-1] + left + right)
    geometry = zip(sizes, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    return math.prod((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in geometry)


def input_vectors(layer: Geometry, x: Tensor, bias: bool) -> Tensor:
    """a `[N, G, T, D]`, with ones last for the bias."""
    a = x.reshape(len(x), 1, -1, x.shape[-1]) if isinstance(layer, nn.Linear) else patches(layer, x).mT
    return F.pad(a, (0, 1), value=1.0) if bias else a


def mean_vectors(layer: Geometry, x: Tensor, bias: bool) -> Tensor:
    """mean_t a `[N, G, D]`, without unfolding."""
    a = x.reshape(len(x), 1, -1, x.shape[-1]).mean(2) if isinstance(layer, nn.Linear) else mean_patches(layer, x)
    return F.pad(a, (0, 1), value=1.0) if bias else a


def gradient_vectors(layer: Geometry, g: Tensor) -> Tensor:
    """g `[N, G, T, O]` of the gradients `[N, *out]` at the output."""
    if isinstance(layer, nn.Linear):
        return g.reshape(len(g), 1, -1, g.shape[-1])
    return g.flatten(2).unflatten(1, (layer.groups, -1)).mT


def vectors(layer: Geometry, x: Tensor, g: Tensor, bias: bool, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """a and g of so many samples after the other."""
    for part, gradients in zip(x.split(samples), g.split(samples), strict=True):
        yield input_vectors(layer, part, bias), gradient_vectors(layer, gradients)


def samples_at_a_time(layer: Geometry, x: Tensor) -> int:
    """Samples whose unfolded inputs stay below UNFOLDED_BYTES, at least one."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    numbers = positions(layer, x) * groups * (layer.weight[0].numel() + 1)
    return max(1, UNFOLDED_BYTES // max(1, numbers * x.element_size()))


def weight_gradient(layer: Geometry, x: Tensor, g: Tensor, bias: bool) -> Tensor:
    """sum_nt g a^T `[G, O, D]`: what autograd has to find for weight and bias."""
    parts = [torch.einsum("ngto,ngtd->god", gs, a) for a, gs in vectors(layer, x, g, bias, samples_at_a_time(layer, x))]
    return sum(parts[1:], start=parts[0])


def _kind(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d) if isinstance(module, kind))
