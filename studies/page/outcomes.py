"""Outcomes of claims by data set: of this folder, and of those beside it, from their ``claims.csv``."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from secondorder.errors import InputError, check_known
from studies.draw.judged import interval_of
from studies.draw.numbers import estimate_words
from studies.draw.palette import OUTCOME_COLORS, label
from studies.judge import Judged
from studies.messages import one_line
from studies.results import read_table

NOT_MEASURED = "not measured"
FILE = "claims"


@dataclass(frozen=True)
class Outcome:
    """What came out for a claim on a data set; nan and "" where there is nothing."""

    claim: str
    primary: int
    dataset: str
    outcome: str
    estimate: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    n: int = 0
    networks: int = 0
    p_holm: float = float("nan")
    seeds_needed: int = 0
    quantity: str = ""
    left_out: int = 0
    """Seeds without an effect, known in this folder only."""

    @property
    def numbers(self) -> str:
        """``0.85 [0.79, 0.92]``."""
        return estimate_words(self.estimate, self.low, self.high)

    @property
    def style(self) -> str:
        """Class of the outcome's word in a page's style sheet; "" for a word that is none of the outcomes."""
        return self.outcome.replace(" ", "-") if self.outcome in OUTCOME_COLORS else ""

    @property
    def seeds(self) -> str:
        """``8 seeds``, ``6 seeds × 2 networks``, how many are without an effect, and how many would decide."""
        if self.n == 0:
            return ""
        words = f"{self.n} seed{'s' * (self.n != 1)}" + (f" × {self.networks} networks" if self.networks > 1 else "")
        words += f", {self.left_out} left out" * (self.left_out > 0)
        return words + f"; {self.seeds_needed} would decide" * (self.seeds_needed > 0 and self.outcome == "undecided")

    @property
    def p(self) -> str:
        """The Holm-adjusted p value; "" for none."""
        return "" if pd.isna(self.p_holm) else "< 0.001" if self.p_holm < 0.001 else f"{self.p_holm:.2g}"

    @property
    def place(self) -> str:
        """Name of the data set for a reader."""
        return label(self.dataset)


COLUMNS = tuple(field.name for field in fields(Outcome) if field.name != "left_out")
COUNTS, MOST = ("primary", "n", "networks", "seeds_needed"), 10**6
"""Columns of counts, and the largest that is believed."""


def outcome_of(judged: Judged) -> Outcome:
    """The outcome of a judged claim."""
    claim, estimate = judged.claim, judged.estimate
    measured: dict[str, Any] = {}
    if estimate is not None:
        measured = dict(zip(("estimate", "low", "high"), interval_of(estimate), strict=True))
        measured |= {"left_out": int(estimate.left_out)}
        measured |= {"n": int(estimate.n), "networks": int(estimate.networks), "p_holm": float(judged.p_holm)}
        measured |= {"seeds_needed": int(judged.seeds_needed or 0)}
    return Outcome(claim.name, claim.primary, judged.dataset, judged.outcome, quantity=claim.quantity, **measured)


def outcomes_table(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    """The table that is written as ``claims.csv``."""
    return pd.DataFrame([vars(outcome) for outcome in outcomes], columns=list(COLUMNS))


def read_outcomes(folder: Path) -> list[Outcome]:
    """The primary outcomes in the ``claims.csv`` of a folder; InputError if it is no such table."""
    table = read_table(folder, FILE, COLUMNS)
    words = ("claim", "dataset", "outcome", "quantity")
    table = table.fillna(dict.fromkeys(words, ""))
    try:
        table = table.astype({name: str if name in words else float for name in COLUMNS})
        for name in COUNTS:
            counts = table[name].fillna(0.0)
            if not counts.between(0, MOST).all():
                raise ValueError(f"a value of {name} is no count")
            table[name] = counts.astype(int)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / FILE}.csv: {error}; run the study again") from None
    rows = table[list(COLUMNS)][table.primary > 0].to_dict("records")
    outcomes = [Outcome(**{str(name): value for name, value in row.items()}) for row in rows]
    for outcome in outcomes:
        check_known("outcome", outcome.outcome, OUTCOME_COLORS)
    return outcomes


def beside(folder: Path, measured: Collection[str]) -> tuple[dict[str, list[Outcome]], list[str]]:
    """Outcomes on data sets that are not among `measured`, from folders beside `folder`; what could not be read, in a line each.

    Returns:
        By name of a folder its outcomes; of a data set that several folders have, only those of the first by name.
        The lines.
    """
    found: dict[str, list[Outcome]] = {}
    lines = []
    known = set(measured)
    here = folder.resolve()
    for file in sorted(here.parent.glob(f"*/{FILE}.csv")):
        if file.parent == here:
            continue
        try:
            rows = read_outcomes(file.parent)
        except (InputError, OSError) as error:
            reason = str(error).replace(str(here.parent), "..")
            lines.append(one_line(f"The outcomes beside this folder, in ../{file.parent.name}, are left out: {reason}"))
            continue
        new = {row.dataset for row in rows if row.outcome != NOT_MEASURED} - known - {""}
        if new:
            found[file.parent.name] = [row for row in rows if row.dataset in new]
            known |= new
    return found, lines
