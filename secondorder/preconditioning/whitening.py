"""Whitened features: the polar form Xc = sqrt(M) S^(1/2) Q of centred features, Q with orthonormal rows on the range.

With the thin singular value decomposition Xc / sqrt(M) = U diag(r) V^T, r_i = sqrt(l_i):

    S = U diag(l) U^T,    Q = U V^T = (Xc Xc^T)^(-1/2) Xc.

Q is the nearest partial isometry to the features (their "matrix sign", which Muon takes of a momentum). Null directions,
l <= C eps l_max as everywhere, are left out of Q, as in a pseudo-inverse.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.matrix_power.spectral import null_directions
from secondorder.preconditioning.features import centred, check_features


class Polar(NamedTuple):
    """The decomposition of centred features, n = min(C, M) directions in descending order."""

    U: Tensor
    """Eigenvectors of S `[N, C, n]`."""
    root: Tensor
    """sqrt(l) `[N, n]`, zero in null directions."""
    V: Tensor
    """Unit vectors over positions `[N, M, n]`, zero in null directions."""

    @property
    def inverse_root(self) -> Tensor:
        """1 / sqrt(l) `[N, n]`, zero in null directions."""
        return torch.where(self.root > 0, 1 / self.root, 0)

    @property
    def whitened(self) -> Tensor:
        """Q = U V^T `[N, C, M]`, the whitened features, zero in null directions."""
        return self.U @ self.V.mT


def polar(features: Tensor) -> Polar:
    """U, r and V of features `[N, C, H, W]`. Raises InputError as `check_features` does; features may be constant."""
    check_features(features)
    Xc = centred(features)
    U, r, Vh = torch.linalg.svd(Xc / Xc.shape[-1] ** 0.5, full_matrices=False)
    live = ~null_directions(r.square().flip(-1), Xc.shape[1]).flip(-1)
    return Polar(U, torch.where(live, r, 0), Vh.mT * live[:, None, :])


@torch.no_grad()
def whitened_features(features: Tensor) -> Tensor:
    """Q = (Xc Xc^T)^(-1/2) Xc of features `[N, C, H, W]`, in the same shape: Q Q^T projects on the range of the covariance.

    Null directions are zero: all of Q where the features of an image are constant. Raises InputError for another shape, fewer
    than 2 positions and features that are not finite.
    """
    return polar(features).whitened.reshape(features.shape)
