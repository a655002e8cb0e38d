"""The two Kronecker factors of a layer with shared weights: `B kron A` for the weight `[out, in]`, row-major.

Index letters: N samples, V backpropagated vectors a sample, T positions (1 for a linear layer on `[N, D]`), G groups,
D inputs of a group (`C / G * kh * kw` for a convolution), O its outputs, a `[N, G, T, D]` what the weight multiplies, s
`[V, N, G, T, O]` the gradients at its output (columns of a root of the loss's curvature, 1 / N of a mean loss inside): see
`weight_sharing`. A layer used several times has the positions of all its uses.

    expand (KFC)    A = sum_nt a a^T / (N T)                     B = sum_vnt s s^T
    reduce          A = sum_n (mean_t a) (mean_t a)^T / N        B = sum_vn (sum_t s) (sum_t s)^T

R. Grosse, J. Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016; R. Eschenhagen,
A. Immer, R. Turner, F. Schneider, P. Hennig, "Kronecker-Factored Approximate Curvature for Modern Neural Network
Architectures", NeurIPS 2023. A covariance head is shift invariant, so that sum_t s = 0 where nothing but linear maps of
single positions lies between it and a convolution: there `reduce` is zero, and only `expand` says anything.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from secondorder.curvature.kronecker.autocorrelation import autocorrelation_factor, autocorrelation_is_faster
from secondorder.curvature.kronecker.layer_kinds import Convolution, Embedding, InProjection, layer_kind
from secondorder.curvature.kronecker.patches import patches
from secondorder.curvature.kronecker.weight_sharing import UNFOLDED_BYTES, LayerKind, with_ones
from secondorder.errors import unknown

SHARINGS = ("expand", "reduce")
KRONECKER_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight, flattened row by row, has the block B kron A: the groups follow each other, and then the outputs."""
CACHED_BYTES = 2**20
"""Patches that a CPU writes and multiplies at a time: they stay in its cache, four times faster than UNFOLDED_BYTES."""


def input_width(layer: nn.Module) -> int:
    """D, the rows and columns of A (of each group)."""
    return layer_kind(layer).inputs


def input_factor(layer: nn.Module, x: Tensor, sharing: str, most_bytes: int | None = None) -> Tensor:
    """A `[D, D]`, or `[G, D, D]` for G > 1 groups, from the layer's input x. Raises InputError for an unknown sharing.

    Args:
        most_bytes: of unfolded patches at a time; None: UNFOLDED_BYTES.
    """
    _check(sharing)
    return _squeezed(_input_mean(layer_kind(layer), x, sharing, most_bytes))


def input_rows(layer: nn.Module, x: Tensor, sharing: str) -> Tensor:
    """Rows `[R, D]` (`[G, R, D]`) with A = rows^T rows: R = N T for expand, N for reduce; for wide inputs."""
    _check(sharing)
    a = _squeezed(joint_input_rows(layer_kind(layer), [x], sharing))
    return a / math.sqrt(a.shape[-2])


def gradient_factor(layer: nn.Module, s: Tensor, sharing: str, most_bytes: int | None = None) -> Tensor:
    """B `[O, O]`, or `[G, O, O]`, from the gradients s `[V, N, *out]` at the layer's output.

    Args:
        most_bytes: of products of single samples at a time; None: UNFOLDED_BYTES.
    """
    _check(sharing)
    return _squeezed(joint_gradient_sum(layer_kind(layer), [s], sharing, most_bytes))


def joint_input_sum(
    kind: LayerKind, xs: Sequence[Tensor], sharing: str, bias: bool = False, most_bytes: int | None = None
) -> Tensor:
    """N T A (expand) or N A (reduce) `[G, D, D]` of the inputs of all uses in one forward; its diagonal for an embedding.

    With `bias` the last input is 1: its row and column are the sums of the other inputs, which need no unfolding.
    """
    if isinstance(kind, Embedding):
        return _sum(kind.counts(x) for x in xs)
    if sharing == "reduce":
        a = _mean_rows(kind, xs, bias)
        return a.mT @ a
    if isinstance(kind, InProjection):
        alike = all(x.stride(2) == 0 for x in xs)  # self-attention: query, key and value are the same
        a = joint_input_rows(kind, xs, sharing, bias)
        return _gram(a[:1]).repeat(3, 1, 1) if alike else _gram(a)
    return _sum(_expanded(kind, x, bias, most_bytes) for x in xs)


def joint_input_rows(kind: LayerKind, xs: Sequence[Tensor], sharing: str, bias: bool = False) -> Tensor:
    """The vectors a `[G, R, D]` of all uses in one forward: R = N T (expand), N (reduce)."""
    if sharing == "reduce":
        return _mean_rows(kind, xs, bias)
    rows = [kind.joint_vectors(x, bias).transpose(0, 1).flatten(1, 2) for x in xs]
    joint = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    return joint * kind.weights_of_positions(xs).sqrt() if isinstance(kind, InProjection) else joint


def joint_squared_sum(kind: LayerKind, gs: Sequence[Tensor], sharing: str) -> Tensor:
    """The diagonal `[G, O]` of `joint_gradient_sum`, without the rest."""
    vectors = (kind.output_vectors(g.flatten(0, 1)) for g in gs)
    if sharing == "reduce":
        return _sum(g.sum(2).transpose(0, 1) for g in vectors).square().sum(1)
    return _sum(g.square().sum((0, 2)) for g in vectors)


def joint_gradient_sum(kind: LayerKind, gs: Sequence[Tensor], sharing: str, most_bytes: int | None = None) -> Tensor:
    """B `[G, O, O]` of the gradients `[V, N, *out]` at the outputs of all uses in one forward."""
    vectors = (kind.output_vectors(g.flatten(0, 1)) for g in gs)
    if sharing == "reduce":
        g = _sum(g.sum(2).transpose(0, 1) for g in vectors)  # [G, V N, O]
        return g.mT @ g
    return _sum(_outer_products(kind, g, most_bytes) for g in vectors)


def _outer_products(kind: LayerKind, g: Tensor, most_bytes: int | None) -> Tensor:
    """sum_nt g g^T `[G, O, O]`, for convolutions a part of the samples at a time."""
    if not isinstance(kind, Convolution):
        return _gram(g.transpose(0, 1).flatten(1, 2))
    s = g.mT.flatten(0, 1)  # [N G, O, T]
    step = _step(kind.groups * s.shape[1] ** 2 * s.element_size(), most_bytes) * kind.groups
    return _sum(torch.bmm(part, part.mT).unflatten(0, (-1, kind.groups)).sum(0) for part in s.split(step))


def _expanded(kind: LayerKind, x: Tensor, bias: bool, most_bytes: int | None) -> Tensor:
    """sum_nt a a^T of one use."""
    count = len(x) * kind.positions(x)
    A = _input_mean(kind, x, "expand", most_bytes).mul_(count)
    if not bias:
        return A
    flat = x.reshape(-1, x.shape[-1]) if not isinstance(kind, Convolution) else x
    ones = with_ones(kind.mean_vectors(flat.mean(0, keepdim=True)), True)[0].mul_(count)  # [G, D]
    whole = A.new_empty(kind.groups, kind.inputs + 1, kind.inputs + 1)
    whole[:, :-1, :-1] = A
    whole[:, -1] = ones
    whole[:, :, -1] = ones
    return whole


def _mean_rows(kind: LayerKind, xs: Sequence[Tensor], bias: bool) -> Tensor:
    """mean_t a `[G, N, D]` over the positions of all uses."""
    T = [kind.positions(x) for x in xs]
    if isinstance(kind, InProjection):
        mean = _sum(kind.joint_vectors(x, bias).sum(2) / sum(T) for x in xs)
        return mean.transpose(0, 1) * kind.weights_of_positions(xs)
    means = [with_ones(kind.mean_vectors(x), bias) for x in xs]
    if len(xs) > 1:
        means = [mean.mul_(t / sum(T)) for mean, t in zip(means, T, strict=True)]
    return _sum(iter(means)).transpose(0, 1)


def _input_mean(kind: LayerKind, x: Tensor, sharing: str, most_bytes: int | None) -> Tensor:
    """A `[G, D, D]`, without the one of a bias."""
    if sharing == "reduce" or not isinstance(kind, Convolution):
        a = joint_input_rows(kind, [x], sharing)
        return _gram(a).div_(a.shape[1])
    if isinstance(kind.module, nn.Conv2d) and autocorrelation_is_faster(kind.module, x):
        return (autocorrelation_factor(x) / (len(x) * x.shape[-2] * x.shape[-1]))[None]
    return _unfolded_mean(kind, x, most_bytes)


def _unfolded_mean(kind: Convolution, x: Tensor, most_bytes: int | None) -> Tensor:
    """A through im2col, a part of the batch at a time."""
    one = patches(kind.module, x[:1])
    if most_bytes is None and x.device.type == "cpu":
        most_bytes = CACHED_BYTES
    step = _step(one.nbytes, most_bytes)
    A = x.new_zeros(one.shape[1], one.shape[2], one.shape[2])
    for part in x.split(step):
        a = patches(kind.module, part)
        few = a.shape[2] <= a.shape[3]  # the products of single samples are no larger than the patches
        if few and (kind.groups > 1 or x.device.type == "cpu"):
            A += (a @ a.mT).sum(0)
        elif kind.groups > 1:
            A += torch.einsum("ngdt,nget->gde", a, a)
        elif x.device.type == "cpu":
            for sample in a[:, 0]:  # no copy of the patches, unlike tensordot
                A[0].addmm_(sample, sample.mT)
        else:
            A[0] += torch.tensordot(a[:, 0], a[:, 0], dims=([0, 2], [0, 2]))
    return A / (len(x) * one.shape[-1])


def _step(sample_bytes: int, most_bytes: int | None) -> int:
    """Samples at a time, at least one."""
    return max(1, (UNFOLDED_BYTES if most_bytes is None else min(most_bytes, UNFOLDED_BYTES)) // sample_bytes)


def _gram(rows: Tensor) -> Tensor:
    """rows^T rows `[G, D, D]` of rows `[G, R, D]`."""
    return (rows[0].mT @ rows[0])[None] if len(rows) == 1 else rows.mT @ rows


def _sum(terms: Iterator[Tensor]) -> Tensor:
    return sum(terms, start=next(terms))


def _squeezed(factor: Tensor) -> Tensor:
    """Without the dimension of groups where there is one group."""
    return factor[0] if len(factor) == 1 else factor


def _check(sharing: str) -> None:
    if sharing not in SHARINGS:
        raise unknown("weight sharing", sharing, SHARINGS)
