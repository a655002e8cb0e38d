"""What the weight of a convolution multiplies at each position of its output: im2col, and its mean over the positions.

A transposed convolution is the convolution of stride 1, with its kernel turned round, of its input with zeros between and
around (V. Dumoulin, F. Visin, "A guide to convolution arithmetic for deep learning", 2016).

Index letters: N samples, C channels, T positions, G groups, D inputs of a group: C / G times the elements of the kernel.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHORTEST_ROW = 8
"""Positions in a row of the output from which copying rows is faster than im2col: 3-10 times; with 2 it takes 3 times as long."""

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def patches(layer: Convolution, x: Tensor) -> Tensor:
    """im2col: what the weight multiplies at each position, `[N, C, *map] -> [N, G, D, T]`; any padding and padding mode."""
    x = padded(layer, x)
    windows = _windows(layer, x.contiguous())
    if isinstance(layer, nn.Conv2d) and not (x.device.type == "cpu" and windows.shape[-1] >= SHORTEST_ROW):
        unfolded = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
    else:
        axes = len(layer.kernel_size)
        unfolded = windows.flatten(2 + axes).flatten(1, 1 + axes)
    return unfolded.unflatten(1, (layer.groups, -1))


def mean_patches(layer: Convolution, x: Tensor) -> Tensor:
    """mean_t a `[N, G, D]` without im2col: R x C^T / T, the rows R and columns C marking what a kernel element passes over."""
    x = padded(layer, x)
    marks = [_passed_over(x, *sizes) for sizes in _axes(layer, x)]
    means = x @ marks[-1].mT
    if len(marks) > 1:
        means = marks[-2] @ means
    if len(marks) > 2:
        means = torch.tensordot(means, marks[0], dims=([2], [1])).movedim(-1, 2)
    T = math.prod((mark[0].sum() for mark in marks), start=x.new_ones(()))
    return (means / T).flatten(2).unflatten(1, (layer.groups, -1)).flatten(2)


def map_positions(layer: Convolution, x: Tensor) -> int:
    """T, the positions of the output for an input `[N, C, *map]`."""
    return math.prod(map_size(layer, x))


def map_size(layer: Convolution, x: Tensor) -> tuple[int, ...]:
    """The output's positions along each axis, for an input `[N, C, *map]`."""
    sides = _sides(layer)[::-1]  # the last axis comes first there, its end last
    spread = [(n - 1) * z + 1 for n, z in zip(x.shape[2:], _zeros_between(layer), strict=True)]
    sizes = [n + sides[2 * i] + sides[2 * i + 1] for i, n in enumerate(spread)]
    axes = zip(sizes, layer.kernel_size, moves(layer), layer.dilation, strict=True)
    return tuple((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in axes)


def padded(layer: Convolution, x: Tensor) -> Tensor:
    """The input with the layer's padding around it, that of a transposed convolution with zeros between, too."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    steps, sides = _zeros_between(layer), _sides(layer)
    if any(step > 1 for step in steps):
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * z + 1 for n, z in zip(x.shape[2:], steps, strict=True)))
        places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in steps))
        spread[places] = x
        x = spread
    return F.pad(x, sides, mode=mode) if any(sides) else x


def moves(layer: Convolution) -> tuple[int, ...]:
    """The stride, along each axis, of a convolution's kernel in its padded input; 1 for a transposed convolution."""
    return (1,) * len(layer.kernel_size) if layer.transposed else tuple(layer.stride)


def _zeros_between(layer: Convolution) -> tuple[int, ...]:
    """Steps from one number of the input to the next in the padded input."""
    return tuple(layer.stride) if layer.transposed else (1,) * len(layer.kernel_size)


def _sides(layer: Convolution) -> list[int]:
    """Padding before and after each axis, the last axis first, as F.pad takes it; negative: that much is cut off."""
    if not layer.transposed:
        return list(layer._reversed_padding_repeated_twice)
    sides: list[int] = []
    axes: Any = zip(layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True)
    for k, d, p, more in reversed(list(axes)):
        before = d * (k - 1) - p
        sides += [before, before + more]
    return sides


def _axes(layer: Convolution, x: Tensor) -> list[tuple[int, int, int, int]]:
    """Size, kernel, stride and dilation for each axis of a padded input."""
    return list(zip(x.shape[2:], layer.kernel_size, moves(layer), layer.dilation, strict=True))


def _windows(layer: Convolution, x: Tensor) -> Tensor:
    """The patches as a view `[N, C, *kernel, *out]` of the padded input."""
    axes, steps = _axes(layer, x), x.stride()[2:]
    out = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in axes]
    kernel = [d * step for (_, _, _, d), step in zip(axes, steps, strict=True)]
    strides = [s * step for (_, _, s, _), step in zip(axes, steps, strict=True)]
    return x.as_strided(
        (*x.shape[:2], *layer.kernel_size, *out), (*x.stride()[:2], *kernel, *strides), x.storage_offset()
    )


def _passed_over(x: Tensor, size: int, kernel: int, stride: int, dilation: int) -> Tensor:
    """`[kernel, size]`, 1 where an element of the kernel meets the input at some position."""
    count = (size - dilation * (kernel - 1) - 1) // stride + 1
    places = dilation * torch.arange(kernel)[:, None] + stride * torch.arange(count)
    return torch.zeros(kernel, size).scatter_(1, places, 1.0).to(x)
