"""EKFAC: the best diagonal in the eigenbasis of the Kronecker factors.

T. George, C. Laurent, X. Bouthillier, N. Ballas, P. Vincent, "Fast Approximate Natural Gradient Descent in a
Kronecker-factored Eigenbasis", NeurIPS 2018. With B = Q_B diag(b) Q_B^T and A = Q_A diag(a) Q_A^T (expand), the products
b_i a_j are replaced by the exact second moments of the projected gradients of samples n and columns r,

    scales_ij = sum_rn (Q_B^T (sum_t s_rnt a_nt^T) Q_A)_ij^2,

of images that act on one another (batch norm in training mode) with the sum over n inside of the square and columns of each image
of its own (`gradients_of_columns`). This brings the block nearer to the exact one in Frobenius norm than any other diagonal in
this basis, K-FAC's included.

Index letters: n samples, r columns, T positions, G groups, D inputs and O outputs of a layer (of a group).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from secondorder.curvature.kronecker.blocks import (
    KroneckerFactors,
    Layers,
    factors_key,
    flat,
    gradients_of_columns,
    joined,
    kronecker_factors,
    kronecker_layers,
    uses_of,
)
from secondorder.curvature.kronecker.layer_kinds import layer_kind
from secondorder.curvature.kronecker.storage import factor_bytes
from secondorder.curvature.matrix_free.batch_parts import Probe
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.jacobian import Jacobian
from secondorder.curvature.matrix_free.layer_uses import LayerUse
from secondorder.curvature.matrix_free.output_matrix import OutputMatrix
from secondorder.curvature.matrix_free.per_sample import over_positions
from secondorder.curvature.matrix_free.sample_gradients import slices
from secondorder.curvature.matrix_free.trial import all_finite
from secondorder.curvature.operators import EigenbasisOperator, FactoredOperator, SymmetricOperator
from secondorder.curvature.resuming.sums import Sums
from secondorder.errors import NonFiniteError
from secondorder.matrix_power.decomposition import symmetric_eigen

WIDE_BASIS = 0
"""Inputs above which A is kept as rows if there are fewer of them: a basis of their span is all that is needed."""


class EigenbasisMoments:
    """The eigenbases `[G, O, O]` and `[G, D, D']` of a layer's factors, and the scales `[G, O, D']` summed in them."""

    def __init__(self, factors: KroneckerFactors, kind: str) -> None:
        self.kind = kind
        self.Q_B = torch.stack([_eigenbasis(B) for B in factors.gradient])
        if kind == "weight":
            self.Q_A = torch.stack([_eigenbasis(A) for A in factors.input])
        else:
            self.Q_A = self.Q_B.new_ones(len(self.Q_B), 1, 1)
        self.scales = self.Q_B.new_zeros(*self.Q_B.shape[:2], self.Q_A.shape[-1])

    def add(self, uses: Sequence[LayerUse], s: Sequence[Tensor], most_bytes: int, coupled: bool) -> None:
        """The gradients `[n, r, *out]` of some columns at the outputs of the uses, at most so many bytes at a time.

        Of images that act on one another (`coupled`), those of a column belong together: n counts positions.
        """
        whole = self.scales.new_zeros(s[0].shape[1], *self.scales.shape) if coupled else None
        n, r = s[0].shape[:2]
        numbers = r * self.scales.numel() + sum(_vectors(use, use.input[:1]).numel() for use in uses)
        for rows in slices(n, numbers * s[0].itemsize, most_bytes):
            projected: Tensor | None = None
            for use, g in zip(uses, s, strict=True):
                left = self.Q_B.mT @ layer_kind(use.layer).output_vectors(g[rows], 2).mT
                if self.kind == "bias":
                    term = left.sum(-1, keepdim=True)
                else:
                    term = over_positions(left, self.Q_A.mT @ _vectors(use, use.input[rows]))
                projected = term if projected is None else projected + term
            assert projected is not None
            if whole is None:
                self.scales += projected.square().sum((0, 1))
            else:
                whole += projected.sum(0)
        if whole is not None:
            self.scales += whole.square().sum(0)

    def block(self) -> SymmetricOperator:
        """The EKFAC block of the parameter, one `EigenbasisOperator` a group, block diagonal over several."""
        return joined([EigenbasisOperator(*parts) for parts in zip(self.Q_B, self.Q_A, self.scales, strict=True)])


def ekfac_blocks(
    jacobian: Jacobian, matrix: OutputMatrix, layers: Mapping[str, tuple[Layers, str]]
) -> dict[str, SymmetricOperator]:
    """The EKFAC block of each parameter: a pass over the batch for the bases, another one for the scales."""
    factors = kronecker_factors(jacobian, matrix, layers, "expand", WIDE_BASIS, by_image=True)
    bases = {name: EigenbasisMoments(factors[shared], kind) for name, (shared, kind) in layers.items()}
    most, projected = jacobian.block_bytes, max(basis.scales.numel() for basis in bases.values())
    key = partial(factors_key, jacobian, matrix, layers, "expand", WIDE_BASIS)
    with Sums("scales", key, {name: basis.scales for name, basis in bases.items()}) as sums:
        for part in sums.parts(jacobian):
            uses = uses_of(part.uses, layers)
            for s in gradients_of_columns(jacobian, part, matrix, flat(uses), sums, projected):
                gradients = iter(s)
                of_layers = {shared: [next(gradients) for _ in found] for shared, found in uses.items()}
                for name, (shared, _) in layers.items():
                    bases[name].add(uses[shared], of_layers[shared], most, jacobian.coupled)
    return {name: basis.block() for name, basis in bases.items()}


def ekfac_bytes(network: FrozenNetwork, probe: Probe, samples: int) -> int:
    """Bytes that the factors, bases and scales of `ekfac_blocks` take beside the graph, for so many samples."""
    layers, itemsize = kronecker_layers(network), network.dtype.itemsize
    return factor_bytes(layers, probe.shapes, samples, "expand", WIDE_BASIS, itemsize, corrected=True)


def _eigenbasis(factor: SymmetricOperator) -> Tensor:
    """Orthonormal eigenvectors; for a factor rows^T rows with few rows those of its range, outside of which nothing lies."""
    if isinstance(factor, FactoredOperator) and len(factor.rows) < factor.size:
        basis, triangle = torch.linalg.qr(factor.rows.mT)
        return basis @ _eigenvectors(triangle @ triangle.mT)
    return _eigenvectors(factor.dense())


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Those of a symmetric matrix. NonFiniteError where it has none in its number format."""
    with suppress(torch.linalg.LinAlgError):
        if all_finite(matrix):
            return symmetric_eigen(matrix)[1]
    raise NonFiniteError(
        f"a Kronecker factor {list(matrix.shape)} with numbers up to {float(matrix.abs().max()):.2g} has no eigenbasis in "
        f"{matrix.dtype}; scale the images, or use float64"
    )


def _vectors(use: LayerUse, a: Tensor) -> Tensor:
    """What the weight multiplies at each position, `[n, G, D, T]`."""
    return layer_kind(use.layer).input_vectors(a).mT
