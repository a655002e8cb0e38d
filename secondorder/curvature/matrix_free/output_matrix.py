"""The matrix between J^T and J: M = F F^T over a network's outputs, block diagonal over samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.memory import check_memory
from secondorder.curvature.matrix_free.separable_losses import ALL, LossParts, SeparableLoss
from secondorder.curvature.matrix_free.streamed import StreamedLoss, StreamedNoise
from secondorder.curvature.resuming.keys import Key, digest
from secondorder.errors import MOST, check_seed, check_whole

FISHERS = ("exact", "mc", "empirical")
"""Columns F from the root of the loss's Hessian, from labels that the model draws, or the gradient of the given labels."""
OUTPUTS, OUTPUTS_OF_ANY = 9, 16
"""As many numbers as outputs that a product holds at a time, by measurement: outputs, tangents, what the loss makes of them (of a
loss that is known by its values: its autograd graph), gradients."""


@dataclass(frozen=True)
class OutputMatrix:
    """M of a loss: its Hessian (`exact`), a Monte-Carlo estimate of it (`mc`), or the labels' own gradients (`empirical`)."""

    loss: LossParts
    fisher: str = "exact"
    noise: Tensor | StreamedNoise | None = None

    def product(self, z: Tensor, U: Tensor, rows: slice) -> Tensor:
        """M U for the samples `rows`, whose outputs z and U are `[n, K]`."""
        if self.fisher == "exact":
            return self.loss.part(rows).product(z, U)
        F = self.columns(z, rows)
        return (F @ (F.mT @ U[..., None]))[..., 0]

    def columns(self, z: Tensor, rows: slice, columns: slice = ALL) -> Tensor:
        """F `[n, K, R]` of the samples `rows`, or some of its columns."""
        part = self.loss.part(rows)
        assert isinstance(part, SeparableLoss)
        if self.fisher == "exact":
            return part.root(z, columns)
        if self.fisher == "empirical":
            return part.gradients(z)[..., columns]
        assert self.noise is not None
        drawn = self.noise[rows][..., columns].contiguous()
        F = part.sampled(z, drawn)
        share = drawn.shape[-1] / self.noise.shape[-1]
        return F if share == 1 else F.mul_(share**0.5)

    def count(self, K: int) -> int:
        """R, the columns of F of a sample with K outputs."""
        return {"exact": K, "mc": 0 if self.noise is None else self.noise.shape[-1], "empirical": 1}[self.fisher]

    def output_bytes(self, K: int, itemsize: int) -> int:
        """Bytes of the outputs of one sample and of what a product with M makes of them, columns among that unless `exact`."""
        columns = 0 if self.fisher == "exact" else 2 * self.count(K)
        return ((OUTPUTS if self.factored else OUTPUTS_OF_ANY) + columns) * K * itemsize

    @property
    def noise_bytes(self) -> int:
        """Bytes of the random numbers of `mc`, of the whole batch."""
        return 0 if self.noise is None else self.noise.nbytes

    def fingerprint(self) -> Key:
        """What tells M from others of the same loss, as a long run notes it."""
        return {"fisher": self.fisher, "the random labels": None if self.noise is None else digest(_states(self.noise))}

    @property
    def factored(self) -> bool:
        """Whether columns F are known; otherwise there are products only."""
        return self.loss.factored


def _states(noise: Tensor | StreamedNoise) -> object:
    return noise.states if isinstance(noise, StreamedNoise) else noise


def output_matrix(loss: LossParts, fisher: str, samples: int, seed: int, count: int, available: int) -> OutputMatrix:
    """M for a kind of FISHERS, with `samples` Monte-Carlo columns for `mc`.

    InputError unless `samples` is a whole number from 1 whose random numbers, one at least for each of `count` samples of the
    data, fit into the bytes that are available, and seed one that torch's generators take.
    """
    check_whole("samples", samples, most=MOST)
    if fisher == "mc":
        check_memory(8 * samples * count, available, f"a random number for each of samples={samples}", "use fewer")
    check_seed(seed)
    source = torch.Generator().manual_seed(seed)
    noise: Tensor | StreamedNoise | None = None
    if fisher == "mc" and isinstance(loss, SeparableLoss):
        noise = loss.noise(samples, source)
    elif fisher == "mc" and isinstance(loss, StreamedLoss) and loss.factored:
        noise = StreamedNoise(loss, samples, source)
    return OutputMatrix(loss, fisher, noise)
