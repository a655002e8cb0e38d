"""The squared gradients of single samples in an eigenbasis, of which EKFAC's second moments are made.

    sum_vn (Q_B^T (sum_t g a^T) Q_A)^2  `[G, O, D]`,  T the positions of all uses in one forward

Either the inputs are rotated by Q_A or the products, whichever is cheaper: T D^2 or O D^2 multiplications a sample. The rotated
inputs of a convolution are its outputs with the eigenvectors as kernels: no patches. Products are made from patches, as many
at a time as a CPU's cache holds.

Index letters: V backpropagated vectors a sample, N samples, T positions, G groups, D inputs, O outputs.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from secondorder.curvature.kronecker.factors import CACHED_BYTES
from secondorder.curvature.kronecker.layer_kinds import Convolution, Embedding
from secondorder.curvature.kronecker.patches import moves, padded
from secondorder.curvature.kronecker.weight_sharing import LayerKind

CHUNK_BYTES = 16 * 2**20
"""Of the products of single samples at a time."""


def squared_products(
    kind: LayerKind, xs: Sequence[Tensor], gs: Sequence[Tensor], Q_A: Tensor, Q_B: Tensor, bias: bool
) -> Tensor:
    """The sum for the inputs `[N, *in]` and the gradients `[V, N, *out]` at the outputs of all uses.

    Q_A `[G, D, D]`, Q_B `[G, O, O]`; `[G, D]` for an embedding, and `[G, O]` for very many outputs, are unit vectors.
    """
    total = Q_B.new_zeros(kind.groups, kind.outputs, Q_A.shape[-1])
    for v in range(len(gs[0])):
        gradients = [g[v] for g in gs]
        if isinstance(kind, Embedding):
            parts = iter([kind.squared_gradients(xs, gradients if Q_B.ndim == 2 else [g @ Q_B[0] for g in gradients])])
        elif isinstance(kind, Convolution):
            parts = _of_convolution(kind, xs, gradients, Q_A, Q_B, bias)
        else:
            parts = _of_vectors(kind, xs, gradients, Q_A, Q_B, bias)
        for part in parts:
            total += part
    return total


def squared_sample_gradients(kind: LayerKind, xs: Sequence[Tensor], gs: Sequence[Tensor], bias: bool) -> Tensor:
    """sum_vn (sum_t g a^T)^2 `[G, O, D]`: the diagonal of the layer's own block, T the positions of all uses in one forward."""
    if isinstance(kind, Embedding):
        return _sum(kind.squared_gradients(xs, [g[v] for g in gs]) for v in range(len(gs[0])))
    D = kind.inputs + bias
    total = gs[0].new_zeros(kind.groups, kind.outputs, D)
    few = max(1, CHUNK_BYTES // (total.numel() * total.element_size()))
    at_once = min(kind.samples_at_a_time(x) for x in xs)
    for first in range(0, len(xs[0]), at_once):
        samples = slice(first, first + at_once)
        vectors = [kind.joint_vectors(x[samples], bias) for x in xs]
        for v in range(len(gs[0])):
            gradients = [kind.output_vectors(g[v, samples]).mT for g in gs]
            for start in range(0, len(vectors[0]), few):
                part = slice(start, start + few)
                total += _sum(g[part] @ a[part] for g, a in zip(gradients, vectors, strict=True)).square_().sum(0)
    return total


def _of_vectors(
    kind: LayerKind, xs: Sequence[Tensor], gs: Sequence[Tensor], Q_A: Tensor, Q_B: Tensor, bias: bool
) -> Iterator[Tensor]:
    a = [kind.joint_vectors(x, bias) for x in xs]
    g = [kind.output_vectors(g) for g in gs]
    yield squared_gradients(Q_A, Q_B, *(parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (a, g)))


def _of_convolution(
    kind: Convolution, xs: Sequence[Tensor], gs: Sequence[Tensor], Q_A: Tensor, Q_B: Tensor, bias: bool
) -> Iterator[Tensor]:
    """Of a part of the samples at a time."""
    G, outputs, D = kind.groups, kind.outputs, Q_A.shape[-1]
    inputs_first = sum(kind.positions(x) for x in xs) <= outputs
    product = rotated_product if inputs_first else patch_product
    most = CACHED_BYTES if Q_A.is_cpu else CHUNK_BYTES
    at_once = max(1, most // (G * outputs * D * Q_A.element_size()))
    for first in range(0, len(xs[0]), at_once):
        samples = slice(first, min(first + at_once, len(xs[0])))
        products = Q_A.new_zeros(G, samples.stop - first, outputs, D)
        for x, g in zip(xs, gs, strict=True):
            few = max(1, most // (G * D * kind.positions(x) * Q_A.element_size()))
            parts = zip(x[samples].split(few), g[samples].split(few), products.split(few, 1), strict=True)
            for inputs, gradients, place in parts:
                place += product(kind, inputs, gradients, Q_A, bias)
        if not inputs_first:
            products = (products.flatten(1, 2) @ Q_A).view(products.shape)
        yield (products if Q_B.ndim == 2 else Q_B.mT[:, None] @ products).square_().sum(1)


def patch_product(kind: Convolution, x: Tensor, g: Tensor, Q_A: Tensor, bias: bool) -> Tensor:
    """sum_t g a^T `[G, N, O, D]`, not rotated."""
    a = kind.input_vectors(x)  # [N, G, T, D], without the one of a bias
    g = kind.output_vectors(g).mT
    products = (g @ a).transpose(0, 1)
    return torch.cat([products, g.sum(-1, keepdim=True).transpose(0, 1)], -1) if bias else products


def rotated_product(kind: Convolution, x: Tensor, g: Tensor, Q_A: Tensor, bias: bool) -> Tensor:
    """sum_t g (Q_A^T a)^T `[G, N, O, D]`; Q_A^T a are the outputs of the convolution with the columns of Q_A as kernels."""
    conv = kind.module
    columns = Q_A.mT  # [G, D, D], a kernel in each row, its last number the bias
    shift = columns[..., -1].flatten() if bias else None
    kernels = columns[..., :-1] if bias else columns
    kernels = kernels.reshape(-1, conv.in_channels // kind.groups, *conv.kernel_size)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel_size) - 1]
    a = convolve(padded(conv, x), kernels, shift, moves(conv), 0, conv.dilation, kind.groups)
    return (kind.output_vectors(g).mT @ kind.output_vectors(a)).transpose(0, 1)


def squared_gradients(Q_A: Tensor, Q_B: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """sum_n (Q_B^T (sum_t g a^T) Q_A)^2 `[G, O, D]` for inputs a `[N, G, T, D]` and output gradients g `[N, G, T, O]`.

    A part of the samples at a time. Inputs or products are projected on Q_A, whichever is cheaper: T D^2 or O D^2
    multiplications a sample.
    """
    (N, G, T, D), outputs = a.shape, g.shape[-1]
    total = Q_A.new_zeros(G, outputs, D)
    step = max(1, CHUNK_BYTES // (G * D * (outputs + min(T, outputs)) * total.element_size())) if T > 1 else N
    for inputs, gradients in zip(a.to(Q_A.dtype).split(step), g.to(Q_B.dtype).split(step), strict=True):
        left = _projected(gradients, Q_B)
        if T == 1:
            total += torch.einsum("ngo,ngd->god", left[:, :, 0].square(), _projected(inputs, Q_A)[:, :, 0].square())
        elif outputs >= T:
            total += (left.mT @ _projected(inputs, Q_A)).square_().sum(0)
        else:
            total += _projected(left.mT @ inputs, Q_A).square_().sum(0)
    return total


def _projected(x: Tensor, Q: Tensor) -> Tensor:
    """x Q for x `[n, G, T, K]`, Q `[G, K, K]`; one product for one group. Q `[G, K]` are the unit vectors."""
    if Q.ndim == 2:
        return x
    return (x.flatten(0, 2) @ Q[0]).view(x.shape) if len(Q) == 1 else x @ Q


def _sum(terms: Iterator[Tensor]) -> Tensor:
    return sum(terms, start=next(terms))
