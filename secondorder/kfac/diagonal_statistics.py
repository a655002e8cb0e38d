"""Sums of one step and averages over steps of the squared gradients of single samples: S = mean_n (sum_t g a^T)^2.

This is the exact diagonal of the layer's block of the Fisher matrix, where K-FAC has the Kronecker product of two factors.

Index letters: V backpropagated vectors a sample, N samples, T positions, G groups, D inputs, O outputs.
"""

from collections.abc import Sequence

from torch import Tensor

from secondorder.curvature.kronecker.squares import squared_sample_gradients
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.statistics import LayerStatistics


class DiagonalStatistics(LayerStatistics):
    """S `[G, O, D]` of one layer; it has neither A nor B."""

    averaged = ("S",)

    @property
    def S(self) -> Tensor | None:
        """The averaged squares; None before the first step."""
        return self._averaged("S")

    def add_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Count the samples of one forward pass; the inputs themselves enter with the gradients."""
        xs = [self._batched(x) for x in inputs]
        self._count(len(xs[0]), len(xs[0]), 0)

    def add_gradients(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the gradients `[V, N, *out]` at the outputs of all uses in one forward, with their inputs."""
        kind = self.layer.kind
        gs = [kind.batched(g.to(self.layer.dtype), leading=1) for g in gradients]
        xs = [self._batched(x) for x in inputs]
        self._stage("S", squared_sample_gradients(kind, xs, gs, self.layer.bias is not None))

    def commit(self, ema_decay: float, gradient_scale: float) -> None:
        """Take the staged squares, times gradient_scale, into the average."""
        if self.staged_samples and "S" in self._staged:
            self._average("S", self._staged["S"].mul_(gradient_scale), ema_decay)
        if self.staged_samples:
            self.samples, self.work = self.staged_samples, self.counts.work
        self.discard()


def layer_statistics(layer: KroneckerLayer) -> LayerStatistics:
    """Empty statistics of a layer, of the kind that its approximation needs."""
    return DiagonalStatistics(layer) if layer.diagonal else LayerStatistics(layer)
