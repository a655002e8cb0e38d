"""The upper triangle of a symmetric matrix as a vector."""

import torch
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.matrix_power import upper_triangle
from secondorder.matrix_power.transforms import known_shape


class UpperTriangle(nn.Module):
    """Row-major upper triangle with the diagonal: `[..., C, C] -> [..., C (C + 1) / 2]`.

    The order is that of fast-MPN-COV and is frozen, because trained classifiers depend on it:
    (0, 0), (0, 1), ..., (0, C-1), (1, 1), ..., (C-1, C-1). Off-diagonal entries are not scaled.
    """

    def forward(self, S: Tensor) -> Tensor:
        """The entries S_ij with i <= j. Raises InputError when S is not square."""
        return triangle_of(S)

    def extra_repr(self) -> str:
        """The frozen order."""
        return "order=row-major"


def triangle_of(S: Tensor) -> Tensor:
    """The upper triangle, after a check of the shape."""
    shape = known_shape(S)
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise InputError(f"UpperTriangle needs square matrices [..., C, C], got shape {list(shape)}")
    return upper_triangle(S)


torch.fx.wrap("triangle_of")
