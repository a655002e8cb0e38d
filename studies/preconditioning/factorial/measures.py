"""Speed-ups of optimisers under poolings and their interactions, from the tables of the factorial.

For an optimiser o under a pooling p on a seed, with T the steps to a target loss and L the training loss of the last epoch,

    speed-up(o, p) = log T(sgd, p) - log T(o, p)    gain(o, p) = log L(sgd, p) - log L(o, p)

and the interaction of o with GCP against p is the difference of the two speed-ups (gains), GCP minus p: below 0 where o
helps GCP less than it helps p. T is known up to bounds: a run that never reaches the target has no upper bound, and one that is
below the target at the first point of its curve has no lower one but one step. Bounds are carried to the end; no run is dropped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from studies.optimisers.measures import REFERENCE, Clock
from studies.statistics import Interval, mean_interval

COMMON, OWN = "common", "own"
"""Targets: SGD's final loss of a seed, the largest over the poolings and so the same for all cells; and of the own pooling."""
KEYS = ["pooling", "optimiser", "seed"]


@dataclass(frozen=True)
class Bounded:
    """A number that lies between `low` and `high`; `value` is the one to show."""

    value: float
    low: float
    high: float

    def __sub__(self, other: "Bounded") -> "Bounded":
        return Bounded(self.value - other.value, self.low - other.high, self.high - other.low)

    def log(self) -> "Bounded":
        """The logarithm of a positive number."""
        return Bounded(
            math.log(self.value), math.log(self.low), math.log(self.high) if self.high < math.inf else math.inf
        )

    def map(self, function: Callable[[float], float]) -> "Bounded":
        """A growing function of it, infinite at infinity."""
        return Bounded(
            function(self.value), function(self.low), function(self.high) if self.high < math.inf else math.inf
        )


def interval(values: Sequence[Bounded]) -> Interval:
    """95 % interval of the mean: its low end from the lower bounds alone, its high end from the upper bounds alone.

    Each end is that of the t interval of the bounds, so that it is valid for their mean, and the mean itself lies further
    inside: the ends are conservative. An end is infinite when one of its bounds is.
    """
    n = len(values)
    shown = mean_interval([v.value for v in values])
    low, high = mean_interval([v.low for v in values]), mean_interval([v.high for v in values])
    return Interval(
        shown.estimate,
        low.low if math.isfinite(low.low) else -math.inf,
        high.high if math.isfinite(high.high) else math.inf,
        n,
    )


def ratio(values: Sequence[Bounded]) -> Interval:
    """The interval of exp(-mean): a speed-up as a ratio of steps, optimiser over SGD."""
    logs = interval(values)
    return Interval(_exp(-logs.estimate), _exp(-logs.high), _exp(-logs.low), logs.n)


def _exp(x: float) -> float:
    return math.exp(x) if x < math.inf else math.inf


class Factorial:
    """The runs of the factorial: steps and seconds to targets, final losses, and what follows from them."""

    def __init__(self, epochs: pd.DataFrame, curves: pd.DataFrame, costs: pd.DataFrame) -> None:
        self.poolings, self.optimisers = list(epochs.pooling.unique()), list(epochs.optimiser.unique())
        self.seeds = sorted(epochs.seed.unique())
        last = epochs[epochs.epoch == epochs.epoch.max()].set_index(KEYS)
        self.losses, self.accuracies = last.train_loss, last.test_top1
        self.steps_per_epoch = float(epochs.step.max()) / float(epochs.epoch.max())
        self.clock = Clock(costs.rename(columns={"pooling": "problem", "optimiser": "arm"}))
        self._curves = {key: run.sort_values("step") for key, run in curves.groupby(KEYS)}

    def target(self, kind: str, pooling: str, seed: int) -> float | None:
        """The loss to reach; None where SGD diverged on this seed, under every pooling for the common target."""
        poolings = self.poolings if kind == COMMON else [pooling]
        ends = [float(self._curves[p, REFERENCE, seed].loss.iloc[-1]) for p in poolings]
        return max((end for end in ends if math.isfinite(end)), default=None)

    def steps(self, kind: str, pooling: str, optimiser: str, seed: int) -> Bounded | None:
        """Steps of a run to its target; None where there is no target."""
        target, run = self.target(kind, pooling, seed), self._curves[pooling, optimiser, seed]
        if target is None:
            return None
        there = run[run.loss <= target].step
        if there.empty:
            least = float(run.step.iloc[-1]) + 1
            return Bounded(least, least, math.inf)
        found, first = float(there.iloc[0]), float(run.step.iloc[0])
        return Bounded(found, 1.0 if found == first and len(run) > 1 else found, found)

    def seconds(self, kind: str, pooling: str, optimiser: str, seed: int) -> Bounded | None:
        """Seconds of these steps, in the interleaved timing."""
        steps = self.steps(kind, pooling, optimiser, seed)
        return None if steps is None else steps.map(lambda s: self.clock.seconds(pooling, optimiser, s))

    def loss(self, pooling: str, optimiser: str, seed: int) -> Bounded:
        """Training loss of the last epoch; of a run that diverged no more is known than that it is positive."""
        value = float(self.losses[pooling, optimiser, seed])
        return Bounded(value, value, value) if 0 < value < math.inf else Bounded(math.inf, 0.0, math.inf)

    def speed_ups(self, kind: str, pooling: str, optimiser: str, what: str = "steps") -> dict[int, Bounded]:
        """log of SGD's steps (or seconds) over the optimiser's, by seed."""
        measured = {"steps": self.steps, "seconds": self.seconds}[what]
        found = {}
        for seed in self.seeds:
            own, sgd = measured(kind, pooling, optimiser, seed), measured(kind, pooling, REFERENCE, seed)
            if own is not None and sgd is not None:
                found[seed] = sgd.log() - own.log()
        return found

    def gains(self, pooling: str, optimiser: str) -> dict[int, Bounded]:
        """log of SGD's final loss over the optimiser's, by seed."""
        return {
            seed: _log_loss(self.loss(pooling, REFERENCE, seed)) - _log_loss(self.loss(pooling, optimiser, seed))
            for seed in self.seeds
        }

    def censored(self, kind: str, pooling: str, optimiser: str) -> int:
        """Runs that never reach their target."""
        found = [self.steps(kind, pooling, optimiser, seed) for seed in self.seeds]
        return sum(steps is not None and math.isinf(steps.high) for steps in found)

    def at_once(self, kind: str, pooling: str, optimiser: str) -> int:
        """Runs below their target at the first point of their curve."""
        found = [self.steps(kind, pooling, optimiser, seed) for seed in self.seeds]
        return sum(steps is not None and steps.low < steps.value for steps in found)


def _log_loss(loss: Bounded) -> Bounded:
    if math.isinf(loss.value):
        return Bounded(math.inf, -math.inf, math.inf)
    return loss.log()


def interaction(under_gcp: dict[int, Bounded], under_other: dict[int, Bounded]) -> list[Bounded]:
    """The difference, seed by seed."""
    return [under_gcp[seed] - under_other[seed] for seed in under_gcp if seed in under_other]
