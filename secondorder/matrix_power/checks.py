"""Refusals of the matrix functions: one line that names the value and what is allowed."""

import math

import torch
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError, check_known, check_number, check_whole
from secondorder.matrix_power.decomposition import symmetric_eigenvalues
from secondorder.matrix_power.transforms import inside_transform, known_shape
from secondorder.matrix_power.units import unit

METHODS = ("auto", "newton_schulz", "eigh")

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""The types of numbers that have matrix functions."""
MOST_STEPS = 1000
"""Newton-Schulz steps: after 56 nothing changes any more in float64."""
MOST_EXPONENT = 1000
"""Of a power: beyond it all but the number 1 is zero or infinite."""


def check_matrices(S: Tensor) -> None:
    """Raises InputError unless S is a real floating-point tensor `[..., C, C]` without an empty dimension."""
    _check_tensor(S, "symmetric matrices [..., C, C]")
    shape = known_shape(S)
    if shape[-1] != shape[-2]:
        raise InputError(f"needs square matrices [..., C, C], got shape {list(S.shape)}")


def check_features(x: Tensor) -> None:
    """Raises InputError unless x is a real floating-point tensor `[..., C, M]` without an empty dimension."""
    _check_tensor(x, "features [..., C, M]")


def check_values(S: Tensor) -> None:
    """Raises InputError unless S is finite, symmetric and positive semi-definite up to rounding.

    Allowed is sqrt(eps) of the number format, relative to the largest entry, and at least 1e-6, so that a matrix computed in
    float32 may be passed in float64.

    Reads the values, which waits for the device; does nothing inside a torch.func transform, where that is impossible, and
    for a meta tensor, which has none.
    """
    if inside_transform() or S.is_meta:
        return
    S = S.detach()
    relative = max(torch.finfo(S.dtype).eps ** 0.5, 1e-6)
    S = S.float() if S.dtype in (torch.float16, torch.bfloat16) else S
    if not S.isfinite().all():
        raise NonFiniteError(f"needs finite matrices, got {int((~S.isfinite()).sum())} non-finite entries")
    c = unit(S)
    S = S / c
    difference = (S - S.mT).abs()
    if (difference > relative).any():
        largest = (difference * c).max()
        raise InputError(f"needs symmetric matrices, got |S - S^T| up to {largest:.3g}; pass (S + S^T) / 2")
    # Cholesky succeeds when no eigenvalue is below -shift
    shift = relative + (S.abs().amax((-2, -1), keepdim=True) == 0).to(S.dtype)
    failed = torch.linalg.cholesky_ex(S + shift * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)).info != 0
    if failed.any():
        lowest = (symmetric_eigenvalues(S) * c[..., 0])[failed].min()
        raise InputError(
            f"needs positive semi-definite matrices, got an eigenvalue of {lowest:.3g}; add a multiple of I"
        )


def check_method(method: str) -> None:
    """Raises InputError for a name that is not in METHODS."""
    check_known("method", method, METHODS)


def check_iterations(num_iter: int) -> None:
    """Raises InputError unless num_iter is a whole number from 1 to MOST_STEPS."""
    check_whole("num_iter", num_iter, most=MOST_STEPS)


def check_exponent(exponent: float) -> None:
    """Raises InputError unless the exponent is a real number of at most MOST_EXPONENT in size."""
    check_number("exponent", exponent, -MOST_EXPONENT, MOST_EXPONENT, "[]")


def check_eps(eps: float) -> None:
    """Raises InputError unless eps is finite and not negative."""
    check_number("eps", eps, 0, math.inf)


def _check_tensor(x: Tensor, what: str) -> None:
    if not isinstance(x, Tensor):
        raise InputError(f"needs {what} as a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise InputError(f"needs {what} of real floating-point numbers, got {x.dtype}; convert with .float()")
    if x.ndim < 2 or 0 in known_shape(x):
        raise InputError(f"needs {what} with no empty dimension, got shape {list(x.shape)}")
