"""The preconditioning study in the report: from its tables to five parts with verdicts."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from studies.preconditioning.blocks.section import part as blocks
from studies.preconditioning.directions.section import part as directions
from studies.preconditioning.factorial.section import part as factorial
from studies.preconditioning.forms.section import part as forms
from studies.preconditioning.heads.section import part as heads
from studies.preconditioning.part import Part
from studies.preconditioning.study import GRADIENTS, KEYS, NAME
from studies.report.section import Claim, Section, Table
from studies.results import read_provenance, read_table

COLUMNS = (*KEYS, "part", "layer", "head", "setting", "measure", "batch", "value")
PARTS: dict[str, Callable[[pd.DataFrame], Part]] = {
    "heads": heads,
    "forms": forms,
    "directions": directions,
    "blocks": blocks,
}
"""Parts that read ``preconditioning.csv``, in the order of the report; the factorial has tables of its own."""


def section(folder: Path) -> Section:
    """The section of the report for the results in `folder`."""
    origin = read_provenance(folder, NAME)
    table = pd.concat([read_table(folder, name, COLUMNS).astype({"setting": object}) for name in (NAME, GRADIENTS)])
    table = table.fillna({"setting": ""})
    parts = [part(table[table.part == name]) for name, part in PARTS.items()]
    trained = factorial(folder)
    parts += [] if trained is None else [trained]
    claims = [claim for part in parts for claim in part.claims]
    config = origin.config
    return Section(
        title="Preconditioning: is GCP a second-order method in disguise?",
        question=(
            "Wang et al. argue that the backward pass of GCP acts like the preconditioner of K-FAC. What part of this holds: at "
            "the pooling head, for the gradients of the layers below, for the conditioning of their curvature, and in training?"
        ),
        method=(
            f"{origin.data['label']}, {config['backbone']}. A to D measure one backbone, untrained, in training and trained "
            f"under GAP and under GCP ({len(origin.seeds)} seeds), with every head put on the same backbone weights and its "
            "classifier fitted anew; batch norm has constant statistics in A and B, and is in training mode in C and D. E trains "
            "every pooling with every optimiser, each cell tuned by as many trials "
            f"({config['factorial']['backbone']}, {config['factorial']['seeds']} seeds). Intervals are over seeds (t intervals, "
            "95 %); of all predictions about one in twenty would be decided by chance."
        ),
        provenance=origin,
        claims=claims,
        remarks=[words for part in parts for words in part.remarks],
        pictures=[picture for part in parts for picture in part.pictures],
        tables=[
            *(own for part in parts for own in part.tables),
            Table(
                "preconditioning_verdicts",
                f"All {len(claims)} predictions of the study.",
                verdicts(claims),
                folded=True,
            ),
        ],
    )


def verdicts(claims: list[Claim]) -> pd.DataFrame:
    """One row for each prediction: what was measured, its interval, the verdict and what it means."""
    return pd.DataFrame([
        {
            "part": claim.group,
            "prediction": claim.statement,
            "measured": claim.quantity,
            "value": str(claim.interval),
            "verdict": claim.verdict,
            "meaning": claim.meaning,
        }
        for claim in claims
    ])  # fmt: skip
