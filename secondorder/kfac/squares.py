"""The squared gradients of single samples in an eigenbasis that one forward adds to EKFAC's second moments.

    sum_vn (Q_B^T (sum_t g a^T) Q_A)^2  `[G, O, D]`,  T the positions of all uses in the forward

Either the inputs are rotated by Q_A or the products, whichever is cheaper: T D^2 or O D^2 multiplications a sample. The rotated
inputs of a convolution are its outputs with the eigenvectors as kernels: no patches. Products are made from patches, as many
at a time as a CPU's cache holds.

Index letters: V backpropagated vectors a sample, N samples, T positions, G groups, D inputs, O outputs.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature.kronecker.factors import CACHED_BYTES, padded
from secondorder.kfac.inverses.ekfac import CHUNK_BYTES, squared_gradients
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.vectors import gradient_vectors, input_vectors, positions


def squared_products(
    layer: KroneckerLayer, xs: Sequence[Tensor], gs: Sequence[Tensor], Q_A: Tensor, Q_B: Tensor
) -> Tensor:
    """The sum for the inputs `[N, *in]` and the gradients `[V, N, *out]` at the outputs of all uses."""
    total = torch.zeros(layer.groups, layer.outputs, layer.inputs, dtype=layer.dtype, device=layer.weight.device)
    of_kind = _of_convolution if isinstance(layer.geometry, nn.Conv2d) else _of_linear
    for v in range(len(gs[0])):
        for part in of_kind(layer, xs, [g[v] for g in gs], Q_A, Q_B):
            total += part
    return total


def _of_linear(
    layer: KroneckerLayer, xs: Sequence[Tensor], gs: Sequence[Tensor], Q_A: Tensor, Q_B: Tensor
) -> Iterator[Tensor]:
    a = [input_vectors(layer.geometry, x, layer.bias is not None) for x in xs]
    g = [gradient_vectors(layer.geometry, g) for g in gs]
    yield squared_gradients(Q_A, Q_B, *(parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (a, g)))


def _of_convolution(
    layer: KroneckerLayer, xs: Sequence[Tensor], gs: Sequence[Tensor], Q_A: Tensor, Q_B: Tensor
) -> Iterator[Tensor]:
    """Of a part of the samples at a time."""
    G, outputs, D = layer.groups, layer.outputs, layer.inputs
    inputs_first = sum(positions(layer.geometry, x) for x in xs) <= outputs
    product = rotated_product if inputs_first else patch_product
    most = CACHED_BYTES if Q_A.is_cpu else CHUNK_BYTES
    at_once = max(1, most // (G * outputs * D * Q_A.element_size()))
    for first in range(0, len(xs[0]), at_once):
        samples = slice(first, min(first + at_once, len(xs[0])))
        products = Q_A.new_zeros(G, samples.stop - first, outputs, D)
        for x, g in zip(xs, gs, strict=True):
            few = max(1, most // (G * D * positions(layer.geometry, x) * Q_A.element_size()))
            parts = zip(x[samples].split(few), g[samples].split(few), products.split(few, 1), strict=True)
            for inputs, gradients, place in parts:
                place += product(layer, inputs, gradients, Q_A)
        if not inputs_first:
            products = (products.flatten(1, 2) @ Q_A).view(products.shape)
        yield (Q_B.mT[:, None] @ products).square_().sum(1)


def patch_product(layer: KroneckerLayer, x: Tensor, g: Tensor, Q_A: Tensor) -> Tensor:
    """sum_t g a^T `[G, N, O, D]`, not rotated."""
    a = input_vectors(layer.geometry, x, False)  # [N, G, T, D], without the one of a bias
    g = _by_group(layer, g)
    products = (g @ a).transpose(0, 1)
    return products if layer.bias is None else torch.cat([products, g.sum(-1, keepdim=True).transpose(0, 1)], -1)


def rotated_product(layer: KroneckerLayer, x: Tensor, g: Tensor, Q_A: Tensor) -> Tensor:
    """sum_t g (Q_A^T a)^T `[G, N, O, D]`; Q_A^T a are the outputs of the convolution with the columns of Q_A as kernels."""
    conv = layer.geometry
    assert isinstance(conv, nn.Conv2d)
    columns = Q_A.mT  # [G, D, D], a kernel in each row, its last number the bias
    shift = None if layer.bias is None else columns[..., -1].flatten()
    kernels = columns if shift is None else columns[..., :-1]
    kernels = kernels.reshape(-1, *conv.weight.shape[1:])
    a = F.conv2d(padded(conv, x), kernels, shift, conv.stride, 0, conv.dilation, conv.groups)
    return (_by_group(layer, g) @ a.flatten(2).unflatten(1, (layer.groups, -1)).mT).transpose(0, 1)


def _by_group(layer: KroneckerLayer, g: Tensor) -> Tensor:
    """`[N, G, O, T]`."""
    return g.flatten(2).unflatten(1, (layer.groups, -1))
