"""Layers that replace a covariance matrix S `[..., C, C]` by a function of it, the normalisation of covariance pooling.

Each also has `of_features`: the upper triangle of the same function of the covariance of features `[N, C, M]`, in one fused
step. Values are not checked, so that no layer waits for the device; `secondorder.matrix_power` has functions that do. A sample
that is not finite gets NaN, and the others what they get without it.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from secondorder.matrix_power import (
    checks,
    covariance_log,
    covariance_power,
    covariance_sqrt,
    matrix_log,
    matrix_power,
    matrix_sqrt,
)
from secondorder.matrix_power.transforms import known_shape
from secondorder.pooling.layout import check_numbers


class MatrixFunction(nn.Module, ABC):
    """A spectral function of symmetric PSD matrices: `[..., C, C] -> [..., C, C]`."""

    @abstractmethod
    def forward(self, S: Tensor) -> Tensor:
        """f(S) `[..., C, C]` of symmetric PSD matrices S `[..., C, C]`. Raises InputError for other shapes and types."""

    @abstractmethod
    def of_features(self, x: Tensor) -> Tensor:
        """Upper triangle `[N, C (C + 1) / 2]` of the function of the covariance of features `[N, C, M]`."""


class MatrixSquareRoot(MatrixFunction):
    """S^(1/2) `[..., C, C]`: K = `num_iter` Newton-Schulz steps (iSQRT-COV, Li et al. 2018), or exact with method "eigh".

    Args:
        method: "auto", "newton_schulz" (the same polynomial) or "eigh".
        num_iter: K, the number of steps; of no account for "eigh".

    Raises:
        InputError: for an unknown method or a number of steps below 1.
    """

    def __init__(self, method: str = "auto", num_iter: int = 5) -> None:
        super().__init__()
        checks.check_method(method)
        checks.check_iterations(num_iter)
        self.method = method
        self.num_iter = num_iter

    def forward(self, S: Tensor) -> Tensor:
        """S^(1/2) `[..., C, C]` of symmetric PSD matrices S, by the layer's method.

        Raises InputError for other shapes and types.
        """
        return root_of(S, self.method, self.num_iter)

    def of_features(self, x: Tensor) -> Tensor:
        """Upper triangle `[N, C (C + 1) / 2]` of the root of the covariance of features x `[N, C, M]`."""
        return covariance_sqrt(x, self.method, self.num_iter, triangle=True)

    def extra_repr(self) -> str:
        """The options that change the result, as text."""
        return "exact" if self.method == "eigh" else f"method={self.method}, num_iter={self.num_iter}"


class MatrixPower(MatrixFunction):
    """S^p `[..., C, C]` on the range of S (MPN-COV, Li et al. 2017, uses p = 1/2).

    Raises InputError for an exponent that is no number, or above `checks.MOST_EXPONENT` in size.
    """

    def __init__(self, exponent: float = 0.5) -> None:
        super().__init__()
        checks.check_exponent(exponent)
        self.exponent = exponent

    def forward(self, S: Tensor) -> Tensor:
        """S^p `[..., C, C]` of symmetric PSD matrices S. Raises InputError for other shapes and types."""
        return power_of(S, self.exponent)

    def of_features(self, x: Tensor) -> Tensor:
        """Upper triangle `[N, C (C + 1) / 2]` of the power of the covariance of features x `[N, C, M]`."""
        return covariance_power(x, self.exponent, triangle=True)

    def extra_repr(self) -> str:
        """The exponent of the power, as text."""
        return f"exponent={self.exponent}"


class MatrixLogarithm(MatrixFunction):
    """log(S + eps I) - log(eps) I for eps > 0; log(S) on the range of S, and zero outside it, for eps = 0.

    The log-Euclidean map of DeepO2P (Ionescu et al. 2015), less a constant, which a classifier's bias absorbs: in this
    form null directions give zero and the layer is smooth there. With eps = 0, or an eps below the rounding level
    C eps l_max of the number format, an eigenvalue that reaches that level makes the value jump. Raises InputError for a
    negative or non-finite eps.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        checks.check_eps(eps)
        self.eps = eps

    def forward(self, S: Tensor) -> Tensor:
        """log(S + eps I) - log(eps) I `[..., C, C]` of symmetric PSD matrices S. Raises InputError for other shapes and types."""
        return logarithm_of(S, self.eps)

    def of_features(self, x: Tensor) -> Tensor:
        """Upper triangle `[N, C (C + 1) / 2]` of the logarithm of the covariance of features x `[N, C, M]`."""
        return covariance_log(x, self.eps, triangle=True)

    def extra_repr(self) -> str:
        """eps, the shift of the eigenvalues, as text."""
        return f"eps={self.eps}"


# What the layers compute, as functions of tensors and numbers: each is one node of a graph that torch.fx traces.


def root_of(S: Tensor, method: str, num_iter: int) -> Tensor:
    """S^(1/2) `[..., C, C]` by a method of `matrix_sqrt`, values not checked; an empty batch as it is."""
    return S.clone() if nothing(S) else matrix_sqrt(S, method, num_iter, validate=False)


def power_of(S: Tensor, exponent: float) -> Tensor:
    """S^p `[..., C, C]`, values not checked; an empty batch as it is."""
    return S.clone() if nothing(S) else matrix_power(S, exponent, validate=False)


def logarithm_of(S: Tensor, eps: float) -> Tensor:
    """log(S + eps I) - log(eps) I `[..., C, C]`, values not checked; an empty batch as it is."""
    return S.clone() if nothing(S) else matrix_log(S, eps, validate=False)


def nothing(S: Tensor) -> bool:
    """Whether S `[N, C, C]` is of an empty batch, which functions leave as it is. Raises InputError for other numbers."""
    check_numbers(S, "a matrix function")
    shape = known_shape(S)
    return len(shape) == 3 and shape[0] == 0 and shape[-1] == shape[-2] > 0


for _function in ("root_of", "power_of", "logarithm_of"):
    torch.fx.wrap(_function)
