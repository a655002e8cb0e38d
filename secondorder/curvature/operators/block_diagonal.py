"""A block-diagonal matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator, norm_at_any_scale
from secondorder.errors import InputError


class BlockDiagonalOperator(SymmetricOperator):
    """diag(B_1, ..., B_L) of symmetric operators B_l `[P_l, P_l]`, in order: `[P, P]` with P = sum_l P_l.

    Raises InputError unless blocks is a list of symmetric operators, at least one, of one number format and device.
    """

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
        """The block-diagonal matrix itself `[P, P]`, zeros included. Raises InputError when it takes more than `limit` bytes."""
        self.check_dense(limit)
        return torch.block_diag(*[block.dense(limit) for block in self.blocks])

    def diagonal(self) -> Tensor:
        """The diagonals of all blocks, one after the other: `[P]`."""
        return torch.cat([block.diagonal() for block in self.blocks])

    def trace(self) -> Tensor:
        """sum_l tr B_l over the blocks, a scalar tensor."""
        return torch.stack([block.trace() for block in self.blocks]).sum()

    def eigenvalues(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The P eigenvalues of all blocks, merged in ascending order.

        Raises InputError when a block needs more than `limit` bytes.
        """
        return torch.cat([block.eigenvalues(limit) for block in self.blocks]).sort().values

    def frobenius_norm(self) -> Tensor:
        """sqrt(sum_l |B_l|_F^2) over the blocks, a scalar tensor."""
        return norm_at_any_scale(torch.stack([block.frobenius_norm() for block in self.blocks]))
