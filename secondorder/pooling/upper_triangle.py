"""The upper triangle of a symmetric matrix as a vector."""

import torch
from torch import Tensor, nn

from secondorder.matrix_power import upper_triangle


class UpperTriangle(nn.Module):
    """Row-major upper triangle with the diagonal: `[..., C, C] -> [..., C (C + 1) / 2]`.

    The order is that of fast-MPN-COV and is frozen, because trained classifiers depend on it:
    (0, 0), (0, 1), ..., (0, C-1), (1, 1), ..., (C-1, C-1). Off-diagonal entries are not scaled.
    """

    def forward(self, S: Tensor) -> Tensor:
        """The entries S_ij with i <= j, row by row: `[..., C, C] -> [..., C (C + 1) / 2]`.

        Raises InputError when S is not square.
        """
        return triangle_of(S)

    def extra_repr(self) -> str:
        """The frozen order of the entries, as text."""
        return "order=row-major"


def triangle_of(S: Tensor) -> Tensor:
    """The upper triangle `[..., C (C + 1) / 2]` of S `[..., C, C]`: one node of a graph that torch.fx traces."""
    return upper_triangle(S)


torch.fx.wrap("triangle_of")
