"""Part D in the report: conditioning of curvature blocks before and after K-FAC, and how well K-FAC fits them."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from studies.preconditioning.blocks import figures
from studies.preconditioning.blocks.claims import claims_of
from studies.preconditioning.blocks.measure import AFTER, BEFORE, DAMPINGS, EXACT, EXACT_DAMPINGS, LAST, SQUARED
from studies.preconditioning.blocks.reading import (
    HALF_RANK,
    MEASURES,
    ONLY_LAST,
    TO_MEAN,
    per_seed,
    phase_name,
    ratio,
)
from studies.preconditioning.part import Part
from studies.preconditioning.reading import at_the_end, short
from studies.report.section import Claim, Picture, Table
from studies.statistics import geometric_interval, mean_interval

NAME = "preconditioning_blocks"
SETTINGS = {BEFORE: "none", AFTER: "K-FAC, damping 0.01", EXACT: "exact GGN, damping 0.01"}
"""Setting -> the preconditioner in the table."""
GAINS = (*DAMPINGS, *EXACT_DAMPINGS)


def part(table: pd.DataFrame) -> Part:
    """Claims, figures and tables of part D; only a remark when nothing was measured."""
    if table.empty:
        return Part([], remarks=["Block conditioning: no block had curvature, so nothing was measured."])
    end = at_the_end(table)
    return Part(
        all_claims(end),
        remarks=list(_remarks(end)),
        pictures=[
            Picture(f"{NAME}_spectra", _spectra_caption(end), figures.spectra(end)),
            Picture(f"{NAME}_conditioning", _conditioning_caption(table), figures.conditioning(table)),
            Picture(f"{NAME}_fidelity", _fidelity_caption(end), figures.fidelity(end)),
        ],
        tables=[
            Table(f"{NAME}_conditioning", _table_caption(end), conditioning_table(end)),
            Table(f"{NAME}_gains", _gains_caption(end), gains_table(end)),
            Table(f"{NAME}_last", _last_caption(end), last_table(end)),
        ],
    )


def all_claims(end: pd.DataFrame) -> list[Claim]:
    """The claims on every backbone at its last moment."""
    return [claim for name in end.backbone.unique() for claim in claims_of(end[end.backbone == name], str(name))]


def conditioning_table(end: pd.DataFrame) -> pd.DataFrame:
    """Conditioning of every head on every backbone without a preconditioner, with K-FAC and with the exact one."""
    names = {**MEASURES, "effective_rank": "effective rank", "largest": "largest eigenvalue"}
    rows = []
    for backbone, head, own in _groups(end):
        for setting, preconditioner in SETTINGS.items():
            found = {name: per_seed(own, setting, measure) for measure, name in names.items()}
            counts = [values[head].notna().sum() if head in values else 0 for values in found.values()]
            cells = {
                name: geometric_interval(values[head].dropna()).short if head in values else ""
                for name, values in found.items()
            }
            rows.append({
                "backbone": phase_name(backbone).removeprefix("backbone "),
                "head": short(head),
                "preconditioner": preconditioner,
                **cells,
                "n": min(counts),
            })  # fmt: skip
    return pd.DataFrame(rows)


def gains_table(end: pd.DataFrame) -> pd.DataFrame:
    """By what factor each preconditioner improves the conditioning of the last convolution."""
    rows = []
    for backbone, head, own in _groups(end):
        before = per_seed(own, BEFORE, HALF_RANK, ONLY_LAST)
        gains = {s: ratio(before, per_seed(own, s, HALF_RANK, ONLY_LAST), head, head) for s in GAINS}
        row: dict[str, object] = {"backbone": phase_name(backbone).removeprefix("backbone "), "head": short(head)}
        rows.append(
            row | {s: geometric_interval(g).short for s, g in gains.items()} | {"n": min(map(len, gains.values()))}
        )
    return pd.DataFrame(rows)


LAST_COLUMNS = {
    (BEFORE, "cosine"): "cosine of K-FAC",
    (BEFORE, "relative_error"): "relative error",
    (BEFORE, "best_scale"): "best scale",
    (SQUARED, HALF_RANK): "λ₁ / λₖ, squared error",
    (BEFORE, "hessian_difference"): "‖H − G‖ / ‖H‖",
    (BEFORE, "hessian_largest"): "largest of H",
    (BEFORE, "hessian_smallest"): "smallest of H",
    (AFTER, "hessian_largest"): "largest of H, after K-FAC",
    (AFTER, "hessian_smallest"): "smallest of H, after K-FAC",
}
"""Setting and measure -> column."""


def last_table(end: pd.DataFrame) -> pd.DataFrame:
    """K-FAC's fidelity, the Jacobian's own conditioning, and the Hessian, of the last convolution."""
    rows = []
    for backbone, head, own in _groups(end[end.layer == LAST]):
        row: dict[str, object] = {"backbone": phase_name(backbone).removeprefix("backbone "), "head": short(head)}
        for (setting, measure), column in LAST_COLUMNS.items():
            values = own[(own.setting == setting) & (own.measure == measure)].value
            row[column] = (geometric_interval(values) if measure == HALF_RANK else mean_interval(values)).short
        rows.append(row | {"n": own.seed.nunique()})
    return pd.DataFrame(rows)


def _groups(end: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Backbone, head and their rows."""
    for (backbone, head), own in end.groupby(["backbone", "head"], sort=False):
        yield str(backbone), str(head), own


def _remarks(end: pd.DataFrame) -> Iterator[str]:
    """What limits the verdicts of this part."""
    yield (
        "Block conditioning: how much an exact preconditioner can improve depends on its damping. Where nearly all eigenvalues "
        "are below λ it divides them all by λ, and every block gains the same factor, however good it was; where λ is below them "
        "it brings every block to 1, and a block gains less exactly because it was better. So a smaller gain speaks for “GCP "
        "already preconditions” only beside that of an exact preconditioner at the same damping."
    )
    differences = end[end.measure == "hessian_difference"].groupby(["head", "backbone"], sort=False).value.mean()
    if len(differences):
        heads = differences.index.get_level_values("head").unique()
        shares = (
            f"under {short(str(head))} {', '.join(f'{d:.2g} ({phase_name(str(b))})' for b, d in differences[head].items())}"
            for head in heads
        )
        yield (
            "Block conditioning: verdicts are about the GGN. How much of the Hessian of the last convolution that leaves out, "
            f"‖H − G‖ / ‖H‖: {'; '.join(shares)}."
        )


def _scope(end: pd.DataFrame) -> str:
    return f"n = {end.seed.nunique()} seeds"


def _table_caption(end: pd.DataFrame) -> str:
    return (
        "GGN blocks of the first, middle and last convolution under each head on the same backbone weights, as a preconditioned "
        "optimiser sees them: geometric mean over convolutions and seeds with its 95 % interval. The largest eigenvalue after an "
        f"exact preconditioner is near 1; K-FAC's own scale is another one. {_scope(end)}; n: seeds in which all exist."
    )


def _gains_caption(end: pd.DataFrame) -> str:
    return (
        f"Factor by which {MEASURES[HALF_RANK]} of the last convolution falls with K-FAC and with the exact preconditioner "
        f"(F + λI)⁻¹ at two dampings, geometric mean over seeds with its 95 % interval. {_scope(end)}."
    )


def _last_caption(end: pd.DataFrame) -> str:
    return (
        "The last convolution: K-FAC (expand) against the exact GGN block, with the scale that would bring it nearest (it leaves "
        "out products between positions, and is too small by about that factor); conditioning of the GGN of the squared error "
        "(J^T J, without the softmax); and the Hessian, whose ends are Ritz values, inside of the spectrum. Means over seeds "
        f"with their 95 % interval (λ₁ / λₖ: geometric). {_scope(end)}."
    )


def _spectra_caption(end: pd.DataFrame) -> str:
    return (
        "Eigenvalues of the GGN block of the last convolution relative to the largest, at geometrically spaced ranks, without "
        "preconditioner (top) and with K-FAC at damping 0.01 (bottom): thin lines the seeds, thick lines their geometric mean, "
        "at ranks where all seeds have one above rounding; dotted: half of the possible rank. A flatter curve is a better "
        f"conditioned block. {_scope(end)}. {_ordered(end)}"
    )


def _ordered(end: pd.DataFrame) -> str:
    """Which head has the flattest spectrum of the last convolution, before and after."""
    found = []
    for backbone in end.backbone.unique():
        best = []
        for setting in (BEFORE, AFTER):
            values = per_seed(end[end.backbone == backbone], setting, HALF_RANK, ONLY_LAST).dropna(axis=1, how="all")
            if len(values.columns):
                best.append(short(str(np.log(values).mean().idxmin())))
        if len(best) == 2:
            found.append(f"{best[0]} before and {best[1]} after ({phase_name(str(backbone))})")
    return f"Smallest {MEASURES[HALF_RANK]}: {', '.join(found)}." if found else ""


def _conditioning_caption(table: pd.DataFrame) -> str:
    end = at_the_end(table)
    return (
        "Conditioning of the GGN blocks over training, geometric mean over the first, middle and last convolution and over seeds "
        "(bars: 95 % intervals), before (solid) and after K-FAC at damping 0.01 (dashed); the untrained backbone, at 0, is the "
        f"same in both columns. {MEASURES[TO_MEAN].capitalize()} is 1 for a perfectly conditioned block. {_scope(end)}."
    )


def _fidelity_caption(end: pd.DataFrame) -> str:
    last = end[(end.measure == "cosine") & (end.layer == LAST)].groupby(["backbone", "head"], sort=False).value.mean()
    found = "; ".join(
        f"{phase_name(str(backbone))}: "
        + ", ".join(f"{short(str(head))} {value:.2f}" for head, value in last[backbone].items())
        for backbone in last.index.get_level_values("backbone").unique()
    )
    return (
        "Cosine between the K-FAC block (expand) and the exact GGN block: mean over seeds, whiskers from the lowest to the "
        f"highest seed. {_scope(end)}. Last convolution, mean: {found}."
    )
