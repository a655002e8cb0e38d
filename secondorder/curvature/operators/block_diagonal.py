"""A block-diagonal matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator, norm_at_any_scale
from secondorder.errors import InputError


class BlockDiagonalOperator(SymmetricOperator):
    """diag(B_1, ..., B_L) of symmetric operators, in order. Raises InputError when there is none or types differ."""

    def __init__(self, blocks: Sequence[SymmetricOperator]) -> None:
        if not isinstance(blocks, Sequence) or not all(isinstance(block, SymmetricOperator) for block in blocks):
            raise InputError(f"a block-diagonal operator needs a list of symmetric operators, got {blocks!r}")
        kinds = {(block.dtype, block.device) for block in blocks}
        if len(kinds) != 1:
            raise InputError(f"a block-diagonal operator needs blocks of one type and device, got {len(kinds)} kinds")
        super().__init__(sum(block.size for block in blocks), *kinds.pop())
        self.blocks = list(blocks)

    def _matmat(self, V: Tensor) -> Tensor:
        parts = V.split([block.size for block in self.blocks])
        return torch.cat([block @ part for block, part in zip(self.blocks, parts, strict=True)])

    def dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The matrix itself `[P, P]`. Raises InputError when it takes more than `limit` bytes."""
        self.check_dense(limit)
        return torch.block_diag(*[block.dense(limit) for block in self.blocks])

    def diagonal(self) -> Tensor:
        """The blocks' diagonals `[P]`."""
        return torch.cat([block.diagonal() for block in self.blocks])

    def trace(self) -> Tensor:
        """The sum of the blocks' traces."""
        return torch.stack([block.trace() for block in self.blocks]).sum()

    def eigenvalues(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The blocks' eigenvalues, merged in ascending order."""
        return torch.cat([block.eigenvalues(limit) for block in self.blocks]).sort().values

    def frobenius_norm(self) -> Tensor:
        """The root of the sum of the blocks' squared norms."""
        return norm_at_any_scale(torch.stack([block.frobenius_norm() for block in self.blocks]))
