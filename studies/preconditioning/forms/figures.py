"""The figure of part B: cosine and error of each form of the backward pass, by layer, over training."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.preconditioning.situation import UNTRAINED
from studies.report.style import COLOURS, logarithmic, new_figure

FORMS = {
    "newton_schulz": ("published head, 5 steps", COLOURS["gcp"]),
    "trimmed_rotated": ("trimmed, eigenvectors kept", COLOURS["dropcov"]),
    "unpreconditioned": ("no preconditioner", COLOURS["covariance"]),
    "trimmed": ("trimmed, as printed", COLOURS["gcp_log"]),
}
"""Form -> its name for a reader and its colour."""
MEASURES = {
    "cosine": "cosine to exact, dL/dX",
    "relative_error": "relative error, dL/dX",
    "weight_cosine": "cosine to exact, dL/dW",
}


def over_training(table: pd.DataFrame) -> Figure:
    """A row a measure, a column a layer; the untrained backbone is where both trainings begin."""
    layers = list(table.layer.unique())
    figure, axes = new_figure(len(MEASURES), len(layers), 2.6 * len(layers) + 1.6, 7.6, sharex=True, sharey="row")
    for row, (measure, title) in enumerate(MEASURES.items()):
        for column, layer in enumerate(layers):
            some = table[(table.layer == layer) & (table.measure == measure)]
            _lines(axes[row, column], some)
        if measure == "relative_error":
            logarithmic(axes[row, 0], "y")
        axes[row, 0].set_ylabel(title)
    for column, layer in enumerate(layers):
        axes[0, column].set_title(layer)
        axes[-1, column].set_xlabel("fraction of training")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize="small", ncols=2, loc="outside upper center")
    return figure


def _lines(ax: Axes, some: pd.DataFrame) -> None:
    for form, (name, tint) in FORMS.items():
        for backbone, style in (("gap", "--"), ("gcp", "-")):
            if backbone in set(some.backbone):
                own = some[(some.setting == form) & some.backbone.isin((UNTRAINED, backbone))]
                seeds = own.groupby("moment").value.agg(["mean", "min", "max"])
                ax.fill_between(seeds.index, seeds["min"], seeds["max"], color=tint, alpha=0.15, linewidth=0)
                ax.plot(seeds.index, seeds["mean"], style, color=tint, marker="o", markersize=3, linewidth=1.3)
        ax.plot([], [], color=tint, label=name)
    ax.axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
