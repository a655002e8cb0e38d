"""The claims of part D on one backbone, with what their verdicts mean."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from studies.preconditioning.blocks.measure import AFTER, BEFORE, CONSTANTS, EXACT, SQUARED
from studies.preconditioning.blocks.reading import (
    HALF_RANK,
    MEASURES,
    ONLY_LAST,
    TO_MEAN,
    per_seed,
    phase_name,
    ratio,
)
from studies.preconditioning.reading import short
from studies.report.section import Claim
from studies.statistics import NOT_SUPPORTED, SUPPORTED, UNDECIDED, geometric_interval

GROUP = "D: block conditioning"
CONVOLUTIONS = "geometric mean over three convolutions"
Meanings = dict[str, str]


@dataclass(frozen=True)
class Phase:
    """The rows of one backbone at the end, and its name."""

    table: pd.DataFrame
    name: str

    def claim(
        self,
        statement: str,
        quantity: str,
        ratios: pd.Series,
        meanings: Meanings,
        claimed: str = "below",
        headline: bool = False,
    ) -> Iterator[Claim]:
        """The claim that one ratio for each seed is below or above 1; nothing when there is no ratio."""
        if ratios.empty:
            return
        quantity, interval = f"{quantity}, {self.name}", geometric_interval(ratios)
        yield Claim(statement, quantity, interval, claimed, group=GROUP, headline=headline).meant(meanings)


def claims_of(table: pd.DataFrame, backbone: str) -> Iterator[Claim]:
    """Better conditioned than GAP and than no root; what K-FAC adds under each head; and the controls of both.

    The headlines are of the backbones that are trained.
    """
    for claim in _claims(Phase(table, phase_name(backbone))):
        yield replace(claim, headline=claim.headline and backbone != "untrained")


def _claims(phase: Phase) -> Iterator[Claim]:
    for reference, meanings in (("gap", BETTER_THAN_GAP), ("covariance", BETTER_THAN_COVARIANCE)):
        for measure in (HALF_RANK, TO_MEAN):
            yield from _better(phase, measure, reference, meanings)
    yield from _without_softmax(phase)
    yield from _constants(phase)
    for head in ("gap", "gcp"):
        yield from _improved(phase, head)
    yield from _improved_less(phase)
    yield from _persists(phase)
    yield from _fits_worse(phase)


def _better(phase: Phase, measure: str, reference: str, meanings: Meanings) -> Iterator[Claim]:
    values = per_seed(phase.table, BEFORE, measure)
    yield from phase.claim(
        f"GGN blocks below GCP are better conditioned than below {LONG[reference]} on the same weights: ratio below 1.",
        f"{short('gcp')} / {short(reference)}, {MEASURES[measure]}, {CONVOLUTIONS}",
        ratio(values, values, "gcp", reference),
        meanings,
        headline=measure == HALF_RANK,
    )


def _without_softmax(phase: Phase) -> Iterator[Claim]:
    values = per_seed(phase.table, SQUARED, HALF_RANK, ONLY_LAST)
    yield from phase.claim(
        "Control: without the softmax, J^T J of the last convolution is better conditioned below GCP than below GAP too.",
        f"{short('gcp')} / {short('gap')}, {MEASURES[HALF_RANK]} of the squared error's GGN, last convolution",
        ratio(values, values, "gcp", "gap"),
        {
            SUPPORTED: "Heads differ in the Jacobian itself, not only in how confident their classifiers are.",
            NOT_SUPPORTED: "The Jacobian below GCP is the worse conditioned one: an advantage of GCP's GGN is the softmax's.",
            UNDECIDED: "Whether an advantage of either head is the Jacobian's or the softmax's is open.",
        },
    )


def _constants(phase: Phase) -> Iterator[Claim]:
    values = per_seed(phase.table, CONSTANTS, HALF_RANK)
    yield from phase.claim(
        "Control: with the statistics of batch norm as constants, GGN blocks below GCP are better conditioned than below GAP.",
        f"{short('gcp')} / {short('gap')}, {MEASURES[HALF_RANK]} with batch norm's statistics as constants, {CONVOLUTIONS}",
        ratio(values, values, "gcp", "gap"),
        {
            SUPPORTED: "With batch norm's statistics as constants GCP's blocks are the better conditioned ones; compare the "
            "claim for the loss that training has.",
            NOT_SUPPORTED: "With batch norm's statistics as constants GCP's blocks are the worse conditioned ones.",
            UNDECIDED: "With batch norm's statistics as constants no head's blocks are clearly better conditioned.",
        },
    )


def _improved(phase: Phase, head: str) -> Iterator[Claim]:
    before, after = (per_seed(phase.table, setting, HALF_RANK) for setting in (BEFORE, AFTER))
    yield from phase.claim(
        f"K-FAC improves the conditioning of the GGN blocks below {short(head)}: after / before below 1.",
        f"after K-FAC (damping 0.01) / before, {MEASURES[HALF_RANK]}, {short(head)}, {CONVOLUTIONS}",
        ratio(after, before, head, head),
        {
            SUPPORTED: f"{short(head)} leaves K-FAC something to precondition.",
            NOT_SUPPORTED: f"K-FAC makes the blocks below {short(head)} worse conditioned.",
            UNDECIDED: f"Whether K-FAC improves the blocks below {short(head)} is open.",
        },
    )


def _gain_ratio(phase: Phase, setting: str) -> pd.Series:
    """after / before of GCP over that of GAP, for each seed: above 1 where GCP's blocks gain less."""
    gains = per_seed(phase.table, setting, HALF_RANK) / per_seed(phase.table, BEFORE, HALF_RANK)
    return ratio(gains, gains, "gcp", "gap")


def _improved_less(phase: Phase) -> Iterator[Claim]:
    yield from phase.claim(
        "K-FAC improves the conditioning less below GCP than below GAP: above 1.",
        f"r = (after / before) {short('gcp')} / {short('gap')}, {MEASURES[HALF_RANK]}, damping 0.01, {CONVOLUTIONS}",
        _gain_ratio(phase, AFTER),
        LESS,
        claimed="above",
        headline=True,
    )


def _persists(phase: Phase) -> Iterator[Claim]:
    """Whether at least half of log r remains with an exact preconditioner; no claim unless K-FAC clearly gains less below GCP."""
    kfac, exact = _gain_ratio(phase, AFTER), _gain_ratio(phase, EXACT)
    if not geometric_interval(kfac).low > 1:
        return
    yield from phase.claim(
        "Control: at least half of the smaller gain, in logarithms, remains with the exact preconditioner (F + λI)⁻¹.",
        f"r of the exact preconditioner / √(r of K-FAC), {MEASURES[HALF_RANK]}, damping 0.01, {CONVOLUTIONS}",
        (exact / np.sqrt(kfac)).dropna(),
        PERSISTS,
        claimed="above",
        headline=True,
    )


def _fits_worse(phase: Phase) -> Iterator[Claim]:
    cosines = per_seed(phase.table, BEFORE, "cosine", ONLY_LAST)
    yield from phase.claim(
        "Control: K-FAC fits the exact GGN block of the last convolution worse below GCP than below GAP.",
        f"{short('gcp')} / {short('gap')}, cosine of K-FAC, last convolution",
        ratio(cosines, cosines, "gcp", "gap"),
        {
            SUPPORTED: "The interaction of GCP with K-FAC in the factorial training is confounded: K-FAC may help GCP less "
            "because its model fits worse there, not because GCP preconditions already.",
            NOT_SUPPORTED: "K-FAC fits no worse below GCP: its fidelity does not explain a smaller gain there.",
            UNDECIDED: "Whether K-FAC's fidelity confounds the interaction of GCP with K-FAC is open.",
        },
        headline=True,
    )


LONG = {"gap": "GAP", "covariance": "the covariance without root"}
BETTER_THAN_GAP = {
    SUPPORTED: "What a preconditioner would do to the weights' curvature is there, though it may come from the covariance, the "
    "classifier or the root.",
    NOT_SUPPORTED: "Below the head the curvature is worse conditioned than under GAP: GCP is no preconditioner there.",
    UNDECIDED: "No difference to GAP in the conditioning of the weights' curvature can be told.",
}
BETTER_THAN_COVARIANCE = {
    SUPPORTED: "The root passes its conditioning of the head on to the weights below: as T2 suggests.",
    NOT_SUPPORTED: "The root conditions the head and not the weights below: the near-isometry does not reach them.",
    UNDECIDED: "Whether the root's conditioning of the head reaches the weights below is open.",
}
LESS = {
    SUPPORTED: "What “GCP already preconditions” predicts; the two controls that follow say whether it can be the reason.",
    NOT_SUPPORTED: "K-FAC improves GCP's blocks more than GAP's: against “GCP already preconditions”.",
    UNDECIDED: "K-FAC's gain in conditioning does not tell the heads apart.",
}
PERSISTS = {
    SUPPORTED: "The smaller gain remains where K-FAC's fidelity plays no part: for “GCP already preconditions”.",
    NOT_SUPPORTED: "With an exact preconditioner at the same damping most of the smaller gain is gone: it is how K-FAC fits "
    "below GCP, and no evidence for “GCP already preconditions”.",
    UNDECIDED: "Whether the smaller gain is K-FAC's fidelity or the blocks' own conditioning is open.",
}
