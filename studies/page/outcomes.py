"""Outcomes of claims by data set: of this folder, and of those beside it, from their ``claims.csv``."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pandas as pd

from secondorder.errors import InputError, check_known
from studies.draw.numbers import estimate_words
from studies.draw.palette import OUTCOME_COLORS
from studies.judge import NOT_MEASURED, Judged
from studies.messages import one_line
from studies.results import read_table

FILE = "claims"


@dataclass(frozen=True)
class Outcome:
    """What came out for a claim on a data set; nan and "" where there is nothing."""

    claim: str
    primary: int
    dataset: str
    outcome: str
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    """The ends of the interval are nan, too, where no scatter was seen for it."""
    n: int = 0
    networks: int = 0
    p_holm: float = math.nan
    seeds_needed: int = 0
    quantity: str = ""
    left_out: int = 0
    """Seeds without an effect, known in this folder only."""
    by_seed: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False)
    """The effect of each seed, known in this folder only."""
    folder: str = ""
    """Name of the folder beside this one that it was measured in; "" for this one."""

    @property
    def numbers(self) -> str:
        """Estimate and interval in words, as in ``0.85 [0.79, 0.92]``."""
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
        return "" if math.isnan(self.p_holm) else "< 0.001" if self.p_holm < 0.001 else f"{self.p_holm:.2g}"


COLUMNS = [field.name for field in fields(Outcome) if field.name not in ("left_out", "by_seed", "folder")]
"""Of ``claims.csv``."""
WORDS, COUNTS = ["claim", "dataset", "outcome", "quantity"], ["primary", "n", "networks", "seeds_needed"]
MOST = 10**6
"""The largest count that is believed."""


def outcome_of(judged: Judged) -> Outcome:
    """The outcome of a judged claim."""
    claim, found = judged.claim, judged.estimate
    outcome = Outcome(claim.name, claim.primary, judged.dataset, judged.outcome, quantity=claim.quantity)
    if found is None:
        return outcome
    _, low, high = found.seen
    return replace(
        outcome, estimate=found.value, low=low, high=high, n=found.n, networks=found.networks, p_holm=judged.p_holm,
        seeds_needed=judged.seeds_needed or 0, left_out=found.left_out, by_seed=found.by_seed,
    )  # fmt: skip


def outcomes_table(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    """The table that is written as ``claims.csv``."""
    return pd.DataFrame([[getattr(outcome, name) for name in COLUMNS] for outcome in outcomes], columns=COLUMNS)


def read_outcomes(folder: Path) -> list[Outcome]:
    """The primary outcomes in the ``claims.csv`` of a folder; InputError if it is no such table."""
    table = read_table(folder, FILE, COLUMNS)[COLUMNS]
    table = table.fillna(dict.fromkeys(WORDS, "") | dict.fromkeys(COUNTS, 0))
    try:
        table = table.astype({name: str if name in WORDS else float for name in COLUMNS})
        if not table[COUNTS].map(lambda count: 0 <= count <= MOST).all(axis=None):
            raise ValueError(f"a value of {', '.join(COUNTS)} is no count")
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / FILE}.csv: {error}; run the study again") from None
    table = table.astype(dict.fromkeys(COUNTS, int))
    outcomes = [Outcome(*row) for row in table[table.primary > 0].itertuples(index=False)]
    for outcome in outcomes:
        check_known("outcome", outcome.outcome, OUTCOME_COLORS)
    return outcomes


def beside(folder: Path, measured: Collection[str]) -> tuple[list[Outcome], list[str]]:
    """Outcomes on data sets that are not among `measured`, from folders beside `folder`; what could not be read, in a line each.

    Of a data set that several folders have, only those of the first folder by name.
    """
    found: list[Outcome] = []
    lines = []
    here = folder.resolve()
    for other in sorted(file.parent for file in here.parent.glob(f"*/{FILE}.csv") if file.parent != here):
        try:
            rows = read_outcomes(other)
        except (InputError, OSError) as error:
            reason = str(error).replace(str(here.parent), "..")
            lines.append(one_line(f"The outcomes beside this folder, in ../{other.name}, are left out: {reason}"))
            continue
        known = {"", *measured, *(outcome.dataset for outcome in found)}
        new = {row.dataset for row in rows if row.outcome != NOT_MEASURED} - known
        found += [replace(row, folder=other.name) for row in rows if row.dataset in new]
    return found, lines
