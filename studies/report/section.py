"""What a study contributes to the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pandas as pd
from matplotlib.figure import Figure

from studies.results import Provenance
from studies.statistics import Interval, verdict


@dataclass(frozen=True)
class Claim:
    """A statement that the measured `interval` supports, contradicts or leaves open: see `studies.statistics.verdict`."""

    statement: str
    quantity: str
    interval: Interval
    claimed: str = "below"
    reference: float = 1.0
    group: str = "in the paper"
    meaning: str = ""
    """A sentence on what the verdict means, chosen by code from the verdict."""
    headline: bool = False
    """Whether it is among the few that stand for all in the summary at the beginning of the report."""

    @property
    def verdict(self) -> str:
        """``supported``, ``not supported`` or ``undecided``, computed from the interval."""
        return verdict(self.interval, self.claimed, self.reference)

    def meant(self, meanings: Mapping[str, str]) -> "Claim":
        """The same claim with the sentence that belongs to its verdict."""
        return replace(self, meaning=meanings[self.verdict])


@dataclass(frozen=True)
class Table:
    """A table of the report with its caption; also written as ``<name>.csv``. A `folded` one is shown when asked for."""

    name: str
    caption: str
    data: pd.DataFrame
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure of the report with its caption; written as ``<name>.svg`` and ``<name>.png``."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    """One study in the report."""

    title: str
    question: str
    method: str
    provenance: Provenance
    claims: list[Claim] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    @property
    def groups(self) -> list[str]:
        """The groups of claims, in order."""
        return list(dict.fromkeys(claim.group for claim in self.claims))

    @property
    def headlines(self) -> list[Claim]:
        """The claims that stand for all."""
        return [claim for claim in self.claims if claim.headline]

    @property
    def abstract(self) -> dict[str, list[tuple[str, str]]]:
        """For each group what its headlines mean: each sentence once, with the numbers that it rests on."""
        found: dict[str, dict[str, list[str]]] = {}
        for claim in self.headlines:
            numbers = f"{claim.verdict}: {claim.quantity}: {claim.interval}"
            found.setdefault(claim.group, {}).setdefault(claim.meaning, []).append(numbers)
        return {group: [(words, "; ".join(n)) for words, n in said.items()] for group, said in found.items()}

    def count(self, word: str, group: str) -> int:
        """How many claims of a group have this verdict."""
        return sum(claim.verdict == word for claim in self.claims if claim.group == group)
