"""Conditioning of curvature blocks under several heads on one backbone, before and after K-FAC.

F is the block of the Gauss-Newton matrix (GGN) of a weight, of the mean cross-entropy of one batch in training mode, B kron A
its K-FAC block of the same images. Rows, of the first, the middle and the last convolution with at most `LARGEST` weights:

    CONDITION       lambda_1 / lambda_k of F
    AFTER_KFAC      the same of P^(1/2) F P^(1/2), P = (B kron A + lambda I)^-1
    AFTER_EXACT     the same with P = (F + lambda I)^-1, eigenvalues f / (f + lambda): what K-FAC would do if it were exact
    COSINE          <F, B kron A> / (|F| |B kron A|)

k is half of the rank that N images and K classes make possible under every head, min(P, N (K - 1)), rounded up; lambda is 0.01 of
|C|_F^2 / tr C of the matrix C that is inverted, the optimiser's default.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks
from secondorder.curvature.matrix_free.loss_curvature import loss_curvature
from secondorder.curvature.operators import (
    DiagonalOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
    damped_inverse_root,
    in_eigenbasis,
    preconditioned,
)
from secondorder.kfac.options import DAMPING
from secondorder.networks import Network
from secondorder.untouched import untouched
from studies.preconditioning.backbone import Backbone, Row, convolutions

CONDITION = "block condition"
AFTER_KFAC, AFTER_EXACT = f"{CONDITION} after K-FAC", f"{CONDITION} after an exact preconditioner"
COSINE = "cosine of K-FAC to the block"
ROLES = ("first convolution", "middle convolution", "last convolution")
LARGEST = 50_000
"""Weights of a convolution whose Jacobian still fits in memory."""
RESOLVED = 1e-13
"""Eigenvalues below this share of the largest are rounding errors of a Gram matrix in float64."""


def block_rows(backbone: Backbone) -> Iterator[Row]:
    """Rows of every head; NaN where there is no curvature, or an eigenvalue is that of rounding."""
    batch, classes = backbone.images(backbone.measures.curvature_images), backbone.data.num_classes
    for head, network in backbone.networks.items():
        small = [name for name in convolutions(network) if network.get_parameter(name).numel() <= LARGEST]
        names = (small[0], small[len(small) // 2], small[-1])
        blocks = gauss_newton_blocks(network, batch, names, classes)
        kfac = curvature_blocks(network, nn.CrossEntropyLoss(), batch, "kfac_expand", set(names), fisher="exact")
        for role, name in zip(ROLES, names, strict=True):
            found = measured(blocks[name], in_double(kfac[name]), len(batch[0]) * (classes - 1))
            yield from ({"head": head, "layer": role, "quantity": q, "value": v} for q, v in found.items())


def measured(F: FactoredOperator, kfac: KroneckerOperator, rank: int) -> dict[str, float]:
    """The quantities of one block, in the eigenbasis of its K-FAC block, where that and the preconditioner are diagonal."""
    root = damped_inverse_root(kfac, DAMPING)
    turned = in_eigenbasis(F, root)
    Q_B, Q_A = root.gradient_basis, root.input_basis
    k = torch.outer((Q_B * (kfac.gradient @ Q_B)).sum(0), (Q_A * (kfac.input @ Q_A)).sum(0)).flatten()  # b_i a_j [P]
    f = turned.eigenvalues().flip(0)
    after = preconditioned(turned, DiagonalOperator(root.scales.flatten())).eigenvalues().flip(0)
    exact = f / (f + DAMPING * f.square().sum() / f.sum())
    cosine = k @ turned.diagonal() / (k.norm() * f.norm())  # <B kron A, F> = sum_i k_i F_ii
    spectra = {CONDITION: f, AFTER_KFAC: after, AFTER_EXACT: exact}
    return {name: condition(v, min(rank, F.size)) for name, v in spectra.items()} | {COSINE: float(cosine)}


def condition(values: Tensor, rank: int) -> float:
    """lambda_1 / lambda_k of eigenvalues in descending order, k = rank / 2 rounded up; NaN where lambda_k is no number."""
    half = values[-(-rank // 2) - 1]
    return float(values[0] / half) if half > RESOLVED * values[0] else torch.nan


def gauss_newton_blocks(
    network: Network, batch: tuple[Tensor, Tensor], names: tuple[str, ...], classes: int
) -> dict[str, FactoredOperator]:
    """J^T H J of each weight, in float64: rows F_n^T J_n with J = dz/dw `[N, K, P]` and F F^T = H, the loss's Hessian in z.

    A Gram matrix in float32 would drown the small eigenvalues.
    """
    images, labels = batch
    # the rows of the Gauss-Newton matrix of a squared error |z - y|^2 are sqrt(2) J
    targets = torch.zeros(len(images), classes, dtype=images.dtype, device=images.device)
    squared = curvature_blocks(network, nn.MSELoss(reduction="sum"), (images, targets), "ggn", set(names))
    rows = squared.whole.factored().rows.double().unflatten(0, targets.shape) / 2**0.5  # type: ignore[attr-defined]
    with torch.no_grad(), untouched(network):
        z = network(images).double()
    root = loss_curvature(nn.CrossEntropyLoss(), z.shape, labels, z.dtype).root(z)  # type: ignore[attr-defined]
    sizes = {name: block.size for name, block in squared.items()}
    parts = zip(sizes, rows.split(list(sizes.values()), 2), strict=True)
    return {name: FactoredOperator((root.mT @ J).flatten(0, 1)) for name, J in parts}


def in_double(block: SymmetricOperator) -> KroneckerOperator:
    """B kron A in float64: small eigenvalues of the factors matter at small damping."""
    assert isinstance(block, KroneckerOperator), "a convolution without groups"
    return KroneckerOperator(block.gradient.dense().double(), block.input.dense().double())
