"""A curvature matrix as an optimiser sees it that multiplies gradients with P.

In the coordinates w = P^(1/2) u a step of gradient descent in u is a step along P times the gradient in w, and the curvature F
becomes P^(1/2) F P^(1/2): symmetric, and similar to P F, so that its eigenvalues are those that the optimiser has to deal with.

For K-FAC, P = (B kron A + lambda I)^-1 is diagonal in the bases of B = Q_B diag(b) Q_B^T and A = Q_A diag(a) Q_A^T:

    P^(1/2) = (Q_B kron Q_A) diag((b_i a_j + lambda)^(-1/2)) (Q_B kron Q_A)^T
"""

import math

import torch
from torch import Tensor

from secondorder.curvature.operators.dense import DenseOperator
from secondorder.curvature.operators.difference import check_same_space
from secondorder.curvature.operators.eigenbasis import EigenbasisOperator
from secondorder.curvature.operators.factored import FactoredOperator
from secondorder.curvature.operators.kronecker import KroneckerOperator
from secondorder.curvature.operators.symmetric import SymmetricOperator, decomposed
from secondorder.curvature.relative_damping import safe_scale, scale_of_spectrum
from secondorder.errors import InputError


class PreconditionedOperator(SymmetricOperator):
    """P^(1/2) F P^(1/2) `[P, P]` by products with F = `operator` and with the symmetric root P^(1/2) = `root`.

    Raises InputError when the two differ in size, number format or device.
    """

    def __init__(self, operator: SymmetricOperator, root: SymmetricOperator) -> None:
        check_same_space(operator, root)
        super().__init__(operator.size, operator.dtype, operator.device)
        self.operator = operator
        self.root = root

    def _matmat(self, V: Tensor) -> Tensor:
        return self.root @ (self.operator @ (self.root @ V))


def preconditioned(operator: SymmetricOperator, root: SymmetricOperator) -> SymmetricOperator:
    """P^(1/2) F P^(1/2) `[P, P]` of F = `operator` and P^(1/2) = `root`, in the form in which F is stored.

    rows^T rows becomes (rows P^(1/2))^T (rows P^(1/2)), with as cheap an exact spectrum as before; a dense matrix stays dense;
    everything else is known by its products. Raises InputError when the two differ in size, number format or device.
    """
    check_same_space(operator, root)
    if isinstance(operator, FactoredOperator):
        return FactoredOperator((root @ operator.rows.mT).mT)
    if isinstance(operator, DenseOperator):
        half = root @ operator.matrix
        matrix = root @ half.mT
        return DenseOperator((matrix + matrix.mT) / 2)
    return PreconditionedOperator(operator, root)


def damped_inverse_root(block: SymmetricOperator, damping: float, relative: bool = True) -> EigenbasisOperator:
    """P^(1/2) for P = (B kron A + lambda I)^-1, from the K-FAC block B kron A of a weight `[o, D]`.

    The factors are decomposed in full: an input wider than its number of activations has directions with a_j = 0, in which P is
    1 / lambda. Negative eigenvalues are rounding and count as zero.

    Args:
        block: B kron A, a `KroneckerOperator`.
        damping: a positive number.
        relative: lambda = damping |F|_F^2 / tr F of F = B kron A, as in `secondorder.kfac.options.Damping`, where a scale too
            small to divide by counts as 1; otherwise lambda = damping.

    Raises:
        InputError: for another block, or a damping that is not positive and finite.
        NonFiniteError: for NaN or infinity in a factor.
    """
    if not isinstance(block, KroneckerOperator):
        raise InputError(f"{type(block).__name__} is no B kron A; give the K-FAC block of a weight without groups")
    if not 0 < damping < math.inf:
        raise InputError(f"damping {damping}: must be positive and finite; 1e-8 is as good as none")
    (b, Q_B), (a, Q_A) = (decomposed(factor, "a Kronecker factor") for factor in (block.gradient, block.input))
    b, a = b.clamp_min(0), a.clamp_min(0)
    scale = safe_scale(scale_of_spectrum(b) * scale_of_spectrum(a))[0] if relative else 1.0
    damped = torch.outer(b, a) + damping * scale
    return EigenbasisOperator(Q_B, Q_A, damped.rsqrt())


def in_eigenbasis(operator: FactoredOperator, basis: EigenbasisOperator) -> FactoredOperator:
    """(Q_B kron Q_A)^T F (Q_B kron Q_A) of F = rows^T rows = `operator`: its spectrum in coordinates where `basis` is diagonal.

    One rotation then serves every damping, whose root is `DiagonalOperator(root.scales.flatten())`, and B kron A itself.
    Raises InputError when the two do not fit, or the bases do not span the space.
    """
    check_same_space(operator, basis)
    Q_B, Q_A = basis.gradient_basis, basis.input_basis
    if basis.scales.numel() < basis.size:
        raise InputError(f"bases of {basis.scales.numel()} of {basis.size} vectors would lose a part of the operator")
    rows = operator.rows.view(-1, len(Q_B), len(Q_A))
    return FactoredOperator((Q_B.mT @ (rows @ Q_A)).flatten(1))
