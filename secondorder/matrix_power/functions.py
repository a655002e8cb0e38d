"""Square root, power and logarithm of symmetric PSD matrices, and of the covariance of features in one fused step.

All are right to second order, in reverse and forward mode and under `torch.func`. Null directions (eigenvalues up to
C eps l_max) are left out by root, power and logarithm, as in a pseudo-inverse: they get value and gradient zero. So they are by
the logarithm with an eps below that rounding level, and by Newton-Schulz of more than 10 steps in float32 (24 in float64), whose
third derivative raises. Negative eigenvalues count as zero. 16-bit inputs are computed in float32; under autocast the result is
float32. Products are float32 products whatever `torch.set_float32_matmul_precision` says, outside of torch.compile.

Value and gradient are right at every scale of the number format, infinite or zero where they are beyond it; a second
derivative beyond it may be NaN. A sample with an entry that is not finite has NaN as value and derivatives, and changes no other
sample (`validate=True` refuses it).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from secondorder.errors import check_flag
from secondorder.matrix_power import checks
from secondorder.matrix_power.crossover import eigenvalues_are_faster, gram_is_faster
from secondorder.matrix_power.kernels import Eigen, Kernel, Products
from secondorder.matrix_power.scalar_functions import Logarithm, Power, ScalarFunction, SquareRoot
from secondorder.matrix_power.spectrum import MatrixFunction, NewtonSchulz, Spectral
from secondorder.matrix_power.strategies import Covariance, OnFeatures, OnMatrix, Square
from secondorder.matrix_power.transforms import full_precision, known_shape, result_dtype, widened
from secondorder.matrix_power.two_level import evaluate
from secondorder.matrix_power.upper_triangle import upper_triangle


def matrix_sqrt(S: Tensor, method: str = "auto", num_iter: int = 5, *, validate: bool = True) -> Tensor:
    """S^(1/2) of symmetric PSD matrices `[..., C, C]`: exact, or its approximation by K = `num_iter` Newton-Schulz steps.

    Args:
        S: matrices of 16, 32 or 64 bits; the result is of their type (float32 under autocast).
        method: "newton_schulz" and "auto": the polynomial of K steps with trace normalisation, exactly iSQRT-COV (Li et al., CVPR
            2018), through eigenvalues, since products blow up for the negative ones of a rounded matrix; `covariance_sqrt` uses
            products, too. "eigh": the exact root. So only "eigh" changes the result (for K = 5 by about 20 % on typical
            features).
        num_iter: K, at least 1; "eigh" does not use it.
        validate: False skips the checks that read values and so wait for the device.

    Raises:
        InputError: for other shapes, types, options, and for matrices that are not finite, symmetric and PSD.
    """
    checks.check_matrices(S)
    checks.check_method(method)
    checks.check_iterations(num_iter)
    check_flag("validate", validate)
    if validate:
        checks.check_values(S)
    return _of_matrix(S, Spectral(SquareRoot()) if method == "eigh" else NewtonSchulz(num_iter))


def matrix_power(S: Tensor, exponent: float, *, validate: bool = True) -> Tensor:
    """S^p of symmetric PSD matrices `[..., C, C]` for any real p; null directions give zero, for negative p too.

    The exponents 1 and 2 are computed without eigenvalues.

    Args:
        S: matrices of 16, 32 or 64 bits; the result is of their type (float32 under autocast).
        exponent: p, a number of at most `checks.MOST_EXPONENT` in size.
        validate: False skips the checks that read values and so wait for the device.

    Raises:
        InputError: for other shapes, types, exponents, and for matrices that are not finite, symmetric and PSD.
    """
    checks.check_matrices(S)
    checks.check_exponent(exponent)
    check_flag("validate", validate)
    if validate:
        checks.check_values(S)
    if exponent == 1:
        return _in_full_precision(torch.clone, S)
    if exponent == 2:
        return _in_full_precision(partial(evaluate, Square()), S)
    return _of_matrix(S, Spectral(_power(exponent)))


def matrix_log(S: Tensor, eps: float = 0.0, *, validate: bool = True) -> Tensor:
    """log(S) of symmetric PSD matrices `[..., C, C]` on their range; with eps > 0, log(S + eps I) - log(eps) I.

    The second form is smooth where S is singular.

    Args:
        S: matrices of 16, 32 or 64 bits; the result is of their type (float32 under autocast).
        eps: a finite number of at least 0, in the units of S.
        validate: False skips the checks that read values and so wait for the device.

    Raises:
        InputError: for other shapes, types, eps, and for matrices that are not finite, symmetric and PSD.
    """
    checks.check_matrices(S)
    checks.check_eps(eps)
    check_flag("validate", validate)
    if validate:
        checks.check_values(S)
    return _of_matrix(S, Spectral(Logarithm(float(eps))))


def covariance(x: Tensor) -> Tensor:
    """S = (1/M) Xc Xc^T, Xc = features `[..., C, M]` centred over their M positions: `[..., C, C]`.

    Raises InputError for other shapes and types.
    """
    checks.check_features(x)
    return _in_full_precision(partial(evaluate, Covariance()), x)


def covariance_sqrt(x: Tensor, method: str = "auto", num_iter: int = 5, *, triangle: bool = False) -> Tensor:
    """`matrix_sqrt(covariance(x))` `[..., C, C]` for features `[..., C, M]` in one step, much faster; only shapes are checked.

    Args:
        x: features of C channels at M positions.
        method: "newton_schulz": by matrix products, up to 10 steps in float32 (24 in float64), for which they are stable; through
            eigenvalues beyond. "auto": the same polynomial by products or through eigenvalues, whichever is faster for the shape.
            "eigh": the exact root.
        num_iter: K steps of Newton-Schulz, at least 1.
        triangle: give the row-major upper triangle `[..., C (C + 1) / 2]` instead of the matrix.

    Raises:
        InputError: for other shapes, types and options.
    """
    checks.check_features(x)
    checks.check_method(method)
    checks.check_iterations(num_iter)
    check_flag("triangle", triangle)
    if method == "eigh":
        return _of_features(x, Eigen(Spectral(SquareRoot())), triangle)
    return _of_features(x, _newton_schulz(method, num_iter, x), triangle)


def covariance_power(x: Tensor, exponent: float, *, triangle: bool = False) -> Tensor:
    """`matrix_power(covariance(x), exponent)` `[..., C, C]` for features `[..., C, M]` in one step; only shapes are checked.

    Args:
        triangle: give the row-major upper triangle `[..., C (C + 1) / 2]` instead. InputError for other shapes, types and
            exponents.
    """
    checks.check_features(x)
    checks.check_exponent(exponent)
    check_flag("triangle", triangle)
    if exponent == 1:
        S = covariance(x)
        return upper_triangle(S) if triangle else S
    return _of_features(x, Eigen(Spectral(_power(exponent))), triangle)


def covariance_log(x: Tensor, eps: float = 0.0, *, triangle: bool = False) -> Tensor:
    """`matrix_log(covariance(x), eps)` `[..., C, C]` for features `[..., C, M]` in one step; only shapes are checked.

    Args:
        triangle: give the row-major upper triangle `[..., C (C + 1) / 2]` instead. InputError for other shapes, types and eps.
    """
    checks.check_features(x)
    checks.check_eps(eps)
    check_flag("triangle", triangle)
    return _of_features(x, Eigen(Spectral(Logarithm(float(eps)))), triangle)


def _power(exponent: float) -> ScalarFunction:
    """The root has a second derivative in closed form."""
    return SquareRoot() if exponent == 0.5 else Power(float(exponent))


def _newton_schulz(method: str, num_iter: int, x: Tensor) -> Kernel:
    """The kernel of K steps on the smaller side of features x."""
    function = NewtonSchulz(num_iter)
    stable = function.stable(widened(x).dtype)
    if not stable or (method == "auto" and eigenvalues_are_faster(min(known_shape(x)[-2:]), num_iter, x.device)):
        return Eigen(function)
    return Products(function)


def _of_matrix(S: Tensor, function: MatrixFunction) -> Tensor:
    return _in_full_precision(partial(evaluate, OnMatrix(Eigen(function))), S)


def _of_features(x: Tensor, kernel: Kernel, triangle: bool) -> Tensor:
    strategy = OnFeatures(kernel, gram_is_faster(*known_shape(x)[-2:]), triangle)
    return _in_full_precision(partial(evaluate, strategy), x)


def _in_full_precision(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) without autocast, 16 bits widened to float32; the result is float32 under autocast, else of x's type."""
    dtype = result_dtype(x)
    with full_precision(x):
        return function(widened(x)).to(dtype)
