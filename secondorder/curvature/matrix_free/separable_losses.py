"""Losses that are sums over samples with closed forms: value, gradient and Hessian M at the outputs, columns F with F F^T = M.

Index letters: N samples, K outputs (classes) of a sample, R columns of F, S Monte-Carlo samples, V vectors. Outputs z
`[N, K]`. M is block diagonal over samples, M_n = F_n F_n^T with F `[N, K, R]`; the loss's own normalisation is inside.

    cross-entropy    l_n = -sum_k q_nk log p_nk,  p = softmax(z)    M_n = c_n (diag p - p p^T)    F_nk = sqrt(c_n p_k) (e_k - p)
    squared error    l_n = c |z_n - y_n|^2                          M_n = 2 c I                  F_n = sqrt(2 c) I

with q the (weighted, smoothed) distribution of the label divided by the mean's divisor, and c_n = sum_k q_nk. A column
drawn from the model's own distribution has the same F F^T in expectation: sqrt(c_n) (p - e_y) with y ~ p, and sqrt(2 c) g
with g ~ N(0, I). Two more, of several labels for each sample, are in `several_labels`.

The empirical Fisher has the given label in place of the drawn one. The loss is a weighted sum of the samples' own losses,
L = sum_n s_n l_n with -log p(y_n | z_n) = l_n up to a constant, and its one column is sqrt(s_n) dl_n/dz_n = dL/dz_n / sqrt(s_n):

    cross-entropy    l_n = -log p_y            s_n = c_n: 1/N for a mean, 1 for a sum, in proportion to class weights
    squared error    l_n = the own mean or     s_n = 1/N for a mean, 1 for a sum; y ~ N(z, sigma^2 I), sigma^2 = K/2 and 1/2
                     sum over K outputs

so that labels which are drawn from p(y | z) at fixed s_n give M_n in expectation. K-FAC's `fisher="empirical"` has the same own
losses, but takes class weights, which it does not know, as part of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secondorder.accelerator import widest
from secondorder.curvature.matrix_free.class_labels import ClassLabels

DRAWN_AT_A_TIME, NORMAL_AT_A_TIME = 2**21, 2**17
"""Numbers in float64 that labels are drawn with at a time: probabilities that are added up (of a language model's tokens they are
as large as its logits), and normal numbers."""

SMALLEST = 2.0**-54
"""In place of a uniform number that is 0, which has no normal one."""
ALL = slice(None)


class LossParts(ABC):
    """A loss at fixed labels, known part by part."""

    separable = True
    """Whether the loss is a sum over samples with known summands, so that it can be computed part by part."""
    factored = False
    """Whether columns F are known."""

    @property
    def settings(self) -> object:
        """What tells this loss, its labels and its normalisation from others."""
        return self

    @abstractmethod
    def part(self, rows: slice) -> "LossCurvature":
        """The loss of some samples of the batch, with the normalisation of the whole batch."""


class LossCurvature(LossParts):
    """A loss at fixed labels as a function of the outputs z `[N, K]`."""

    @abstractmethod
    def value(self, z: Tensor) -> Tensor:
        """The reduced loss of outputs z `[N, K]`, a differentiable scalar."""

    @abstractmethod
    def product(self, z: Tensor, U: Tensor) -> Tensor:
        """M U `[N, K]` for U `[N, K]`, with M the Hessian of the reduced loss at outputs z `[N, K]`."""


@dataclass(frozen=True)
class Totals:
    """How many samples a whole data set has, and what a mean over it is divided by, for a loss of one of its batches."""

    samples: int
    divisor: float


class SeparableLoss(LossCurvature):
    """A loss with closed forms: a sum over samples of the negative log-likelihood of a distribution."""

    factored = True

    @property
    @abstractmethod
    def mean_divisor(self) -> float:
        """What a mean of the losses of these samples would be divided by: numbers, or weights of the labels that count."""

    @abstractmethod
    def part(self, rows: slice) -> "SeparableLoss":
        """The loss of some samples of the batch, with the normalisation of the whole batch."""

    @abstractmethod
    def root(self, z: Tensor, columns: slice = ALL) -> Tensor:
        """F `[N, K, K]` with F_n F_n^T = M_n at outputs z `[N, K]`, or the R columns `[N, K, R]` of a slice."""

    @abstractmethod
    def noise(self, samples: int, source: torch.Generator) -> Tensor:
        """Random numbers for S = `samples` columns of `sampled`, the same on every device and for any parts of the batch."""

    @abstractmethod
    def sampled(self, z: Tensor, noise: Tensor) -> Tensor:
        """F `[N, K, S]` with E F_n F_n^T = M_n at outputs z `[N, K]`, from the random numbers of `noise`."""

    @abstractmethod
    def gradients(self, z: Tensor) -> Tensor:
        """F `[N, K, 1]`, the gradient of each sample's own loss at z `[N, K]` times the root of its share s_n in the loss."""


def uniform(shape: Sequence[int], source: torch.Generator, device: torch.device) -> Tensor:
    """Uniform numbers on [0, 1) of this shape, drawn in float64 on the CPU: the same on every device."""
    drawn = torch.rand(*shape, generator=source, dtype=torch.float64)
    return drawn.to(widest(device)).to(device)


@dataclass(frozen=True)
class CrossEntropy(SeparableLoss):
    """-sum_nk q_nk log p_nk with the sums c `[N, 1]` of q `[N, K]` over the classes; M and its draws need no labels."""

    scale: Tensor
    labels: ClassLabels | None = None

    def value(self, z: Tensor) -> Tensor:
        """-sum_nk q_nk log p_nk of logits z `[N, K]`, with p = softmax(z); a differentiable scalar."""
        return -(self._distribution * z.log_softmax(-1)).sum()

    def product(self, z: Tensor, U: Tensor) -> Tensor:
        """M u = c (p * u - p (p . u)) for each row u of U `[N, K]`, with p = softmax(z) and c = sum_k q_k."""
        p = z.softmax(-1)
        pU = p * U
        return pU.sub_(p.mul_(pU.sum(-1, keepdim=True))).mul_(self.scale)

    def part(self, rows: slice) -> "CrossEntropy":
        """The cross-entropy of some samples, with the normalisation of the whole batch."""
        return replace(self, scale=self.scale[rows], labels=None if self.labels is None else self.labels.part(rows))

    def root(self, z: Tensor, columns: slice = ALL) -> Tensor:
        """F `[N, K, R]`, its column k being sqrt(c p_k) (e_k - p) with p = softmax(z): all K columns, or those of a slice."""
        p = z.softmax(-1)
        first, last, _ = columns.indices(z.shape[-1])
        F = p.neg()[..., None].repeat(1, 1, last - first)
        F.diagonal(-first, 1, 2).add_(1)
        return F.mul_((self.scale * p[:, columns]).sqrt()[..., None, :])

    @property
    def mean_divisor(self) -> float:
        """What a mean is divided by: the summed weights of the labels that count."""
        assert self.labels is not None
        return self.labels.weights

    def noise(self, samples: int, source: torch.Generator) -> Tensor:
        """Uniform numbers `[N, S]`, S = `samples`, by which `sampled` draws a class for each sample and column."""
        return uniform((len(self.scale), samples), source, self.scale.device)

    def sampled(self, z: Tensor, noise: Tensor) -> Tensor:
        """F `[N, K, S]`, its column s being sqrt(c / S) (p - e_y), with y the class in which the uniform number falls."""
        p, few = z.softmax(-1), max(1, DRAWN_AT_A_TIME // z.shape[-1])
        sums = (rows.to(noise.dtype).cumsum(-1) for rows in p.split(few))
        y = torch.cat([torch.searchsorted(*both, right=True) for both in zip(sums, noise.split(few), strict=True)])
        columns = p[..., None].repeat(1, 1, noise.shape[-1])  # [N, K, S]
        columns.scatter_add_(1, y.clamp_max(z.shape[-1] - 1)[:, None], columns.new_full((), -1).expand_as(y[:, None]))
        return columns.mul_((self.scale / noise.shape[-1]).sqrt()[..., None])

    def gradients(self, z: Tensor) -> Tensor:
        """F `[N, K, 1]` = sqrt(c) (p - q / c), the given label's gradient; zero for a label that does not count."""
        c = self.scale
        return (z.softmax(-1).mul_(c).sub_(self._distribution) / torch.where(c > 0, c, 1).sqrt())[..., None]

    @property
    def _distribution(self) -> Tensor:
        assert self.labels is not None
        return self.labels.distribution


@dataclass(frozen=True)
class SquaredError(SeparableLoss):
    """c sum_nk (z_nk - y_nk)^2 with the targets y `[N, K]`, c = 1 / divisor, and the share s of a sample's own loss in it."""

    y: Tensor
    divisor: float
    share: float = 1.0

    @property
    def mean_divisor(self) -> float:
        """What a mean is divided by: N K, the number of targets."""
        return self.y.numel()

    def value(self, z: Tensor) -> Tensor:
        """c sum_nk (z_nk - y_nk)^2 of outputs z `[N, K]`, c = 1 / divisor; a differentiable scalar."""
        return (z - self.y).square().sum() / self.divisor

    def product(self, z: Tensor, U: Tensor) -> Tensor:
        """M U = 2 c U for U `[N, K]`, whatever the outputs z."""
        return U * (2 / self.divisor)

    def part(self, rows: slice) -> "SquaredError":
        """The squared error of some samples, with the divisor of the whole batch."""
        return replace(self, y=self.y[rows])

    def root(self, z: Tensor, columns: slice = ALL) -> Tensor:
        """F = sqrt(2 c) I for each sample, `[N, K, K]`, or those of its columns that a slice names."""
        first, last, _ = columns.indices(z.shape[-1])
        eye = z.new_zeros(z.shape[-1], last - first)
        eye.diagonal(-first).fill_((2 / self.divisor) ** 0.5)
        return eye.expand(len(z), -1, -1)

    def noise(self, samples: int, source: torch.Generator) -> Tensor:
        """Normal numbers `[N, K, S]`, from uniform ones: what `torch.randn` gives depends on how many are drawn at once."""
        noise = self.y.new_empty(*self.y.shape, samples)
        for part in noise.split(max(1, NORMAL_AT_A_TIME // self.y.shape[1] // samples)):
            drawn = torch.rand(part.shape, generator=source, dtype=torch.float64)
            part.copy_(torch.special.ndtri(drawn.clamp_min_(SMALLEST)))
        return noise

    def sampled(self, z: Tensor, noise: Tensor) -> Tensor:
        """F `[N, K, S]`, its column s being sqrt(2 c / S) g with the normal numbers g of `noise`."""
        return noise * (2 / self.divisor / noise.shape[-1]) ** 0.5

    def gradients(self, z: Tensor) -> Tensor:
        """F `[N, K, 1]` = 2 c (z - y) / sqrt(s), s the share of a sample's own loss in the loss."""
        return ((z - self.y) * (2 / self.divisor / self.share**0.5))[..., None]
