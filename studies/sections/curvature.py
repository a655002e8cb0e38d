"""What the curvature study found, computed from ``curvature.csv``, ``curvature_spectra.csv`` and ``curvature_training.csv``."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from studies.figures import curvature as figures
from studies.figures.style import label
from studies.results import Provenance, read_provenance, read_table
from studies.sections.section import Claim, Picture, Section, Table
from studies.statistics import Comparison, mean_interval, ratio_interval

PHASES = {
    "initial": "same initial weights",
    "trained": "after training",
    "shared: gap": "backbone trained under GAP",
    "shared: gcp": "backbone trained under GCP",
}
# quantity -> matrix and measure in the table, and its name.
QUANTITIES = {
    "condition": ("GGN", "condition", "condition number on the range"),
    "median_condition": ("GGN", "median_condition", "largest / median eigenvalue"),
    "trace_quantile_condition": ("GGN", "trace_quantile_condition", "10 % / 90 % trace quantile"),
    "largest": ("GGN", "largest", "largest GGN eigenvalue"),
    "trace": ("GGN", "trace", "trace of the GGN"),
    "effective_rank": ("GGN", "effective_rank", "effective rank of the GGN"),
    "kfac": ("K-FAC (expand)", "cosine", "cosine of K-FAC (expand)"),
    "ekfac": ("EKFAC", "cosine", "cosine of EKFAC"),
}
DIFFERENCE = ("GGN to Hessian", "relative_difference", "‖H − G‖ / ‖H‖")
"""Zero up to rounding under GAP, so that it has no ratio to it."""
CONDITIONS = ("condition", "trace_quantile_condition")
WEIGHTS = ("first", "middle", "last", "classifier")
BACKBONE = ("first", "middle", "last")
COLUMNS = ("backbone", "pooling", "seed", "phase", "step", "block", "matrix", "measure", "value", "error")
Values = pd.DataFrame


def values(table: pd.DataFrame, backbone: str, phase: str, quantity: str, blocks: Collection[str]) -> Values:
    """One row for each seed and one column for each head: the geometric mean over the blocks of a quantity.

    NaN where a value is missing or not positive, so that nothing is hidden in a mean.
    """
    matrix, measure, _ = DIFFERENCE if quantity == "difference" else QUANTITIES[quantity]
    some = table[
        (table.backbone == backbone)
        & (table.phase == phase)
        & (table.matrix == matrix)
        & (table.measure == measure)
        & table.block.isin(blocks)
    ]
    logs = np.log(some.value.where(some.value > 0))
    means = logs.groupby([some.seed, some.pooling]).agg(lambda block: block.mean(skipna=False))
    return means.unstack("pooling").pipe(np.exp)


def compare(
    table: pd.DataFrame,
    backbone: str,
    phase: str,
    quantity: str,
    *,
    pooling: str = "gcp",
    reference: str = "gap",
    blocks: Collection[str] = BACKBONE,
) -> Comparison | None:
    """The ratio of a head to another over seeds, geometric mean over blocks; None when one of them was not measured."""
    found = values(table, backbone, phase, quantity, blocks)
    if not {pooling, reference} <= set(found.columns):
        return None
    return Comparison(pooling, f"{backbone} {phase}", quantity, ratio_interval(found[pooling], found[reference]))


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
    if compared:
        found = all_comparisons(table)
        phases = {p: name for p, name in PHASES.items() if p in set(table.phase)}
        names = {quantity: name for quantity, (_, _, name) in QUANTITIES.items()}
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


def all_comparisons(table: pd.DataFrame) -> list[Comparison]:
    """Every head relative to GAP in every quantity, for every backbone and phase."""
    found = [
        compare(table, backbone, phase, quantity, pooling=pooling)
        for backbone in table.backbone.unique()
        for phase in PHASES
        for quantity in QUANTITIES
        for pooling in table.pooling.unique()
        if pooling != "gap"
    ]
    return [one for one in found if one is not None]


def _claims(table: pd.DataFrame) -> list[Claim]:
    """What the paper's explanation predicts, what goes beyond it, and what the root adds to the covariance."""
    claims = []
    for backbone in table.backbone.unique():
        for phase, phase_name in PHASES.items():
            where = f"{backbone}, {phase_name}"
            for quantity in CONDITIONS:
                claims += _claim(
                    table, backbone, phase, quantity, where, "in the paper",
                    "The GGN blocks of the convolutions are better conditioned under GCP than under GAP.",
                )  # fmt: skip
            if phase not in ("initial", "trained"):
                continue
            claims += _claim(
                table, backbone, phase, "largest", where, "beyond the paper",
                "The largest GGN eigenvalue of the convolutions is smaller under GCP.",
            )  # fmt: skip
            claims += _difference_claim(table, backbone, phase, where)
            claims += _claim(
                table, backbone, phase, "kfac", where, "beyond the paper",
                "K-FAC (expand) fits the last convolution worse under GCP.", blocks=("last",),
            )  # fmt: skip
            claims += _claim(
                table, backbone, phase, "condition", where, "control",
                "The root conditions the convolutions better than covariance pooling without it.", reference="covariance",
            )  # fmt: skip
    return claims


def _claim(
    table: pd.DataFrame,
    backbone: str,
    phase: str,
    quantity: str,
    where: str,
    group: str,
    statement: str,
    *,
    claimed: str = "below",
    reference: str = "gap",
    blocks: Collection[str] = BACKBONE,
) -> list[Claim]:
    found = compare(table, backbone, phase, quantity, reference=reference, blocks=blocks)
    if found is None:
        return []
    what = f"{label('gcp')} / {label(reference)}, {QUANTITIES[quantity][2]}, {where}"
    return [Claim(statement, what, found.interval, claimed=claimed, group=group)]


def _difference_claim(table: pd.DataFrame, backbone: str, phase: str, where: str) -> list[Claim]:
    """The GGN as an approximation of the Hessian: exact for single convolutions under GAP, so there is no ratio to it."""
    found = values(table, backbone, phase, "difference", BACKBONE)
    if "gcp" not in found.columns:
        return []
    statement = "Under GCP most of the Hessian of the convolutions lies outside the GGN."
    quantity = f"{label('gcp')}, {DIFFERENCE[2]}, {where}"
    interval = mean_interval(found["gcp"])
    return [Claim(statement, quantity, interval, claimed="above", reference=0.5, group="beyond the paper")]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Geometric means over the convolutions and seeds of the main quantities, for each backbone, phase and head."""
    rows = []
    for backbone in table.backbone.unique():
        for phase, phase_name in PHASES.items():
            found = {q: values(table, backbone, phase, q, BACKBONE) for q in QUANTITIES}
            for pooling in (p for p in table.pooling.unique() if p in found["condition"].columns):
                row: dict[str, object] = {"backbone": backbone, "weights": phase_name, "head": label(pooling)}
                for quantity, (_, _, name) in QUANTITIES.items():
                    row[name] = float(np.exp(np.log(found[quantity][pooling]).mean()))
                difference = values(table, backbone, phase, "difference", BACKBONE).get(pooling)
                row[DIFFERENCE[2]] = "" if difference is None else f"{difference.mean():.2g}"
                rows.append(row | {"n": len(found["condition"])})
    return pd.DataFrame(rows)


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
    share = table[(table.matrix == "GGN to Hessian") & (table.phase == "trained")]
    means = ", ".join(
        f"{label(str(pooling))} {some.value.mean():.2f}" for pooling, some in share.groupby("pooling", sort=False)
    )
    return [
        f"“GCP gives better conditioned blocks”, over all networks, phases and two measures of condition: {counts}.",
        f"‖H − G‖ / ‖H‖ after training, mean over networks, blocks and seeds: {means}. Where the network has only ReLU and "
        "a head that is linear in its features the Hessian of a single convolution's weights is its GGN; a covariance makes "
        "them differ.",
        f"The condition number on the range counts eigenvalues above {origin.config['limits']['threshold']:g} of the largest "
        "one. It says as much about this threshold as about the block where the spectrum decays through it; the ratio of "
        "trace quantiles has no threshold. Intervals are not corrected for the number of claims.",
    ]


def _method(origin: Provenance) -> str:
    c = origin.config
    small, large = c["small"], c["large"]
    scales = f"{small['images']} images in {small['precision']}" + (
        f" ({large['images']} at {large['image_size']}×{large['image_size']} in {large['precision']} for torchvision's networks)"
        if any(not b.startswith(("digits", "cifar")) for b in c["backbones"])
        else ""
    )
    return (
        f"Preset {c['preset']}: {', '.join(c['backbones'])} with the heads {', '.join(label(p) for p in c['poolings'])}, on "
        f"{origin.data['label']}, {len(origin.seeds)} seeds. For each seed all heads start from the same backbone weights; "
        f"all have the same last stride and the same reduction. Blocks of the mean cross-entropy of {scales}, batch "
        "statistics as constants: weights of the first, middle and last convolution and of the classifier, and all "
        "parameters of the small networks. GGN blocks are exact, from their factor; Hessian blocks are dense up to "
        f"{c['limits']['dense']:,} parameters, else estimated (random products, Lanczos). On a shared backbone every "
        "head has a classifier fitted to its own features by logistic regression."
    )


def _scope(origin: Provenance) -> str:
    return f"{origin.data['label']}, n = {len(origin.seeds)} seeds."


def _table_caption(origin: Provenance) -> str:
    return f"Geometric means over the three convolutions and over seeds. {_scope(origin)}"


def _spectra_caption(origin: Provenance) -> str:
    return (
        "Eigenvalues of the GGN block of the last convolution relative to the largest, in descending order, down to "
        f"{origin.config['limits']['threshold']:g}: geometric mean over seeds, thin lines the seeds. A flatter curve is a better "
        f"conditioned block. {_scope(origin)}"
    )


def _ratios_caption(origin: Provenance) -> str:
    return (
        "Every head relative to GAP, geometric mean over the three convolutions: left of 1 for a condition number is "
        f"better conditioned. {_scope(origin)}"
    )


def _training_caption(origin: Provenance, table: pd.DataFrame) -> str:
    return f"The last convolution along training: geometric mean over seeds, thin lines the seeds. {_scope(origin)}"


def _kfac_caption(origin: Provenance, table: pd.DataFrame) -> str:
    some = table[(table.matrix == "K-FAC (expand)") & (table.measure == "cosine") & (table.phase == "trained")]
    last = some[some.block == "last"].groupby("pooling", sort=False).value.mean()
    found = ", ".join(f"{label(str(pooling))} {value:.2f}" for pooling, value in last.items())
    return (
        "Cosine between approximate and exact GGN blocks after training, mean over seeds, whiskers from the lowest to the "
        f"highest seed. {_scope(origin)} K-FAC (expand) of the last convolution, mean over networks: {found}."
    )
