"""Eigenvalues and eigenvectors of symmetric matrices, also of those for which LAPACK's algorithm fails."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from secondorder.accelerator import widest
from secondorder.matrix_power.transforms import exporting, inside_transform


def symmetric_eigen(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues lam `[..., C]`, ascending, and eigenvectors U `[..., C, C]` of symmetric S = U diag(lam) U^T.

    `torch.linalg.eigh`, which does not converge, or gives NaN, for some matrices of which many eigenvalues are mere rounding,
    such as covariances of fewer positions than channels in float32. These, and no others of a batch, are decomposed in float64,
    or else as Q^T S Q with a random orthogonal Q. Raises torch.linalg.LinAlgError where that fails, too, as for NaN.
    """
    try:
        lam, U = torch.linalg.eigh(S)
    except torch.linalg.LinAlgError:
        pass
    else:
        # It is LAPACK that gives NaN; on an accelerator the question would be waited for.
        if S.device.type != "cpu" or is_fake(S) or inside_transform() or exporting() or _finite(U):
            return lam, U
    if S.ndim == 2:
        return _otherwise(S)
    found = [symmetric_eigen(A) for A in S.flatten(0, -3)]
    lam, U = (torch.stack(parts) for parts in zip(*found, strict=True))
    return lam.view(S.shape[:-1]), U.view(S.shape)


def symmetric_eigenvalues(S: Tensor) -> Tensor:
    """Eigenvalues `[..., C]`, ascending, by `torch.linalg.eigvalsh`, or as `symmetric_eigen` where that does not converge."""
    try:
        return torch.linalg.eigvalsh(S)
    except torch.linalg.LinAlgError:
        return symmetric_eigen(S)[0]


def _finite(U: Tensor) -> bool:
    return bool(U.sum().isfinite())


def _otherwise(S: Tensor) -> tuple[Tensor, Tensor]:
    wide = S.to(widest(S.device))
    try:
        lam, U = torch.linalg.eigh(wide)
        found = _finite(U)
    except torch.linalg.LinAlgError:
        found = False
    if not found:
        random = torch.randn(S.shape, generator=torch.Generator().manual_seed(0), dtype=wide.dtype)
        Q = torch.linalg.qr(random).Q.to(S.device)
        turned = Q.mT @ wide @ Q
        lam, V = torch.linalg.eigh((turned + turned.mT) / 2)
        U = Q @ V
    return lam.to(S.dtype), U.to(S.dtype)
