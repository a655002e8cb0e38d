"""Contours of a value over two coordinates."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

from secondorder.errors import InputError
from studies.draw.frame import SMALL, checked, limits, log_ticks, panel_grid, themed
from studies.draw.maps import GREYS
from studies.draw.palette import INK

MOST_LEVELS = 10
"""As many greys can be told apart."""


@dataclass(frozen=True)
class Contours:
    """Mean of `value` over seeds on a grid of `x` and `y`: filled levels, lines with their values, a cross at the origin.

    All panels share their levels, darker for larger. Points whose value is not finite for some seed, or not positive where `log`,
    stay white. A table is that of a `secondorder.landscape.LandscapePlane`, with a column seed.
    """

    x: str
    y: str
    value: str
    panels: str | None = None
    x_label: str = ""
    y_label: str = ""
    value_label: str = ""
    log: bool = False

    @themed
    def draw(self, table: pd.DataFrame) -> Figure:
        """The figure of a table with the columns `x`, `y`, `value`, `panels` and seed.

        InputError if it lacks one, and unless each panel has two values of x and of y, and a number at each place of the grid.
        """
        data = checked(table, [self.panels, "seed"], [self.x, self.y, self.value])
        keys = [column for column in (self.panels, self.x, self.y) if column is not None]
        means = data.groupby(keys, sort=False)[self.value].mean().reset_index()
        shown = means[self.value].where((means[self.value] > 0) | (not self.log))
        levels = self._levels(shown)
        figure, grid = panel_grid(means.assign(**{self.value: shown}), self.panels, 3.0)
        filled = [self._panel(axes, part, levels) for axes, part in grid]
        bar = figure.colorbar(filled[0], ax=[axes for axes, _ in grid], fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
        if self.log:
            log_ticks(bar.ax.yaxis, levels[0], levels[-1])
        bar.set_label(self.value_label or self.value)
        return figure

    def _panel(self, axes: Axes, part: pd.DataFrame, levels: NDArray[np.float64]) -> QuadContourSet:
        """One plane."""
        grid = part.pivot(index=self.y, columns=self.x, values=self.value)
        rows, columns = grid.shape
        if min(rows, columns) < 2 or grid.size != len(part):
            raise InputError(
                f"contours need a full grid, got {len(part)} places of {columns} values of {self.x} and {rows} of {self.y}"
            )
        places = grid.columns.to_numpy(float), grid.index.to_numpy(float)
        heights = np.ma.masked_invalid(grid.to_numpy())
        filled = axes.contourf(*places, heights, levels, cmap=GREYS, norm=LogNorm() if self.log else None)
        lines = axes.contour(*places, heights, levels, colors=INK, linewidths=0.6)
        axes.clabel(lines, fmt=_name, fontsize=SMALL)
        if all(ends.min() <= 0 <= ends.max() for ends in places):
            axes.plot(0, 0, "+", color=INK, markersize=8, markeredgewidth=1.4)
        axes.set(xlabel=self.x_label or self.x, ylabel=self.y_label or self.y)
        return filled

    def _levels(self, values: pd.Series) -> NDArray[np.float64]:
        """Round numbers from the last one below all finite values to the first one above them."""
        low, high = limits([values], self.log, margin=0.0)
        if low == high:  # a plain has an edge on either side of it
            low, high = limits([values], self.log)
        decades = np.log10(high / low) if self.log else 0.0
        subs = (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
        locator = LogLocator(subs=subs) if decades >= 1 else MaxNLocator(MOST_LEVELS - 1)
        levels = np.asarray(locator.tick_values(low, high))
        return levels[max(0, np.searchsorted(levels, low, "right") - 1) : np.searchsorted(levels, high) + 1]


def _name(level: float) -> str:
    return f"{level:g}"
