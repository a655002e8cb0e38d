"""Figures of part E: loss over steps, and steps to the common target by pooling."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.optimisers.figures import tint as tint_of_arm
from studies.optimisers.settings import ARMS
from studies.preconditioning.factorial.measures import COMMON, OWN, Factorial, interval
from studies.report.style import label, logarithmic, new_figure

TINTS = {"gauss_newton": "#D55E00"}
MARKERS = {"sgd": "o", "kfac": "s", "gauss_newton": "D"}


def tint(optimiser: str) -> str:
    """The colour of an optimiser, that of the optimiser study where it has one."""
    return TINTS.get(optimiser, tint_of_arm(optimiser))


def curves(table: pd.DataFrame, factorial: Factorial) -> Figure:
    """Training loss over steps, a panel for each pooling: each seed thin, the geometric mean thick; the targets dashed."""
    poolings = factorial.poolings
    figure, axes = new_figure(1, len(poolings), 3.0 * len(poolings) + 0.6, 3.3, sharey=True, sharex=True)
    for ax, pooling in zip(axes[0], poolings, strict=True):
        some = table[(table.pooling == pooling) & np.isfinite(table.loss) & (table.loss > 0)]
        for optimiser in factorial.optimisers:
            own = some[some.optimiser == optimiser]
            for _, run in own.groupby("seed"):
                ax.plot(run.step, run.loss, color=tint(optimiser), linewidth=0.5, alpha=0.6)
            mean = own.assign(log=np.log(own.loss)).groupby("step").log.mean().transform(np.exp)
            ax.plot(mean.index, mean, color=tint(optimiser), linewidth=1.8, label=ARMS[optimiser].label)
        for kind, dash, words in ((COMMON, (0, (4, 2)), "common target"), (OWN, (0, (1, 1.5)), "SGD's own final loss")):
            targets = [factorial.target(kind, pooling, seed) for seed in factorial.seeds]
            logs = [math.log(t) for t in targets if t is not None and t > 0]
            if logs:
                ax.axhline(math.exp(sum(logs) / len(logs)), color="#999999", linewidth=1.0, linestyle=dash, label=words)
        ax.set_title(label(pooling))
        ax.set_xlabel("step")
    axes[0, 0].set_ylabel("training loss")
    for ax in axes[0]:
        logarithmic(ax, "y")
    _legend(figure, axes[0, 0])
    return figure


def interactions(factorial: Factorial) -> Figure:
    """Steps to the target by pooling, a line for each optimiser: common target (left), SGD's own final loss (right)."""
    figure, axes = new_figure(1, 2, 8.6, 3.5)
    for ax, kind, words in (
        (axes[0, 0], COMMON, "the common target"),
        (axes[0, 1], OWN, "SGD's final loss, same head"),
    ):
        for number, optimiser in enumerate(factorial.optimisers):
            _line(ax, factorial, kind, optimiser, 0.09 * (number - (len(factorial.optimisers) - 1) / 2))
        ax.set_xticks(range(len(factorial.poolings)), [label(p) for p in factorial.poolings])
        ax.set_xlim(-0.4, len(factorial.poolings) - 0.6)
        ax.set_title(f"to {words}")
        ax.set_ylabel("steps")
        logarithmic(ax, "y")
    _legend(figure, axes[0, 0])
    return figure


def _line(ax: Axes, factorial: Factorial, kind: str, optimiser: str, shift: float) -> None:
    """Mean with its interval at each pooling, and the seeds beside it; open and pointing up where the target is not reached."""
    means: list[float] = []
    for place, pooling in enumerate(factorial.poolings):
        steps = [factorial.steps(kind, pooling, optimiser, seed) for seed in factorial.seeds]
        found = [s for s in steps if s is not None]
        for s in found:
            reached = math.isfinite(s.high)
            ax.plot(
                place + shift + 0.035,
                s.value,
                marker="." if reached else "^",
                markerfacecolor=tint(optimiser) if reached else "none",
                markeredgecolor=tint(optimiser),
                markersize=4 if reached else 5,
                alpha=0.7,
                linestyle="none",
            )
        logs = interval([s.log() for s in found])
        means.append(math.exp(logs.estimate) if found else math.nan)
        if math.isfinite(logs.low):  # the lower end alone where runs are censored
            top = math.exp(
                min(logs.high, math.log(max(s.value for s in found)) if math.isinf(logs.high) else logs.high)
            )
            ax.vlines(place + shift, math.exp(logs.low), top, color=tint(optimiser), linewidth=1.0)
    places = np.arange(len(means)) + shift
    style = {"color": tint(optimiser), "marker": MARKERS.get(optimiser, "o"), "markersize": 5}
    ax.plot(places, means, linewidth=1.4, label=ARMS[optimiser].label, **style)  # type: ignore[arg-type]


def _legend(figure: Figure, ax: Axes) -> None:
    handles, names = ax.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize="small", ncols=len(names), loc="outside upper center")
