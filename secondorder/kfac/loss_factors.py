"""Whether the losses of a step are the declared ones, and their factors those of accumulated means or of sums.

The gradient at the outputs tells both (`likelihood_check`). What it has lost since backward does not count against the loss.
"""

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from secondorder.errors import InputError, one_line
from secondorder.kfac.agreement import to_host
from secondorder.kfac.likelihood_check import BOUND, is_close, loss_ratio, terms, verify_likelihood, verify_loss


@dataclass(eq=False)
class Watched:
    """Outputs, the loss's gradients at them by backward pass, and the batch they belong to: the outputs of a model share one.

    Args:
        fisher: its likelihood is that of this output. weight: the declared factor of its loss. made_by: the operation of the
            graph.
    """

    logits: Tensor
    fisher: Any
    batch: Hashable
    weight: float = 1.0
    made_by: str = ""
    gradients: list[tuple[int, Tensor]] = field(default_factory=list)

    def to_host(self) -> None:
        """All numbers to the host in one copy, so that what is asked of them waits for no device."""
        tasks = [task for task, _ in self.gradients]
        self.logits, *gradients = to_host([self.logits, *(gradient for _, gradient in self.gradients)])
        self.gradients = list(zip(tasks, gradients, strict=True))

    def gradient(self, backwards: set[int]) -> Tensor | None:
        """The sum over these backward passes; None: there was none."""
        terms = [gradient for backward, gradient in self.gradients if backward in backwards]
        return sum(terms[1:], terms[0]) if terms else None


def verify_losses(losses: Sequence[Watched], backwards: set[int], rescaled: float, known: bool) -> None:
    """InputError for a loss that is not the declared one, a warning for one that may be and for one with a factor.

    Args:
        losses: with what came to their outputs.
        backwards: that went on to the weights; a gradient that the user asked for with autograd.grad does not count.
        rescaled: norm of the gradients as they are now over that of the gradients that backward made.
        known: whether all batches of the step are among the losses; factors mean something only then: each loss is a mean over
            its rows times their share in all rows, or divided by the number of batches.
    """
    rows: dict[Hashable, int] = {}
    doubts: list[str] = []
    ratios: list[tuple[Watched, float]] = []
    for watched in losses:
        gradient = watched.gradient(backwards)
        if gradient is not None:
            given = watched.logits, gradient, watched.fisher.likelihood, watched.fisher.reduction
            if doubt := verify_likelihood(*given, rescaled, watched.made_by):
                doubts.append(doubt)
            rows[watched.batch] = len(watched.logits)
            if (ratio := loss_ratio(*given)) is not None:
                ratios.append((watched, ratio))
    if doubts:
        warnings.warn(one_line(doubts[0]), stacklevel=2)
    if not ratios or not known:
        return
    declared = ratios[0][0].fisher
    by_rows = {batch: n / sum(rows.values()) for batch, n in rows.items()}
    ways = [dict.fromkeys(rows, 1 / len(rows)), by_rows] if declared.reduction == "mean" else [dict.fromkeys(rows, 1.0)]
    factors = min((_factors(ratios, shares, rescaled) for shares in ways), key=_spread)
    count = terms(ratios[0][0].logits, declared.likelihood)
    verify_factors(factors, declared.likelihood, declared.reduction, count, len(rows))


def _factors(
    ratios: Sequence[tuple[Watched, float]], shares: Mapping[Hashable, float], rescaled: float
) -> list[list[float]]:
    """What is left of the ratios of each batch's outputs when the batch has this share."""
    batches: dict[Hashable, list[float]] = {}
    for watched, ratio in ratios:
        factor = ratio / shares[watched.batch]
        factor = factor if factor <= 1 else max(1.0, factor * min(1.0, rescaled))
        batches.setdefault(watched.batch, []).append(factor)
    return list(batches.values())


def _spread(factors: Sequence[Sequence[float]]) -> tuple[float, float]:
    """How different the factors are, and how far from 1."""
    found = [factor for batch in factors for factor in batch]
    return round(max(found) / min(found), 2), max(abs(math.log(factor)) for factor in found)


def verify_factors(
    factors: Sequence[Sequence[float]], likelihood: str, reduction: str, count: int, batches: int
) -> None:
    """InputError for factors of the loss that are a mistake or differ, a warning for one that all have.

    Args:
        factors: of the outputs of each accumulated batch where they are known; 1: as declared.
        likelihood, reduction: what they are factors of.
        count: terms of one of the losses, the ratio of a sum to a mean.
        batches: that were accumulated.
    """
    found = [factor for batch in factors for factor in batch]
    low, high = min(found), max(found)
    if max(high - 1, 1 - low) <= BOUND:
        return
    for batch in factors:
        if not is_close(max(batch), min(batch)):
            raise InputError(
                f"the losses of the outputs have factors from {min(batch):.4g} to {max(batch):.4g}: pass them as "
                "Fisher(weights=[...]), one for each output, 1 for a loss without a factor"
            )
    worst = max(found, key=lambda factor: abs(math.log(factor)))
    slip = count if reduction == "mean" else 1 / count
    if not is_close(high, low) or is_close(worst, slip) or (batches > 1 and is_close(worst, batches)):
        verify_loss(worst, likelihood, reduction, batches, 1.0)
    warnings.warn(
        one_line(
            f"the loss's gradient is {worst:.4g} times that of {likelihood} with reduction {reduction!r}; a constant factor does "
            f"not change K-FAC's direction: Fisher(weights={worst:.4g}) takes it into the curvature, too"
        ),
        stacklevel=2,
    )
