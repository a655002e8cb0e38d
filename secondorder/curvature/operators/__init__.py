"""Symmetric linear operators: dense, factored, diagonal, block-diagonal, Kronecker-factored, in an eigenbasis, difference."""

from secondorder.curvature.operators.block_diagonal import BlockDiagonalOperator
from secondorder.curvature.operators.dense import DenseOperator
from secondorder.curvature.operators.diagonal import DiagonalOperator
from secondorder.curvature.operators.difference import DifferenceOperator
from secondorder.curvature.operators.eigenbasis import EigenbasisOperator
from secondorder.curvature.operators.factored import FactoredOperator
from secondorder.curvature.operators.kronecker import KroneckerOperator
from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator

__all__ = [
    "DENSE_LIMIT",
    "BlockDiagonalOperator",
    "DenseOperator",
    "DiagonalOperator",
    "DifferenceOperator",
    "EigenbasisOperator",
    "FactoredOperator",
    "KroneckerOperator",
    "SymmetricOperator",
]
