"""Losses with several labels for each sample: a class at each position (segmentation, tokens), or a yes or no for each output.

Outputs z `[N, K]`, flattened. The labels of a sample are independent given z, and M_n is block diagonal over them.

    cross-entropy at       outputs [N, C, D] of D positions, K = C D; at each of the N D that of `CrossEntropy` over C classes,
    positions              with the distributions q and their sums c of all positions

    binary                 l_nk = a_nk s(-z_nk) + b_nk s(z_nk),    s(z) = log(1 + e^z),    p = 1 / (1 + e^-z)
    cross-entropy          M_n = diag h_n,    h = (a + b) p (1 - p),    F_n = diag sqrt(h_n),    dl/dz = (a + b) p - a

with a = w pw y and b = w (1 - y) for targets y on [0, 1], weights w and pw (of positive labels), divided by the mean's divisor.
Columns of drawn labels, independent of one another, and that of the given ones (the empirical Fisher) stack those of the single
labels; of a binary one sqrt(a + b) (p - y) with y drawn from p, and ((a + b) p - a) / sqrt(a + b).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from secondorder.curvature.matrix_free.separable_losses import ALL, CrossEntropy, SeparableLoss, uniform


@dataclass(frozen=True)
class CrossEntropyAtPositions(SeparableLoss):
    """The cross-entropy of outputs `[N, C, D]`; `rows` is that of the `[N D, C]` single positions, sample by sample."""

    rows: CrossEntropy
    positions: int

    def value(self, z: Tensor) -> Tensor:
        """The sum of the cross-entropies at all N D positions of outputs z `[N, C D]`, a differentiable scalar."""
        return self.rows.value(self._rows_of(z))

    def product(self, z: Tensor, U: Tensor) -> Tensor:
        """M U `[N, C D]`: at each position c (p * u - p (p . u)), the product of its own cross-entropy over C classes."""
        return self._outputs_of(self.rows.product(self._rows_of(z), self._rows_of(U)))

    def part(self, rows: slice) -> "CrossEntropyAtPositions":
        """The cross-entropy of some samples at all their positions, with the normalisation of the whole batch."""
        first, last, _ = rows.indices(len(self.rows.scale) // self.positions)
        return replace(self, rows=self.rows.part(slice(first * self.positions, last * self.positions)))

    def root(self, z: Tensor, columns: slice = ALL) -> Tensor:
        """F `[N, C D, R]`, its column (k, d) being sqrt(c_d p_kd) (e_k - p_d) at position d and zero elsewhere."""
        p = z.unflatten(1, (-1, self.positions)).softmax(1)  # [N, C, D]
        place = torch.arange(*columns.indices(z.shape[1]), device=z.device)
        k, d, r = place // self.positions, place % self.positions, torch.arange(len(place), device=z.device)
        own = -p[:, :, d]  # [N, C, R]
        own[:, k, r] += 1
        own *= (self.rows.scale.view(len(z), -1)[:, d] * p[:, k, d]).sqrt()[:, None]
        F = z.new_zeros(*p.shape, len(place))
        F[:, :, d, r] = own
        return F.flatten(1, 2)

    @property
    def mean_divisor(self) -> float:
        """What a mean is divided by: the summed weights of the labels that count, at all positions."""
        return self.rows.mean_divisor

    def noise(self, samples: int, source: torch.Generator) -> Tensor:
        """Uniform numbers `[N, D, S]`, S = `samples`, by which `sampled` draws a class at each position."""
        return self.rows.noise(samples, source).unflatten(0, (-1, self.positions))

    def sampled(self, z: Tensor, noise: Tensor) -> Tensor:
        """F `[N, C D, S]`, its column s being sqrt(c / S) (p - e_y) at each position, with a label y drawn there from p."""
        return self._outputs_of(self.rows.sampled(self._rows_of(z), noise.flatten(0, 1)))

    def gradients(self, z: Tensor) -> Tensor:
        """F `[N, C D, 1]`: at each position sqrt(c) (p - q / c), the gradient of its given label."""
        return self._outputs_of(self.rows.gradients(self._rows_of(z)))

    def _rows_of(self, z: Tensor) -> Tensor:
        """`[N, C D]` as `[N D, C]`."""
        return z.unflatten(1, (-1, self.positions)).transpose(1, 2).flatten(0, 1)

    def _outputs_of(self, rows: Tensor) -> Tensor:
        """`[N D, C, ...]` as `[N, C D, ...]`."""
        return rows.unflatten(0, (-1, self.positions)).transpose(1, 2).flatten(1, 2)


@dataclass(frozen=True)
class BinaryCrossEntropy(SeparableLoss):
    """sum_nk a_nk s(-z_nk) + b_nk s(z_nk) for a, b `[N, K]` of at least 0."""

    a: Tensor
    b: Tensor

    def value(self, z: Tensor) -> Tensor:
        """sum_nk a_nk s(-z_nk) + b_nk s(z_nk) of logits z `[N, K]`, s(z) = log(1 + e^z); a differentiable scalar."""
        return (self.a * F.softplus(-z) + self.b * F.softplus(z)).sum()

    def product(self, z: Tensor, U: Tensor) -> Tensor:
        """M U = h * U for U `[N, K]`, with h = (a + b) p (1 - p) and p the sigmoid of the logits z."""
        return self._curvature(z) * U

    def part(self, rows: slice) -> "BinaryCrossEntropy":
        """The binary cross-entropy of some samples, with the normalisation of the whole batch."""
        return BinaryCrossEntropy(self.a[rows], self.b[rows])

    def root(self, z: Tensor, columns: slice = ALL) -> Tensor:
        """F `[N, K, R]`, its column k being sqrt(h_k) e_k, h = (a + b) p (1 - p): all K columns, or those of a slice."""
        first, last, _ = columns.indices(z.shape[1])
        root = z.new_zeros(*z.shape, last - first)
        root.diagonal(-first, 1, 2).copy_(self._curvature(z)[:, columns].sqrt())
        return root

    @property
    def mean_divisor(self) -> float:
        """What a mean is divided by: N K, the number of targets."""
        return self.a.numel()

    def noise(self, samples: int, source: torch.Generator) -> Tensor:
        """Uniform numbers `[N, K, S]`, S = `samples`, by which `sampled` draws a label for each output."""
        return uniform((*self.a.shape, samples), source, self.a.device)

    def sampled(self, z: Tensor, noise: Tensor) -> Tensor:
        """F `[N, K, S]`, its column s being sqrt((a + b) / S) (p - y), with y = 1 where the uniform number is below p, else 0."""
        p = z.sigmoid()[..., None]
        return (p - (noise < p).to(z)) * ((self.a + self.b)[..., None] / noise.shape[-1]).sqrt()

    def gradients(self, z: Tensor) -> Tensor:
        """F `[N, K, 1]` = ((a + b) p - a) / sqrt(a + b), the given label's gradient; zero for a label that does not count."""
        c = self.a + self.b
        return ((c * z.sigmoid() - self.a) / torch.where(c > 0, c, 1).sqrt())[..., None]

    def _curvature(self, z: Tensor) -> Tensor:
        """H = (a + b) p (1 - p)."""
        return (self.a + self.b) * z.sigmoid() * (-z).sigmoid()
