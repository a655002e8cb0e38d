"""Figure of the performance study, from ``performance.csv``."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from studies.report.style import colour, new_figure

TINTS = {
    "textbook": colour("gap"),
    "gcp": colour("gcp"),
    "gcp, products": "#56B4E9",
    "gcp_exact": colour("gcp_exact"),
    "covariance": colour("covariance"),
    "one matrix product": "#000000",
}
NAMES = {
    "textbook": "textbook Newton-Schulz, plain autograd",
    "gcp": "gcp head (auto)",
    "gcp, products": "gcp head, matrix products only",
    "gcp_exact": "gcp_exact head (eigenvalues)",
    "covariance": "covariance head (no root)",
    "one matrix product": "bound: one product C × n by n × C, n = min(C, HW)",
}


def times(summary: pd.DataFrame) -> Figure:
    """Median time and peak memory of every variant at every shape; whiskers are the quartiles over repeats.

    `summary` has one row for each shape and variant, with the columns shape, variant, median, low, high, peak_mib.
    """
    shapes = list(dict.fromkeys(summary["shape"]))
    variants = list(dict.fromkeys(summary.variant))
    figure, axes = new_figure(1, 2, 10.5, 3.8)
    offsets = (np.arange(len(variants)) - (len(variants) - 1) / 2) * 0.7 / len(variants)
    for variant, offset in zip(variants, offsets, strict=True):
        some = summary[summary.variant == variant].set_index("shape").loc[shapes]
        places = np.arange(len(shapes)) + offset
        spread = np.array([some["median"] - some.low, some.high - some["median"]])
        marker = {"color": TINTS.get(variant, "#999999"), "markersize": 6, "linestyle": "none", "marker": "o"}
        axes[0, 0].errorbar(places, some["median"], yerr=spread, capsize=3, label=NAMES.get(variant, variant), **marker)
        axes[0, 1].plot(places, some.peak_mib, **marker)
    for ax, title in zip(axes[0], ("forward + backward [ms]", "peak memory [MiB]"), strict=True):
        ax.set_yscale("log")
        ax.set_ylabel(title)
        ax.set_xticks(range(len(shapes)), shapes)
        ax.set_xlabel("features, N × C × H × W")
        ax.grid(axis="y", which="both", linewidth=0.3)
    figure.legend(frameon=False, fontsize="small", ncols=3, loc="outside lower center")
    return figure
