"""The first table of a page: what came out for each primary claim on each data set, and the figure of all of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from studies.draw import Forest, forest_row, in_margins, seed_rows
from studies.draw.palette import LABELS, label
from studies.judge import NOT_MEASURED, Claim, Judged
from studies.judge.sentences import in_words
from studies.page.outcomes import Outcome
from studies.page.parts import Fold, Page, Picture

OVERVIEW = "claims_overview"


@dataclass(frozen=True)
class ClaimRow:
    """A primary claim: its outcome on each data set, one sentence, and the command that would measure what is missing."""

    claim: Claim
    cells: Sequence[Outcome]
    sentence: str
    command: str

    @property
    def anchor(self) -> str:
        """Of the fold; name of the small picture."""
        return f"claim_{int(self.claim.primary)}"

    @cached_property
    def margins(self) -> pd.DataFrame:
        """The forest table in margins, of the estimate on each data set and of the seeds behind it."""
        rows = []
        for cell in self.cells:
            row = forest_row(self.claim, cell.dataset, cell.outcome, (cell.estimate, cell.low, cell.high))
            rows += [row, *seed_rows(row, cell.by_seed)]
        return in_margins(pd.DataFrame(rows))

    @property
    def drawn(self) -> bool:
        """Whether there is an estimate, in margins, to be drawn."""
        return bool(self.cells) and bool(np.isfinite(self.margins.estimate).any())


def columns(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The data sets that a claim was measured on, small ones first, each with the folder beside this one that it is from, or "".

    All data sets, where no claim was measured on any.
    """
    measured = [outcome for outcome in outcomes if outcome.outcome != NOT_MEASURED] or outcomes
    found = {outcome.dataset: outcome.folder for outcome in measured if outcome.dataset}
    order = {name: place for place, name in enumerate(LABELS)}
    return dict(sorted(found.items(), key=lambda column: order.get(column[0], len(order))))


def claim_rows(page: Page, judged: Sequence[Judged], outcomes: Sequence[Outcome]) -> list[ClaimRow]:
    """The primary claims of the page, and others that a study judged, each with its outcome on each data set."""
    claims = {claim.name: claim for claim in (*page.claims, *(item.claim for item in judged)) if claim.primary}
    by_place = {(outcome.claim, outcome.dataset): outcome for outcome in outcomes}
    rows = []
    for name, claim in sorted(claims.items(), key=lambda item: item[1].primary):
        places = {dataset: Outcome(name, claim.primary, dataset, NOT_MEASURED) for dataset in columns(outcomes)}
        cells = [by_place.get((name, dataset), missing) for dataset, missing in places.items()]
        said = [item for item in judged if item.claim.name == name and item.sentence]
        command = page.commands.get(name, "")
        if any(cell.outcome != NOT_MEASURED for cell in cells):
            own = {item.dataset: item.sentence for item in said if item.estimate is not None}
            sentence, command = _sentence(claim, cells, own), ""
        elif command:
            sentence = "Not measured; this would:"
        else:
            sentence = said[0].sentence if said else "Not measured: no study measures it yet."
        rows.append(ClaimRow(claim, cells, sentence, command))
    return rows


def _sentence(claim: Claim, cells: Sequence[Outcome], own: Mapping[str, str]) -> str:
    """What came out: one sentence where all data sets agree, that of this page's if it has one, else one for each data set."""
    measured = [cell for cell in cells if cell.outcome != NOT_MEASURED]
    sentences = {cell.dataset: own.get(cell.dataset) or in_words(claim, cell.outcome) for cell in measured}
    if len(measured) == len(cells) and len({cell.outcome for cell in cells}) == 1:
        return next((own[name] for name in sentences if name in own), next(iter(sentences.values())))
    return " ".join(f"{label(name)}: {text}" for name, text in sentences.items())


def agreement(rows: Sequence[ClaimRow]) -> str:
    """What all data sets agree on, of the claims that were measured on each; "" where no claim was measured on several."""
    everywhere = [row for row in rows if len(row.cells) > 1 and all(c.outcome != NOT_MEASURED for c in row.cells)]
    if not everywhere:
        return ""
    parts = []
    for same, verb in ((True, "agree on"), (False, "differ on")):
        found = [str(row.claim.primary) for row in everywhere if (len({c.outcome for c in row.cells}) == 1) is same]
        parts += [f"{verb} {', '.join(found)}"] if found else []
    names = " and ".join(label(cell.dataset) for cell in everywhere[0].cells)
    return f"Of the claims measured on {names}, outcomes {' and '.join(parts)}."


def overview(rows: Sequence[ClaimRow]) -> Fold | None:
    """All primary claims on one axis, in margins of practical equivalence; None where nothing was measured."""
    if not any(row.drawn for row in rows):
        return None
    table = pd.concat([row.margins.assign(heading=f"{row.claim.primary} · {row.claim.name}") for row in rows])
    kind = Forest("dataset", groups="heading", margins=True, x_label="effect in margins of practical equivalence")
    counts = []
    for cells in zip(*(row.cells for row in rows), strict=True):
        words = Counter(cell.outcome for cell in cells)
        counts.append(f"{label(cells[0].dataset)}: " + ", ".join(f"{count} {word}" for word, count in words.items()))
    caption = (
        f"{'; '.join(counts)}. Estimates with 95 % intervals, small points are seeds, filled where decided. One margin is what "
        "counts as no effect (grey); the axis is logarithmic beyond it. The numbers at the right are in each claim's own unit."
    )
    return Fold(title="All claims in one figure", pictures=[Picture(OVERVIEW, caption, kind.draw(table))])
