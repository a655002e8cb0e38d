"""The first table of a page: what came out for each primary claim on each data set, and the figure of all of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from studies.draw import Forest, forest_row, forest_table, in_margins
from studies.draw.judged import COLUMNS
from studies.draw.palette import LABELS, label
from studies.judge import Claim, Judged
from studies.page.outcomes import NOT_MEASURED, Outcome
from studies.page.parts import Fold, Picture

OVERVIEW = "claims_overview"


@dataclass(frozen=True)
class Column:
    """A data set; `folder` is the one beside this that it was measured in, and `page` whether that has a page."""

    dataset: str
    folder: str = ""
    page: bool = False

    @property
    def label(self) -> str:
        """Name of the data set for a reader."""
        return label(self.dataset)


@dataclass(frozen=True)
class ClaimRow:
    """A primary claim: its outcome in each column, one sentence, and the command that would measure what is missing."""

    claim: Claim
    cells: Sequence[Outcome]
    sentence: str
    command: str

    @property
    def anchor(self) -> str:
        """Of the fold; name of the small picture."""
        return f"claim_{int(self.claim.primary)}"

    @property
    def margins(self) -> pd.DataFrame:
        """The forest table of the small picture, a row for each data set, in margins."""
        rows = [forest_row(self.claim, c.dataset, c.outcome, (c.estimate, c.low, c.high)) for c in self.cells]
        return in_margins(pd.DataFrame(rows, columns=list(COLUMNS)))


def columns(here: Iterable[Outcome], beside: Mapping[str, Sequence[Outcome]], folder: Path) -> list[Column]:
    """The data sets of this folder and of those beside it, small ones first; "" is that of what was measured on none."""
    found = [Column(dataset) for dataset in dict.fromkeys(outcome.dataset for outcome in here) if dataset]
    for name, outcomes in beside.items():
        page = (folder.resolve().parent / name / "index.html").is_file()
        found += [Column(dataset, name, page) for dataset in dict.fromkeys(outcome.dataset for outcome in outcomes)]
    known = list(LABELS)
    return sorted(found, key=lambda column: known.index(column.dataset) if column.dataset in known else len(known))


def claim_row(
    claim: Claim, judged: Sequence[Judged], outcomes: Iterable[Outcome], across: Sequence[Column], command: str
) -> ClaimRow:
    """The row of a claim.

    Args:
        claim: the primary claim.
        judged: the claim judged on the data sets of this folder.
        outcomes: of this claim and others, in this folder and beside it.
        across: the columns.
        command: that would measure the claim, "" if there is none yet.
    """
    by_dataset = {outcome.dataset: outcome for outcome in outcomes if outcome.claim == claim.name}
    missing = {column.dataset: Outcome(claim.name, claim.primary, column.dataset, NOT_MEASURED) for column in across}
    cells = [by_dataset.get(column.dataset, missing[column.dataset]) for column in across]
    sentences = [item.sentence for item in judged if item.estimate is not None and item.sentence]
    if sentences:
        return ClaimRow(claim, cells, sentences[0], "")
    if any(cell.outcome != NOT_MEASURED for cell in cells):
        return ClaimRow(claim, cells, claim.statement, "")
    if not command:
        planned = next((item.sentence for item in judged if item.sentence), "Not measured: no study measures it yet.")
        return ClaimRow(claim, cells, planned, "")
    return ClaimRow(claim, cells, "Not measured; this would:", command)


def overview(rows: Sequence[ClaimRow], judged: Sequence[Judged]) -> Fold | None:
    """All primary claims on one axis, in margins of practical equivalence; None where nothing was measured."""
    here = in_margins(forest_table([item for item in judged if item.claim.primary]))
    seeds = here[here.seed >= 0]
    parts = []
    for row in rows:
        estimates = row.margins
        own = seeds[(seeds.claim == row.claim.name) & seeds.dataset.isin(estimates.dataset)]
        parts.append(pd.concat([estimates, own] if len(own) else [estimates]))
    table = pd.concat(parts) if parts else pd.DataFrame()
    if table.empty or not np.isfinite(table.estimate.to_numpy(float)).any():
        return None
    table["heading"] = [f"{number} · {name}" for number, name in zip(table.primary, table.claim, strict=True)]
    kind = Forest("dataset", groups="heading", margins=True, x_label="effect in margins of practical equivalence")
    figure: Figure = kind.draw(table)
    counts = (
        f"{cells[0].place}: {_counted([cell.outcome for cell in cells])}"
        for cells in zip(*(r.cells for r in rows), strict=True)
    )
    caption = (
        f"{'; '.join(counts)}. Estimates with 95 % intervals, small points are seeds, filled where decided. One margin is what "
        "counts as no effect (grey); the axis is logarithmic beyond it. The numbers at the right are in each claim's own unit."
    )
    return Fold(title="All claims in one figure", pictures=[Picture(OVERVIEW, caption, figure)])


def _counted(words: Sequence[str]) -> str:
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
