"""What a reader is shown of preconditioning: two folds about primary claims, two about what was published and what K-FAC adds."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from secondorder.kfac.options import DAMPING
from studies.draw import Curves, Forest, Scatter, case_rows
from studies.draw.palette import label
from studies.engine.study import Results
from studies.judge import Claim, Judged
from studies.page import Fold, Picture, Table
from studies.preconditioning import blocks, gradients, heads
from studies.preconditioning import claims as stated
from studies.preconditioning.claims import FORMS, LIKE, UNDER, means

BANDS = "Bands: 95 % intervals over seeds."
AS_BEFORE = "Backbones and classifiers are those of claim 3."


def folds(results: Results) -> Sequence[Fold]:
    """Four folds, each with a picture or a table, of records with the name of the backbone, untrained ones first."""
    names = {head: UNDER.get(head, f"trained under {head}") for head in results.records.trained_under} | {
        "": "untrained"
    }
    records = results.records.assign(backbone=results.records.trained_under.map(names)).sort_values(
        "step", kind="stable"
    )
    return [fold(results, records) for fold in (_heads, _directions, _backward, _curvature)]


def _heads(results: Results, records: pd.DataFrame) -> Fold:
    """Claim 3: the conditioning of heads."""
    judged, theorem = results.of("head preconditions"), _of(results, [stated.THEOREM])
    part = records[records.quantity == heads.CONDITION]
    steps, level = part[part["head"] == "gcp"], part[part["head"].isin(("covariance", "gcp_exact"))]
    level = level.drop(columns="setting").merge(steps[["setting"]].drop_duplicates(), how="cross")
    axes: dict[str, Any] = {"x_label": "Newton-Schulz steps", "y_label": "condition number"}
    curves = Curves("setting", "value", panels="backbone", mean="geometric", log="xy", **axes)
    figure = curves.draw(pd.concat([steps, level]))  # heads without steps as lines at every number of steps
    features = means(records[records.quantity == heads.FEATURES], ["backbone"], geometric=True)
    spread = ", ".join(f"{value:.3g} ({name})" for name, value in features.items())
    part = stated.head_conditions(records)
    table = means(part.assign(head=part["head"].map(label)), ["head", "backbone"], geometric=True).unstack("backbone")
    caption = "Condition numbers of each head by backbone: medians over images, geometric means over seeds."
    return Fold(
        judged=judged,
        sentences=[
            *(f"With the exact root it is at most √2: {case.outcome}." for case in theorem),
            f"That of the features' covariance is {spread}; that of GAP is 1.",
        ],
        pictures=[Picture("preconditioning_heads", f"{judged[0].sentence} Medians over images. {BANDS}", figure)],
        controls=_of(results, stated.ROOTS),
        exploratory=theorem,
        tables=[Table("preconditioning_conditions", caption, table[list(part.backbone.unique())].reset_index())],
        method=[
            "The head's Jacobian is d svec(Z) / dX at the features X of one image, on the range of their covariance. The claim's "
            "value is the geometric mean over both trained backbones.",
            _method(results),
        ],
        provenance=results.provenance,
    )


def _directions(results: Results, records: pd.DataFrame) -> Fold:
    """Claim 5: gradients under two heads."""
    judged, points = results.of("K-FAC-like gradient"), unrelated(records)
    shown = stated.partials(records[records.layer != gradients.ALL])
    shown = shown[shown["head"].isin(("gcp", "covariance", f"gcp, {gradients.PERMUTED}"))]
    axes: dict[str, Any] = {"x_label": "damping of P", "y_label": gradients.PARTIAL}
    by_damping = Curves("setting", "value", panels="backbone", log="x", reference=0.0, zone=LIKE.zone, **axes).draw(
        shown
    )
    axes = {"x_label": "predicted by an unrelated P", "y_label": "cos(g, P g_GAP)"}
    against = Scatter("predicted", "measured", panels="backbone", line="identity", **axes).draw(points)
    gcp = points[(points["head"] == "gcp") & (points.setting == DAMPING)]
    above = f"Of GCP's points at damping {DAMPING:g}, {100 * (gcp.measured > gcp.predicted).mean():.0f} % lie above the line."
    return Fold(
        judged=judged,
        sentences=[
            f"At damping {DAMPING:g} the cosine of g_GCP with P g_GAP is {gcp.measured.mean():.3f}; a P that turns g_GAP as far "
            f"but knows nothing of GCP predicts cos(g_GCP, g_GAP) cos(g_GAP, P g_GAP) = {gcp.predicted.mean():.3f}. Only the "
            "partial correlation is evidence."
        ],
        pictures=[
            Picture("preconditioning_partial", f"{judged[0].sentence} Grey: the margin. {BANDS}", by_damping),
            Picture("preconditioning_cosines", f"{above} A point: one convolution, seed, damping.", against),
            *_turned(_of(results, stated.TURNED)),
        ],
        controls=_of(results, stated.CONTROLS),
        exploratory=_of(results, [*stated.PARTIALS, *stated.TURNED, *stated.NEARER]),
        method=[
            "g is the gradient of a convolution's weights, P the K-FAC preconditioner of the network with the GAP head, both of "
            f"the large batch; the damping, {DAMPING:g}, is relative to the block's scale. The partial correlation is the cosine "
            "of what is left of g_GCP and of P g_GAP without their parts along g_GAP: the mean over convolutions and trained "
            f"backbones. Controls: other heads, and GCP with a random classifier or one fitted to permuted labels. {AS_BEFORE}"
        ],
        provenance=results.provenance,
    )


def _turned(cases: Sequence[Judged]) -> list[Picture]:
    """What the gradient of GCP has of each way to turn that of GAP."""
    if not cases:
        return []
    named = {case.claim.name.partition(": ")[2]: case for case in cases}
    rows = [row | {"P": P} for P, case in named.items() for row in case_rows(case)]
    figure = Forest("P", x_label="partial correlation of g_GCP with P g_GAP given g_GAP").draw(pd.DataFrame(rows))
    beyond = [P for P, case in named.items() if case.estimate and case.estimate.seen[1] > case.claim.compare.zone[1]]
    said = (
        f"more than the margin of {', '.join(beyond)}"
        if beyond
        else "more than the margin of none of these for certain"
    )
    caption = (
        f"Beyond the gradient of GAP, that of GCP has {said}. K-FAC's P and its powers at damping {DAMPING:g}; Muon: U Vᵀ of "
        "g_GAP = U diag(s) Vᵀ. Points are seeds, lines 95 % intervals, grey is the margin."
    )
    return [Picture("preconditioning_turned", caption, figure)]


def unrelated(records: pd.DataFrame) -> pd.DataFrame:
    """Of each head, backbone, seed, damping and convolution cos(g, P g_GAP), `measured`, and the product `predicted`."""
    keys = ["network", "backbone", "seed", "layer"]
    each = records[records.layer != gradients.ALL]
    plain, turn, points = (
        each[each.quantity == quantity].rename(columns={"value": name})[[*keys, *others, name]]
        for quantity, name, others in (
            (gradients.PLAIN, "plain", ["head"]),
            (gradients.TURN, "turn", ["setting"]),
            (gradients.WITH_P, "measured", ["head", "setting"]),
        )
    )
    return points.merge(plain).merge(turn).assign(predicted=lambda table: table.plain * table.turn)


def _backward(results: Results, records: pd.DataFrame) -> Fold:
    """The published approximation of the backward pass."""
    sentences = []
    for of, quantity in heads.COSINES.items():
        cosines = means(records[records.quantity == quantity], ["layer"])
        listed = "; ".join(f"{name} {cosines[form]:.3f}" for form, name in FORMS.items())
        sentences.append(f"Cosine of {of} to that of the exact root, mean over trained backbones and seeds: {listed}.")
    return Fold(
        title="The published form of the backward pass",
        sentences=sentences,
        exploratory=_of(results, stated.BACKWARD),
        method=[
            "The same dL/dZ of a fitted GCP head goes through each form: that of the published head (5 steps), its approximation "
            f"as printed and with the eigenvectors that it leaves out, and that without a root; W: last convolution. {AS_BEFORE}"
        ],
    )


def _curvature(results: Results, records: pd.DataFrame) -> Fold:
    """What K-FAC adds below each head."""
    part = records[records.quantity.isin(blocks.QUANTITIES) & records["head"].isin(("gap", "covariance", "gcp"))]
    table = means(part, ["backbone", "head", "quantity"], geometric=True).unstack("quantity").reset_index()
    pairs = means(part, ["backbone", "head", "seed", "layer", "quantity"]).unstack("quantity").reset_index()
    better = 100 * (pairs[blocks.AFTER_KFAC] < pairs[blocks.CONDITION]).mean()
    axes: dict[str, Any] = {"x_label": "λ₁ / λₖ", "y_label": "after K-FAC"}
    figure = Scatter(blocks.CONDITION, blocks.AFTER_KFAC, panels="layer", line="identity", log="xy", **axes).draw(pairs)
    means_of = "Geometric means over three convolutions and seeds; the block condition is λ₁ / λₖ."
    caption = f"K-FAC lowers λ₁ / λₖ of {better:.0f} % of the blocks. A point: one backbone and seed."
    return Fold(
        title="What K-FAC leaves to do below each head",
        sentences=[
            "A smaller gain by K-FAC below GCP would speak for “GCP preconditions already” only if an exact preconditioner "
            "gained less there, too: K-FAC may fit one head's blocks better."
        ],
        pictures=[Picture("preconditioning_blocks", caption, figure)],
        exploratory=_of(results, stated.BLOCKS),
        tables=[Table("preconditioning_conditioning", means_of, table.assign(head=table["head"].map(label)))],
        method=[
            "λ₁ / λₖ is the condition of the GGN block of a convolution, the first, middle or last; k is half of the possible "
            f"rank. The damping, {DAMPING:g}, is relative to the scale of what is inverted. {AS_BEFORE}"
        ],
    )


def _of(results: Results, claims: Sequence[Claim]) -> list[Judged]:
    """These claims as judged, as far as they were measured."""
    return [case for case in results.of(*(claim.name for claim in claims)) if case.estimate is not None]


def _method(results: Results) -> str:
    training, measures = results.origins.settings["training"], results.origins.settings["measures"]
    data = results.origins.data.get("label", training["dataset"])
    return (
        f"{training['network']} on {data}, after {training['epochs']} epochs of SGD; every head on the same backbone, its "
        f"classifier fitted (penalty {measures['penalty']:g}). Training images: {measures['images']} in the large batch, whose "
        f"statistics batch norm has, {measures['head_images']} for heads, {measures['curvature_images']} for blocks."
    )
