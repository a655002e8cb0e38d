"""What torch.export, the ONNX exporter and torch.jit.trace get instead of the fast autograd functions.

They record plain operations and differentiate those, so the fast ways (written in place, with a backward pass of their own) are
no use to them: Newton-Schulz is recorded as the products of its plain definition, of more steps than are stable as a function of
eigenvalues. Such a function is recorded as the plain eigen-decomposition where torch.export is asked for no gradient (under
`torch.no_grad()`), else as the operator `torch.ops.secondorder.spectral`, because the backward pass of a plain one divides by
gaps of eigenvalues. A program with that operator runs where `secondorder.pooling` is imported. (torch.jit.trace checks its graph
without gradients, so it cannot choose.) Recorded programs know no units (`units`): features near the ends of the number format
are for the module itself.
"""

from typing import Any

import torch
from torch import Tensor

from secondorder.errors import InputError
from secondorder.matrix_power.newton_schulz import NewtonSchulzPolynomial
from secondorder.matrix_power.scalar_functions import Logarithm, Power, ScalarFunction, SquareRoot
from secondorder.matrix_power.spectral import first_derivative, spectral, value
from secondorder.matrix_power.transforms import exporting


def spectral_or_recorded(S: Tensor, function: ScalarFunction) -> Tensor:
    """f(S) of symmetric `[..., C, C]` by `spectral`, or by `recorded` while a program is being recorded."""
    return recorded(S, function) if exporting() else spectral(S, function)


def recorded(S: Tensor, function: ScalarFunction) -> Tensor:
    """f(S) of symmetric `[..., C, C]` for a program that is being recorded. Raises InputError for ONNX: it has no eigenvalues."""
    if _for_onnx():
        raise InputError(
            'ONNX has no eigenvalues, which this pooling needs: use "gcp" of at most 10 steps (num_iter), or torch.export'
        )
    if not torch.jit.is_tracing() and not (torch.is_grad_enabled() and S.requires_grad):
        return value(S, function)
    name = type(function).__name__
    return torch.ops.secondorder.spectral(S, name, PARAMETER[name](function))


def _for_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


# torch.compiler.assume_constant_result without the two seconds that torch._dynamo takes to import: torch.export's strict mode
# takes the question itself for False.
_for_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


PARAMETER: dict[str, Any] = {
    "SquareRoot": lambda root: 0.5,
    "Power": lambda power: power.exponent,
    "Logarithm": lambda logarithm: logarithm.eps,
    "NewtonSchulzPolynomial": lambda polynomial: polynomial.num_iter,
}
"""Scalar function -> its number, of which the operator makes it anew."""

FUNCTION: dict[str, Any] = {
    "SquareRoot": lambda _: SquareRoot(),
    "Power": Power,
    "Logarithm": Logarithm,
    "NewtonSchulzPolynomial": lambda num_iter: NewtonSchulzPolynomial(int(num_iter)),
}
"""Name -> scalar function of its number."""


@torch.library.custom_op("secondorder::spectral", mutates_args=())
def _operator(S: Tensor, function: str, parameter: float) -> Tensor:
    """f(S) for a function of the table FUNCTION."""
    return value(S, FUNCTION[function](parameter))


@_operator.register_fake
def _shape(S: Tensor, function: str, parameter: float) -> Tensor:
    return torch.empty_like(S)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    S, ctx.name, ctx.parameter = inputs
    ctx.save_for_backward(S)


def _backward(ctx: Any, G: Tensor) -> tuple:
    (S,) = ctx.saved_tensors
    return torch.ops.secondorder.spectral_gradient(S, G, ctx.name, ctx.parameter), None, None


@torch.library.custom_op("secondorder::spectral_gradient", mutates_args=())
def _gradient(S: Tensor, G: Tensor, function: str, parameter: float) -> Tensor:
    """The gradient with respect to S of <G, f(S)>."""
    return first_derivative(S, G, FUNCTION[function](parameter))


@_gradient.register_fake
def _gradient_shape(S: Tensor, G: Tensor, function: str, parameter: float) -> Tensor:
    return torch.empty_like(S)


_operator.register_autograd(_backward, setup_context=_keep)
