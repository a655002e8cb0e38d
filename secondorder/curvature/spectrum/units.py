"""Operators in units of their own size, for numbers whose squares leave the range of float64.

Products of eigenvalues near 1e-200 vanish, and near 1e200 they are infinite. Where that happened, what is made of squares is made
anew in units: powers of two, which change no digit.
"""

import math

import torch

from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenbasisOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
)
from secondorder.curvature.spectrum.products import gaussian, generator, product

SQUARES = 1e-280, 1e280
"""Sums of squares that are right: none of their terms was lost that counts."""


def squares_are_lost(*sums: float) -> bool:
    """Whether sums of squares are too small or too large to be right; zero may be."""
    return not all(SQUARES[0] < value < SQUARES[1] for value in sums)


def unit_of(operator: SymmetricOperator) -> float:
    """A power of two near the size of the operator's products; 1 for a zero one."""
    largest = float(product(operator, gaussian(operator, 1, generator(0))).abs().max())
    return 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0


def scaled(operator: SymmetricOperator, factor: float) -> SymmetricOperator:
    """c A for a power of two c = `factor`, as an operator of the same structure in double precision."""
    match operator:
        case DenseOperator():
            return DenseOperator(operator.matrix.double() * factor)
        case DiagonalOperator():
            return DiagonalOperator(operator.entries.double() * factor)
        case FactoredOperator():
            return FactoredOperator(operator.rows.double() * factor**0.5)
        case EigenbasisOperator():
            bases = operator.gradient_basis.double(), operator.input_basis.double()
            return EigenbasisOperator(*bases, operator.scales.double() * factor)
        case KroneckerOperator():
            unit = unit_of(operator.gradient)
            return KroneckerOperator(scaled(operator.gradient, 1 / unit), scaled(operator.input, factor * unit))
        case BlockDiagonalOperator():
            return BlockDiagonalOperator([scaled(block, factor) for block in operator.blocks])
        case _:
            return ScaledOperator(operator, factor)


class ScaledOperator(SymmetricOperator):
    """c A `[P, P]` in double precision, for an operator A and a number c = `factor`."""

    def __init__(self, operator: SymmetricOperator, factor: float) -> None:
        super().__init__(operator.size, torch.float64, operator.device)
        self.operator = operator
        self.factor = factor

    def _matmat(self, V: torch.Tensor) -> torch.Tensor:
        return product(self.operator, V) * self.factor
