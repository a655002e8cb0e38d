"""What is known of an operator without random probes: eigenvalues, inner products, and what they cost."""

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.gauss_newton import GaussNewtonOperator
from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DampedOperator,
    DenseOperator,
    DiagonalOperator,
    EigenbasisOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
)
from secondorder.curvature.spectrum.products import COLUMNS, check_name, columns, finite, product
from secondorder.errors import InputError, NonFiniteError

METHODS = ("auto", "exact", "lanczos")
EXACT_SIZE = 2048  # rows of a matrix whose eigen-decomposition takes about a second on one core


def decomposition_size(operator: SymmetricOperator) -> int:
    """The rows of the largest dense matrix that has to be decomposed (or formed) for the exact spectrum."""
    match operator:
        case DiagonalOperator() | EigenbasisOperator():
            return 0
        case FactoredOperator():
            return min(operator.rows.shape)
        case KroneckerOperator():
            return max(decomposition_size(operator.gradient), decomposition_size(operator.input))
        case BlockDiagonalOperator():
            return max(decomposition_size(block) for block in operator.blocks)
        case DampedOperator():
            return decomposition_size(operator.operator)
        case GaussNewtonOperator() if operator.matrix.factored:
            return min(len(operator.jacobian.images) * operator.columns, operator.size)
        case _:
            return operator.size


def is_stored(operator: SymmetricOperator) -> bool:
    """Whether the operator's numbers are in memory, so that a product with it is cheap."""
    match operator:
        case BlockDiagonalOperator():
            return all(is_stored(block) for block in operator.blocks)
        case KroneckerOperator():
            return is_stored(operator.gradient) and is_stored(operator.input)
        case DampedOperator():
            return is_stored(operator.operator)
        case _:
            return isinstance(operator, DenseOperator | FactoredOperator | DiagonalOperator | EigenbasisOperator)


def in_memory(operator: SymmetricOperator) -> SymmetricOperator:
    """A Gauss-Newton matrix as its factor where that is known and fits into memory; other operators as they are."""
    if isinstance(operator, GaussNewtonOperator) and decomposition_size(operator) <= EXACT_SIZE:
        try:
            return operator.factored()
        except NonFiniteError:
            raise
        except InputError:
            return operator
    if isinstance(operator, DampedOperator):
        return DampedOperator(in_memory(operator.operator), operator.damping)
    return operator


def has_diagonal(operator: SymmetricOperator) -> bool:
    """Whether the exact diagonal costs less than some tens of products."""
    if isinstance(operator, DampedOperator):
        return has_diagonal(operator.operator)
    if isinstance(operator, GaussNewtonOperator):
        return operator.matrix.factored and not operator.jacobian.coupled  # one backward pass for each output
    return is_stored(operator)


def exact_eigenvalues(operator: SymmetricOperator) -> Tensor:
    """All P eigenvalues, ascending, float64 on the CPU; computed in the operator's number format."""
    try:
        values = operator.eigenvalues()
    except torch.linalg.LinAlgError as failure:
        product(operator, torch.ones(operator.size, 1, dtype=torch.float64, device=operator.device))  # names NaN or inf
        raise InputError(
            f"the eigen-decomposition of {type(operator).__name__} failed; use products: {failure}"
        ) from None
    return finite("spectrum", operator, values).cpu()


def known_eigenvalues(operator: SymmetricOperator, method: str) -> Tensor | None:
    """All P eigenvalues, ascending, where the method is "exact", or "auto" and they are cheap; None: go on with products.

    Raises InputError for another method than "auto", "exact" and "lanczos", and as `exact_eigenvalues`.
    """
    check_name("method", method, METHODS)
    if method == "lanczos" or (method == "auto" and decomposition_size(operator) > EXACT_SIZE):
        return None
    try:
        return exact_eigenvalues(operator)
    except InputError as refusal:
        if method == "exact" or isinstance(refusal, NonFiniteError):
            raise
        return None  # the factor of a Gauss-Newton matrix does not fit into memory


def rounding(operator: SymmetricOperator) -> float:
    """P eps of the operator's number format: the share of the largest magnitude that a decomposition leaves uncertain."""
    return operator.size * torch.finfo(operator.dtype).eps


def inner_product(A: SymmetricOperator, B: SymmetricOperator) -> float | None:
    """<A, B>_F = tr(A B) of two operators of one size, exact, without a dense matrix; None unless both are stored."""
    if not (is_stored(A) and is_stored(B)):
        return None
    by_structure = _structured(A, B)
    return by_structure if by_structure is not None else _by_products(*_cheaper_first(A, B))


def _structured(A: SymmetricOperator, B: SymmetricOperator) -> float | None:
    """Block by block or factor by factor where both operators have the same structure, else None."""
    match A, B:
        case BlockDiagonalOperator(), BlockDiagonalOperator():
            if [a.size for a in A.blocks] == [b.size for b in B.blocks]:
                return sum(inner_product(a, b) or 0.0 for a, b in zip(A.blocks, B.blocks, strict=True))
        case KroneckerOperator(), KroneckerOperator() if A.input.size == B.input.size:
            gradient, input = inner_product(A.gradient, B.gradient), inner_product(A.input, B.input)
            return None if gradient is None or input is None else gradient * input
        case EigenbasisOperator(), EigenbasisOperator() if len(A.input_basis) == len(B.input_basis):
            return float((A.scales.double() * _quadratic_forms(A, B)).sum())
        case EigenbasisOperator(), KroneckerOperator() if len(A.input_basis) == B.input.size:
            return float((A.scales.double() * _quadratic_forms(A, B)).sum())
        case KroneckerOperator(), EigenbasisOperator():
            return _structured(B, A)
        case FactoredOperator(), FactoredOperator():
            first, second = (operator.rows.split(COLUMNS) for operator in (A, B))
            return sum(float((a.double() @ b.mT.double()).square().sum()) for a in first for b in second)
    return None


def _quadratic_forms(E: EigenbasisOperator, B: EigenbasisOperator | KroneckerOperator) -> Tensor:
    """q^T B q for every vector q = q_B kron q_A of an eigenbasis, in the shape of its scales."""
    Q_B, Q_A = E.gradient_basis.double(), E.input_basis.double()
    if isinstance(B, KroneckerOperator):
        gradient = (Q_B * product(B.gradient, Q_B)).sum(0)
        return torch.outer(gradient, (Q_A * product(B.input, Q_A)).sum(0))
    gradient = (Q_B.mT @ B.gradient_basis.double()).square()
    return gradient @ B.scales.double() @ (Q_A.mT @ B.input_basis.double()).square().mT


def _cheaper_first(A: SymmetricOperator, B: SymmetricOperator) -> tuple[SymmetricOperator, SymmetricOperator]:
    """The operator that is a sum of fewer outer products first; a diagonal matrix needs no products at all."""

    def terms(operator: SymmetricOperator) -> int:
        match operator:
            case DiagonalOperator():
                return 0
            case FactoredOperator():
                return len(operator.rows)
            case _:
                return operator.size

    return (A, B) if terms(A) <= terms(B) else (B, A)


def _by_products(A: SymmetricOperator, B: SymmetricOperator) -> float:
    """sum_r a_r^T B a_r for A = sum_r a_r a_r^T, or column by column of A, or along the diagonal."""
    if isinstance(A, DiagonalOperator):
        return float((A.entries.double() * B.diagonal().double()).sum())
    total = 0.0
    if isinstance(A, FactoredOperator):
        for rows in A.rows.split(COLUMNS):
            total += float((rows.mT.double() * product(B, rows.mT)).sum())
        return total
    for (_, a), (_, b) in zip(columns(A), columns(B), strict=True):
        total += float((a * b).sum())
    return total
