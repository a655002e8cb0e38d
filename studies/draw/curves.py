"""Curves and bands over training: mean, interval and every seed, all heads in one panel."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from studies.draw.frame import checked, legend, limits, log_axis, panel_grid, themed
from studies.draw.palette import RULE, ZONE, colors, dashes
from studies.statistics import geometric_interval, mean_interval

Mean = Literal["arithmetic", "geometric"]


def means(table: pd.DataFrame, keys: list[str], y: str, mean: Mean) -> pd.DataFrame:
    """Mean of `y` over seeds with its 95 % t interval: `keys` as index, columns mean, low, high.

    A mean over seeds of which one is missing or not finite (or not positive, for a geometric mean) is nan: a network that
    diverged must not make the others' mean look like that of all.
    """
    seeds = table.seed.nunique()
    interval = geometric_interval if mean == "geometric" else mean_interval

    def row(values: "pd.Series[Any]") -> tuple[float, float, float]:
        if len(values) < seeds or (mean == "geometric" and not (values > 0).all()):
            return (np.nan, np.nan, np.nan)
        found = interval(values.to_numpy())
        return (found.estimate, found.low, found.high)

    rows = table.groupby(keys, sort=True)[y].agg(row)
    return pd.DataFrame(rows.to_list(), index=rows.index, columns=["mean", "low", "high"])


def each_seed(table: pd.DataFrame, keys: list[str], columns: list[str]) -> pd.DataFrame:
    """One row for each seed and each value of `keys`: seeds are what an interval counts, not layers or batches."""
    return table.groupby([*keys, "seed"], sort=True, dropna=False)[columns].mean().reset_index()


@dataclass(frozen=True)
class Curves:
    """`y` over `x`: thin lines the seeds, a thick line their mean, its 95 % t interval as a band; one colour for each `hue`.

    Axes are linear unless `log` names them (``"x"``, ``"y"``, ``"xy"``); panels share the range of `y` unless `same_y` is False.
    The range is that of the seeds: an interval that is wider runs off the panel.
    """

    x: str
    y: str
    hue: str = "head"
    panels: str | None = None
    x_label: str = ""
    y_label: str = ""
    mean: Mean = "arithmetic"
    log: str = ""
    reference: float | None = None
    zone: tuple[float, float] | None = None
    same_y: bool = True

    @themed
    def draw(self, table: pd.DataFrame) -> Figure:
        """The figure of a table with the columns `x`, `y`, `hue`, `panels` and seed; InputError if it lacks one."""
        data = checked(table, [self.hue, self.panels, "seed"], [self.x, self.y])
        seeds = each_seed(data, [c for c in (self.panels, self.hue, self.x) if c is not None], [self.y])
        words = list(dict.fromkeys(data[self.hue].astype(str)))
        order = list(dict.fromkeys(data[self.panels])) if self.panels else []
        seeds = seeds if self.panels is None else seeds.sort_values(self.panels, key=lambda v: v.map(order.index))
        figure, grid, parts = panel_grid(seeds, self.panels, 2.7, sharex=True, sharey=self.same_y)
        for value, axes in grid.items():
            self._panel(axes, parts[value], words)
        for axes, drawn in zip(grid.values(), parts.values(), strict=True):
            self._axes(axes, seeds if self.same_y else drawn)
        _label_outside(list(grid.values()), self.x_label or self.x, self.y_label or self.y)
        band = "seeds (bands: 95 % intervals)"
        legend(figure, words, extra=[Line2D([], [], color=RULE, linewidth=0.6, label=band)])
        return figure

    def _panel(self, axes: Axes, part: pd.DataFrame, words: list[str]) -> None:
        """Seeds, intervals and means of all words in one panel."""
        if self.zone is not None:
            axes.axhspan(*self.zone, color=ZONE, linewidth=0, zorder=0)
        if self.reference is not None:
            axes.axhline(self.reference, color=RULE, linewidth=1.0, zorder=1)
        palette, styles = colors(words), dashes(words)
        by_word = part.assign(**{self.hue: part[self.hue].astype(str)})
        visible = np.isfinite(part[self.y]) & ((part[self.y] > 0) | ("y" not in self.log))
        sns.lineplot(
            by_word[visible], x=self.x, y=self.y, hue=self.hue, palette=palette, units="seed", estimator=None,
            linewidth=0.6, alpha=0.45, legend=False, ax=axes, hue_order=[w for w in words if w in set(by_word[self.hue])],
        )  # fmt: skip
        for word in (word for word in words if (by_word[self.hue] == word).any()):
            mean = means(by_word[by_word[self.hue] == word], [self.x], self.y, self.mean)
            mean = mean.where(np.isfinite(mean))
            axes.fill_between(mean.index, mean.low, mean.high, color=palette[word], alpha=0.15, linewidth=0)
            axes.plot(mean.index, mean["mean"], color=palette[word], linewidth=1.8, dashes=styles[word] or (None, None))

    def _axes(self, axes: Axes, compared: pd.DataFrame) -> None:
        """The range of the seeds of all panels that are compared, and logarithmic axes."""
        marks = [value for value in (self.reference, *(self.zone or ())) if value is not None]
        ends = limits([compared[self.y].to_numpy(), np.array(marks)], "y" in self.log)
        if ends is not None:
            axes.set_ylim(ends)
        for which in self.log:
            log_axis(axes, which)


@dataclass(frozen=True)
class Bands:
    """Bands from the mean over seeds of `low` to that of `high`, over `x`; thin lines are the edges of each seed.

    The mean is geometric where the `y` axis is logarithmic (`log`) or `mean` says so.
    """

    x: str
    low: str
    high: str
    hue: str = "head"
    panels: str | None = None
    x_label: str = ""
    y_label: str = ""
    mean: Mean = "arithmetic"
    log: bool = False

    @themed
    def draw(self, table: pd.DataFrame) -> Figure:
        """The figure of a table with the columns `x`, `low`, `high`, `hue`, `panels` and seed; InputError if it lacks one."""
        data = checked(table, [self.hue, self.panels, "seed"], [self.x, self.low, self.high])
        words = list(dict.fromkeys(data[self.hue].astype(str)))
        figure, grid, parts = panel_grid(data, self.panels, 2.7, sharex=True, sharey=True)
        for value, axes in grid.items():
            self._panel(axes, parts[value], words)
        for axes in grid.values():
            ends = limits([data[self.low].to_numpy(), data[self.high].to_numpy()], self.log)
            if ends is not None:
                axes.set_ylim(ends)
            if self.log:
                log_axis(axes, "y")
        _label_outside(list(grid.values()), self.x_label or self.x, self.y_label or f"{self.low} to {self.high}")
        legend(figure, words, extra=[Line2D([], [], color=RULE, linewidth=0.6, label="edges of each seed")])
        return figure

    def _panel(self, axes: Axes, part: pd.DataFrame, words: list[str]) -> None:
        """The band of every word, its edges, and those of each seed."""
        palette, styles = colors(words), dashes(words)
        mean: Mean = "geometric" if self.log else self.mean
        for word in (word for word in words if (part[self.hue].astype(str) == word).any()):
            seeds = each_seed(part[part[self.hue].astype(str) == word], [self.x], [self.low, self.high])
            edges = [means(seeds, [self.x], edge, mean)["mean"] for edge in (self.low, self.high)]
            axes.fill_between(edges[0].index, edges[0], edges[1], color=palette[word], alpha=0.18, linewidth=0)
            for edge, line in zip((self.low, self.high), edges, strict=True):
                shown = seeds.assign(**{edge: seeds[edge].where((seeds[edge] > 0) | (not self.log))})
                sns.lineplot(
                    shown, x=self.x, y=edge, units="seed", estimator=None, color=palette[word], linewidth=0.5,
                    alpha=0.45, legend=False, ax=axes,
                )  # fmt: skip
                axes.plot(line.index, line, color=palette[word], linewidth=1.6, dashes=styles[word] or (None, None))


def _label_outside(grid: list[Axes], x: str, y: str) -> None:
    """Names of the axes at the left and lower edge of the panels only."""
    for axes in grid:
        place = axes.get_subplotspec()
        below = place is None or place.is_last_row() or len(grid) - grid.index(axes) <= place.get_gridspec().ncols - 1
        axes.set_xlabel(x if below else "")
        axes.set_ylabel(y if place is None or place.is_first_col() else "")
        if below:
            axes.tick_params(labelbottom=True)
