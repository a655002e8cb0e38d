"""Figure of K-FAC's step costs, from ``performance_kfac.csv`` and ``performance_kfac_parts.csv``."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.report.style import colour, label, logarithmic, new_figure

TINTS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")


def costs(table: pd.DataFrame, parts: pd.DataFrame) -> Figure:
    """Quantities relative to SGD's with their targets, and a stacked bar of the parts of the largest step, by head and method."""
    heads, quantities = list(dict.fromkeys(table.pooling)), list(dict.fromkeys(table.quantity))
    methods = list(dict.fromkeys(table.method))
    figure, axes = new_figure(len(heads), 2, 11.0, 0.6 + 2.6 * len(heads))
    offsets = (np.arange(len(methods)) - (len(methods) - 1) / 2) * 0.22
    for (left, right), head in zip(axes, heads, strict=True):
        for method, offset, tint in zip(methods, offsets, TINTS, strict=False):
            some = table[(table.pooling == head) & (table.method == method)].set_index("quantity").loc[quantities]
            places = np.arange(len(quantities)) + offset
            ends = some[["low", "high"]].where(np.isfinite(some[["low", "high"]]), some.estimate, axis=0)
            spread = np.array([some.estimate - ends.low, ends.high - some.estimate])
            style = {"fmt": "o", "color": tint, "markersize": 4, "capsize": 2}
            left.errorbar(some.estimate, places, xerr=spread, label=method, **style)
        targets = table[table.pooling == head].drop_duplicates("quantity").target
        left.plot(targets, np.arange(len(quantities)), "|", color="#000000", markersize=18, label="target: below")
        left.axvline(1.0, color=colour("gap"), linewidth=1.0, linestyle="--")
        left.set_yticks(np.arange(len(quantities)), quantities)
        left.invert_yaxis()
        logarithmic(left, "x")
        left.set_xlabel("times SGD's")
        left.set_title(label(head))
        _parts(right, parts[parts.pooling == head], methods)
        right.set_title(label(head))
    axes[0, 0].legend(frameon=False, fontsize="small")
    axes[0, 1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _parts(ax: Axes, parts: pd.DataFrame, methods: list[str]) -> None:
    """Stacked bars, one for each method."""
    start = np.zeros(len(methods))
    for part, tint in zip(dict.fromkeys(parts.part), TINTS, strict=False):
        lengths = parts[parts.part == part].set_index("method").sgd_steps.reindex(methods).fillna(0.0).to_numpy()
        ax.barh(methods, lengths, left=start, color=tint, label=part)
        start += lengths
    ax.invert_yaxis()
    ax.set_xlabel("SGD steps")
