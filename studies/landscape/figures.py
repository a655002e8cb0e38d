"""Figures of the landscape study, from ``landscape.csv`` and ``landscape_training.csv``."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.report.style import colour, label, logarithmic, mean_and_seeds, new_figure
from studies.statistics import Comparison

PUBLISHED = ("feature", "ascent")
BANDS = {"loss": "loss L(X + ηg)", "gradient_distance": "‖g(X + ηg) − g(X)‖₂"}
WIDTHS = {
    "loss_variation": "loss variation\nmax L − min L",
    "gradient_distance": "gradient distance\nmax ‖g(η) − g(0)‖₂",
}


def bands(lines: pd.DataFrame) -> Figure:
    """The published figure: band min..max over eta along X + eta g at every measured step, one column for each head.

    The edges are geometric means over seeds (the axes are logarithmic), thin lines the seeds' own edges.
    """
    heads = list(lines.pooling.unique())
    figure, axes = new_figure(len(BANDS), len(heads), 3.4 * len(heads) + 0.6, 5.4, sharex=True, sharey="row")
    on_line = lines[(lines.space == PUBLISHED[0]) & (lines.direction == PUBLISHED[1])]
    for row, (quantity, title) in enumerate(BANDS.items()):
        for column, pooling in enumerate(heads):
            _band(axes[row, column], on_line[on_line.pooling == pooling], quantity, colour(pooling))
        axes[row, 0].set_ylabel(title)
        for ax in axes[row]:
            logarithmic(ax, "y")
    for column, pooling in enumerate(heads):
        axes[0, column].set_title(label(pooling))
        axes[-1, column].set_xlabel("training step")
    return figure


def _band(ax: Axes, lines: pd.DataFrame, quantity: str, tint: str) -> None:
    per_seed = lines.groupby(["step", "seed"])[quantity].agg(["min", "max"])
    per_seed = per_seed.where(per_seed > 0)  # a logarithmic axis has no place for zero
    edges = per_seed.transform("log").groupby("step").mean().transform("exp")
    ax.fill_between(edges.index, edges["min"], edges["max"], color=tint, alpha=0.25, linewidth=0)
    for edge in ("min", "max"):
        ax.plot(edges.index, edges[edge], color=tint, linewidth=1.4)
        for _, own in per_seed[edge].groupby("seed"):
            ax.plot(own.index.get_level_values("step"), own.to_numpy(), color=tint, linewidth=0.5, alpha=0.6)


def widths(by_step: pd.DataFrame, lines: Mapping[str, str]) -> Figure:
    """Loss variation and largest gradient distance over training, for each line; geometric mean over seeds, thin lines each seed.

    `by_step` has one row for each pooling, seed, space, direction and step; `lines` gives the name of each
    "<space> <direction>", in the order shown.
    """
    figure, axes = new_figure(len(WIDTHS), len(lines), 10.5, 5.4, sharex=True)
    for row, (quantity, title) in enumerate(WIDTHS.items()):
        for column, (line, line_title) in enumerate(lines.items()):
            ax = axes[row, column]
            some = by_step[by_step.space + " " + by_step.direction == line]
            for pooling in by_step.pooling.unique():
                own = some[some.pooling == pooling]
                mean_and_seeds(ax, own, "step", quantity, tint=colour(pooling), name=label(pooling))
            logarithmic(ax, "y")
            if row == 0:
                ax.set_title(line_title)
            else:
                ax.set_xlabel("training step")
        axes[row, 0].set_ylabel(title)
    axes[0, 0].legend(frameon=False, fontsize="small")
    return figure


def ratios(comparisons: Sequence[Comparison], lines: Mapping[str, str], quantities: Mapping[str, str]) -> Figure:
    """Every comparison as a ratio to GAP with its interval; left of 1: smoother than GAP.

    `lines` and `quantities` give the names of the comparisons' conditions and quantities, in the order shown.
    """
    heads = list(dict.fromkeys(c.pooling for c in comparisons))
    figure, axes = new_figure(1, len(lines), 3.2 * len(lines) + 1.2, 1.3 + 0.38 * len(quantities), sharey=True)
    shifts = dict(zip(heads, np.linspace(-0.18, 0.18, len(heads)) if len(heads) > 1 else [0.0], strict=True))
    for ax, (line, title) in zip(axes[0], lines.items(), strict=True):
        for pooling in heads:
            ax.plot([], [], "o-", color=colour(pooling), markersize=4, label=label(pooling))
        for one in (c for c in comparisons if c.condition == line):
            height = list(quantities).index(one.quantity) + shifts[one.pooling]
            ax.plot([one.interval.estimate], [height], "o", color=colour(one.pooling), markersize=4)
            if np.isfinite([one.interval.low, one.interval.high]).all():
                ax.plot([one.interval.low, one.interval.high], [height] * 2, color=colour(one.pooling), linewidth=1.6)
        ax.axvline(1.0, color=colour("gap"), linewidth=1.0, linestyle="--", label="GAP = 1")
        logarithmic(ax, "x")
        ax.set_title(title)
    axes[0, 0].set_yticks(range(len(quantities)), list(quantities.values()))
    axes[0, 0].invert_yaxis()
    figure.supxlabel("ratio to GAP, geometric mean over seeds with 95 % interval (left of 1: smoother)", fontsize=9)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize="small", ncols=len(names), loc="outside upper center")
    return figure


def training(epochs: pd.DataFrame) -> Figure:
    """Training loss and test error over epochs; geometric mean over seeds, thin lines each seed."""
    figure, axes = new_figure(1, 2, 8.0, 3.0)
    table = epochs.assign(test_error=100.0 * (1.0 - epochs.test_top1))
    columns = {"train_loss": "training loss", "test_error": "test error [%]"}
    for ax, (column, title) in zip(axes[0], columns.items(), strict=True):
        for pooling in table.pooling.unique():
            some = table[table.pooling == pooling]
            mean_and_seeds(ax, some, "epoch", column, tint=colour(pooling), name=label(pooling))
        logarithmic(ax, "y")
        ax.set_xlabel("epoch")
        ax.set_ylabel(title)
    axes[0, 0].legend(frameon=False, fontsize="small")
    return figure
