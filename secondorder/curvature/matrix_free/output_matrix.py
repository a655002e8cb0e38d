"""The matrix between J^T and J: M = F F^T over a network's outputs, block diagonal over samples."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from secondorder.curvature.matrix_free.loss_curvature import LossCurvature, SeparableLoss
from secondorder.errors import check_seed, check_whole

FISHERS = ("exact", "mc", "empirical")
"""Columns F from the root of the loss's Hessian, from labels that the model draws, or the gradient of the given labels."""


@dataclass(frozen=True)
class OutputMatrix:
    """M of a loss: its Hessian (`exact`), a Monte-Carlo estimate of it (`mc`), or the labels' own gradients (`empirical`)."""

    loss: LossCurvature
    fisher: str = "exact"
    noise: Tensor | None = None

    def product(self, z: Tensor, U: Tensor, rows: slice) -> Tensor:
        """M U for the samples `rows`, whose outputs z and U are `[n, K]`."""
        if self.fisher == "exact":
            return self.loss.part(rows).product(z, U)
        F = self.columns(z, rows)
        return (F @ (F.mT @ U[..., None]))[..., 0]

    def columns(self, z: Tensor, rows: slice) -> Tensor:
        """F `[n, K, R]` of the samples `rows`."""
        part = self.loss.part(rows)
        assert isinstance(part, SeparableLoss)
        columns: dict[str, Callable[[], Tensor]] = {
            "exact": lambda: part.root(z),
            "mc": lambda: part.sampled(z, self.noise[rows]),  # type: ignore[index]
            "empirical": lambda: part.gradients(z),
        }
        return columns[self.fisher]()

    def column_bytes(self, K: int, itemsize: int) -> int:
        """Bytes of the columns of one sample, and of what they are made from."""
        counts = {"exact": K, "mc": 0 if self.noise is None else self.noise.shape[-1], "empirical": 1}
        return 2 * K * counts[self.fisher] * itemsize

    @property
    def factored(self) -> bool:
        """Whether columns F are known; otherwise there are products only."""
        return isinstance(self.loss, SeparableLoss)


def output_matrix(loss: LossCurvature, fisher: str, samples: int, seed: int) -> OutputMatrix:
    """M for a kind of FISHERS, with `samples` Monte-Carlo columns for `mc`.

    InputError unless samples is a whole number from 1, and seed one that torch's generators take.
    """
    check_whole("samples", samples)
    check_seed(seed)
    noise = loss.noise(samples, seed) if fisher == "mc" and isinstance(loss, SeparableLoss) else None
    return OutputMatrix(loss, fisher, noise)
