"""Figure of the curvature quantities' costs, from ``performance_curvature.csv``."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from studies.report.style import colour, logarithmic, new_figure


def costs(table: pd.DataFrame) -> Figure:
    """Ratio of time and of peak memory to a forward and backward pass, for each quantity; targets and floors where known."""
    figure, axes = new_figure(1, 2, 10.0, 0.9 + 0.36 * len(table), sharey=True)
    places = np.arange(len(table))
    baseline = table.iloc[0]
    time, memory = axes[0]
    spread = np.array([table.ratio - table.low, table.high - table.ratio])
    time.errorbar(table.ratio, places, xerr=spread, fmt="o", color=colour("gcp"), capsize=3, label="measured")
    floor = table[["arithmetic_ms", "traffic_ms"]].max(axis=1) / baseline["median"]
    time.plot(floor, places, "x", color="#000000", label="floor")
    known = table.target.notna()
    time.plot(
        table.target[known], places[known], "|", color=colour("covariance"), markersize=14, label="target: at most"
    )
    memory.plot(table.peak_mib / baseline.peak_mib, places, "o", color=colour("gcp"))
    for ax, title in zip(axes[0], ("time", "peak memory"), strict=True):
        ax.axvline(1.0, color=colour("gap"), linewidth=1.0, linestyle="--")
        logarithmic(ax, "x")
        ax.set_xlabel(f"{title} / that of forward + backward")
        ax.grid(axis="x", which="both", linewidth=0.3)
    time.set_yticks(places, table.quantity)
    time.invert_yaxis()
    figure.legend(frameon=False, fontsize="small", ncols=3, loc="outside upper center")
    return figure
