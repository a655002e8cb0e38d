"""The backward pass of GCP, G = dL/dZ -> dL/dX for Z = S^(1/2), exact and as approximated, as linear operators.

Per image, with Xc = sqrt(M) U diag(r) V^T (`whitening`), Q = U V^T, G symmetric, G~ = U^T G U, S = U diag(l) U^T:

    exact              (1 / sqrt M) U [w_ji G~_ij] V^T,    w_ji = 2 r_j / (r_i + r_j)      2 D Xc / M, S^(1/2) D + D S^(1/2) = G
    trimmed            (1 / M) G L^(-1/2) Xc,    L = diag(l), descending                   Wang et al. 2020, taken literally
    trimmed_rotated    (1 / M) G S^(-1/2) Xc = (1 / sqrt M) G Q                            exact with w = 1
    unpreconditioned   (2 / M) G Xc                                                        that of plain covariance pooling

Wang et al. ("What Deep CNNs Benefit from Global Covariance Pooling", CVPR 2020) trim the backward pass through the
eigen-decomposition to F^-1 = 2 J X (2 K^T o L^(1/2) + 1/2 L^(-1/2)). K has a zero diagonal and L^(1/2) is diagonal, so
their product is zero and F^-1 = J X L^(-1/2), in which the eigenvectors are lost: eigenvalue c meets channel c.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError, check_known
from secondorder.matrix_power import upper_triangle
from secondorder.matrix_power.transforms import symmetric
from secondorder.matrix_power.upper_triangle import twice_symmetric
from secondorder.preconditioning.features import svec_scale
from secondorder.preconditioning.whitening import Polar, polar


class Form(Protocol):
    """A linear map from symmetric G `[N, C, C]` to Y `[N, C, M]`."""

    def apply(self, G: Tensor) -> Tensor:
        """Y `[N, C, M]`, the linear map of symmetric G `[N, C, C]`."""

    def adjoint(self, Y: Tensor) -> Tensor:
        """A matrix `[N, C, C]` whose symmetric part is the transposed map of Y `[N, C, M]`."""


@dataclass(frozen=True)
class Product(Form):
    """G -> G A for a matrix A `[N, C, M]`."""

    factor: Tensor

    def apply(self, G: Tensor) -> Tensor:
        """G A `[N, C, M]` of symmetric G `[N, C, C]`."""
        return G @ self.factor

    def adjoint(self, Y: Tensor) -> Tensor:
        """Y A^T `[N, C, C]` of Y `[N, C, M]`."""
        return Y @ self.factor.mT


@dataclass(frozen=True)
class Lyapunov(Form):
    """The exact pass. Rows i outside U are null, w_ji = 2, so Y = (2 G U + U [(w_ji - 2) G~_ij]) V^T / sqrt(M)."""

    parts: Polar

    def _weights(self) -> Tensor:
        """The weights w_ji - 2 = -2 r_i / (r_i + r_j), and zero for null j, where V is zero."""
        r = self.parts.root
        total = r[:, :, None] + r[:, None, :]
        return torch.where(total > 0, -2 * r[:, :, None] / total, 0)

    def apply(self, G: Tensor) -> Tensor:
        """Y = (2 G U + U [(w_ji - 2) G~_ij]) V^T / sqrt(M) `[N, C, M]` of symmetric G `[N, C, C]`, by products with U only."""
        U, _, V = self.parts
        GU = G @ U
        return (2 * GU + U @ (self._weights() * (U.mT @ GU))) @ V.mT / V.shape[1] ** 0.5

    def adjoint(self, Y: Tensor) -> Tensor:
        """(2 B + U [(w_ji - 2) (U^T B)_ij]) U^T `[N, C, C]` of Y `[N, C, M]`, with B = Y V / sqrt(M)."""
        U, _, V = self.parts
        B = Y @ V / V.shape[1] ** 0.5
        return (2 * B + U @ (self._weights() * (U.mT @ B))) @ U.mT


def _trimmed(parts: Polar) -> Form:
    """A = L^(-1/2) Xc / M; channels beyond the number of eigenvalues meet null ones."""
    U, r, V = parts
    inverse = torch.nn.functional.pad(parts.inverse_root, (0, U.shape[1] - r.shape[-1]))
    return Product(inverse[..., None] * ((U * r[:, None, :]) @ V.mT) / V.shape[1] ** 0.5)


def _trimmed_rotated(parts: Polar) -> Form:
    """A = Q / sqrt(M)."""
    return Product(parts.whitened / parts.V.shape[1] ** 0.5)


def _unpreconditioned(parts: Polar) -> Form:
    """A = 2 Xc / M."""
    U, r, V = parts
    return Product(2 * (U * r[:, None, :]) @ V.mT / V.shape[1] ** 0.5)


FORMS: dict[str, Callable[[Polar], Form]] = {
    "exact": Lyapunov,
    "trimmed": _trimmed,
    "trimmed_rotated": _trimmed_rotated,
    "unpreconditioned": _unpreconditioned,
}
"""Name -> the linear map for decomposed features."""


@dataclass(frozen=True)
class BackwardOperator:
    """G -> dL/dX of N images at once, never formed as a matrix.

    `matvec` and `rmatvec` are adjoint for the Frobenius inner products of symmetric G `[N, C, C]` and of features
    `[N, C, H, W]`. Flattened for SciPy, G is in svec coordinates (the upper triangle with sqrt(2) off the diagonal), whose
    Euclidean inner product is Frobenius's: there `rmatvec` is the transpose.
    """

    form: Form
    features_shape: tuple[int, int, int, int]
    like: Tensor
    """A tensor of the operator's type and device."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N C H W, N C (C + 1) / 2), that of the matrix in svec coordinates."""
        N, C, H, W = self.features_shape
        return N * C * H * W, N * C * (C + 1) // 2

    def matvec(self, G: Tensor) -> Tensor:
        """dL/dX `[N, C, H, W]` of G = dL/dZ: matrices `[N, C, C]`, or the gradient `[N, C (C + 1) / 2]` of the upper triangle.

        A matrix counts by its symmetric part. Raises InputError for another shape or type, NonFiniteError for a G that is not
        finite.
        """
        N, C = self.features_shape[:2]
        if not isinstance(G, Tensor) or not G.is_floating_point() or G.is_meta:
            kind = type(G).__name__ if not isinstance(G, Tensor) else "a meta tensor" if G.is_meta else G.dtype
            raise InputError(f"needs dL/dZ of real floating-point numbers, got {kind}; convert with .float()")
        if G.shape not in ((N, C, C), (N, C * (C + 1) // 2)):
            raise InputError(
                f"needs dL/dZ [{N}, {C}, {C}] or, of the upper triangle, [{N}, {C * (C + 1) // 2}], got {list(G.shape)}"
            )
        if not G.isfinite().all():
            raise NonFiniteError(f"needs a finite dL/dZ, got {int((~G.isfinite()).sum())} non-finite entries")
        G = G.detach().to(self.like)
        S = symmetric(G) if G.ndim == 3 else twice_symmetric(G) / 2
        return self.form.apply(S).reshape(self.features_shape)

    def rmatvec(self, V: Tensor) -> Tensor:
        """The adjoint: symmetric matrices `[N, C, C]` of V `[N, C, H, W]`. Raises InputError for another shape."""
        if V.shape != self.features_shape:
            raise InputError(f"needs features {list(self.features_shape)}, got {list(V.shape)}")
        return symmetric(self.form.adjoint(V.detach().to(self.like).flatten(2)))

    def linear_operator(self) -> LinearOperator:
        """The operator for SciPy on NumPy vectors: svec coordinates of all images in, features out, both flattened."""
        N, C = self.features_shape[:2]
        scale = svec_scale(C, self.like)

        def product(v: np.ndarray) -> np.ndarray:
            triangle = scale * torch.as_tensor(np.ascontiguousarray(v)).to(self.like).reshape(N, -1)
            result: np.ndarray = self.matvec(triangle).flatten().cpu().numpy()
            return result

        def transposed(v: np.ndarray) -> np.ndarray:
            V = torch.as_tensor(np.ascontiguousarray(v)).to(self.like).reshape(self.features_shape)
            result: np.ndarray = (scale * upper_triangle(self.rmatvec(V))).flatten().cpu().numpy()
            return result

        dtype = torch.empty(0, dtype=self.like.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=transposed, dtype=dtype)


@torch.no_grad()
def backward_operator(features: Tensor, form: str = "exact") -> BackwardOperator:
    """The backward pass G = dL/dZ -> dL/dX of GCP at features, as an operator. Computed in their precision, 16 bits in float32.

    Null directions of the covariance are left out as the head with the exact root leaves them out; for constant features
    the result is zero.

    Args:
        features: `[N, C, H, W]` of at least 2 positions.
        form: key of FORMS: "exact", "trimmed" (Wang et al. 2020, taken literally), "trimmed_rotated" or "unpreconditioned".

    Raises:
        InputError: for an unknown form, another shape, and fewer than 2 positions.
        NonFiniteError: for features that are not finite.
    """
    check_known("form", form, FORMS)
    parts = polar(features)
    N, C, H, W = features.shape
    return BackwardOperator(FORMS[form](parts), (N, C, H, W), parts.root)


@torch.no_grad()
def gcp_backward(features: Tensor, grad: Tensor, form: str = "exact") -> Tensor:
    """dL/dX `[N, C, H, W]` of GCP, Z = S^(1/2), at features of this shape, exact or in an approximate form.

    Args:
        features: `[N, C, H, W]` of at least 2 positions.
        grad: dL/dZ, symmetric matrices `[N, C, C]`, or the gradient `[N, C (C + 1) / 2]` of the upper triangle that the head
            gives.
        form: key of FORMS: "exact" equals the gradient of the head "gcp_exact"; "trimmed_rotated" is "exact" with all weights
            w = 1; "trimmed" is Wang et al. (2020), taken literally; "unpreconditioned" that of plain covariance pooling.

    Raises:
        InputError: as `backward_operator`, and for another shape or type of `grad`.
        NonFiniteError: for features or `grad` that are not finite.
    """
    return backward_operator(features, form).matvec(grad)
