"""The figure of part A: the features' spectrum, and the condition number of heads by steps, over training, and by autograd."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.preconditioning.heads.measure import PROBED
from studies.preconditioning.heads.reading import prepared
from studies.preconditioning.reading import at_the_end, backbone_name
from studies.preconditioning.situation import UNTRAINED
from studies.report.style import COLOURS, logarithmic, mean_and_seeds, new_figure

BACKBONES = {UNTRAINED: COLOURS["dropcov"], "gap": COLOURS["gap"], "gcp": COLOURS["gcp"]}
FUNCTIONS = {
    "covariance": COLOURS["covariance"],
    "logarithm": COLOURS["gcp_log"],
    "power 1/4": COLOURS["dropcov"],
    "power 3/4": "#56B4E9",
    "5 steps": COLOURS["gcp"],
    "exact root": COLOURS["gcp_exact"],
}
ROOT2 = 2**0.5


def conditioning(table: pd.DataFrame) -> Figure:
    """Four panels: spectrum; condition by Newton-Schulz steps; condition over training; the closed form beside autograd."""
    table = prepared(table)
    figure, axes = new_figure(2, 2, 9.2, 7.2)
    end = at_the_end(table)
    _spectrum(axes[0, 0], end)
    _by_steps(axes[0, 1], end)
    _over_training(axes[1, 0], table)
    _by_autograd(axes[1, 1], end)
    return figure


def _spectrum(ax: Axes, end: pd.DataFrame) -> None:
    shares = end[end.name == "features"]
    for backbone, tint in _backbones(end):
        own = shares[shares.backbone == backbone]
        median = own[(own.measure == "share_median") & (own.value > 0)]
        _band(ax, own, "share", tint)
        mean_and_seeds(ax, median.sort_values("setting"), "setting", "value", tint=tint, name=backbone_name(backbone))
    logarithmic(ax, "x")
    logarithmic(ax, "y")
    ax.set(xlabel="rank of the eigenvalue", ylabel="eigenvalue / trace, median over images")
    ax.set_title("spectrum of the features")
    ax.legend(frameon=False, fontsize="small")


def _by_steps(ax: Axes, end: pd.DataFrame) -> None:
    steps = end[end["head"] == "gcp"]
    for backbone, tint in _backbones(end):
        own = steps[steps.backbone == backbone]
        _band(ax, own, "condition", tint)
        median = own[own.measure == "condition_median"].sort_values("setting")
        mean_and_seeds(ax, median, "setting", "value", tint=tint, name=backbone_name(backbone))
        plain = end[(end.backbone == backbone) & (end.name == "covariance") & (end.measure == "condition_median")]
        ax.axhline(np.exp(np.log(plain.value).mean()), color=tint, linewidth=0.8, linestyle=":")
    ax.axhline(ROOT2, color=COLOURS["gcp_exact"], linewidth=1.0, linestyle="--")
    logarithmic(ax, "y")
    ax.set(xlabel="Newton-Schulz steps", ylabel="condition number, median over images")
    ax.set_title("dotted: covariance without root; dashed: √2")


def _over_training(ax: Axes, table: pd.DataFrame) -> None:
    """The untrained backbone is where both trainings begin."""
    some = table[table.measure == "condition_median"]
    for name, tint in FUNCTIONS.items():
        for backbone, style in (("gap", "--"), ("gcp", "-")):
            if backbone in set(some.backbone):
                own = some[(some.name == name) & some.backbone.isin((UNTRAINED, backbone))]
                mean = np.exp(np.log(own.value).groupby(own.moment).mean())
                width = 3.0 if name == "power 1/4" else 1.4  # powers 1/4 and 3/4 coincide on features of full rank
                ax.plot(mean.index, mean, style, color=tint, marker="o", markersize=3, linewidth=width)
        ax.plot([], [], color=tint, label=name)
    ax.axhline(ROOT2, color="#999999", linewidth=0.8, linestyle=":")
    ax.set_ylim(1.0, ax.get_ylim()[1] * 8)  # room for the legend
    logarithmic(ax, "y")
    ax.set(xlabel="fraction of training", ylabel="condition number, median over images")
    ax.set_title("solid: trained under GCP; dashed: GAP; dotted: √2")
    ax.legend(frameon=False, fontsize="small", ncols=2, loc="upper left")


def _by_autograd(ax: Axes, end: pd.DataFrame) -> None:
    """Of one seed, one image and some channels: closed form as lines, the Jacobian's own singular values as points."""
    some = end[end.seed == end.seed.min()]
    for backbone, tint in _backbones(end):
        own = some[some.backbone == backbone].sort_values("setting")
        steps = own[own["head"] == "gcp"]
        lines, points = (steps[steps.measure == name] for name in ("closed_condition", "jacobian_condition"))
        ax.plot(lines.setting, lines.value, color=tint, linewidth=1.0, label=backbone_name(backbone))
        ax.plot(points.setting, points.value, "o", color=tint, markersize=4, markerfacecolor="none")
        for name, style in (("covariance", ":"), ("exact root", "--")):
            level, measured = (
                own[(own.name == name) & (own.measure == m)].value for m in ("closed_condition", "jacobian_condition")
            )
            for value in level:
                ax.axhline(value, color=tint, linewidth=0.8, linestyle=style)
            ax.plot([0.5] * len(measured), measured, "s", color=tint, markersize=4, markerfacecolor="none")
    logarithmic(ax, "y")
    ax.set(xlabel="Newton-Schulz steps", ylabel="condition number, one image")
    ax.set_title(f"lines: closed form; points: autograd (≤ {PROBED} channels)")
    ax.legend(frameon=False, fontsize="small")


def _backbones(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The measured backbones with their colours."""
    return [(name, BACKBONES.get(name, "#000000")) for name in table.backbone.unique()]


def _band(ax: Axes, own: pd.DataFrame, measure: str, tint: str) -> None:
    """Quartiles over images, geometric means over seeds."""
    low, high = (
        np.exp(np.log(some.value).groupby(some.setting).mean())
        for some in (own[(own.measure == f"{measure}_{end}") & (own.value > 0)] for end in ("q25", "q75"))
    )
    both = low.index.intersection(high.index)
    ax.fill_between(both, low[both], high[both], color=tint, alpha=0.15, linewidth=0)
