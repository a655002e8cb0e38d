"""f(S) = U diag(f(lam)) U^T of a symmetric matrix, right to second order, without differentiating eigenvectors.

Notation: S = U diag(lam) U^T; V, W symmetric directions; V~ = U^T V U. Daleckii and Krein (1965):

    first derivative     D f(S)[V]    = U (f[lam_i, lam_j] V~_ij) U^T
    second derivative    D2 f(S)[V, W] = U (sum_k f[lam_i, lam_k, lam_j] (V~_ik W~_kj + W~_ik V~_kj)) U^T

The first is self-adjoint and the second a symmetric trilinear form, so both are their own transposes: the three autograd
functions below are closed under reverse and forward differentiation and divide by no gap of eigenvalues.

Null directions, lam <= C eps lam_max: for an f that is singular at 0 they count as exactly zero, with f(0) = 0 and
f[0, 0] = f[0, 0, 0] = 0; then f[lam, 0] = f(lam) / lam and f[lam, 0, 0] = f(lam) / lam^2. Composed with X -> X X^T these
give the right first and second derivatives on the features of constant rank, hence for fewer positions than channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from secondorder.errors import NonFiniteError
from secondorder.matrix_power.scalar_functions import ScalarFunction
from secondorder.matrix_power.transforms import exporting, homogeneous, mapped_first, primals, symmetric


def spectral(S: Tensor, function: ScalarFunction) -> Tensor:
    """f(S) for symmetric S `[..., C, C]`; gradients are symmetric, and a third derivative raises."""
    if exporting():
        from secondorder.matrix_power.exporting import recorded as apply  # here, as it imports this module
    else:
        apply = _apply
    if function.degree is None:
        return apply(S, function)
    return homogeneous(lambda S: apply(S, function), function.degree, S)


def _apply(S: Tensor, function: ScalarFunction) -> Tensor:
    return _Value.apply(S, function)[0]


def value(S: Tensor, function: ScalarFunction) -> Tensor:
    """f(S) in plain operations, which are not to be differentiated."""
    return _Value.forward(S, function)[0]


def first_derivative(S: Tensor, V: Tensor, function: ScalarFunction) -> Tensor:
    """D f(S)[V] in plain operations, which are not to be differentiated."""
    return _First.forward(S, V, *eigenvalues(S), function)


def eigenvalues(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors. Raises NonFiniteError (an InputError) for non-finite entries."""
    try:
        return torch.linalg.eigh(S)
    except torch.linalg.LinAlgError as error:
        raise NonFiniteError(f"no eigenvalues for matrices {list(S.shape)}: entries are not finite") from error


def null_directions(lam: Tensor, size: int) -> Tensor:
    """Which of the ascending eigenvalues lam count as zero in a matrix of `size` rows."""
    return lam <= size * torch.finfo(lam.dtype).eps * lam[..., -1:]


def divided_differences(lam: Tensor, null: Tensor, function: ScalarFunction) -> tuple[Tensor, Tensor]:
    """f(lam) `[..., C]` and f[lam_i, lam_j] `[..., C, C]` with the convention for null directions."""
    if not function.null_at_zero:
        lam = lam.clamp_min(0)
        return function.value(lam), function.first(lam[..., :, None], lam[..., None, :])
    lam = torch.where(null, 1, lam)
    value = function.value(lam)
    first = function.first(lam[..., :, None], lam[..., None, :])
    row, column = null[..., :, None], null[..., None, :]
    ratio = value / lam
    first = torch.where(row, torch.where(column, 0, ratio[..., None, :]), first)
    first = torch.where(column & ~row, ratio[..., :, None], first)
    return torch.where(null, 0, value), first


class _Value(Function):
    """S -> f(S), and the eigenvalues and eigenvectors as constants."""

    @staticmethod
    def forward(S: Tensor, function: ScalarFunction) -> tuple[Tensor, Tensor, Tensor]:
        lam, U = eigenvalues(S)
        null = null_directions(lam, S.shape[-1])
        if function.null_at_zero:
            value = torch.where(null, 0, function.value(torch.where(null, 1, lam)))
        else:
            value = function.value(lam.clamp_min(0))
        return (U * value[..., None, :]) @ U.mT, lam, U

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        S, ctx.function = inputs
        _, lam, U = output
        ctx.mark_non_differentiable(lam, U)
        ctx.save_for_backward(S, lam, U)
        ctx.save_for_forward(S, lam, U)

    @staticmethod
    def backward(ctx: Any, G: Tensor, *_: Any) -> tuple:
        S, lam, U = ctx.saved_tensors
        return _First.apply(S, G, lam, U, ctx.function), None

    @staticmethod
    def jvp(ctx: Any, V: Tensor, *_: Any) -> tuple:
        S, lam, U = primals(ctx.saved_tensors)
        return _First.apply(S, V, lam, U, ctx.function), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _Value.apply(*mapped_first(info.batch_size, in_dims, arguments)), (0, 0, 0)


class _First(Function):
    """(S, V) -> D f(S)[V]."""

    @staticmethod
    def forward(S: Tensor, V: Tensor, lam: Tensor, U: Tensor, function: ScalarFunction) -> Tensor:
        _, first = divided_differences(lam, null_directions(lam, S.shape[-1]), function)
        return U @ (first * (U.mT @ symmetric(V) @ U)) @ U.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.function = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, H: Tensor) -> tuple:
        S, V, lam, U = ctx.saved_tensors
        f = ctx.function
        gradient_S = _Second.apply(S, V, H, lam, U, f) if ctx.needs_input_grad[0] else None
        gradient_V = _First.apply(S, H, lam, U, f) if ctx.needs_input_grad[1] else None
        return gradient_S, gradient_V, None, None, None

    @staticmethod
    def jvp(ctx: Any, dS: Tensor | None, dV: Tensor | None, *_: Any) -> Tensor:
        S, V, lam, U = primals(ctx.saved_tensors)
        moved = torch.zeros_like(V) if dS is None else _Second.apply(S, V, dS, lam, U, ctx.function)
        return moved if dV is None else moved + _First.apply(S, dV, lam, U, ctx.function)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _First.apply(*mapped_first(info.batch_size, in_dims, arguments)), 0


class _Second(Function):
    """(S, V, W) -> D2 f(S)[V, W]."""

    @staticmethod
    def forward(S: Tensor, V: Tensor, W: Tensor, lam: Tensor, U: Tensor, function: ScalarFunction) -> Tensor:
        V, W = U.mT @ symmetric(V) @ U, U.mT @ symmetric(W) @ U
        null = null_directions(lam, S.shape[-1]) if function.null_at_zero else torch.zeros_like(lam, dtype=torch.bool)
        safe = torch.where(null, 1, lam.clamp_min(0))
        form = _factored if function.factored else _summed
        T = form(safe, null, V, W, function) + _two_null(safe, null, V, W, function)
        return U @ T @ U.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.function = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, H: Tensor) -> tuple:
        S, V, W, lam, U = ctx.saved_tensors
        f = ctx.function
        if ctx.needs_input_grad[0]:
            raise NotImplementedError(_THIRD)
        gradient_V = _Second.apply(S, W, H, lam, U, f) if ctx.needs_input_grad[1] else None
        gradient_W = _Second.apply(S, V, H, lam, U, f) if ctx.needs_input_grad[2] else None
        return None, gradient_V, gradient_W, None, None, None

    @staticmethod
    def jvp(ctx: Any, dS: Tensor | None, dV: Tensor | None, dW: Tensor | None, *_: Any) -> Tensor:
        if dS is not None:
            raise NotImplementedError(_THIRD)
        S, V, W, lam, U = primals(ctx.saved_tensors)
        moved = torch.zeros_like(V) if dV is None else _Second.apply(S, dV, W, lam, U, ctx.function)
        return moved if dW is None else moved + _Second.apply(S, V, dW, lam, U, ctx.function)

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
    first, ratio = function.first(lam[..., :, None], lam[..., None, :]), function.value(lam) / lam
    for k in range(lam.shape[-1]):
        second = _second_slice(lam, null, first, ratio, k, function)
        product = V[..., :, k, None] * W[..., None, k, :]
        T += second * (product + product.mT)
    return T


def _second_slice(lam: Tensor, null: Tensor, first: Tensor, ratio: Tensor, k: int, function: ScalarFunction) -> Tensor:
    """f[lam_i, lam_k, lam_j] for one k, zero where two of the indices are null."""
    a, b, c = lam[..., :, None], lam[..., k, None, None], lam[..., None, :]
    second = function.second(a, b, c)
    if not function.null_at_zero:
        return second
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
    if not function.null_at_zero:
        return torch.zeros_like(V)
    N = null.to(V.dtype)
    weight = torch.where(null, 0, function.value(lam) / lam**2)
    outer = (V * weight[..., None, :]) @ W * N[..., :, None] * N[..., None, :]  # null i, j; k in the range
    inner = (V * N[..., None, :]) @ W  # null k and one of i, j
    inner = (inner + inner.mT) * (N[..., :, None] * weight[..., None, :] + weight[..., :, None] * N[..., None, :])
    return outer + outer.mT + inner
