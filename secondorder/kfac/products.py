"""The sums of outer products that one forward adds to a layer's factors, over samples, positions and vectors.

    expand  sum_nt a a^T  `[G, D, D]`               sum_vnt g g^T  `[G, O, O]`
    reduce  sum_n (mean_t a) (mean_t a)^T           sum_vn (sum_t g) (sum_t g)^T

T are the positions of all uses in the forward. The last input of a layer with bias is 1: its row and column are the sums of
the other inputs, which need no unfolding, and the number of positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secondorder.curvature.kronecker.factors import gradient_factor, input_factor
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.vectors import gradient_vectors, input_vectors, mean_vectors


def input_products(layer: KroneckerLayer, xs: Sequence[Tensor], T: Sequence[int]) -> Tensor:
    """The sum `[G, D, D]` of the inputs of all uses; T: positions of each."""
    if layer.sharing == "reduce":
        a = _mean_rows(layer, xs, T)
        return a.mT @ a
    terms = [_expanded(layer, x, t) for x, t in zip(xs, T, strict=True)]
    return sum(terms[1:], start=terms[0])


def input_rows(layer: KroneckerLayer, xs: Sequence[Tensor], T: Sequence[int]) -> Tensor:
    """The vectors a `[G, R, D]` themselves: R = N T (expand), N (reduce)."""
    if layer.sharing == "reduce":
        return _mean_rows(layer, xs, T)
    rows = [input_vectors(layer.geometry, x, layer.bias is not None).transpose(0, 1).flatten(1, 2) for x in xs]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def gradient_products(layer: KroneckerLayer, gs: Sequence[Tensor]) -> Tensor:
    """The sum `[G, O, O]` of the gradients `[V, N, *out]` of all uses."""
    if layer.sharing == "reduce":
        terms = [gradient_vectors(layer.geometry, g.flatten(0, 1)).sum(2).transpose(0, 1) for g in gs]
        g = sum(terms[1:], start=terms[0])  # [G, V N, O]
        return g.mT @ g
    terms = [_grouped(gradient_factor(layer.geometry, g, "expand")) for g in gs]
    return sum(terms[1:], start=terms[0])


def _expanded(layer: KroneckerLayer, x: Tensor, T: int) -> Tensor:
    """sum_nt a a^T of one use."""
    count = len(x) * T
    A = _grouped(input_factor(layer.geometry, x, "expand")).mul_(count)
    if layer.bias is None:
        return A
    flat = x.reshape(-1, x.shape[-1]) if isinstance(layer.geometry, nn.Linear) else x
    ones = mean_vectors(layer.geometry, flat.mean(0, keepdim=True), True)[0].mul_(count)  # [G, D]
    whole = A.new_empty(layer.groups, layer.inputs, layer.inputs)
    whole[:, :-1, :-1] = A
    whole[:, -1] = ones
    whole[:, :, -1] = ones
    return whole


def _mean_rows(layer: KroneckerLayer, xs: Sequence[Tensor], T: Sequence[int]) -> Tensor:
    """mean_t a `[G, N, D]` over the positions of all uses."""
    shares = [t / sum(T) for t in T]
    terms = [mean_vectors(layer.geometry, x, layer.bias is not None).mul_(w) for x, w in zip(xs, shares, strict=True)]
    return sum(terms[1:], start=terms[0]).transpose(0, 1)


def _grouped(factor: Tensor) -> Tensor:
    """With the dimension of groups."""
    return factor if factor.ndim == 3 else factor[None]
