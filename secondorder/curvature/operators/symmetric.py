"""Symmetric linear operators: a matrix that is known by what it does to vectors."""

import inspect
import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from secondorder.curvature.resuming.keys import Key, digest
from secondorder.errors import InputError, NonFiniteError, check_number
from secondorder.matrix_power.decomposition import symmetric_eigen, symmetric_eigenvalues
from secondorder.matrix_power.transforms import full_precision

DENSE_LIMIT = 2 * 2**30  # bytes of a dense matrix that nobody asked for in so many words


class SymmetricOperator(ABC):
    """A symmetric matrix `[P, P]` given by its products: ``operator @ V`` for V `[P]` or `[P, K]`.

    Index letters: P rows, K vectors. A subclass gives `_matmat` and, where it has one, a cheaper `dense`, `diagonal`,
    `trace` or `eigenvalues`. All tensors of one operator have its `dtype` and `device`; `size` is P. Products raise InputError
    for another shape. Raises InputError for numbers of fewer than 32 bits.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        if dtype.is_floating_point and torch.finfo(dtype).bits < 32:
            raise InputError(f"an operator of {dtype} is too short for curvature; use .float()")
        self.size = size
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def _matmat(self, V: Tensor) -> Tensor:
        """The product with V `[P, K]`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P), as a matrix has it."""
        return self.size, self.size

    def __matmul__(self, V: Tensor) -> Tensor:
        check_tensor(f"a product with an operator of shape {list(self.shape)}", V, whole=True)
        if V.ndim not in (1, 2) or V.shape[0] != self.size:
            raise InputError(f"an operator of shape {list(self.shape)} cannot be multiplied by shape {list(V.shape)}")
        V = V.to(self.device, self.dtype)
        with full_precision(V):
            return self._matmat(V[:, None])[:, 0] if V.ndim == 1 else self._matmat(V)

    def dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The matrix itself `[P, P]`, exactly symmetric. Raises InputError when it takes more than `limit` bytes."""
        self.check_dense(limit)
        matrix = self @ torch.eye(self.size, dtype=self.dtype, device=self.device)
        return (matrix + matrix.mT) / 2

    def check_dense(self, limit: int) -> None:
        """Raises InputError when the dense matrix `[P, P]` takes more than `limit` bytes."""
        check_bytes(self.size, self.dtype, limit)

    def diagonal(self) -> Tensor:
        """The diagonal `[P]`.

        From the dense matrix where there is no cheaper way: InputError when that takes more than DENSE_LIMIT bytes.
        """
        return self.dense().diagonal().clone()

    def trace(self) -> Tensor:
        """The trace, the sum of the diagonal, a scalar tensor. Raises InputError as `diagonal` does."""
        return self.diagonal().sum()

    def eigenvalues(self, limit: int = DENSE_LIMIT) -> Tensor:
        """All P eigenvalues in ascending order. Raises InputError when they need a dense matrix above `limit` bytes."""
        return symmetric_eigenvalues(self.dense(limit))

    def frobenius_norm(self) -> Tensor:
        """|A|_F, the root of the sum of all squared entries, a scalar tensor.

        From the dense matrix where there is no cheaper way: InputError when that takes more than DENSE_LIMIT bytes.
        """
        return norm_at_any_scale(self.dense())

    def fingerprint(self) -> Key:
        """What the matrix is made from, as a `long_run` notes it.

        That of an operator of this package are its own arguments; of any other a product with one vector.
        """
        key: Key = {"the operator": type(self).__name__, "its size": self.size, "its number format": str(self.dtype)}
        if not type(self).__module__.startswith("secondorder."):
            v = torch.randn(self.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            return key | {"a product with the operator": self @ v.to(self.device, self.dtype)}
        for name in inspect.signature(type(self)).parameters:
            parts = getattr(self, name)
            for number, part in enumerate(parts if isinstance(parts, list) else [parts]):
                of_part = part.fingerprint() if isinstance(part, SymmetricOperator) else {"": digest(part)}
                key |= {f"{name} {number} {item}": value for item, value in of_part.items()}
        return key

    def linear_operator(self) -> LinearOperator:
        """This operator for SciPy: products with NumPy vectors and matrices, computed on this operator's device."""

        def product(v: np.ndarray) -> np.ndarray:
            result: np.ndarray = (self @ torch.as_tensor(np.ascontiguousarray(v))).cpu().numpy()
            return result

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape,
            matvec=lambda v: product(v.reshape(-1)),
            rmatvec=lambda v: product(v.reshape(-1)),
            matmat=product,
            rmatmat=product,
            dtype=dtype,
        )


def decomposed(operator: SymmetricOperator, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[P]`, ascending, and eigenvectors `[P, P]` as columns, of the dense matrix of an operator.

    Raises NonFiniteError, which calls the matrix `what`, for NaN or infinity in it.
    """
    matrix = operator.dense()
    if not torch.isfinite(matrix).all():
        raise NonFiniteError(f"{what} {list(matrix.shape)} contains NaN or infinity")
    values, vectors = symmetric_eigen(matrix)
    return values, vectors


def mirror_(matrix: Tensor) -> Tensor:
    """The matrix `[P, P]`, its lower triangle overwritten in place by the upper: products may round the two differently."""
    return matrix.triu_().add_(matrix.triu(1).mT)


def norm_at_any_scale(x: Tensor) -> Tensor:
    """sqrt(sum x_i^2) of a tensor of any shape, also where the squares vanish or overflow; a scalar tensor."""
    norm = torch.linalg.vector_norm(x)
    limits = torch.finfo(x.dtype)
    if x.numel() == 0 or (limits.tiny / limits.eps) ** 0.5 < float(norm) < math.inf:
        return norm
    largest = x.abs().max()
    return torch.linalg.vector_norm(x / largest) * largest if 0 < float(largest) < math.inf else norm


def check_tensor(what: str, x: Tensor, whole: bool = False) -> None:
    """Raises InputError unless x is a tensor of real numbers, floating-point or, with `whole`, integer too."""
    if not isinstance(x, Tensor):
        raise InputError(f"{what} needs a tensor, got {type(x).__name__}")
    if x.is_complex() or not (whole or x.is_floating_point()):
        raise InputError(f"{what} needs real floating-point numbers, got {x.dtype}; use .double()")
    if whole and x.is_meta:
        raise InputError(f"{what} needs numbers, the device 'meta' holds none")


def check_bytes(size: int, dtype: torch.dtype, limit: int) -> None:
    """Raises InputError when a dense matrix of `size` x `size` numbers of this type takes more than `limit` bytes."""
    check_number("limit", limit, 0, math.inf, "(]", hint="; in bytes")
    needed = size**2 * dtype.itemsize
    if needed > limit:
        raise InputError(
            f"a dense matrix of {size} x {size} takes {needed / 2**30:.1f} GiB, more than the limit of "
            f"{limit / 2**30:.1f} GiB; use products (operator @ v), a smaller block, or pass a larger limit"
        )
