"""What is claimed of preconditioning, and the numbers that decide it: one for each network, seed and cell."""

from functools import partial

import pandas as pd
from scipy.stats import gmean

from secondorder.kfac.options import DAMPING
from studies.judge import Bound, Claim, Comparison, Difference, Interaction, Ratio, primary
from studies.judge.primary import GAP, GCP, Values
from studies.preconditioning import blocks, heads
from studies.preconditioning.backbone import PUBLISHED
from studies.preconditioning.gradients import ALL, MUON, NATURAL, PARTIAL, PERMUTED, POWERS, RANDOM

ROUNDING = 1e-6
"""How far above sqrt(2) rounding may bring a condition number."""
KEYS = ["network", "seed"]
UNDER = {"gap": "trained under GAP", "gcp": "trained under GCP"}
WITHOUT = "unpreconditioned"
FORMS = {
    heads.NEWTON_SCHULZ: "published head's own",
    "trimmed": "approximation as printed",
    "trimmed_rotated": "approximation with eigenvectors",
    WITHOUT: "no preconditioner",
}
"""Forms of the backward pass -> names for a reader."""


def means(part: pd.DataFrame, by: list[str], geometric: bool = False) -> "pd.Series[float]":
    """Means of value over all but `by`, in the order of the table; not finite where one of the numbers is missing or infinite."""
    values = part.groupby(by, sort=False).value
    return values.agg(gmean) if geometric else values.agg(lambda numbers: numbers.mean(skipna=False))


def head_conditions(records: pd.DataFrame, quantity: str = heads.CONDITION) -> pd.DataFrame:
    """The rows of a quantity of heads, of the published head with the published number of Newton-Schulz steps."""
    return records[(records.quantity == quantity) & ((records["head"] != "gcp") | (records.setting == PUBLISHED))]


def median_conditions(records: pd.DataFrame) -> pd.DataFrame:
    """The median condition number of each head, the geometric mean over trained backbones."""
    return means(head_conditions(records[records.trained_under != ""]), [*KEYS, "head"], geometric=True).reset_index()


def worst_conditions(records: pd.DataFrame) -> pd.DataFrame:
    """The largest condition number of each head on any image and backbone, untrained ones too."""
    return head_conditions(records, heads.WORST).groupby([*KEYS, "head"]).value.max().reset_index()


def partials(records: pd.DataFrame, which: str = "") -> pd.DataFrame:
    """Rows of partial correlations (with P of the name `which`, else K-FAC's), the variant of the head in its name."""
    names = {f"{PARTIAL}{variant}{which}": variant for variant in ("", f", {RANDOM}", f", {PERMUTED}")}
    part = records[records.quantity.isin(names)]
    return part.assign(head=part["head"] + part.quantity.map(names))


def partial_correlations(records: pd.DataFrame, under: str = "", which: str = "", whole: bool = False) -> pd.DataFrame:
    """Partial correlations of each head and control (also as `layer`) at the optimiser's damping.

    They are means over convolutions, or with `whole` those of all convolutions as one vector, and over the backbones, or those
    trained `under` one head.
    """
    part = partials(records, which)
    part = part[part.setting.fillna(DAMPING).eq(DAMPING) & ((part.layer == ALL) == whole)]
    found = means(part[(part.trained_under == under) | (under == "")], [*KEYS, "head"]).reset_index()
    return found.assign(layer=found["head"])


def by_preconditioner(records: pd.DataFrame) -> pd.DataFrame:
    """The partial correlations of GCP with each P g_gap, K-FAC's and others, by its name (`layer`)."""
    found = {name: partial_correlations(records, which=which) for name, which in PRECONDITIONERS.items()}
    return pd.concat([part[part["head"] == "gcp"].assign(layer=name) for name, part in found.items()])


def backward_cosines(records: pd.DataFrame) -> pd.DataFrame:
    """The cosine of dL/dX to the exact one on trained backbones, by the form (`layer`)."""
    part = records[records.quantity == heads.COSINES["dL/dX"]]
    return means(part, [*KEYS, "layer"]).reset_index()


def block_values(records: pd.DataFrame) -> pd.DataFrame:
    """The geometric mean over convolutions and trained backbones, by head and quantity."""
    part = records[records.quantity.isin(blocks.QUANTITIES)]
    return means(part, [*KEYS, "head", "quantity"], geometric=True).reset_index()


CONDITION = "median condition number of the head's Jacobian"
KFAC = "K-FAC's P"
PRECONDITIONERS = {KFAC: "", **{name: f", {name}" for name in (*POWERS, MUON, NATURAL)}}
"""Names of what turns g_gap -> ends of quantities."""
SHARED = "partial correlation of g_GCP with P g_GAP given g_GAP"
LIKE = primary(5).compare
CONDITIONED = {
    "supported": "Five Newton-Schulz steps condition the head nearly as well as the exact root does.",
    "contradicted": "Five Newton-Schulz steps do not reach the conditioning of the exact root: the published head is not the "
    "one of the theorem.",
}
LIKE_KFAC = {
    "supported": "Beyond the gradient of GAP, that of GCP has what K-FAC adds to it.",
    "contradicted": "Beyond the gradient of GAP, that of GCP goes against what K-FAC adds to it.",
    "no effect": "Beyond the gradient of GAP, that of GCP has next to nothing of what K-FAC adds to it.",
}


def _explored(name: str, quantity: str, compare: Comparison, values: Values, proved: bool = False) -> Claim:
    """A claim that is not one of the paper's nine."""
    statement = f"{quantity[0].upper()}{quantity[1:]}."
    return Claim(name, statement, "preconditioning", quantity, compare, values, proved=proved)


THEOREM = _explored(
    "exact root within √2",
    "largest condition number of the exact root's Jacobian over images and backbones, against √2",
    Bound({"head": "gcp_exact"}, "below", reference=2**0.5 + ROUNDING),
    worst_conditions,
    proved=True,
)
ROOTS = [
    _explored(
        f"head condition: {a} / {b}", f"{CONDITION}, {a} / {b}", Ratio({"head": a}, {"head": b}), median_conditions
    )
    for a, b in (("gcp", "covariance"), ("gcp_exact", "gcp"))
]
PARTIALS = [
    _explored(f"partial correlation: {words}", f"{SHARED}, {words}", LIKE, values)
    for words, values in (
        *((words, partial(partial_correlations, under=head)) for head, words in UNDER.items()),
        ("one vector of all convolutions", partial(partial_correlations, whole=True)),
    )
]
TURNED = [
    _explored(
        f"turned gradient: {name}",
        f"partial correlation of g_GCP with P g_GAP given g_GAP, P: {name}",
        Bound({"layer": name}, "above", reference=0.0, margin=0.1, scale="fisher"),
        by_preconditioner,
    )
    for name in PRECONDITIONERS
]
NEARER = [
    _explored(
        f"turned gradient: {name} − {KFAC}",
        f"partial correlation of g_GCP with P g_GAP given g_GAP, P: {name} − {KFAC}",
        Difference({"layer": name}, {"layer": KFAC}, "above", 0.1, "fisher"),
        by_preconditioner,
    )
    for name in PRECONDITIONERS
    if name != KFAC
]
CONTROLS = [
    _explored(
        f"partial correlation: gcp − {other}",
        f"{SHARED}, GCP − {other}",
        Difference({"layer": "gcp"}, {"layer": other}, "above", 0.1, "fisher"),
        partial_correlations,
    )
    for other in ("covariance", "gcp_exact", "gap_lifted", f"gcp, {RANDOM}", f"gcp, {PERMUTED}")
]
BACKWARD = [
    _explored(
        f"backward pass: {name} − {FORMS[WITHOUT]}",
        f"cosine of dL/dX to that of the exact root, {name} − {FORMS[WITHOUT]}",
        Difference({"layer": form}, {"layer": WITHOUT}, "above", scale="fisher"),
        backward_cosines,
    )
    for form, name in FORMS.items()
    if form != WITHOUT
]
BEFORE, FIT = {"quantity": blocks.CONDITION}, {"quantity": blocks.COSINE}
BLOCKS = [
    _explored(name, quantity, compare, block_values)
    for name, quantity, compare in (
        (
            "block condition: gcp / gap",
            "λ₁ / λₖ of GGN blocks on the same backbones, GCP / GAP",
            Ratio(GCP | BEFORE, GAP | BEFORE, margin=0.2),
        ),
        *(
            (
                f"gain by {words}: gcp − gap",
                f"log of λ₁ / λₖ before over after {words}, GCP − GAP",
                Interaction(GCP, GAP, BEFORE, {"quantity": after}),
            )
            for after, words in ((blocks.AFTER_KFAC, "K-FAC"), (blocks.AFTER_EXACT, "an exact preconditioner"))
        ),
        (
            "fit of K-FAC: gcp / gap",
            "cosine of the K-FAC block to the GGN block, GCP / GAP",
            Ratio(GCP | FIT, GAP | FIT, "above"),
        ),
    )
]
CLAIMS = [
    primary(3).measured(median_conditions, CONDITIONED),
    primary(5).measured(partial_correlations, LIKE_KFAC),
    *(THEOREM, *ROOTS, *PARTIALS, *TURNED, *NEARER, *CONTROLS, *BACKWARD, *BLOCKS),
]
