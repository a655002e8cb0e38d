"""Products with the matrices of a factor that may be diagonal: `[G, n, n]`, or `[G, n]`, the diagonal alone.

A factor of very many outputs (or inputs) is kept as its diagonal; its eigenvectors are then the unit vectors, a diagonal of
ones, and whatever is made of it is diagonal as well. Nothing `[n, n]` is built, and nothing is decomposed.
"""

from torch import Tensor

from secondorder.curvature.relative_damping import weighted_mean_eigenvalue


def is_diagonal(M: Tensor) -> bool:
    """Whether a matrix is given by its diagonal."""
    return M.ndim == 2


def times(M: Tensor, W: Tensor) -> Tensor:
    """M W for W `[G, n, k]`; a new tensor."""
    return M[..., None] * W if is_diagonal(M) else M @ W


def times_right(W: Tensor, M: Tensor) -> Tensor:
    """W M for W `[G, k, n]`; a new tensor."""
    return W * M[:, None] if is_diagonal(M) else W @ M


def rotated(Q: Tensor, W: Tensor, R: Tensor) -> Tensor:
    """Q W R of orthogonal matrices, W `[G, n, k]`; a new tensor. Diagonal ones are those of the unit vectors: the identity."""
    M = W if is_diagonal(Q) else Q @ W
    if is_diagonal(R):
        return M.clone() if M is W else M
    return M @ R


def product(M: Tensor, N: Tensor) -> Tensor:
    """M N of two matrices `[G, n, n]`, or of two diagonals `[G, n]`."""
    return M * N if is_diagonal(M) else M @ N


def transposed(M: Tensor) -> Tensor:
    """M^T of matrices `[G, n, n]`; diagonals `[G, n]` as they are."""
    return M if is_diagonal(M) else M.mT


def mean_eigenvalue(S: Tensor) -> Tensor:
    """tr S / n `[G]` of symmetric matrices."""
    return _diagonal(S).mean(-1)


def weighted_eigenvalue(S: Tensor) -> Tensor:
    """|S|_F^2 / tr S `[G]` of positive semi-definite matrices, 0 for zero ones."""
    return weighted_mean_eigenvalue(S[:, None] if is_diagonal(S) else S, _diagonal(S).sum(-1))


def _diagonal(S: Tensor) -> Tensor:
    return S if is_diagonal(S) else S.diagonal(dim1=-2, dim2=-1)
