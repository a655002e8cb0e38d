"""Decompositions that do not fail: each step of a ladder is tried when the one before it fails, and counted.

inverse        Cholesky -> Cholesky with growing jitter on the diagonal -> eigenvalues in float64, on the CPU
eigenvalues    in the matrix's own precision -> in float64, on the CPU
either         -> the layer's last good inverse -> W / lambda when there was none yet

A diagonal matrix, given by its diagonal `[G, n]`, is its own decomposition, and its eigenvectors are a diagonal of ones.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EVENTS = {
    "jitter": "a factor needed more on its diagonal for its Cholesky decomposition",
    "float64": "a factor was decomposed in float64",
    "kept": "a layer kept its last good inverse",
    "identity": "a layer had no good inverse yet: its gradient was divided by the damping",
}
"""What is counted."""
JITTERS = (1e-6, 1e-4, 1e-2)
"""Times the mean of the diagonal."""

Result = tuple[Tensor, ...]
Eigen = tuple[Tensor, Tensor]
"""Eigenvalues `[G, n]`, none below zero, and eigenvectors `[G, n, n]` in columns."""


def eigen(matrices: Sequence[Tensor], report: Counter[str]) -> list[Eigen | None]:
    """The eigendecomposition of each of the positive semi-definite matrices `[G, n, n]`, None where all failed.

    torch.linalg.eigh is LAPACK's syevd on a CPU, the fastest driver (one thread, float32, ms for n = 145, 289, 577: syevd
    0.7, 3.2, 17; syevr 1.2, 5.0, 25; syev 2.0, 12, 97; syevd in float64 1.3, 7.6, 40).
    """
    found = _in_batches(matrices, _eigh, lambda i: _eigh_float64(matrices[i], report))
    return [None if pair is None else (pair[0], pair[1]) for pair in found]


def inverses(matrices: Sequence[Tensor], shifts: Sequence[Tensor], report: Counter[str]) -> list[Tensor | None]:
    """(S + shift I)^-1 of each positive semi-definite matrix `[G, n, n]` and shift `[G, 1, 1]`, None where all failed."""
    shifted = [_shifted(S, shift) for S, shift in zip(matrices, shifts, strict=True)]

    def retry(i: int) -> Result | None:
        return _jittered(shifted[i], report) or _spectral_inverse(matrices[i], shifts[i], report)

    return [None if found is None else found[0] for found in _in_batches(shifted, _cholesky_inverse, retry)]


def all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether the numbers of each tensor, and their sum, are finite; one synchronisation for all."""
    return torch.stack([tensor.sum().isfinite() for tensor in tensors]).tolist() if tensors else []


def _in_batches(
    matrices: Sequence[Tensor], batched: Callable[[Tensor], Result | None], retry: Callable[[int], Result | None]
) -> list[Result | None]:
    """One call for all matrices of a size; if it fails each by itself, and `retry` with the index of one that fails again.

    On a CPU each matrix is by itself: LAPACK takes them one by one anyway, and stacking only copies.
    """
    found: dict[int, Result | None] = {}
    for indices in _of_one_size(matrices):
        together = [matrices[i] for i in indices]
        result = batched(together[0] if len(together) == 1 else torch.cat(together))
        if result is None:
            found |= {i: (batched(matrices[i]) if len(indices) > 1 else None) or retry(i) for i in indices}
        else:
            parts = zip(*(part.split([len(matrix) for matrix in together]) for part in result), strict=True)
            found |= dict(zip(indices, parts, strict=True))
    return [found[i] for i in range(len(matrices))]


def _of_one_size(matrices: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the matrices that are decomposed in one call."""
    groups: dict[object, list[int]] = {}
    for i, matrix in enumerate(matrices):
        key = i if matrix.device.type == "cpu" else (matrix.shape[1:], matrix.dtype, matrix.device)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _eigh(S: Tensor) -> Result | None:
    if S.ndim == 2:
        return S.clamp(min=0), torch.ones_like(S)
    try:
        values, vectors = torch.linalg.eigh(S)
    except torch.linalg.LinAlgError:
        return None
    return (values.clamp_(min=0), vectors) if all(all_finite([values, vectors])) else None


def _eigh_float64(S: Tensor, report: Counter[str]) -> Result | None:
    report["float64"] += 1
    found = _eigh(S.cpu().double())
    return None if found is None else tuple(part.to(S) for part in found)


def _cholesky_inverse(S: Tensor) -> Result | None:
    if S.ndim == 2:
        return (S.reciprocal(),)
    L, info = torch.linalg.cholesky_ex(S)
    if info.any():
        return None
    inverse = torch.cholesky_inverse(L)
    return (inverse,) if all(all_finite([inverse])) else None


def _jittered(S: Tensor, report: Counter[str]) -> Result | None:
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    for jitter in JITTERS:
        found = _cholesky_inverse(_shifted(S, jitter * mean))
        if found is not None:
            report["jitter"] += 1
            return found
    return None


def _spectral_inverse(S: Tensor, shift: Tensor, report: Counter[str]) -> Result | None:
    found = _eigh_float64(S, report)
    if found is None:
        return None
    values, Q = found
    inverse = (Q / (values[:, None] + shift)) @ Q.mT
    return (inverse,) if all(all_finite([inverse])) else None


def _shifted(S: Tensor, shift: Tensor) -> Tensor:
    """S + shift I."""
    if S.ndim == 2:
        return S + shift[:, 0]
    total = S.clone()
    total.diagonal(dim1=-2, dim2=-1).add_(shift[:, 0])
    return total
