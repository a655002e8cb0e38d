"""f(S) = U diag(f(lam)) U^T of a symmetric matrix, right to second order, without differentiating eigenvectors.

Notation: S = U diag(lam) U^T; V, W symmetric directions; V~ = U^T V U. Daleckii and Krein (1965):

    first derivative     D f(S)[V]    = U (f[lam_i, lam_j] V~_ij) U^T
    second derivative    D2 f(S)[V, W] = U (sum_k f[lam_i, lam_k, lam_j] (V~_ik W~_kj + W~_ik V~_kj)) U^T

The first is self-adjoint and the second a symmetric trilinear form, so both are their own transposes: the three autograd
functions below are closed under reverse and forward differentiation and divide by no gap of eigenvalues.

Null directions, lam <= C eps lam_max: for an f that is singular at 0 they count as exactly zero, with f(0) = 0 and
f[0, 0] = f[0, 0, 0] = 0; then f[lam, 0] = f(lam) / lam and f[lam, 0, 0] = f(lam) / lam^2. Composed with X -> X X^T these
give the right first and second derivatives on the features of constant rank, hence for fewer positions than channels.
Negative eigenvalues count as zero.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from secondorder.matrix_power.decomposition import symmetric_eigen
from secondorder.matrix_power.precision import full_precision
from secondorder.matrix_power.scalar_functions import Logarithm, ScalarFunction
from secondorder.matrix_power.transforms import mapped_first, primals, symmetric


def spectral(S: Tensor, function: ScalarFunction) -> Tensor:
    """f(S) for symmetric S `[..., C, C]` of moderate scale (`units`); gradients are symmetric, a third derivative raises."""
    unit = function.unit if isinstance(function, Logarithm) else None
    plain = function if unit is None else replace(function, unit=None)  # type: ignore[type-var]
    return _Value.apply(S, unit, plain)[0]


def value(S: Tensor, function: ScalarFunction) -> Tensor:
    """f(S) in plain operations, which are not to be differentiated."""
    return _Value.forward(S, None, function)[0]


def first_derivative(S: Tensor, V: Tensor, function: ScalarFunction) -> Tensor:
    """D f(S)[V] in plain operations, which are not to be differentiated."""
    return _First.forward(S, V, *eigenvalues(S), None, function)


def eigenvalues(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors; zero and I for matrices of NaN, which would stop all others.

    Expects a matrix that is not finite to have NaN as its first entry (`units`).
    """
    return symmetric_eigen(S.masked_fill(S[..., :1, :1].isnan(), 0))


def null_directions(lam: Tensor, size: int) -> Tensor:
    """Which of the ascending eigenvalues lam count as zero in a matrix of `size` rows."""
    return lam <= rounding_level(lam, size)


def rounding_level(lam: Tensor, size: int) -> Tensor:
    """C eps lam_max `[..., 1]` for ascending eigenvalues lam of a matrix of C = `size` rows."""
    return size * torch.finfo(lam.dtype).eps * lam[..., -1:]


def left_out(lam: Tensor, size: int, function: ScalarFunction) -> Tensor:
    """Which of the ascending eigenvalues `[..., n]` are null directions that f leaves out."""
    singular = function.singular_at(rounding_level(lam, size)[..., None])
    null = null_directions(lam, size)
    return null if singular is True else null & singular[..., 0]  # type: ignore[index]


def divided_differences(lam: Tensor, null: Tensor, function: ScalarFunction) -> tuple[Tensor, Tensor]:
    """f(lam) `[..., C]` and f[lam_i, lam_j] `[..., C, C]` with the convention for the null directions that are left out."""
    lam = torch.where(null, 1, lam.clamp_min(0))
    value = _value(function, lam)
    first = function.first(lam[..., :, None], lam[..., None, :])
    row, column = null[..., :, None], null[..., None, :]
    ratio = value / lam  # read beside null directions only, where lam > 0
    first = torch.where(row, torch.where(column, 0, ratio[..., None, :]), first)
    first = torch.where(column & ~row, ratio[..., :, None], first)
    return torch.where(null, 0, value), first


def _value(function: ScalarFunction, lam: Tensor) -> Tensor:
    """f(lam) `[..., C]` of a function with a unit `[..., 1, 1]`."""
    return function.value(lam[..., None, :])[..., 0, :]


def _with_unit(function: ScalarFunction, unit: Tensor | None) -> ScalarFunction:
    return function if unit is None else replace(function, unit=unit)  # type: ignore[type-var]


class _Value(Function):
    """S -> f(S), and the eigenvalues and eigenvectors as constants."""

    @staticmethod
    def forward(S: Tensor, unit: Tensor | None, function: ScalarFunction) -> tuple[Tensor, Tensor, Tensor]:
        with full_precision(S):
            f = _with_unit(function, unit)
            lam, U = eigenvalues(S)
            null = left_out(lam, S.shape[-1], f)
            value = torch.where(null, 0, _value(f, torch.where(null, 1, lam.clamp_min(0))))
            return (U * value[..., None, :]) @ U.mT, lam, U

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        S, unit, ctx.function = inputs
        _, lam, U = output
        ctx.mark_non_differentiable(lam, U)
        ctx.save_for_backward(S, lam, U, unit)
        ctx.save_for_forward(S, lam, U, unit)

    @staticmethod
    def backward(ctx: Any, G: Tensor, *_: Any) -> tuple:
        S, lam, U, unit = ctx.saved_tensors
        return _First.apply(S, G, lam, U, unit, ctx.function), None, None

    @staticmethod
    def jvp(ctx: Any, V: Tensor, *_: Any) -> tuple:
        S, lam, U, unit = primals(ctx.saved_tensors)
        return _First.apply(S, V, lam, U, unit, ctx.function), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _Value.apply(*mapped_first(info.batch_size, in_dims, arguments)), (0, 0, 0)


class _First(Function):
    """(S, V) -> D f(S)[V]."""

    @staticmethod
    def forward(S: Tensor, V: Tensor, lam: Tensor, U: Tensor, unit: Tensor | None, function: ScalarFunction) -> Tensor:
        with full_precision(S):
            f = _with_unit(function, unit)
            _, first = divided_differences(lam, left_out(lam, S.shape[-1], f), f)
            return U @ (first * (U.mT @ symmetric(V) @ U)) @ U.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.function = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, H: Tensor) -> tuple:
        S, V, *rest = ctx.saved_tensors
        f = ctx.function
        gradient_S = _Second.apply(S, V, H, *rest, f) if ctx.needs_input_grad[0] else None
        gradient_V = _First.apply(S, H, *rest, f) if ctx.needs_input_grad[1] else None
        return gradient_S, gradient_V, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dS: Tensor | None, dV: Tensor | None, *_: Any) -> Tensor:
        S, V, *rest = primals(ctx.saved_tensors)
        moved = torch.zeros_like(V) if dS is None else _Second.apply(S, V, dS, *rest, ctx.function)
        return moved if dV is None else moved + _First.apply(S, dV, *rest, ctx.function)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _First.apply(*mapped_first(info.batch_size, in_dims, arguments)), 0


class _Second(Function):
    """(S, V, W) -> D2 f(S)[V, W]."""

    @staticmethod
    def forward(
        S: Tensor, V: Tensor, W: Tensor, lam: Tensor, U: Tensor, unit: Tensor | None, function: ScalarFunction
    ) -> Tensor:
        with full_precision(S):
            f = _with_unit(function, unit)
            V, W = U.mT @ symmetric(V) @ U, U.mT @ symmetric(W) @ U
            null = left_out(lam, S.shape[-1], f)
            safe = torch.where(null, 1, lam.clamp_min(0))
            form = _factored if f.factored else _summed
            T = form(safe, null, V, W, f) + _two_null(safe, null, V, W, f)
            return U @ T @ U.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.function = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, H: Tensor) -> tuple:
        S, V, W, *rest = ctx.saved_tensors
        f = ctx.function
        if ctx.needs_input_grad[0]:
            raise NotImplementedError(_THIRD)
        gradient_V = _Second.apply(S, W, H, *rest, f) if ctx.needs_input_grad[1] else None
        gradient_W = _Second.apply(S, V, H, *rest, f) if ctx.needs_input_grad[2] else None
        return None, gradient_V, gradient_W, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dS: Tensor | None, dV: Tensor | None, dW: Tensor | None, *_: Any) -> Tensor:
        if dS is not None:
            raise NotImplementedError(_THIRD)
        S, V, W, *rest = primals(ctx.saved_tensors)
        moved = torch.zeros_like(V) if dV is None else _Second.apply(S, dV, W, *rest, ctx.function)
        return moved if dW is None else moved + _Second.apply(S, V, dW, *rest, ctx.function)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _Second.apply(*mapped_first(info.batch_size, in_dims, arguments)), 0


_THIRD = (
    "matrix functions have first and second derivatives; a third derivative with respect to the matrix is not defined"
)


def _factored(lam: Tensor, null: Tensor, V: Tensor, W: Tensor, function: ScalarFunction) -> Tensor:
    """Terms with at most one null index when f[a, b, c] = -f[a, b] f[b, c] f[a, c]: -L(L(V) L(W) + L(W) L(V))."""
    lam = torch.where(null, 0, lam)
    first = divided_differences(lam, null, function)[1]
    product = (first * V) @ (first * W)
    return -first * (product + product.mT)


def _summed(lam: Tensor, null: Tensor, V: Tensor, W: Tensor, function: ScalarFunction) -> Tensor:
    """Terms with at most one null index, one k at a time, so that memory stays at `[..., C, C]`."""
    T = torch.zeros_like(V)
    first, ratio = function.first(lam[..., :, None], lam[..., None, :]), _value(function, lam) / lam
    for k in range(lam.shape[-1]):
        second = _second_slice(lam, null, first, ratio, k, function)
        product = V[..., :, k, None] * W[..., None, k, :]
        # not in place: a recorder (`torch.func.linearize`) would replay it on the zeros of the first time
        T = T + second * (product + product.mT)
    return T


def _second_slice(lam: Tensor, null: Tensor, first: Tensor, ratio: Tensor, k: int, function: ScalarFunction) -> Tensor:
    """f[lam_i, lam_k, lam_j] for one k, zero where two of the indices are null."""
    a, b, c = lam[..., :, None], lam[..., k, None, None], lam[..., None, :]
    second = function.second(a, b, c)
    row, middle, column = null[..., :, None], null[..., k, None, None], null[..., None, :]
    ratio_i, ratio_k, ratio_j = ratio[..., :, None], ratio[..., k, None, None], ratio[..., None, :]
    second = torch.where(row, _with_zero(first[..., k, None, :], b, c, ratio_k, ratio_j), second)
    second = torch.where(column, _with_zero(first[..., :, k, None], a, b, ratio_i, ratio_k), second)
    second = torch.where(middle, _with_zero(first, a, c, ratio_i, ratio_j), second)
    nulls = row.to(lam.dtype) + middle + column
    return torch.where(nulls > 1, 0, second)


def _with_zero(first: Tensor, a: Tensor, b: Tensor, ratio_a: Tensor, ratio_b: Tensor) -> Tensor:
    """f[a, b, 0] = (f[a, b] - f(b) / b) / a, taking the larger of the two as a: there is no cancellation."""
    return torch.where(a > b, (first - ratio_b) / a, (first - ratio_a) / b)


def _two_null(lam: Tensor, null: Tensor, V: Tensor, W: Tensor, function: ScalarFunction) -> Tensor:
    """The terms f[lam, 0, 0] = f(lam) / lam^2, in which two of the three indices are null."""
    N = null.to(V.dtype)
    weight = torch.where(null | (lam == 0), 0, _value(function, lam) / lam**2)  # read beside null directions only
    outer = (V * weight[..., None, :]) @ W * N[..., :, None] * N[..., None, :]  # null i, j; k in the range
    inner = (V * N[..., None, :]) @ W  # null k and one of i, j
    inner = (inner + inner.mT) * (N[..., :, None] * weight[..., None, :] + weight[..., :, None] * N[..., None, :])
    return outer + outer.mT + inner
