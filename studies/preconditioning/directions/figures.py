"""Figures of part C, from the rows of ``preconditioning.csv``."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.preconditioning.directions.measure import CONTROLS, NATURAL, NATURAL_DAMPING
from studies.preconditioning.directions.reading import GAIN, PLAIN, Readings, band
from studies.preconditioning.reading import backbone_name
from studies.report.style import colour, label, logarithmic, new_figure

COSINES = {
    "plain": ("cos(g GCP, g GAP)", colour("gap"), "-"),
    "preconditioned": ("cos(g GCP, P g GAP)", colour("gcp"), "-"),
    "turn": ("cos(g GAP, P g GAP)", "#E69F00", "--"),
}
"""The three cosines: name, colour, line."""
LINES = {"gcp": "-", "covariance": "-", "random": "--", "permuted": ":"}
TINTS = {"gcp": colour("gcp"), "covariance": colour("covariance"), "random": "#009E73", "permuted": "#CC79A7"}
HEADS = {
    "gcp": "GCP",
    "covariance": label("covariance"),
    "random": "GCP, random classifier",
    "permuted": "GCP, permuted labels",
}
"""The heads for a reader."""
SWEPT = {GAIN: "cos(g, P g GAP) − cos(g, g GAP)", "partial": "partial correlation of g\nand P g GAP given g GAP"}


def by_layer(found: Readings) -> Figure:
    """The three cosines of GCP and the partial correlations, first to last convolution; a column a backbone.

    Above those of the reference images' gradient, below the partial correlations of single mini-batches.
    """
    count = len(found.backbones)
    layers = [str(layer) for layer in found.layers(found.backbones[0], "turn", "gap", found.default).layer.unique()]
    figure, axes = new_figure(3, count, 2.7 * count + 1.5, 7.6, sharex=True, sharey="row")
    for backbone, (cosines, partial, single) in zip(found.backbones, axes.T, strict=True):
        for measure, (name, tint, line) in COSINES.items():
            setting, head = (PLAIN if measure == "plain" else found.default), ("gap" if measure == "turn" else "gcp")
            values = dict(list(found.layers(backbone, measure, head, setting).groupby("layer").value))
            _banded(cosines, values, layers, tint, line, name)
        for head in ("gcp", *found.controls):
            for ax, rows in ((partial, found.layers), (single, found.rows)):
                values = dict(list(rows(backbone, "partial", head, found.default).groupby("layer").value))
                _banded(ax, values, layers, TINTS[head], LINES[head], HEADS[head])
        cosines.set_title(backbone_name(backbone))
        for ax in (cosines, partial, single):
            ax.axhline(0.0, color="black", linewidth=0.6)
        words = [layer.removeprefix("features.") if layer.count(".") > 1 else layer for layer in layers]
        single.set_xticks(range(len(layers)), words, rotation=40, ha="right", rotation_mode="anchor", fontsize="small")
        single.set_xlabel("convolution, first to last")
    axes[0, 0].set_ylabel(f"cosine, damping {found.default:g}")
    axes[1, 0].set_ylabel(SWEPT["partial"])
    axes[2, 0].set_ylabel("the same of\nsingle mini-batches")
    for ax in axes[:, -1]:
        ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def sweep(found: Readings) -> Figure:
    """What preconditioning gains, and the partial correlation, over the damping; a column a backbone."""
    count = len(found.backbones)
    figure, axes = new_figure(2, count, 2.7 * count + 1.5, 5.6, sharex=True, sharey="row")
    for row, (measure, title) in enumerate(SWEPT.items()):
        for column, backbone in enumerate(found.backbones):
            ax = axes[row, column]
            for head in ("gcp", *found.controls):
                values = {d: found.per_seed(backbone, measure, head, d) for d in found.dampings}
                _banded(ax, values, found.dampings, TINTS[head], LINES[head], HEADS[head])
            means = [found.average(backbone, measure, "gcp", d, batches=True) for d in found.dampings]
            ax.plot(found.dampings, means, "-.", color=colour("gcp"), linewidth=0.9, label="GCP, mini-batches")
            _natural(ax, found.per_seed(backbone, measure, "gcp", NATURAL))
            ax.axhline(0.0, color="black", linewidth=0.6)
            ax.axvline(found.default, color="black", linewidth=0.6, linestyle=":")
            logarithmic(ax, "x")
            if row == 0:
                ax.set_title(backbone_name(backbone))
            else:
                ax.set_xlabel("damping, relative")
        axes[row, 0].set_ylabel(title)
    axes[0, -1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _banded(ax: Axes, values: Mapping, order: Sequence, tint: str, line: str, name: str) -> None:
    """Means of several values along `order`, with bootstrap bands; words are evenly spaced."""
    shown = [(place, x) for place, x in enumerate(order) if len(values.get(x, ()))]
    if not shown:
        return
    middle, low, high = np.array([band(values[x]) for _, x in shown]).T
    places = [place if isinstance(x, str) else x for place, x in shown]
    thick = 0.9 if name in [HEADS[head] for head in CONTROLS] else 1.6
    ax.plot(places, middle, line, color=tint, linewidth=thick, marker=".", markersize=4, label=name)
    ax.fill_between(places, low, high, color=tint, alpha=0.2, linewidth=0)


def _natural(ax: Axes, values: pd.Series) -> None:
    """GCP with the exact natural gradient, at its damping."""
    if values.empty:
        return
    middle, low, high = band(values)
    bars = [[middle - low], [high - middle]]
    ax.errorbar(
        [NATURAL_DAMPING], [middle], bars, color="black", marker="D", markersize=4, linewidth=0.9, label="GCP, exact P"
    )
