"""The quantity of a batch from the quantities of its chunks: the table `MERGES`, a rule for each kind of quantity.

The losses of the chunks add up to that of the batch, whose divisor is inside them. So what belongs to the loss or to single
samples is added or put side by side; averages over the samples, such as the input factor of K-FAC, are weighted with n/N,
the chunk's share of the samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from backpack import extensions
from torch import Tensor

from secondorder.curvature.backpack.diag_hessian_mc import BatchDiagHessianMC, DiagHessianMC
from secondorder.curvature.backpack.kronecker import WeightSharingKFAC, WeightSharingKFLR
from secondorder.curvature.operators.factored import FactoredOperator


@dataclass(frozen=True)
class Part:
    """What one chunk of n samples gave for one parameter."""

    value: Any
    gradient: Tensor  # of the chunk's part of the loss
    samples: int  # n
    share: float  # n/N


Merge = Callable[[Sequence[Part]], Any]


def added(parts: Sequence[Part]) -> Tensor:
    """sum_c q_c over the chunks c."""
    return torch.stack([part.value for part in parts]).sum(0)


def joined(parts: Sequence[Part], dim: int = 0) -> Tensor:
    """The samples of all chunks along `dim`."""
    return torch.cat([part.value for part in parts], dim)


def variance(parts: Sequence[Part]) -> Tensor:
    """Variance over all samples: the mean of the chunks' variances plus the variance of their means."""
    means = [part.gradient / part.samples for part in parts]
    total = sum((part.share * mean for part, mean in zip(parts, means, strict=True)), torch.zeros_like(means[0]))
    within = sum(part.share * part.value for part in parts)
    return within + sum(part.share * (mean - total) ** 2 for part, mean in zip(parts, means, strict=True))


def kronecker(parts: Sequence[Part]) -> list[Any]:
    """Factors [B, A] of a weight or [B] of a bias: B = sum_c B_c, A = sum_c n_c/N A_c."""
    output = torch.stack([part.value[0] for part in parts]).sum(0)
    return [output, *(averaged(parts, i) for i in range(1, len(parts[0].value)))]


def averaged(parts: Sequence[Part], index: int) -> Tensor | FactoredOperator:
    """sum_c n_c/N A_c; of factors that are kept as rows A_c = R_c^T R_c, the rows sqrt(n_c/N) R_c of all chunks."""
    factors = [part.value[index] for part in parts]
    if isinstance(factors[0], FactoredOperator):
        return FactoredOperator(torch.cat([part.share**0.5 * A.rows for part, A in zip(parts, factors, strict=True)]))
    return torch.stack([part.share * A for part, A in zip(parts, factors, strict=True)]).sum(0)


def product(parts: Sequence[Part]) -> Callable[[Tensor], Tensor]:
    """The matrix product mat `[V, *parameter]` -> sum_c G_c mat."""
    return lambda mat: torch.stack([part.value(mat) for part in parts]).sum(0)


MERGES: dict[type, Merge] = {
    extensions.BatchGrad: joined,
    extensions.BatchL2Grad: joined,
    extensions.SumGradSquared: added,
    extensions.Variance: variance,
    extensions.DiagGGNExact: added,
    extensions.DiagGGNMC: added,
    extensions.DiagHessian: added,
    DiagHessianMC: added,
    extensions.BatchDiagGGNExact: joined,
    extensions.BatchDiagGGNMC: joined,
    extensions.BatchDiagHessian: joined,
    BatchDiagHessianMC: joined,
    extensions.SqrtGGNExact: partial(joined, dim=1),
    extensions.SqrtGGNMC: partial(joined, dim=1),
    extensions.KFAC: kronecker,
    extensions.KFLR: kronecker,
    WeightSharingKFAC: kronecker,
    WeightSharingKFLR: kronecker,
    extensions.GGNMP: product,
    extensions.HMP: product,
}
"""Exact class of an extension -> rule. KFRA has none: it averages over the batch at every layer."""
