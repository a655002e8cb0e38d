"""The loss as a function of the network's outputs: its value, gradient and Hessian M, and columns F with F F^T = M.

Index letters: N samples, K outputs (classes) of a sample, R columns of F, S Monte-Carlo samples, V vectors. Outputs z
`[N, K]`. M is block diagonal over samples, M_n = F_n F_n^T with F `[N, K, R]`; the loss's own normalisation is inside.

    cross-entropy    l_n = -sum_k q_nk log p_nk,  p = softmax(z)    M_n = c_n (diag p - p p^T)    F_nk = sqrt(c_n p_k) (e_k - p)
    squared error    l_n = c |z_n - y_n|^2                          M_n = 2 c I                  F_n = sqrt(2 c) I

with q the (weighted, smoothed) distribution of the label divided by the mean's divisor, and c_n = sum_k q_nk. A column
drawn from the model's own distribution has the same F F^T in expectation: sqrt(c_n) (p - e_y) with y ~ p, and sqrt(2 c) g
with g ~ N(0, I).

The empirical Fisher has the given label in place of the drawn one. The loss is a weighted sum of the samples' own losses,
L = sum_n s_n l_n with -log p(y_n | z_n) = l_n up to a constant, and its one column is sqrt(s_n) dl_n/dz_n = dL/dz_n / sqrt(s_n):

    cross-entropy    l_n = -log p_y            s_n = c_n: 1/N for a mean, 1 for a sum, in proportion to class weights
    squared error    l_n = the own mean or     s_n = 1/N for a mean, 1 for a sum; y ~ N(z, sigma^2 I), sigma^2 = K/2 and 1/2
                     sum over K outputs

so that labels which are drawn from p(y | z) at fixed s_n give M_n in expectation. K-FAC's `fisher="empirical"` has the same own
losses, but takes class weights, which it does not know, as part of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.accelerator import widest
from secondorder.errors import InputError, failures_of

DRAWN_AT_A_TIME = 2**21
"""Probabilities that are added up in float64 to draw classes: of a language model's tokens they are as large as its logits."""

Loss = Callable[[Tensor, Tensor], Tensor]


class LossCurvature(ABC):
    """A loss at fixed labels as a function of the outputs z `[N, K]`."""

    separable = True
    """Whether the loss is a sum over samples with known summands, so that it can be computed part by part."""

    @abstractmethod
    def value(self, z: Tensor) -> Tensor:
        """The reduced loss, a differentiable scalar."""

    @abstractmethod
    def product(self, z: Tensor, U: Tensor) -> Tensor:
        """M U for U `[N, K]`."""

    @abstractmethod
    def part(self, rows: slice) -> "LossCurvature":
        """The summands of some samples, with the normalisation of the whole batch."""


class SeparableLoss(LossCurvature):
    """A loss with closed forms: a sum over samples of the negative log-likelihood of a distribution."""

    @abstractmethod
    def root(self, z: Tensor) -> Tensor:
        """F `[N, K, K]` with F_n F_n^T = M_n."""

    @abstractmethod
    def noise(self, samples: int, seed: int) -> Tensor:
        """Random numbers for `sampled`, the same on every device and for every division of the batch."""

    @abstractmethod
    def sampled(self, z: Tensor, noise: Tensor) -> Tensor:
        """F `[N, K, S]` with E F_n F_n^T = M_n."""

    @abstractmethod
    def gradients(self, z: Tensor) -> Tensor:
        """F `[N, K, 1]`, the gradient of each sample's own loss times the root of its share s_n in the loss."""


@dataclass(frozen=True)
class CrossEntropy(SeparableLoss):
    """-sum_nk q_nk log p_nk with q `[N, K]`, the mean's divisor inside."""

    q: Tensor

    def value(self, z: Tensor) -> Tensor:
        """The loss."""
        return -(self.q * z.log_softmax(-1)).sum()

    def product(self, z: Tensor, U: Tensor) -> Tensor:
        """c (p * u - p (p . u))."""
        pU = z.softmax(-1) * U
        return self._scale * (pU - z.softmax(-1) * pU.sum(-1, keepdim=True))

    def part(self, rows: slice) -> "CrossEntropy":
        """The summands of some samples."""
        return replace(self, q=self.q[rows])

    def root(self, z: Tensor) -> Tensor:
        """Column k: sqrt(c p_k) (e_k - p)."""
        p = z.softmax(-1)
        columns = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device) - p[..., None]
        return columns * (self._scale * p).sqrt()[..., None, :]

    def noise(self, samples: int, seed: int) -> Tensor:
        """Uniform numbers `[N, S]`."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(len(self.q), samples, generator=generator, dtype=torch.float64)
        return drawn.to(widest(self.q.device)).to(self.q.device)

    def sampled(self, z: Tensor, noise: Tensor) -> Tensor:
        """Column s: sqrt(c / S) (p - e_y), y the class in which the uniform number falls."""
        p, few = z.softmax(-1), max(1, DRAWN_AT_A_TIME // z.shape[-1])
        sums = (rows.to(noise.dtype).cumsum(-1) for rows in p.split(few))
        y = torch.cat([torch.searchsorted(*both, right=True) for both in zip(sums, noise.split(few), strict=True)])
        columns = p[..., None].repeat(1, 1, noise.shape[-1])  # [N, K, S]
        columns.scatter_add_(1, y.clamp_max(z.shape[-1] - 1)[:, None], columns.new_full((), -1).expand_as(y[:, None]))
        return columns.mul_((self._scale / noise.shape[-1]).sqrt()[..., None])

    def gradients(self, z: Tensor) -> Tensor:
        """sqrt(c) (p - q / c); none for a label that does not count."""
        c = self._scale
        return ((c * z.softmax(-1) - self.q) / torch.where(c > 0, c, 1).sqrt())[..., None]

    @property
    def _scale(self) -> Tensor:
        """c `[N, 1]`."""
        return self.q.sum(-1, keepdim=True)


@dataclass(frozen=True)
class SquaredError(SeparableLoss):
    """c sum_nk (z_nk - y_nk)^2 with the targets y `[N, K]`, c = 1 / divisor, and the share s of a sample's own loss in it."""

    y: Tensor
    divisor: int
    share: float = 1.0

    def value(self, z: Tensor) -> Tensor:
        """The loss."""
        return (z - self.y).square().sum() / self.divisor

    def product(self, z: Tensor, U: Tensor) -> Tensor:
        """2 c u."""
        return U * (2 / self.divisor)

    def part(self, rows: slice) -> "SquaredError":
        """The summands of some samples."""
        return replace(self, y=self.y[rows])

    def root(self, z: Tensor) -> Tensor:
        """sqrt(2 c) I."""
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        return (eye * (2 / self.divisor) ** 0.5).expand(len(z), -1, -1)

    def noise(self, samples: int, seed: int) -> Tensor:
        """Normal numbers `[N, K, S]`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*self.y.shape, samples, generator=generator, dtype=torch.float64).to(self.y)

    def sampled(self, z: Tensor, noise: Tensor) -> Tensor:
        """Column s: sqrt(2 c / S) g."""
        return noise * (2 / self.divisor / noise.shape[-1]) ** 0.5

    def gradients(self, z: Tensor) -> Tensor:
        """2 c (z - y) / sqrt(s)."""
        return ((z - self.y) * (2 / self.divisor / self.share**0.5))[..., None]


@dataclass(frozen=True)
class AnyLoss(LossCurvature):
    """A loss that is known by its values only; `shape` is that of the outputs, which the loss expects."""

    loss: Loss
    labels: Tensor
    shape: torch.Size
    separable = False

    def value(self, z: Tensor) -> Tensor:
        """The loss."""
        value = self.loss(z.view(self.shape), self.labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise InputError(f"{loss_name(self.loss)} returns no scalar; use reduction='mean' or 'sum'")
        if z.requires_grad and not value.requires_grad:
            raise InputError(
                f"{loss_name(self.loss)} does not depend on the outputs, or detaches them; it has no curvature"
            )
        return value.reshape(())

    def product(self, z: Tensor, U: Tensor) -> Tensor:
        """M U by differentiating the gradient along U."""
        with torch.enable_grad(), failures_of(f"a second derivative of {loss_name(self.loss)}"):
            z = z.detach().requires_grad_()
            gradient = torch.autograd.grad(self.value(z), z, create_graph=True)[0]
            if not gradient.requires_grad:  # a loss that is linear in z
                return torch.zeros_like(U)
            return torch.autograd.grad(gradient, z, U, materialize_grads=True)[0]

    def part(self, rows: slice) -> "AnyLoss":
        """The whole loss; parts of it are not known."""
        return self


def loss_curvature(loss: Loss, shape: torch.Size, labels: Tensor, dtype: torch.dtype) -> LossCurvature:
    """The loss at these labels for outputs of this shape; closed forms for cross-entropy and squared error.

    Raises InputError for labels that do not fit, and for losses that are no functions or not reduced to a scalar.
    """
    if not callable(loss) or isinstance(loss, type):
        raise InputError(f"loss {loss!r}: must be a function of outputs and labels, for example nn.CrossEntropyLoss()")
    options = _options(loss)
    if options is None or (len(shape) != 2 and options["kind"] == "cross-entropy"):
        return AnyLoss(loss, labels, shape)
    if options["reduction"] not in ("mean", "sum"):
        raise InputError(f"{loss_name(loss)} has reduction {options['reduction']!r}; use 'mean' or 'sum'")
    if options["kind"] == "squared error":
        return _squared_error(options, shape, labels, dtype)
    return _cross_entropy(options, shape, labels, dtype)


def loss_name(loss: Loss) -> str:
    """How messages call a loss."""
    return type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", type(loss).__name__)


def _options(loss: Loss) -> dict[str, Any] | None:
    """Kind and options of a loss with closed forms; None for any other, subclasses with a forward of their own too."""
    if loss is F.cross_entropy:
        loss = nn.CrossEntropyLoss()
    if loss is F.mse_loss:
        loss = nn.MSELoss()
    if isinstance(loss, nn.MSELoss) and type(loss).forward is nn.MSELoss.forward:
        return {"kind": "squared error", "reduction": loss.reduction}
    if isinstance(loss, nn.CrossEntropyLoss) and type(loss).forward is nn.CrossEntropyLoss.forward:
        names = ("reduction", "weight", "ignore_index", "label_smoothing")
        return {"kind": "cross-entropy"} | {name: getattr(loss, name) for name in names}
    return None


def _squared_error(options: dict[str, Any], shape: torch.Size, y: Tensor, dtype: torch.dtype) -> SquaredError:
    if y.shape != shape or not y.is_floating_point():
        raise InputError(
            f"targets of shape {list(y.shape)} ({y.dtype}) for outputs {list(shape)}; squared error needs equal shapes and "
            "floating-point targets"
        )
    if not torch.isfinite(y).all():
        raise InputError("the targets contain NaN or infinity")
    y = y.to(dtype).reshape(len(y), -1)
    return SquaredError(y, y.numel(), 1 / len(y)) if options["reduction"] == "mean" else SquaredError(y, 1)


def _cross_entropy(options: dict[str, Any], shape: torch.Size, labels: Tensor, dtype: torch.dtype) -> CrossEntropy:
    N, K = shape
    weight = options["weight"]
    weight = torch.ones(K, dtype=dtype, device=labels.device) if weight is None else weight.to(labels.device, dtype)
    if weight.shape != (K,) or not bool((weight.isfinite() & (weight >= 0)).all()):
        raise InputError(
            f"weights {weight.tolist()} of the loss: must be {K} finite numbers of at least 0, one for each output"
        )
    if labels.is_floating_point():
        if labels.shape != shape or not torch.isfinite(labels).all():
            raise InputError(f"class probabilities of shape {list(labels.shape)}: must be finite and [{N}, {K}]")
        target, counted = labels.to(dtype), torch.ones_like(weight[:1]).expand(N)
        divisor = torch.tensor(float(N), dtype=dtype, device=labels.device)
    else:
        counted = _checked_classes(labels, N, K, options["ignore_index"]).to(dtype)
        target = F.one_hot(labels.where(counted > 0, 0), K).to(dtype)
        divisor = (counted[:, None] * target * weight).sum()
    smoothing = options["label_smoothing"]
    q = weight * ((1 - smoothing) * target + smoothing / K) * counted[:, None]
    if options["reduction"] == "sum":
        divisor = torch.ones_like(divisor)
    if not divisor > 0:
        raise InputError("no label counts: all are ignored or have weight 0")
    return CrossEntropy(q / divisor)


def _checked_classes(labels: Tensor, N: int, K: int, ignored: int) -> Tensor:
    """Which of the class indices `[N]` count, as a mask; InputError for wrong types, shapes and values."""
    if labels.dtype != torch.int64 or labels.shape != (N,):
        raise InputError(
            f"labels of shape {list(labels.shape)} ({labels.dtype}); cross-entropy needs class indices [{N}] (torch.int64) "
            f"or class probabilities [{N}, {K}]"
        )
    counted = labels != ignored
    wrong = labels[counted & ((labels < 0) | (labels >= K))]
    if len(wrong):
        raise InputError(
            f"label {int(wrong[0])} is out of range; the network has {K} outputs, labels must be 0..{K - 1}"
        )
    return counted
