"""The two Kronecker factors of a layer with shared weights: `B kron A` for the weight `[out, in]`, row-major.

Index letters: N samples, V backpropagated vectors a sample, T positions (1 for a linear layer on `[N, D]`), G groups,
D inputs of a group (`C / G * kh * kw` for a convolution), O its outputs, a `[N, T, G, D]` what the weight multiplies, s
`[V, N, T, G, O]` the gradients at its output (columns of a root of the loss's curvature, 1 / N of a mean loss inside).

    expand (KFC)    A = sum_nt a a^T / (N T)                     B = sum_vnt s s^T
    reduce          A = sum_n (mean_t a) (mean_t a)^T / N        B = sum_vn (sum_t s) (sum_t s)^T

R. Grosse, J. Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016; R. Eschenhagen,
A. Immer, R. Turner, F. Schneider, P. Hennig, "Kronecker-Factored Approximate Curvature for Modern Neural Network
Architectures", NeurIPS 2023. A covariance head is shift invariant, so that sum_t s = 0 where nothing but linear maps of
single positions lies between it and a convolution: there `reduce` is zero, and only `expand` says anything.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature.kronecker.autocorrelation import autocorrelation_factor, autocorrelation_is_faster
from secondorder.errors import unknown

SHARINGS = ("expand", "reduce")
KRONECKER_LAYERS = (nn.Linear, nn.Conv2d)
WIDE_INPUT = 4096
"""Inputs from which A is kept as rows (`input_rows`), whose product is A, and never built: 64 MiB in float32."""
UNFOLDED_BYTES = 64 * 2**20
"""Size of a buffer of unfolded patches or of products of single samples: larger batches are taken part by part."""
CACHED_BYTES = 2**20
"""Patches that a CPU writes and multiplies at a time: they stay in its cache, four times faster than UNFOLDED_BYTES."""
SHORTEST_ROW = 8
"""Positions in a row of the output from which copying rows is faster than im2col: 3-10 times; with 2 it takes 3 times as long."""

Layer = nn.Linear | nn.Conv2d


def input_width(layer: Layer) -> int:
    """D, the rows and columns of A (of each group)."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()


def input_factor(layer: Layer, x: Tensor, sharing: str, most_bytes: int | None = None) -> Tensor:
    """A `[D, D]`, or `[G, D, D]` for G > 1 groups, from the layer's input x. Raises InputError for an unknown sharing.

    most_bytes: of unfolded patches at a time; None: UNFOLDED_BYTES.
    """
    _check(sharing)
    if isinstance(layer, nn.Linear):
        a = _rows_of_linear(x, sharing)
        return (a.mT @ a).div_(len(a))
    if sharing == "reduce":
        a = mean_patches(layer, x)
        return _squeezed(torch.einsum("ngd,nge->gde", a, a) / len(x))
    if autocorrelation_is_faster(layer, x):
        return autocorrelation_factor(x) / (len(x) * x.shape[-2] * x.shape[-1])
    return _unfolded_factor(layer, x, most_bytes)


def input_rows(layer: Layer, x: Tensor, sharing: str) -> Tensor:
    """Rows `[R, D]` (`[G, R, D]`) with A = rows^T rows: R = N T for expand, N for reduce; for inputs above WIDE_INPUT."""
    _check(sharing)
    if isinstance(layer, nn.Linear):
        a = _rows_of_linear(x, sharing)
    elif sharing == "reduce":
        a = _squeezed(mean_patches(layer, x).transpose(0, 1))
    else:
        a = _squeezed(patches(layer, x).permute(1, 0, 3, 2).flatten(1, 2))
    return a / math.sqrt(a.shape[-2])


def gradient_factor(layer: Layer, s: Tensor, sharing: str, most_bytes: int | None = None) -> Tensor:
    """B `[O, O]`, or `[G, O, O]`, from the gradients s `[V, N, *out]` at the layer's output.

    most_bytes: of products of single samples at a time; None: UNFOLDED_BYTES.
    """
    _check(sharing)
    if isinstance(layer, nn.Linear):
        s = s.flatten(0, 1).flatten(1, -2) if s.ndim > 3 else s.flatten(0, 1)[:, None]
        s = (s.sum(1) if sharing == "reduce" else s.flatten(0, 1)).flatten(0, -2)
        return s.mT @ s
    s = s.flatten(0, 1).flatten(2)
    if sharing == "reduce":
        s = s.sum(-1, keepdim=True)
    s = s.unflatten(1, (layer.groups, -1)).flatten(0, 1)
    step = _step(layer.groups * s.shape[1] ** 2 * s.element_size(), most_bytes) * layer.groups
    products = (torch.bmm(part, part.mT).unflatten(0, (-1, layer.groups)).sum(0) for part in s.split(step))
    return _squeezed(sum(products))


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """im2col: what the weight multiplies at each position, `[N, C, H, W] -> [N, G, D, T]`; any padding and padding mode."""
    x = padded(layer, x)
    windows = _windows(layer, x.contiguous())
    if x.device.type == "cpu" and windows.shape[-1] >= SHORTEST_ROW:
        unfolded = windows.flatten(4).flatten(1, 3)
    else:
        unfolded = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
    return unfolded.unflatten(1, (layer.groups, -1))


def _windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The patches as a view `[N, C, kh, kw, *out]` of the padded input."""
    geometry = zip(x.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    out = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in geometry]
    steps = x.stride()[-2:]
    kernel = [d * step for d, step in zip(layer.dilation, steps, strict=True)]
    moves = [s * step for s, step in zip(layer.stride, steps, strict=True)]
    return x.as_strided(
        (*x.shape[:2], *layer.kernel_size, *out), (*x.stride()[:2], *kernel, *moves), x.storage_offset()
    )


def mean_patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """mean_t a `[N, G, D]` without im2col: R x C^T / T, the rows R and columns C marking what a kernel element passes over."""
    x = padded(layer, x)
    geometry = zip(x.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    R, C = (_passed_over(x, *sizes) for sizes in geometry)
    T = R[0].sum() * C[0].sum()
    means = R @ (x @ C.mT) / T
    return means.flatten(2).unflatten(1, (layer.groups, -1)).flatten(2)


def _passed_over(x: Tensor, size: int, kernel: int, stride: int, dilation: int) -> Tensor:
    """`[kernel, size]`, 1 where an element of the kernel meets the input at some position."""
    count = (size - dilation * (kernel - 1) - 1) // stride + 1
    places = dilation * torch.arange(kernel)[:, None] + stride * torch.arange(count)
    return torch.zeros(kernel, size).scatter_(1, places, 1.0).to(x)


def padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with the layer's padding around it."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    sides = layer._reversed_padding_repeated_twice
    return F.pad(x, sides, mode=mode) if any(sides) else x


def _unfolded_factor(layer: nn.Conv2d, x: Tensor, most_bytes: int | None) -> Tensor:
    """A through im2col, a part of the batch at a time."""
    one = patches(layer, x[:1])
    if most_bytes is None and x.device.type == "cpu":
        most_bytes = CACHED_BYTES
    step = _step(one.nbytes, most_bytes)
    A = x.new_zeros(one.shape[1], one.shape[2], one.shape[2])
    for part in x.split(step):
        a = patches(layer, part)
        few = a.shape[2] <= a.shape[3]  # the products of single samples are no larger than the patches
        if few and (layer.groups > 1 or x.device.type == "cpu"):
            A += (a @ a.mT).sum(0)
        elif layer.groups > 1:
            A += torch.einsum("ngdt,nget->gde", a, a)
        elif x.device.type == "cpu":
            for sample in a[:, 0]:  # no copy of the patches, unlike tensordot
                A[0].addmm_(sample, sample.mT)
        else:
            A[0] += torch.tensordot(a[:, 0], a[:, 0], dims=([0, 2], [0, 2]))
    return _squeezed(A / (len(x) * one.shape[-1]))


def _step(sample_bytes: int, most_bytes: int | None) -> int:
    """Samples at a time, at least one."""
    return max(1, (UNFOLDED_BYTES if most_bytes is None else min(most_bytes, UNFOLDED_BYTES)) // sample_bytes)


def _rows_of_linear(x: Tensor, sharing: str) -> Tensor:
    """a `[N T, D]`, or mean_t a `[N, D]`."""
    if x.ndim > 2 and sharing == "reduce":
        return x.flatten(1, -2).mean(1)
    return x.flatten(0, -2)


def _squeezed(factor: Tensor) -> Tensor:
    """Without the dimension of groups where there is one group."""
    return factor[0] if len(factor) == 1 else factor


def _check(sharing: str) -> None:
    if sharing not in SHARINGS:
        raise unknown("weight sharing", sharing, SHARINGS)
