"""What the curvature study found, computed from ``curvature.csv``, ``curvature_spectra.csv`` and ``curvature_training.csv``."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torchvision

from secondorder.data import DATASETS
from secondorder.networks import NETWORKS, network
from studies.curvature import figures
from studies.curvature.comparisons import (
    COLUMNS,
    CONDITIONS,
    DIFFERENCE,
    PHASES,
    QUANTITIES,
    WEIGHTS,
    all_comparisons,
    compare,
    summary,
    values,
)
from studies.report.section import Claim, Picture, Section, Table
from studies.report.style import label
from studies.results import Provenance, read_provenance, read_table
from studies.statistics import mean_interval


def section(folder: Path) -> Section:
    """The section of the report for the results in `folder`."""
    table = read_table(folder, "curvature", COLUMNS)
    spectra = read_table(
        folder, "curvature_spectra", ("backbone", "pooling", "seed", "phase", "block", "rank", "value")
    )
    epochs = read_table(folder, "curvature_training", ("backbone", "pooling", "seed", "epoch", "test_top1"))
    origin = read_provenance(folder, "curvature")
    compared = {"gap", "gcp"} <= set(table.pooling)
    claims = _claims(table) if compared else []
    backbones = list(table.backbone.unique())
    pictures = [
        Picture("curvature", _spectra_caption(origin), figures.spectra(spectra)),
        Picture("curvature_training", _training_caption(origin, table), figures.along_training(table)),
        Picture("curvature_kfac", _kfac_caption(origin, table), figures.fidelity(table)),
    ]
    hessians = figures.hessians(spectra)
    if hessians is not None:
        pictures.insert(1, Picture("curvature_hessian", _hessian_caption(origin, table), hessians))
    if compared:
        found = all_comparisons(table)
        phases = {p: name for p, name in PHASES.items() if p in set(table.phase)}
        names = {key: quantity.name for key, quantity in QUANTITIES.items()}
        figure = figures.ratios(found, backbones, phases, names)
        pictures.insert(1, Picture("curvature_ratios", _ratios_caption(origin), figure))
    return Section(
        title="Curvature: are the blocks better conditioned under GCP?",
        question="If the backward pass of GCP acts like a second-order preconditioner (Wang et al. 2020), the curvature "
        "blocks of the weights below it should be better conditioned than under GAP.",
        method=_method(origin),
        provenance=origin,
        claims=claims,
        remarks=_remarks(origin, table, claims)
        if compared
        else ["Without runs of GAP and GCP no claim can be judged."],
        pictures=pictures,
        tables=[
            Table("curvature_summary", _table_caption(origin), summary(table)),
            Table("curvature_accuracy", "Test top-1 [%] after training, mean over seeds.", accuracy(epochs)),
        ],
    )


CLAIMS = {
    "largest": ("The largest GGN eigenvalue of the convolutions is smaller under GCP.", "beyond the paper", "gap"),
    "hessian": (
        "The largest Hessian eigenvalue of the last convolution is smaller under GCP.",
        "beyond the paper",
        "gap",
    ),
    "kfac": ("K-FAC (expand) fits the last convolution worse under GCP.", "beyond the paper", "gap"),
    "half_rank_condition": (
        "The root conditions the convolutions better than covariance pooling without it.",
        "control",
        "covariance",
    ),
}
"""Quantity -> what is claimed of GCP's being smaller, in which group, against which head, for weights of the head's own."""


GROUPS = ("in the paper", "beyond the paper", "control")


def _claims(table: pd.DataFrame) -> list[Claim]:
    """What the paper's explanation predicts, what goes beyond it, and what the root adds to the covariance."""
    better = "The GGN blocks of the convolutions are better conditioned under GCP than under GAP."
    found: list[Claim | None] = []
    for backbone in table.backbone.unique():
        for phase in PHASES:
            found += [_claim(table, backbone, phase, q, better, "in the paper") for q in CONDITIONS]
        for phase in ("initial", "trained"):
            for quantity, (statement, group, reference) in CLAIMS.items():
                found.append(_claim(table, backbone, phase, quantity, statement, group, reference))
            found.append(_difference_claim(table, backbone, phase))
    return sorted((claim for claim in found if claim is not None), key=lambda claim: GROUPS.index(claim.group))


def _claim(
    table: pd.DataFrame, backbone: str, phase: str, quantity: str, statement: str, group: str, reference: str = "gap"
) -> Claim | None:
    found = compare(table, backbone, phase, quantity, reference=reference)
    if found is None:
        return None
    heads = f"{label('gcp')} / {label(reference)}"
    what = f"{heads}, {QUANTITIES[quantity].name}, {backbone}, {PHASES[phase]}"
    return Claim(statement, what, found.interval, group=group)


def _difference_claim(table: pd.DataFrame, backbone: str, phase: str) -> Claim | None:
    """The GGN as an approximation of the Hessian: exact for single convolutions under GAP, so there is no ratio to it."""
    found = values(table, backbone, phase, DIFFERENCE)
    if "gcp" not in found.columns:
        return None
    statement = "Under GCP most of the Hessian of the convolutions lies outside the GGN."
    what = f"{label('gcp')}, {DIFFERENCE.name}, {backbone}, {PHASES[phase]}"
    interval = mean_interval(found["gcp"])
    return Claim(statement, what, interval, claimed="above", reference=0.5, group="beyond the paper")


def accuracy(epochs: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy of the last epoch with its interval."""
    last = epochs[epochs.epoch == epochs.groupby("backbone").epoch.transform("max")]
    rows = []
    for (backbone, pooling), some in last.groupby(["backbone", "pooling"], sort=False):
        found = mean_interval(100 * some.test_top1)
        rows.append(
            {
                "backbone": backbone,
                "head": label(str(pooling)),
                "top-1": found.estimate,
                "low": found.low,
                "high": found.high,
                "n": found.n,
            }
        )
    return pd.DataFrame(rows)


def _remarks(origin: Provenance, table: pd.DataFrame, claims: list[Claim]) -> list[str]:
    published = [claim for claim in claims if claim.group == "in the paper"]
    words = {word: sum(c.verdict == word for c in published) for word in ("supported", "not supported", "undecided")}
    counts = ", ".join(f"{count} {word}" for word, count in words.items())
    some = table[(table.matrix == DIFFERENCE.matrix) & (table.phase == "trained") & table.block.isin(WEIGHTS)]
    means = ", ".join(
        f"{label(str(pooling))} {each.value.mean():.2f}" for pooling, each in some.groupby("pooling", sort=False)
    )
    return [
        f"“GCP gives better conditioned blocks”, over all networks, weights and two measures: {counts}. These verdicts are "
        "about the GGN; how much of the Hessian that is, the next paragraph says.",
        f"‖H − G‖ / ‖H‖ of the convolutions after training, mean over networks, convolutions and seeds: {means}. With ReLU and "
        "a head that is linear in its features the Hessian of one convolution's weights is its GGN; a covariance makes "
        "them differ.",
        f"The GGN of {_samples(origin)} has at most as many eigenvalues as images times (classes − 1), far fewer than most "
        "blocks have parameters: what is compared is the conditioning of these samples' part. λ₁ / λₖ and the mean eigenvalue "
        f"are taken at the same possible rank for every head; the condition number on the range (above "
        f"{origin.config['limits']['threshold']:g} of the largest eigenvalue) is bounded by that threshold and given for "
        "reference only.",
        _geometry(origin),
        "Intervals are over seeds and not corrected for the number of claims.",
    ]


def _samples(origin: Provenance) -> str:
    return " or ".join(f"{images} images" for images in sorted({scale["images"] for scale in _scales(origin).values()}))


def _scales(origin: Provenance) -> dict[str, Any]:
    """The scale of each backbone, as the study chose it."""
    c = origin.config
    return {b: c["large"] if hasattr(torchvision.models, b) else c["small"] for b in c["backbones"]}


def _geometry(origin: Provenance) -> str:
    """How many positions the covariance is taken over; its rank is below that."""
    words = []
    for backbone, scale in _scales(origin).items():
        strides = NETWORKS[backbone].last_stride
        with torch.device("meta"):
            net = network(backbone, "gap", 2, last_stride=None if strides is None else strides[1])
        size = scale["image_size"] or DATASETS[origin.config["dataset"]].image_size
        channels, height, width = net.feature_shape(size)
        kept = scale["reduced_channels"] or channels
        words.append(f"{backbone} {kept} channels at {height}×{width} positions")
    return f"The pooling sees: {'; '.join(words)}. A covariance over M positions has rank at most M − 1, which at 2×2 is 3."


def _method(origin: Provenance) -> str:
    c = origin.config
    kinds = {(s["images"], s["image_size"], s["precision"]): b for b, s in _scales(origin).items()}
    scales = " and ".join(
        f"{images} images" + (f" at {size}×{size}" if size else "") + f" in {precision}"
        for images, size, precision in kinds
    )
    return (
        f"Preset {c['preset']}: {', '.join(c['backbones'])} with the heads {', '.join(label(p) for p in c['poolings'])}, on "
        f"{origin.data['label']}, {len(origin.seeds)} seeds. For each seed all heads start from the same backbone weights; "
        f"all have the same last stride and the same reduction. Blocks of the mean cross-entropy of {scales}, batch "
        "statistics as constants (in training mode verdicts can differ: part D of the preconditioning study): weights of the "
        "first, middle and last convolution and of the classifier, and all "
        f"parameters together up to {c['limits']['whole']:,}. GGN blocks are exact, from their factor. The Hessian is dense up "
        f"to {c['limits']['dense']:,} parameters; else its trace and ‖H − G‖ are estimated from {c['limits']['probes']} random "
        f"vectors and its ends by at most {c['limits']['steps']} Lanczos steps, from within. On a shared backbone every head "
        "has a classifier fitted to its own features by logistic regression."
    )


def _scope(origin: Provenance) -> str:
    return f"{origin.data['label']}, n = {len(origin.seeds)} seeds."


def _table_caption(origin: Provenance) -> str:
    return (
        "Geometric means over seeds and, where no single block is named, the first, middle and last convolution; empty: not "
        f"measured. {_scope(origin)}"
    )


def _spectra_caption(origin: Provenance) -> str:
    return (
        "Eigenvalues of the GGN block of the last convolution relative to the largest, in descending order, down to "
        f"{origin.config['limits']['threshold']:g}: geometric mean over seeds where all have one, thin lines the seeds. A "
        f"flatter curve is a better conditioned block. {_scope(origin)}"
    )


def _hessian_caption(origin: Provenance, table: pd.DataFrame) -> str:
    some = table[(table.matrix == "Hessian") & (table.measure == "negative_share") & (table.phase == "trained")]
    shares = some[some.block == "whole"].groupby("pooling", sort=False).value.mean()
    found = ", ".join(f"{label(str(pooling))} {100 * value:.0f} %" for pooling, value in shares.items())
    return (
        "All eigenvalues of the Hessian of all parameters, a line for each seed; linear between the marks next to zero. "
        f"{_scope(origin)} Share of negative eigenvalues in Σ|λ| after training: {found}."
    )


def _ratios_caption(origin: Provenance) -> str:
    return (
        "Every head relative to GAP, geometric mean over the three convolutions unless one is named: for the first three rows "
        f"left of 1 is better conditioned. {_scope(origin)}"
    )


def _training_caption(origin: Provenance, table: pd.DataFrame) -> str:
    return (
        "The last convolution along training: geometric mean over seeds, thin lines the seeds; the Hessian is measured at the "
        f"start and the end only. {_scope(origin)}"
    )


def _kfac_caption(origin: Provenance, table: pd.DataFrame) -> str:
    some = table[(table.matrix == "K-FAC (expand)") & (table.measure == "cosine") & (table.phase == "trained")]
    last = some[some.block == "last"].groupby("pooling", sort=False).value.mean()
    found = ", ".join(f"{label(str(pooling))} {value:.2f}" for pooling, value in last.items())
    return (
        "Cosine between approximate and exact GGN blocks after training, mean over seeds, whiskers from the lowest to the "
        f"highest seed. {_scope(origin)} K-FAC (expand) of the last convolution, mean over networks: {found}."
    )
