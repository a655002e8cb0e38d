"""What a study contributes to the report."""

from dataclasses import dataclass, field

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
    """A sentence on what the verdict means, for the abstract of the report; chosen by code from the verdict."""

    @property
    def verdict(self) -> str:
        """``supported``, ``not supported`` or ``undecided``, computed from the interval."""
        return verdict(self.interval, self.claimed, self.reference)


@dataclass(frozen=True)
class Table:
    """A table of the report with its caption; also written as ``<name>.csv``."""

    name: str
    caption: str
    data: pd.DataFrame


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
    def abstract(self) -> dict[str, list[str]]:
        """What the claims of each group mean, each sentence once, for the beginning of the report."""
        found: dict[str, list[str]] = {}
        for claim in self.claims:
            if claim.meaning and claim.meaning not in found.setdefault(claim.group, []):
                found[claim.group].append(claim.meaning)
        return {group: sentences for group, sentences in found.items() if sentences}

    def count(self, word: str, group: str) -> int:
        """How many claims of a group have this verdict."""
        return sum(claim.verdict == word for claim in self.claims if claim.group == group)
