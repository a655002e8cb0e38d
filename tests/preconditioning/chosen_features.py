"""Features with a chosen covariance spectrum, and the spectra that a pooling head may meet."""

import torch
from torch import Tensor

F64 = torch.float64


def features_with(spectrum: list[float], height: int, width: int, images: int = 2) -> Tensor:
    """Features `[N, C, H, W]` whose covariance has these eigenvalues, in a random basis, with means that are not zero."""
    C, M = len(spectrum), height * width
    U = torch.linalg.qr(torch.randn(images, C, C, dtype=F64)).Q
    ones = torch.ones(images, M, 1, dtype=F64)
    V = torch.linalg.qr(torch.cat([ones, torch.randn(images, M, M - 1, dtype=F64)], -1)).Q[..., 1:]
    rank = min(C, M - 1)
    r = torch.tensor(spectrum, dtype=F64)[:rank].sqrt()
    X = M**0.5 * (U[..., :rank] * r) @ V[..., :rank].mT
    return (X + torch.randn(images, C, 1, dtype=F64)).reshape(images, C, height, width)


SPECTRA = {
    "spread": ([5.0, 2.0, 1.1, 0.7, 0.2, 0.05], 3, 4),
    "ill-conditioned": ([1.0, 0.1, 1e-3, 1e-5, 1e-7, 1e-8], 3, 4),
    "repeated": ([2.0, 2.0, 2.0, 0.5, 0.5, 0.5], 3, 4),
    "white": ([1.0] * 5, 2, 4),
    "null channels": ([3.0, 1.0, 0.4, 0.0, 0.0], 3, 4),
    "one direction": ([2.0, 0.0, 0.0], 2, 4),
    "as many positions as channels": ([3.0, 2.0, 1.0, 0.5, 0.2, 0.1], 2, 3),
    "fewer positions than channels": ([3.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.1], 2, 2),
    "two positions": ([3.0, 1.0, 1.0], 1, 2),
    "one channel": ([0.3], 2, 2),
}
"""Name -> eigenvalues of the covariance (those beyond M - 1 are lost), height, width."""
