"""Conjugate gradients for (A + damping I) x = b with A given by products only (Hestenes & Stiefel, 1952).

SciPy's `cg` has NumPy vectors on the CPU; products with a network's curvature live where the network does, in its precision.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError, check_number, check_whole, failures_of


@dataclass(frozen=True)
class CGSolution:
    """What conjugate gradients found, of the shape of b."""

    x: Tensor
    """The iterate with the smallest residual."""
    iterations: int
    """Steps taken."""
    residual: float
    """|b - (A + damping I) x| / |b|, computed anew from x, not by the recursion."""
    converged: bool
    """Whether `residual` is at most the tolerance."""
    status: str
    """In one line: why the iteration ended."""


@dataclass
class _Iterate:
    """x, its residual r = b - (A + damping I) x as the recursion has it, and |r|; b has norm 1."""

    x: Tensor
    r: Tensor
    size: float


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    damping: float = 0.0,
    tolerance: float = 1e-6,
    iterations: int = 200,
    start: Tensor | None = None,
) -> CGSolution:
    """x with |b - (A + damping I) x| <= tolerance |b|, for symmetric positive semi-definite A.

    Each claim of convergence is checked with one more product; where the recursion was wrong (rounding) it starts again from
    there, as long as that helps. Ends without convergence, and says so in `status`, when the steps are used up, rounding allows
    no more, or a direction p has p^T (A + damping I) p <= 0 up to rounding: A is not positive semi-definite, or b is not in its
    range.

    Args:
        product: gives A v for v of the shape of b; called with vectors of size about 1, whatever the size of b.
        b: floating-point tensor of any shape.
        damping: a number of at least 0.
        tolerance: of the residual, as a part of |b|, in (0, 1).
        iterations: most steps, at least 1.
        start: first x, of the shape of b; None: zero.

    Raises:
        NonFiniteError: for NaN or infinity in b, start or a product.
        InputError: for a bad damping, tolerance or number of iterations, or a shape that is not that of b.
    """
    if not callable(product):
        raise InputError(f"product {product!r}: must be a function that gives A v for v of the shape of b")
    _check(b, damping, tolerance, iterations, start)
    damping, tolerance = float(damping), float(tolerance)
    b = b.detach()
    largest = float(b.abs().max()) if b.numel() else 0.0
    if largest == 0.0:
        return CGSolution(torch.zeros_like(b), 0, 0.0, True, "b is zero, and so is x")
    norm = float((b / largest).norm())
    b = b / largest / norm

    def damped(v: Tensor) -> Tensor:
        with failures_of("the product"):
            found = product(v)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"the product is {kind}: must be a tensor of real floating-point numbers")
        found = found.detach()
        if found.shape != v.shape:
            raise InputError(f"the product has the shape {list(found.shape)}, b has {list(v.shape)}")
        _check_finite("the product", found)
        return found.add(v, alpha=damping)

    x = torch.zeros_like(b) if start is None else start.detach().to(b) / largest / norm
    _check_finite("start / |b|", x)
    x, residual, steps, status = _solve(damped, b, x, tolerance, iterations)
    x = x * norm * largest
    _check_finite("x", x)
    return CGSolution(x, steps, residual, residual <= tolerance, status)


def _solve(
    damped: Callable[[Tensor], Tensor], b: Tensor, x: Tensor, tolerance: float, iterations: int
) -> tuple[Tensor, float, int, str]:
    """x, its residual, the steps and the status, for b of norm 1."""
    r = b - damped(x) if x.any() else b
    residual, steps = float(r.norm()), 0
    while residual > tolerance:
        best, taken, ended = _steps(damped, _Iterate(x, r, residual), tolerance, iterations - steps)
        steps += taken
        r, before = b - damped(best.x), residual
        now = float(r.norm())
        if now < before:
            x, residual = best.x, now
        if ended is None and now > tolerance and now > before / 2:
            ended = "rounding allows no smaller one"
        if ended is not None and residual > tolerance:
            return x, residual, steps, f"not converged after step {steps}, residual {residual:.2g}: {ended}"
    return x, residual, steps, f"converged after step {steps}, residual {residual:.2g}"


def _steps(
    damped: Callable[[Tensor], Tensor], now: _Iterate, tolerance: float, most: int
) -> tuple[_Iterate, int, str | None]:
    """The iterate with the smallest residual, the steps taken, and why they ended if not by convergence."""
    best, p = now, now.r
    for step in range(most):
        Ap = damped(p)
        curvature, rounding = float((p * Ap).sum()), torch.finfo(p.dtype).eps * float(p.norm() * Ap.norm())
        if curvature <= rounding:
            return best, step, f"p^T (A + damping I) p = {curvature:.2g}, not positive; raise the damping"
        alpha = now.size**2 / curvature
        r = now.r - alpha * Ap
        after = _Iterate(now.x + alpha * p, r, float(r.norm()))
        if not math.isfinite(after.size):
            return best, step + 1, "the iterates overflow; raise the damping"
        best = after if after.size < best.size else best
        if after.size <= tolerance:
            return best, step + 1, None
        p = r + (after.size / now.size) ** 2 * p
        now = after
    return best, most, f"tolerance {tolerance:g} not reached; more iterations or damping"


def _check(b: Tensor, damping: float, tolerance: float, iterations: int, start: Tensor | None) -> None:
    check_number("damping", _plain(damping), 0.0, math.inf)
    check_number("tolerance", _plain(tolerance), 0.0, 1.0, "()", hint=", a part of |b|")
    check_whole("iterations", iterations)
    for name, tensor in (("b", b), *([] if start is None else [("start", start)])):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is {type(tensor).__name__}: must be a tensor")
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or tensor.device.type == "meta":
            raise InputError(f"{name} has dtype {tensor.dtype} on {tensor.device}: must be floating point")
    if start is not None and start.shape != b.shape:
        raise InputError(f"start has the shape {list(start.shape)}, b has {list(b.shape)}")
    _check_finite("b", b)


def _plain(value: object) -> object:
    """The number in a tensor that holds one; anything else as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"{name} has {int((~torch.isfinite(values)).sum())} numbers that are not finite")
