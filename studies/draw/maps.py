"""Maps of a value over two settings."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from studies.draw.frame import SMALL, checked, limits, log_ticks, panel_grid, themed
from studies.draw.numbers import rounded
from studies.draw.palette import INK, label
from studies.statistics import Interval, mean_interval

MOST_CELLS = 10
"""Side by side: so wide is the word "diverged"."""
GREYS = sns.light_palette("#6F6F6F", as_cmap=True)
SIGNS = (200, 40)
"""Hues below and above 0, in degrees: a blue and an orange that no head has."""


@dataclass(frozen=True)
class Heatmap:
    """Mean of `value` over seeds by `rows` and `columns`, with half the width of its 95 % interval; the best cell framed.

    Cells whose value is not finite for some seed read "diverged". All panels share one scale of greys, darker for larger.
    A `signed` value has two colours, paler towards 0, and words in bold where the interval excludes 0.
    """

    rows: str
    columns: str
    value: str
    panels: str | None = None
    row_label: str = ""
    column_label: str = ""
    value_label: str = ""
    best: Literal["lowest", "highest", ""] = "lowest"
    log: bool = False
    signed: bool = False

    @themed
    def draw(self, table: pd.DataFrame) -> Figure:
        """The figure of a table with the columns `rows`, `columns`, `value`, `panels` and seed; InputError if it lacks one."""
        data = checked(table, [self.rows, self.columns, self.panels, "seed"], [self.value])
        keys = [column for column in (self.panels, self.rows, self.columns) if column is not None]
        seeds = data.groupby([*keys, "seed"], sort=False)[self.value].mean()
        found = {place: mean_interval(values) for place, values in seeds.groupby(keys, sort=False)}
        cells = pd.DataFrame(found.keys(), columns=keys)
        cells["mean"] = [interval.estimate for interval in found.values()]
        cells["words"] = [_words(interval) for interval in found.values()]
        cells["sure"] = [self.signed and np.isfinite(i.low) and i.low * i.high > 0 for i in found.values()]
        across = max(1, MOST_CELLS // data[self.columns].nunique())
        figure, grid = panel_grid(cells, self.panels, 0.9 + 0.4 * data[self.rows].nunique(), across)
        ends = limits([cells["mean"].abs(), -cells["mean"].abs()] if self.signed else [cells["mean"]], self.log)
        norm = (LogNorm if self.log else Normalize)(*ends)
        for axes, part in grid:
            self._panel(axes, self._map(part), norm)
        every = [axes for axes, _ in grid]
        bar = figure.colorbar(every[0].collections[0], ax=every, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
        if self.log:
            log_ticks(bar.ax.yaxis, *ends)
        bar.set_label(self.value_label or self.value)
        return figure

    def _map(self, part: pd.DataFrame) -> pd.DataFrame:
        """The cells of a panel by row and column: words in the order of the table, numbers by size."""
        cells = part.pivot(index=self.rows, columns=self.columns)
        words = not pd.api.types.is_numeric_dtype(part[self.rows])
        return cells.reindex(part[self.rows].unique()) if words else cells

    def _panel(self, axes: Axes, cells: pd.DataFrame, norm: Normalize) -> None:
        """One map: a grey for each mean, its number in the cell."""
        mean = pd.DataFrame(cells["mean"])
        colors = sns.diverging_palette(*SIGNS, s=60, l=62, as_cmap=True) if self.signed else GREYS
        sns.heatmap(
            mean, norm=norm, cmap=colors, cbar=False, linewidths=1.0, linecolor="white",
            xticklabels=[_name(value) for value in mean.columns], yticklabels=[_name(value) for value in mean.index], ax=axes,
        )  # fmt: skip
        axes.tick_params(axis="both", rotation=0)
        axes.set(xlabel=self.column_label or self.columns, ylabel=self.row_label or self.rows)
        bold = cells["sure"].eq(True).to_numpy()
        for (row, column), word in np.ndenumerate(cells["words"].fillna("").to_numpy()):
            weight = "bold" if bold[row, column] else "normal"
            axes.text(column + 0.5, row + 0.5, word, ha="center", va="center", fontsize=SMALL, color=INK, weight=weight)
        if self.best and np.isfinite(mean.to_numpy()).any():
            choose = np.nanargmin if self.best == "lowest" else np.nanargmax
            row, column = divmod(int(choose(mean.to_numpy())), mean.shape[1])
            axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=INK, linewidth=1.8, clip_on=False))


def _words(found: Interval) -> str:
    """The mean, and below it half of the interval's width."""
    half = found.high - found.estimate
    if not np.isfinite(found.estimate):
        return "diverged"
    return "\n±".join(rounded(half, found.estimate, half) if np.isfinite(half) else rounded(half, found.estimate))


def _name(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else label(value)
