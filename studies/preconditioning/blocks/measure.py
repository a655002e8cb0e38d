"""What part D measures of one backbone under several heads: curvature blocks before and after K-FAC, and K-FAC's fidelity.

The network is in training mode, so that blocks are of the loss that training has: batch norm makes it flat along the scale of
a channel. Blocks are the weights of the first, the middle and the last convolution. The classifier is left out: it has another
size under every head, and lies above what the heads are compared for. A block F of the GGN is turned into the eigenbasis of its
K-FAC block B kron A of the same images, where the latter and the preconditioner are diagonal. Settings:

    before          F
    K-FAC 0.01      P^(1/2) F P^(1/2), P = (B kron A + lambda I)^-1 with this relative damping, the optimiser's default
    K-FAC 0.0001    the same with hardly any damping, for the last convolution
    exact 0.01      P = (F + lambda I)^-1, eigenvalues f / (f + lambda): what K-FAC would do if it were exact, so that a
                    difference between heads is none of K-FAC's fidelity (theory T6.4); and with 0.0001
    squared error   the GGN of the squared error, J^T J up to a factor, of the last convolution: without the softmax, whose
                    Hessian is as badly conditioned as the classifier's confidence differs between images

    constants       F with the statistics of batch norm as constants, as in the curvature study: whether a verdict depends on it

lambda is relative to |C|_F^2 / tr C of the matrix C that is inverted. Conditioning is compared at the rank that N images and K
classes make possible under every head, min(P, N (K - 1)), or min(P, N K) for the squared error: see `studies.curvature.measures`.
The Hessian is that of the last convolution.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks, spectral_summary
from secondorder.curvature.matrix_free.loss_curvature import loss_curvature
from secondorder.curvature.operators import (
    DiagonalOperator,
    EigenbasisOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
    damped_inverse_root,
    in_eigenbasis,
    preconditioned,
)
from secondorder.curvature.spectrum.krylov_basis import KrylovBasis
from secondorder.networks import Network
from secondorder.untouched import untouched
from studies.curvature.measures import Limits, block_names
from studies.preconditioning.situation import Row, Situation, row

PART = "blocks"
LAST = "last"
CONVOLUTIONS = ("first", "middle", LAST)
BEFORE, AFTER, EXACT, SQUARED = "before", "K-FAC 0.01", "exact 0.01", "squared error"
CONSTANTS = "constants"
DAMPINGS = {AFTER: 0.01, "K-FAC 0.0001": 1e-4}
EXACT_DAMPINGS = {EXACT: 0.01, "exact 0.0001": 1e-4}
"""Setting -> relative damping."""
RANGE = 1e-5
"""Eigenvalues below this share of the largest are outside the range, for the condition number on it."""
RESOLVED = 1e-13
"""Eigenvalues below this share of the largest are rounding errors of a Gram matrix in float64."""
RANKS = 20
"""Eigenvalues kept of a spectrum, at geometrically spaced ranks."""
LANCZOS, PROBES = 6, 4
"""Products with a Hessian for both ends of its spectrum, and random vectors for its distance to the GGN."""
Measured = Iterator[tuple[str, str, float]]
"""Setting, measure and value."""


def measure(situation: Situation) -> list[Row]:
    """The rows of all heads, with measures of `of_block` and `of_hessian`. A quantity that does not exist has no row."""
    return [row(PART, *found) for head in situation.heads for found in _of_head(situation, head)]


def _of_head(situation: Situation, head: str) -> Iterator[tuple[str, str, str, str, float]]:
    """Layer, head, setting, measure and value."""
    network, loss = situation.training_heads[head], nn.CrossEntropyLoss()
    batch = situation.some_images(situation.settings.curvature_images)
    named = block_names(network, Limits().block)
    names = {role: named[role] for role in CONVOLUTIONS}
    jacobians, z = jacobian_rows(network, batch[0], names, situation.data.num_classes)
    kfac = curvature_blocks(network, loss, batch, "kfac_expand", set(names.values()), fisher="exact")
    fixed = jacobian_rows(situation.heads[head], batch[0], names, situation.data.num_classes)
    for role, name in names.items():
        block, ggn = in_double(kfac[name]), gauss_newton_block(jacobians[role], z, batch[1])
        chosen = DAMPINGS if role == LAST else {AFTER: DAMPINGS[AFTER]}
        roots = {setting: damped_inverse_root(block, damping) for setting, damping in chosen.items()}
        possible = min(block.size, len(batch[0]) * (situation.data.num_classes - 1))
        for found in of_block(ggn, block, roots, possible, listed=role == LAST):
            yield role, head, *found
        constant = descending(gauss_newton_block(fixed[0][role], fixed[1], batch[1]))
        for measured in conditioning(constant, possible) if float(constant[0]) > 0 else ():
            yield role, head, CONSTANTS, *measured
        if role == LAST:
            for measured in without_softmax(jacobians[role]):
                yield role, head, SQUARED, *measured
            hessian = curvature_blocks(network, loss, batch, "hessian", [name])[name]
            for found in of_hessian(hessian, ggn, roots[AFTER], situation.seed):
                yield role, head, *found


def jacobian_rows(
    network: Network, images: Tensor, names: Mapping[str, str], classes: int
) -> tuple[dict[str, Tensor], Tensor]:
    """J = dz/dw `[N, K, P]` of each named weight, by role, and the logits z `[N, K]`, both in float64.

    The rows of the Gauss-Newton matrix of a squared error c |z - y|^2 are sqrt(2 c) J.
    """
    targets = torch.zeros(len(images), classes, dtype=images.dtype, device=images.device)
    chosen = curvature_blocks(network, nn.MSELoss(reduction="sum"), (images, targets), "ggn", set(names.values()))
    sizes = {name: block.size for name, block in chosen.items()}
    J = chosen.whole.factored().rows.double().unflatten(0, targets.shape) / 2**0.5  # type: ignore[attr-defined]
    parts = dict(zip(sizes, J.split(list(sizes.values()), 2), strict=True))
    with torch.no_grad(), untouched(network):
        z = network(images).double()
    return {role: parts[name] for role, name in names.items()}, z


def gauss_newton_block(J: Tensor, z: Tensor, labels: Tensor) -> FactoredOperator:
    """J^T H J of the mean cross-entropy, with the rows F_n^T J_n, F F^T = H."""
    F = loss_curvature(nn.CrossEntropyLoss(), z.shape, labels, z.dtype).root(z)  # type: ignore[attr-defined]
    return FactoredOperator((F.mT @ J).flatten(0, 1))


def without_softmax(J: Tensor) -> Iterator[tuple[str, float]]:
    """Conditioning of J^T J of a weight."""
    values = descending(FactoredOperator(J.flatten(0, 1)))
    if float(values[0]) > 0:
        yield from conditioning(values, min(J.flatten(0, 1).shape))


def in_double(block: SymmetricOperator) -> KroneckerOperator:
    """B kron A in float64: small eigenvalues of the factors matter at small damping."""
    assert isinstance(block, KroneckerOperator), "block_names gives convolutions without groups"
    return KroneckerOperator(block.gradient.dense().double(), block.input.dense().double())


def of_block(
    exact: FactoredOperator,
    block: KroneckerOperator,
    roots: Mapping[str, EigenbasisOperator],
    possible: int,
    *,
    listed: bool,
) -> Measured:
    """A GGN block before and after preconditioning with the roots of its K-FAC `block`, and the fidelity of the latter.

    Measures: those of `conditioning`; K-FAC's "cosine", "relative_error" and "best_scale"; and, if `listed`, "eigenvalue k" for
    the k-th largest before and after.
    """
    basis = next(iter(roots.values()))
    turned = in_eigenbasis(exact, basis)
    spectra = {BEFORE: descending(turned)}
    f = spectra[BEFORE]
    if not float(f[0]) > 0:
        return  # without curvature there is nothing to compare
    for setting, root in roots.items():
        spectra[setting] = descending(preconditioned(turned, DiagonalOperator(root.scales.flatten())))
    for setting, damping in EXACT_DAMPINGS.items():
        spectra[setting] = f / (f + damping * f.square().sum() / f.sum())
    for setting, values in spectra.items():
        for name, value in conditioning(values, possible):
            yield setting, name, value
        if listed and setting in (BEFORE, AFTER):
            for rank in torch.logspace(0, torch.tensor(possible).log10(), RANKS).round().long().unique().tolist():
                if values[rank - 1] > RESOLVED * values[0]:
                    yield setting, f"eigenvalue {rank}", float(values[rank - 1])
    for name, value in fidelity_in(turned, diagonal_in(basis, block), f):
        yield BEFORE, name, value


def fidelity_in(turned: FactoredOperator, k: Tensor, f: Tensor) -> Iterator[tuple[str, float]]:
    """Cosine, relative error and best scale of K-FAC, as `secondorder.curvature.fidelity` has them, without more products.

    `turned` is the GGN where K-FAC is the diagonal k `[P]`, and f `[P]` are its eigenvalues: <K, F> = sum_i k_i F_ii.
    """
    kk, kf, ff = float(k.square().sum()), float(k @ turned.diagonal()), float(f.square().sum())
    yield "cosine", kf / (kk * ff) ** 0.5 if kk > 0 else 0.0
    yield "relative_error", (max(kk - 2 * kf + ff, 0.0) / ff) ** 0.5
    if kk > 0:
        yield "best_scale", kf / kk


def conditioning(values: Tensor, possible: int) -> Iterator[tuple[str, float]]:
    """Measures of a spectrum `values` in descending order, the largest positive, at the rank `possible` under every head."""
    half = values[-(-possible // 2) - 1]
    if half > RESOLVED * values[0]:
        yield "half_rank_condition", float(values[0] / half)
    yield "largest_to_mean", float(values[0] * possible / values.sum())
    summary = spectral_summary(DiagonalOperator(values), "exact", threshold=RANGE)
    for name in ("condition", "effective_rank", "trace", "largest"):
        yield name, getattr(summary, name).value


def of_hessian(hessian: SymmetricOperator, ggn: FactoredOperator, root: EigenbasisOperator, seed: int) -> Measured:
    """ "hessian_largest" and "hessian_smallest" before and after, from within, and "hessian_difference" |H - G|_F / |H|_F."""
    own = EigenbasisOperator(*(part.to(hessian.dtype) for part in (root.gradient_basis, root.input_basis, root.scales)))
    for setting, operator in ((BEFORE, hessian), (AFTER, preconditioned(hessian, own))):
        smallest, largest = ends(operator, seed)
        yield setting, "hessian_largest", largest
        yield setting, "hessian_smallest", smallest
    probes = torch.randn(hessian.size, PROBES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Hv = hessian @ probes
    if float(Hv.norm()) > 0:  # E |A v|^2 = |A|_F^2
        yield BEFORE, "hessian_difference", float((Hv - ggn @ probes).norm() / Hv.norm())


def ends(operator: SymmetricOperator, seed: int) -> tuple[float, float]:
    """The smallest and the largest Ritz value of a few Lanczos steps: both lie inside of the spectrum."""
    steps = min(LANCZOS, operator.size)
    basis = KrylovBasis(operator, min(steps + 1, operator.size), 1, torch.Generator().manual_seed(seed))
    for _ in range(steps):
        basis.expand()
    values = basis.ritz().values
    return float(values[0]), float(values[-1])


def diagonal_in(basis: EigenbasisOperator, block: KroneckerOperator) -> Tensor:
    """b_i a_j `[P]` of B kron A in its own eigenbasis."""
    Q_B, Q_A = basis.gradient_basis, basis.input_basis
    return torch.outer((Q_B * (block.gradient @ Q_B)).sum(0), (Q_A * (block.input @ Q_A)).sum(0)).flatten()


def descending(operator: SymmetricOperator) -> Tensor:
    """All eigenvalues, the largest first, on the CPU."""
    return operator.eigenvalues().flip(0).cpu()
