"""Symmetric linear operators: stored (dense, factored, diagonal, Kronecker, eigenbasis), or made of others."""

from secondorder.curvature.operators.block_diagonal import BlockDiagonalOperator
from secondorder.curvature.operators.damped import DampedOperator
from secondorder.curvature.operators.dense import DenseOperator
from secondorder.curvature.operators.diagonal import DiagonalOperator
from secondorder.curvature.operators.difference import DifferenceOperator
from secondorder.curvature.operators.eigenbasis import EigenbasisOperator
from secondorder.curvature.operators.factored import FactoredOperator
from secondorder.curvature.operators.inverse import InverseOperator, WoodburyOperator, damped_inverse
from secondorder.curvature.operators.kronecker import KroneckerOperator
from secondorder.curvature.operators.preconditioned import (
    PreconditionedOperator,
    damped_inverse_root,
    in_eigenbasis,
    preconditioned,
)
from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator

__all__ = [
    "DENSE_LIMIT",
    "BlockDiagonalOperator",
    "DampedOperator",
    "DenseOperator",
    "DiagonalOperator",
    "DifferenceOperator",
    "EigenbasisOperator",
    "FactoredOperator",
    "InverseOperator",
    "KroneckerOperator",
    "PreconditionedOperator",
    "SymmetricOperator",
    "WoodburyOperator",
    "damped_inverse",
    "damped_inverse_root",
    "in_eigenbasis",
    "preconditioned",
]
