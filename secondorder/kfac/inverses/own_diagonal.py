"""The damped inverse of the diagonal of a layer's own block, without Kronecker factors: P W = W / (S + lambda).

S `[G, O, D]` are the mean squares of the gradients of single samples, mean_n (sum_t g a^T)^2. Lambda is one number for the layer:
a normalisation has a group for each channel, and a channel without curvature is not to be divided by next to nothing.
"""

from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from secondorder.curvature.relative_damping import safe_scale, scale_of_spectrum
from secondorder.kfac.inverses.eigenbasis import Rotated


@dataclass(eq=False)
class OwnDiagonal(Rotated):
    """S `[G, O, D]` and its scale sum S^2 / sum S `[G, 1, 1]`, the same for all groups; its eigenvectors are the unit vectors."""

    kind = "diagonal"
    shapes = MappingProxyType({"S": "GOD", "scale": "G11"})
    S: Tensor
    scale: Tensor

    @classmethod
    def of(cls, S: Tensor) -> "OwnDiagonal":
        """The inverse of mean squares S `[G, O, D]` of the gradients of single samples, with their scale."""
        return cls(S, own_scale(S))

    def damped_eigenvalues(self, added: Tensor | float) -> Tensor:
        """S + lambda `[G, O, D]`, a new tensor, for lambda = `added`."""
        return self.S + added

    def rotated(self, W: Tensor) -> Tensor:
        """W `[G, O, D]` itself, a copy: the eigenvectors are the unit vectors."""
        return W.to(self.S.dtype, copy=True)

    def rotated_back(self, M: Tensor) -> Tensor:
        """M `[G, O, D]` itself, no copy: the eigenvectors are the unit vectors."""
        return M


def own_scale(S: Tensor) -> Tensor:
    """The scale `[G, 1, 1]` of a diagonal, by which damping is relative."""
    return safe_scale(scale_of_spectrum(S)).expand(len(S), 1, 1).contiguous()
