"""What the landscape study found, computed from ``landscape.csv`` and ``landscape_training.csv``."""

import math
from pathlib import Path

import pandas as pd
import torch

from secondorder.networks import NETWORKS, network
from studies.landscape import figures
from studies.report.section import Claim, Picture, Section, Table
from studies.report.style import label
from studies.results import Provenance, read_provenance, read_table
from studies.statistics import Comparison, mean_interval, ratio_interval

# The measured lines, "<space> <direction>" as in the table.
LINES = {
    "feature ascent": "features, +g (published)",
    "feature descent": "features, −g",
    "weight step": "weights, optimiser's step",
}
PUBLISHED = "feature ascent"
QUANTITIES = {
    "loss_variation": "loss variation",
    "gradient_distance": "gradient distance",
    "beta": "effective β",
    "relative_gradient_distance": "relative gradient distance",
    "turning": "turning 1 − cos",
}
STATEMENTS = {
    "loss_variation": "The loss of GCP varies less than that of GAP (a smaller Lipschitzness band).",
    "gradient_distance": "The gradients of GCP are more predictive than those of GAP (a smaller ‖g(η) − g(0)‖).",
    "beta": "The effective β-smoothness constant of GCP is smaller than that of GAP.",
    "relative_gradient_distance": "Free of the gradient's scale: ‖g(η) − g(0)‖ / ‖g(0)‖ is smaller under GCP.",
    "turning": "The direction alone: the gradient of GCP turns less (1 − cos).",
}
# The quantities that the paper shows on its line; everything else goes beyond it.
PUBLISHED_QUANTITIES = ("loss_variation", "gradient_distance")
LINE_KEYS = ["pooling", "seed", "space", "direction", "step"]
MEASURED = ["loss", "gradient_distance", "cosine", "beta"]
COLUMNS = (*LINE_KEYS, "eta", *MEASURED, "gradient_norm")


def by_step(lines: pd.DataFrame) -> pd.DataFrame:
    """One row for each pooling, seed, line and step with the QUANTITIES of that line.

    max L - min L, max ||g(eta) - g||, max beta, max ||g(eta) - g|| / ||g||, max (1 - cos), all over eta. A line with a value
    that is not finite is infinite throughout, so that a head that diverges does not look smooth.
    """
    table = lines.assign(
        relative_gradient_distance=lines.gradient_distance / lines.gradient_norm,
        turning=1.0 - lines.cosine,
        finite=lines[MEASURED].map(math.isfinite).all(axis=1),
        at_lowest_eta=lines.eta.where(lines.beta == lines.groupby(LINE_KEYS).beta.transform("max")),
    )
    widths = table.groupby(LINE_KEYS, sort=False).agg(
        low=("loss", "min"),
        high=("loss", "max"),
        gradient_distance=("gradient_distance", "max"),
        beta=("beta", "max"),
        relative_gradient_distance=("relative_gradient_distance", "max"),
        turning=("turning", "max"),
        finite=("finite", "all"),
        beta_at_lowest_eta=("at_lowest_eta", "min"),
        lowest_eta=("eta", "min"),
    )
    widths = widths.assign(loss_variation=widths.high - widths.low)
    # a step of length zero (learning rate 0) has no beta and no band: that is no divergence
    still = (widths.loss_variation == 0) & (widths.gradient_distance == 0)
    widths.loc[~widths.finite & ~still, list(QUANTITIES)] = math.inf
    widths.loc[still, list(QUANTITIES)] = 0.0
    return widths.reset_index()


def comparisons(widths: pd.DataFrame, reference: str = "gap") -> list[Comparison]:
    """Ratios to the reference head for every line, quantity and other head; none without reference.

    For each seed the geometric mean over the measured steps of the ratio at that step. A step where either value is zero
    has no ratio and is left out of both; a value that is not finite leaves the whole comparison undecided.
    """
    if reference not in set(widths.pooling):
        return []
    found = []
    for line in LINES:
        some = widths[widths.space + " " + widths.direction == line]
        for key in QUANTITIES:
            values = some.pivot(index=["seed", "step"], columns="pooling", values=key)
            for pooling in (p for p in widths.pooling.unique() if p != reference):
                pair = values[[pooling, reference]].dropna()  # measured under both heads
                kept = pair[(pair != 0).all(axis=1)]
                means = kept.transform("log").groupby("seed").mean().transform("exp")
                interval = ratio_interval(means[pooling], means[reference])
                found.append(Comparison(pooling, line, key, interval, len(pair) - len(kept)))
    return found


def section(folder: Path) -> Section:
    """The section of the report for the results in `folder`."""
    lines = read_table(folder, "landscape", COLUMNS)
    epochs = read_table(folder, "landscape_training", ("pooling", "seed", "epoch", "train_loss", "test_top1"))
    origin = read_provenance(folder, "landscape")
    widths = by_step(lines)
    compared = {"gap", "gcp"} <= set(lines.pooling)
    found = comparisons(widths)
    claims = _claims(found) + _control(widths) if compared else []
    pictures = [
        Picture("landscape", _bands_caption(origin, claims), figures.bands(lines)),
        Picture("landscape_widths", _widths_caption(origin, found), figures.widths(widths, LINES)),
        Picture("landscape_training", _training_caption(origin, epochs), figures.training(epochs)),
    ]
    tables = [Table("landscape_accuracy", _scope(origin) + " Mean over seeds with 95 % t interval.", accuracy(epochs))]
    if found:
        pictures.insert(
            2, Picture("landscape_ratios", _ratios_caption(origin, found), figures.ratios(found, LINES, QUANTITIES))
        )
        caption = "Ratios to GAP: geometric means over the measured steps, then over seeds. Below 1: smoother than GAP."
        tables.insert(0, Table("landscape_summary", caption, _printed(found)))
    return Section(
        title="Landscape: is the loss smoother under GCP?",
        question="Wang et al. (2020) report that the loss of a GCP network varies less along its gradient, and that its "
        "gradients are more predictive, than those of a GAP network.",
        method=_method(origin),
        provenance=origin,
        claims=claims,
        remarks=_remarks(origin, found, widths)
        if compared
        else ["Without runs of both GAP and GCP no claim can be judged."],
        pictures=pictures,
        tables=tables,
    )


def accuracy(epochs: pd.DataFrame) -> pd.DataFrame:
    """Results of the last epoch for each head, mean over seeds with the ends of the interval."""
    last = epochs[epochs.epoch == epochs.epoch.max()]
    rows = []
    for pooling, some in last.groupby("pooling", sort=False):
        loss, top1 = mean_interval(some.train_loss), mean_interval(100 * some.test_top1)
        rows.append(
            {
                "head": label(str(pooling)),
                "training loss": loss.estimate,
                "its low": loss.low,
                "its high": loss.high,
                "test top-1 [%]": top1.estimate,
                "low": top1.low,
                "high": top1.high,
                "n": top1.n,
                "training seconds": some.seconds.mean(),
            }
        )
    return pd.DataFrame(rows)


def _claims(found: list[Comparison]) -> list[Claim]:
    """What the paper shows, then other quantities and lines."""
    gcp = [c for c in found if c.pooling == "gcp"]
    published = [c for c in gcp if c.condition == PUBLISHED and c.quantity in PUBLISHED_QUANTITIES]
    beyond = [c for c in gcp if c.condition == PUBLISHED and c.quantity not in PUBLISHED_QUANTITIES]
    beyond += [c for c in gcp if c.condition != PUBLISHED and c.quantity in (*PUBLISHED_QUANTITIES, "beta")]
    return [
        Claim(
            STATEMENTS[c.quantity],
            f"GCP / GAP, {QUANTITIES[c.quantity]}, {LINES[c.condition]}",
            c.interval,
            group="in the paper" if c in published else "beyond the paper",
        )
        for c in published + beyond
    ]


def _control(widths: pd.DataFrame) -> list[Claim]:
    """Is it the root, or do second-order statistics suffice? GCP against covariance pooling without the root."""
    return [
        Claim(
            "With the root the loss varies less than without it.",
            f"GCP / covariance, {QUANTITIES[c.quantity]}, {LINES[c.condition]}",
            c.interval,
            group="control",
        )
        for c in comparisons(widths, reference="covariance")
        if (c.pooling, c.condition, c.quantity) == ("gcp", PUBLISHED, "loss_variation")
    ]


def _remarks(origin: Provenance, found: list[Comparison], widths: pd.DataFrame) -> list[str]:
    published = {(c.pooling, c.quantity): c for c in found if c.condition == PUBLISHED}
    absolute, relative = published["gcp", "gradient_distance"], published["gcp", "relative_gradient_distance"]
    remarks = [
        f"The published measures depend on the length of g, which the head itself changes, and the walk ηg with it. On the "
        f"published line the gradient distance of GCP relative to GAP is {absolute.interval} ({absolute.smaller}), free of "
        f"that scale {relative.interval} ({relative.smaller}).",
        f"The largest β is found at the smallest η in {_share_at_lowest_eta(widths):.0%} of the measured lines: there the "
        "effective β-smoothness is a local curvature.",
        _confounds(origin),
    ]
    if broken := int((widths.loss_variation == math.inf).sum()):
        remarks.append(
            f"{broken} of {len(widths)} measured lines hold a value that is not finite; the comparisons that they enter are "
            "undecided."
        )
    if left_out := sum(c.left_out for c in found):
        remarks.append(f"{left_out} ratios at single steps were left out because a value is zero there.")
    return remarks


def _share_at_lowest_eta(widths: pd.DataFrame) -> float:
    return float((widths.beta_at_lowest_eta == widths.lowest_eta).mean())


def _confounds(origin: Provenance) -> str:
    """What else differs between the heads: the classifier's inputs, and for ResNets as published the last stride."""
    c = origin.config
    with torch.device("meta"):
        heads = {
            p: network(c["backbone"], p, 2, reduced_channels=c["reduced_channels"], last_stride=c["last_stride"])
            for p in c["poolings"]
        }
    inputs = ", ".join(f"{label(p)} {n.head.out_features:,}" for p, n in heads.items())
    strides = NETWORKS[c["backbone"]].last_stride
    differ = c["last_stride"] is None and strides is not None and strides[0] != strides[1]
    return (
        f"The heads differ in more than the pooling: the classifier reads {inputs} features"
        + (", and as published the GAP network has stride 2 in its last stage, the others stride 1." if differ else ".")
        + " Intervals are not corrected for the number of claims."
    )


def _method(origin: Provenance) -> str:
    c = origin.config
    return (
        f"Preset {c['preset']}: {c['backbone']} with the heads {', '.join(label(p) for p in c['poolings'])}, trained by "
        "SGD with momentum for "
        f"{c['epochs']} epochs (batch {c['batch_size']}, learning rate {c['learning_rate']}, schedule {c['schedule']}) on "
        f"{origin.data['label']}, {len(origin.seeds)} seeds. For each seed all heads start from the same backbone weights "
        f"and see the same batches. Every {c['measure_every']} steps the loss and its gradient are measured at "
        f"{c['eta_points']} equally spaced points of three lines: η in [{c['eta_low']}, {c['eta_high']}] from the "
        f"activation X after the stem along +g and −g, and [{c['step_low']}, {c['step_high']}] optimiser steps from the "
        f"weights. Batch statistics and dropout masks are those of the training step."
    )


def _scope(origin: Provenance) -> str:
    return f"{origin.data['label']}, {origin.config['backbone']}, n = {len(origin.seeds)} seeds."


def _bands_caption(origin: Provenance, claims: list[Claim]) -> str:
    found = " ".join(f"{c.quantity}: {c.interval}, claim {c.verdict}." for c in claims[:2])
    return (
        f"Bands from the smallest to the largest value over η at each measured step (geometric mean over seeds of both "
        f"edges, thin lines the seeds). {_scope(origin)} {found}"
    )


def _widths_caption(origin: Provenance, found: list[Comparison]) -> str:
    gcp = [c for c in found if c.pooling == "gcp" and c.quantity == "loss_variation"]
    words = "; ".join(f"{LINES[c.condition]} {c.interval}" for c in gcp)
    return (
        f"Width of the bands along all three lines: geometric mean over seeds, thin lines the seeds. {_scope(origin)}"
        + (f" Loss variation of GCP relative to GAP: {words}." if words else "")
    )


def _training_caption(origin: Provenance, epochs: pd.DataFrame) -> str:
    last = epochs[epochs.epoch == epochs.epoch.max()].groupby("pooling", sort=False).test_top1.mean()
    found = ", ".join(f"{label(str(pooling))} {100 * value:.1f} %" for pooling, value in last.items())
    return (
        f"The same runs: training loss and test error, geometric mean over seeds, thin lines the seeds. {_scope(origin)} "
        f"Test top-1 after the last epoch: {found}."
    )


def _ratios_caption(origin: Provenance, found: list[Comparison]) -> str:
    words = [c.smaller for c in found if c.pooling == "gcp"]
    counts = ", ".join(f"{words.count(w)} {w}" for w in dict.fromkeys(words))
    return (
        f"All comparisons with GAP. Of GCP's {len(words)} ratios, taken as claims of being below 1: {counts or 'none'}."
    )


def _printed(found: list[Comparison]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "head": label(c.pooling),
            "line": LINES[c.condition],
            "quantity": QUANTITIES[c.quantity],
            "ratio to GAP": c.interval.estimate,
            "low": c.interval.low,
            "high": c.interval.high,
            "n": c.interval.n,
            "smoother than GAP": c.smaller,
        }
        for c in found
    )
