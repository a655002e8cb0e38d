"""Steps and seconds to a target, and comparisons with tuned SGD, computed from the tables of the optimiser study.

A target of a seed is the training loss that SGD has on that seed at its end, or at EARLY of its steps. A run that never gets
there is censored: it counts with one step more than it took, a lower bound, and a comparison that holds it has no upper end.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from studies.statistics import Interval, exponential, mean_interval, ratio_interval, with_error

REFERENCE = "sgd"
EARLY = 0.5
TARGETS = {"final": 1.0, "early": EARLY}


@dataclass(frozen=True)
class Ratio:
    """An arm against SGD in one quantity: `censored` of the seeds are lower bounds."""

    interval: Interval
    censored: int = 0

    def __str__(self) -> str:
        return str(self.interval) + (f", {self.censored} censored" if self.censored else "")


def reached(curves: pd.DataFrame) -> pd.DataFrame:
    """Steps to each target for each problem, arm and seed; `censored` where the target was not reached."""
    rows = []
    for (problem, seed), some in curves.groupby(["problem", "seed"], sort=False):
        own = some[some.arm == REFERENCE]
        for name, share in TARGETS.items():
            target = own[own.step <= share * own.step.max()].loss.iloc[-1]
            for arm, run in some.groupby("arm", sort=False):
                there = run[run.loss <= target]
                rows.append(
                    {
                        "problem": problem,
                        "arm": arm,
                        "seed": seed,
                        "target": name,
                        "loss": target,
                        "steps": int(there.step.iloc[0]) if len(there) else int(run.step.max()) + 1,
                        "censored": there.empty,
                    }
                )
    return pd.DataFrame(rows)


class Clock:
    """Seconds that an arm's steps take, from the interleaved timing.

    The first steps, in which K-FAC updates its factors more often, take what they took; later ones the mean of the second half
    of those timed.
    """

    def __init__(self, costs: pd.DataFrame) -> None:
        self.times = {
            key: some.sort_values("step").milliseconds.to_numpy() / 1e3
            for key, some in costs.groupby(["problem", "arm"])
        }

    def seconds(self, problem: str, arm: str, steps: float) -> float:
        """Seconds of the first `steps` steps."""
        times = self.times[problem, arm]
        later = float(times[len(times) // 2 :].mean())
        return float(times[: int(steps)].sum()) + max(0.0, steps - len(times)) * later

    def log_error(self, problem: str) -> float:
        """Standard error of the logarithm of a ratio of two mean step times, from the scatter of SGD's later steps.

        SGD's steps are all alike, so their scatter is the machine's; that of interleaved arms is counted as independent.
        """
        times = self.times[problem, REFERENCE]
        logs = np.log(times[len(times) // 2 :])
        return float(logs.std(ddof=1) * np.sqrt(2 / len(logs))) if len(logs) > 1 else math.inf

    def step_ratio(self, problem: str, arm: str) -> float:
        """Mean time of a later step, in those of SGD."""
        mean = {
            name: self.times[problem, name][len(self.times[problem, name]) // 2 :].mean() for name in (arm, REFERENCE)
        }
        return float(mean[arm] / mean[REFERENCE])


def steps_ratio(table: pd.DataFrame, problem: str, arm: str, target: str, clock: Clock | None = None) -> Ratio:
    """Steps of an arm to the target, or with a clock seconds, over those of SGD: geometric mean over seeds.

    The interval of seconds has the scatter of the timing in it, too.
    """
    some = table[(table.problem == problem) & (table.target == target)].set_index(["arm", "seed"])

    def sizes(name: str) -> list[float]:
        steps = some.steps.xs(name, level="arm").sort_index()
        return [clock.seconds(problem, name, s) if clock else float(s) for s in steps]

    logs = mean_interval(np.log(sizes(arm)) - np.log(sizes(REFERENCE)))
    if clock:
        logs = with_error(logs, clock.log_error(problem))
    interval = exponential(logs)
    censored = int(some.censored.xs(arm, level="arm").sum())
    if censored:
        interval = replace(interval, high=math.inf)
    return Ratio(interval, censored)


def final_ratio(epochs: pd.DataFrame, problem: str, arm: str) -> Interval:
    """Training loss of the last epoch over that of SGD: geometric mean over seeds; infinite where a run diverged."""
    values = at_the_end(epochs, problem, "train_loss")
    if np.isinf(values[arm]).any():
        return Interval(math.inf, math.inf, math.inf, len(values))
    return ratio_interval(values[arm], values[REFERENCE])


def accuracy_difference(epochs: pd.DataFrame, problem: str, arm: str) -> Interval:
    """Test accuracy after the last epoch minus that of SGD, in points: mean over seeds."""
    values = 100 * at_the_end(epochs, problem, "test_top1")
    return mean_interval(values[arm] - values[REFERENCE])


def at_the_end(epochs: pd.DataFrame, problem: str, column: str) -> pd.DataFrame:
    """A column of the last epoch, one row for each seed, one column for each arm."""
    last = epochs[(epochs.problem == problem) & (epochs.epoch == epochs.epoch.max())]
    return last.pivot(index="seed", columns="arm", values=column)
