"""The labels of a cross-entropy as distributions over the classes: weighted, smoothed, and with the mean's divisor inside.

Index letters: N samples, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secondorder.errors import InputError, check_number

NO_LABEL = "no label counts: all are ignored or have weight 0"


@dataclass(frozen=True)
class ClassLabels:
    """Class indices `[N]` or probabilities `[N, K]`, the distribution of which is made for some samples at a time.

    Args:
        weight: of the classes `[K]`; counted: of the samples `[N]`, 0 for a label that is ignored; divisor: of a mean, or 1.
    """

    given: Tensor
    weight: Tensor
    counted: Tensor
    smoothing: float
    divisor: Tensor

    @property
    def distribution(self) -> Tensor:
        """q `[N, K]`: each label's smoothed distribution times class weights, over the mean's divisor; 0 where ignored."""
        K = len(self.weight)
        if self.given.is_floating_point():
            q = (1 - self.smoothing) * self.given.to(self.weight) + self.smoothing / K
        else:
            q = self.weight.new_full((len(self.given), K), self.smoothing / K)
            q.scatter_add_(1, self._classes, q.new_full((), 1 - self.smoothing).expand_as(self._classes))
        return q.mul_(self.weight).mul_((self.counted / self.divisor)[:, None])

    @property
    def total(self) -> Tensor:
        """c = sum_k q_k `[N, 1]`, the sum of each label's weighted, smoothed and divided distribution."""
        even = self.smoothing * self.weight.mean()
        given = (
            self.given.to(self.weight) @ self.weight
            if self.given.is_floating_point()
            else self.weight[self._classes[:, 0]]
        )
        return (((1 - self.smoothing) * given + even) * self.counted / self.divisor)[:, None]

    @property
    def of_likelihood(self) -> bool:
        """Whether all are distributions but for their scale, so that the loss is convex: probabilities may be given below 0."""
        return not self.given.is_floating_point() or bool((self.given >= 0).all())

    @property
    def weights(self) -> float:
        """What a mean is divided by: the weights of the classes that count, or the number of distributions."""
        if self.given.is_floating_point():
            return float(len(self.given))
        return float((self.counted * self.weight[self._classes[:, 0]]).sum())

    @property
    def _classes(self) -> Tensor:
        return self.given.where(self.counted > 0, 0)[:, None]

    def part(self, rows: slice) -> "ClassLabels":
        """The labels of some samples, with the divisor of the whole batch."""
        return replace(self, given=self.given[rows], counted=self.counted[rows])


def class_labels(
    options: Mapping[str, Any], shape: torch.Size, labels: Tensor, dtype: torch.dtype, divisor: float | None = None
) -> ClassLabels:
    """The labels of a loss with these options for outputs `[N, K]`. Raises InputError for those that do not fit.

    Args:
        divisor: of a mean over more than these samples; None: theirs.
    """
    N, K = shape
    check_number("label_smoothing", options["label_smoothing"], 0, 1, "[]")
    weight = options["weight"]
    weight = (
        torch.ones(K, dtype=dtype, device=labels.device)
        if weight is None
        else weight.detach().to(labels.device, dtype, copy=True)
    )
    if weight.shape != (K,) or not bool((weight.isfinite() & (weight >= 0)).all()):
        raise InputError(
            f"weights {weight.tolist()} of the loss: must be {K} finite numbers of at least 0, one for each output"
        )
    if labels.is_floating_point():
        if labels.shape != shape or not torch.isfinite(labels).all():
            raise InputError(
                f"class probabilities of shape {list(labels.shape)}: must be finite and [{N}, {K}]; class indices are torch.int64"
            )
        counted = torch.ones_like(weight[:1]).expand(N)
    else:
        counted = _checked_classes(labels, N, K, options["ignore_index"]).to(dtype)
    made = ClassLabels(labels, weight, counted, options["label_smoothing"], torch.ones_like(weight[0]))
    if options["reduction"] == "sum":
        return made
    divisor = made.weights if divisor is None else divisor
    if not divisor > 0:
        raise InputError(NO_LABEL)
    return replace(made, divisor=torch.full_like(weight[0], divisor))


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
