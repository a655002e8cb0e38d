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

from torch import nn

from secondorder.curvature import curvature_blocks, fidelity, half_rank_condition, output_jacobians
from secondorder.curvature.operators import (
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
    damped_inverse_root,
    preconditioned,
)
from secondorder.curvature.relative_damping import scale_of_spectrum
from secondorder.kfac.options import DAMPING
from studies.backbones import first_middle_last
from studies.engine.records import Row
from studies.preconditioning.backbone import Backbone

CONDITION = "block condition"
AFTER_KFAC, AFTER_EXACT = f"{CONDITION} after K-FAC", f"{CONDITION} after an exact preconditioner"
COSINE = "cosine of K-FAC to the block"
QUANTITIES = (CONDITION, AFTER_KFAC, AFTER_EXACT, COSINE)
ROLES = ("first convolution", "middle convolution", "last convolution")
LARGEST = 50_000
"""Weights of a convolution whose Jacobian still fits in memory."""
LOSS = nn.CrossEntropyLoss()


def block_rows(backbone: Backbone) -> Iterator[Row]:
    """Rows of every head; NaN where there is no curvature, infinite where an eigenvalue is that of rounding."""
    images, labels = backbone.images(backbone.measures.curvature_images)
    for head, network in backbone.networks.items():
        names = first_middle_last(network, LARGEST)
        jacobians = output_jacobians(network, images, names.values())
        kfac = curvature_blocks(network, LOSS, (images, labels), "kfac_expand", names.values(), fisher="exact")
        for role, name in zip(ROLES, names.values(), strict=True):
            found = measured(jacobians.gauss_newton(name, LOSS, labels), in_double(kfac[name]), jacobians.rank(name))
            yield from ({"head": head, "layer": role, "quantity": q, "value": v} for q, v in found.items())


def measured(F: FactoredOperator, kfac: KroneckerOperator, rank: int) -> dict[str, float]:
    """The quantities of one block."""
    f, after = F.eigenvalues(), preconditioned(F, damped_inverse_root(kfac, DAMPING)).eigenvalues()
    exact = f / (f + DAMPING * scale_of_spectrum(f))
    spectra = {CONDITION: f, AFTER_KFAC: after, AFTER_EXACT: exact}
    conditions = {name: half_rank_condition(values, rank) for name, values in spectra.items()}
    return conditions | {COSINE: fidelity(kfac, F).cosine.value}


def in_double(block: SymmetricOperator) -> KroneckerOperator:
    """B kron A in float64: small eigenvalues of the factors matter at small damping."""
    assert isinstance(block, KroneckerOperator), "a convolution without groups"
    return KroneckerOperator(block.gradient.dense().double(), block.input.dense().double())
