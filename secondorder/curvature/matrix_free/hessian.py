"""The Hessian of a network's loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.jacobian import Jacobian, batched
from secondorder.curvature.matrix_free.second_derivatives import check_functions, check_network
from secondorder.curvature.matrix_free.separable_losses import LossParts
from secondorder.curvature.matrix_free.trial import all_finite
from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.resuming.keys import Key, digest
from secondorder.curvature.resuming.sums import Sums
from secondorder.errors import NonFiniteError, failures_of
from secondorder.untouched import same_randomness

COLUMNS, SMALL_NETWORK = 16, 10_000
"""Columns at once, and up to how many parameters: 2 times faster at 828, but 1.7 times slower at 25,000 (CPU, float64)."""


class HessianOperator(SymmetricOperator):
    """d^2 L / dw^2 `[P, P]` for the named parameters, by differentiating the gradient, whose graph is kept."""

    def __init__(self, jacobian: Jacobian, loss: LossParts, names: Sequence[str]) -> None:
        network = jacobian.network
        super().__init__(sum(network.weights[name].numel() for name in names), network.dtype, network.device)
        self.jacobian = jacobian
        self.loss = loss
        self.names = list(names)

    def _matmat(self, V: Tensor) -> Tensor:
        result = torch.zeros_like(V)
        key = lambda: self.fingerprint() | {"the vectors of the product": digest(V)}  # noqa: E731
        with same_randomness(), Sums("product", key, {"result": result}, vectors=V.shape[1]) as sums:
            if not self.jacobian.twice_differentiable and not sums.finished:
                with failures_of("a second derivative of this network"):
                    self.jacobian.check_backward()
                    check_network(self.jacobian)
                self.jacobian.twice_differentiable = True
            for part in sums.parts(self.jacobian):
                self.jacobian.check_part(part)
                check_functions(self.jacobian, part)
                for columns in sums.units(self._groups(V.shape[1])):
                    tangents = batched(V[:, columns], self.jacobian.network, self.names)
                    result[:, columns] += torch.cat(
                        [H.reshape(len(H), -1) for H in part.hessian_products(self.loss, tangents)], 1
                    ).mT
        if all_finite(V) and not all_finite(result):
            raise NonFiniteError(
                "a product with the Hessian is not finite: a second derivative of the network or loss is infinite or none there "
                "(a square root or a norm at 0), or the numbers leave their format"
            )
        return result

    def fingerprint(self) -> Key:
        """What the matrix is made from, as a long run notes it."""
        return {**self.jacobian.fingerprint(self.loss), "the parameters of the block": ", ".join(self.names)}

    def _groups(self, count: int) -> list[slice]:
        """Columns that are multiplied at once: in small networks the time goes into the number of calls."""
        network = self.jacobian.network
        parameters = sum(w.numel() for w in (*network.weights.values(), *network.constants.values()))
        size = COLUMNS if parameters <= SMALL_NETWORK else 1
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]
