"""What is claimed of preconditioning, and the numbers that decide it: one for each network, seed and cell."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from secondorder.kfac.options import DAMPING
from studies.judge import Bound, Claim, Comparison, Difference, Interaction, Ratio, primary
from studies.judge.primary import GAP, GCP
from studies.preconditioning import backward, blocks, conditioning
from studies.preconditioning.backbone import PUBLISHED
from studies.preconditioning.gradients import ALL, NATURAL, PARTIAL, PERMUTED, RANDOM

ROUNDING = 1e-6
"""How far above sqrt(2) rounding may bring a condition number."""
KEYS = ["network", "seed"]
UNDER = {"gap": "trained under GAP", "gcp": "trained under GCP"}
WITHOUT = "unpreconditioned"
FORMS = {
    backward.NEWTON_SCHULZ: "published head's own",
    "trimmed": "approximation as printed",
    "trimmed_rotated": "approximation with eigenvectors",
    WITHOUT: "no preconditioner",
}
"""Forms of the backward pass -> names for a reader."""


def means(part: pd.DataFrame, by: list[str], geometric: bool = False) -> "pd.Series[float]":
    """Means over all but `by`, in the order of the table; not finite where one of the numbers is missing or infinite."""

    def mean(values: "pd.Series[float]") -> float:
        numbers = values.to_numpy(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.exp(np.log(numbers).mean()) if geometric else numbers.mean())

    found: pd.Series[float] = part.groupby(by, sort=False).value.agg(mean)
    return found


def published(records: pd.DataFrame) -> pd.DataFrame:
    """Rows of the condition of heads, of the published head with the published number of Newton-Schulz steps."""
    return records[(records["head"] != "gcp") | (records.setting == PUBLISHED)]


def head_conditions(records: pd.DataFrame) -> pd.DataFrame:
    """The median condition number of each head, the geometric mean over trained backbones."""
    part = published(records[(records.quantity == conditioning.CONDITION) & (records.trained_under != "")])
    return means(part, [*KEYS, "head"], geometric=True).reset_index()


def worst_conditions(records: pd.DataFrame) -> pd.DataFrame:
    """The largest condition number of each head on any image and backbone, untrained ones too."""
    part = published(records[records.quantity == conditioning.WORST])
    return part.groupby([*KEYS, "head"]).value.max().reset_index()


def partials(records: pd.DataFrame, *which: str) -> pd.DataFrame:
    """Rows of partial correlations (with P of the name `which`, else K-FAC's), the variant of the head in its name."""
    ends = ("", f", {RANDOM}", f", {PERMUTED}")
    names = {", ".join((PARTIAL + end, *which)): end for end in ends}
    part = records[records.quantity.isin(names)]
    return part.assign(head=part["head"] + part.quantity.map(names))


def partial_correlations(
    records: pd.DataFrame, under: str = "", which: Sequence[str] = (), whole: bool = False
) -> pd.DataFrame:
    """Partial correlations of each head and control (also as `layer`) at the optimiser's damping, means over convolutions.

    Args:
        records: of the study.
        under: head that the backbones are trained under; all of them when not given.
        which: name of P if it is not K-FAC's.
        whole: of all convolutions as one vector, not the mean over them.
    """
    part = partials(records, *which)
    part = part[(part.setting == DAMPING) & ((part.layer == ALL) == whole)]
    part = part[part.trained_under == under] if under else part
    found = means(part, [*KEYS, "head"]).reset_index()
    return found.assign(layer=found["head"])


def backward_cosines(records: pd.DataFrame) -> pd.DataFrame:
    """The cosine of dL/dX to the exact one on trained backbones, by the form (`layer`)."""
    part = records[records.quantity == f"{backward.COSINE}, {backward.FEATURES}"]
    return means(part, [*KEYS, "layer"]).reset_index()


def block_values(records: pd.DataFrame) -> pd.DataFrame:
    """The geometric mean over convolutions and trained backbones, by head and quantity."""
    part = records[records.layer.isin(blocks.ROLES)]
    return means(part, [*KEYS, "head", "quantity"], geometric=True).reset_index()


def _explored(name: str, quantity: str, compare: Comparison, values: Callable[[pd.DataFrame], pd.DataFrame]) -> Claim:
    """A claim that is not one of the paper's nine."""
    return Claim(name, f"{quantity[0].upper()}{quantity[1:]}.", "preconditioning", quantity, compare, values)


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
CONDITION, SHARED = (
    "median condition number of the head's Jacobian",
    "partial correlation of g_GCP with P g_GAP given g_GAP",
)
LIKE = primary(5).compare
LARGEST = "largest condition number of the exact root's Jacobian over images and backbones, against √2"
WITHIN = Bound({"head": "gcp_exact"}, "below", reference=2**0.5 + ROUNDING)
THEOREM = replace(_explored("exact root within √2", LARGEST, WITHIN, worst_conditions), proved=True)
ROOTS = [
    _explored(f"head condition: {a} / {b}", f"{CONDITION}, {a} / {b}", Ratio({"head": a}, {"head": b}), head_conditions)
    for a, b in (("gcp", "covariance"), ("gcp_exact", "gcp"))
]
PARTIALS = [
    _explored(f"partial correlation: {words}", f"{SHARED}, {words}", LIKE, values)
    for words, values in {
        **{words: partial(partial_correlations, under=head) for head, words in UNDER.items()},
        "one vector of all convolutions": partial(partial_correlations, whole=True),
        "exact natural gradient": partial(partial_correlations, which=(NATURAL,)),
    }.items()
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
    _explored(
        "block condition: gcp / gap",
        "λ₁ / λₖ of GGN blocks on the same backbones, GCP / GAP",
        Ratio(GCP | BEFORE, GAP | BEFORE, margin=0.2),
        block_values,
    ),
    *(
        _explored(
            f"gain by {words}: gcp − gap",
            f"log of λ₁ / λₖ before over after {words}, GCP − GAP",
            Interaction(GCP, GAP, BEFORE, {"quantity": after}),
            block_values,
        )
        for after, words in ((blocks.AFTER_KFAC, "K-FAC"), (blocks.AFTER_EXACT, "an exact preconditioner"))
    ),
    _explored(
        "fit of K-FAC: gcp / gap",
        "cosine of the K-FAC block to the GGN block, GCP / GAP",
        Ratio(GCP | FIT, GAP | FIT, "above"),
        block_values,
    ),
]
CLAIMS = [
    primary(3).measured(head_conditions, CONDITIONED),
    primary(5).measured(partial_correlations, LIKE_KFAC),
    *(THEOREM, *ROOTS, *PARTIALS, *CONTROLS, *BACKWARD, *BLOCKS),
]
