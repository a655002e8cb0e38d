"""What a pooling head computes of the features: a spectral function of the covariance, or a function of the mean."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.errors import check_known
from secondorder.matrix_power.decomposition import symmetric_eigenvalues
from secondorder.matrix_power.scalar_functions import Logarithm, Power, SquareRoot
from secondorder.matrix_power.spectrum import MatrixFunction, NewtonSchulz, Spectral
from secondorder.pooling import PoolingHead, RandomLift, pooling_head


@dataclass(frozen=True)
class MeanFunction:
    """y = h(z) of the mean z of M positions: the identity without a lift (GAP), else the random lift.

    X -> z has orthogonal rows of the length 1 / sqrt(M), so that dy / dX has the singular values of the Jacobian J of h, divided
    by sqrt(M). For the lift y = (z, s u_i u_j), u = Q z, a direction v with w = Q v has

        |J v|^2 = |v|^2 + s^2 sum_{i<j} (w_i u_j + u_i w_j)^2 = |v|^2 + s^2 (|u|^2 |w|^2 + (u . w)^2 - 2 sum_i u_i^2 w_i^2),

    so that the squares of the singular values of J, all at least 1, are the eigenvalues of

        J^T J = I + s^2 Q^T K Q,    K = |u|^2 I + u u^T - 2 diag(u_i^2).
    """

    lift: RandomLift | None = None

    def singular_values(self, z: Tensor, M: int) -> Tensor:
        """Singular values `[N, C]`, descending, of dy / dX at means z `[N, C]` over M positions, of the C directions of z."""
        if self.lift is None:
            return torch.full_like(z, M**-0.5)
        Q = self.lift.rotation.to(z)
        u = z @ Q.mT
        length = torch.linalg.vector_norm(u, dim=-1, keepdim=True)  # [N, 1]
        u = u / length.clamp_min(
            torch.finfo(u.dtype).tiny
        )  # of unit length: a product beyond float64 has no eigenvalues
        K = u[:, :, None] * u[:, None, :] + (1 - 2 * u.square()).diag_embed()
        eigenvalues = symmetric_eigenvalues(Q.mT @ K @ Q).clamp_min(0)  # K is a sum of squares
        return ((1 + (self.lift.scale * length).square() * eigenvalues) / M).sqrt().flip(-1)


HEAD_FUNCTIONS: dict[str, Callable[[Any], MatrixFunction | MeanFunction]] = {
    "gap": lambda layers: MeanFunction(),
    "covariance": lambda layers: Spectral(Power(1.0)),
    "gcp": lambda layers: _root(layers[1].method, layers[1].num_iter),
    "gcp_exact": lambda layers: Spectral(SquareRoot()),
    "gcp_power": lambda layers: _power(layers[1].exponent),
    "gcp_log": lambda layers: Spectral(Logarithm(float(layers[1].eps))),
    "gap_lifted": lambda layers: MeanFunction(layers[-1]),
}
"""Pooling -> f of Z = f(S), or the function of the mean, from the head's layers, which hold the options."""


def _root(method: str, num_iter: int) -> MatrixFunction:
    return Spectral(SquareRoot()) if method == "eigh" else NewtonSchulz(num_iter)


def _power(exponent: float) -> MatrixFunction:
    return Spectral(SquareRoot() if exponent == 0.5 else Power(float(exponent)))


def head_and_function(
    pooling: str, channels: int, options: Mapping[str, Any]
) -> tuple[PoolingHead, MatrixFunction | MeanFunction]:
    """The head of a key of HEAD_FUNCTIONS and its function. Raises InputError for other poolings and for unknown options.

    Args:
        pooling: key of HEAD_FUNCTIONS.
        channels: channels C of the features.
        options: those of the pooling, e.g. `num_iter` of "gcp".
    """
    check_known("pooling with a closed form", pooling, HEAD_FUNCTIONS)
    head = pooling_head(pooling, channels, **options)
    layers: nn.Sequential = head.layers
    return head, HEAD_FUNCTIONS[pooling](layers)
