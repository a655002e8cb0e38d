"""What a page is made of: folds of sentences, pictures and tables, each about one claim or one topic."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from secondorder.errors import InputError, check_known
from studies.judge import CONTRADICTED, SUPPORTED, Claim, Judged

INDEX, PERFORMANCE = "index", "performance"


@dataclass(frozen=True)
class Part:
    """What is written into a file of its own, with a caption that says the conclusion first."""

    name: str
    caption: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise InputError(f"picture or table {self.name[:80]!r}: the name of a file has letters, digits, - and _")


@dataclass(frozen=True)
class Picture(Part):
    """A figure, written as ``<name>.svg`` and ``<name>.png``."""

    figure: Figure


@dataclass(frozen=True)
class Table(Part):
    """A table, also written as ``<name>.csv``."""

    data: pd.DataFrame


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of a study come from: its name, and a sentence about code, machines and seeds."""

    study: str
    words: str


@dataclass(frozen=True)
class Fold:
    """A part of the page that is shown when asked for: about a claim (`judged` on each data set) or, without one, a topic.

    Args:
        title: of a fold about a topic; that of a claim is its name.
        claim: what it is about; that of `judged` unless given, so only needed where nothing was measured.
        judged: the claim judged on each data set of this folder.
        sentences: what came out, in addition to the sentences of `judged`.
        pictures: each with a caption that says the conclusion first.
        controls: shown only where the claim has an effect, supported or contradicted.
        exploratory: further comparisons, with estimates and intervals but no outcome.
        tables: shown below all else.
        method: how it was measured, a paragraph each.
        provenance: where the numbers come from.
        page: "index", or "performance" for the page of that name.
    """

    title: str = ""
    claim: Claim | None = None
    judged: Sequence[Judged] = ()
    sentences: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    controls: Sequence[Judged] = ()
    exploratory: Sequence[Judged] = ()
    tables: Sequence[Table] = ()
    method: Sequence[str] = ()
    provenance: Provenance | None = None
    page: str = INDEX

    def __post_init__(self) -> None:
        check_known("page of a fold", self.page, (INDEX, PERFORMANCE))
        if not self.title and self.about is None:
            raise InputError("a fold has a claim or a title")
        if isinstance(self.sentences, str) or isinstance(self.method, str):
            raise InputError("sentences and method of a fold are lists of sentences, not one string")

    @property
    def about(self) -> Claim | None:
        """The claim that it is about; None for a topic."""
        return self.judged[0].claim if self.claim is None and self.judged else self.claim

    @property
    def heading(self) -> str:
        """The title, or name of the claim."""
        return self.title or (self.about.name if self.about is not None else "")

    @property
    def number(self) -> int:
        """Of the primary claim; 0 for other folds."""
        return int(self.about.primary) if self.about is not None else 0

    @property
    def anchor(self) -> str:
        """Where links to it lead: letters, digits and underscores only."""
        slug = re.sub(r"[^a-z0-9]+", "_", self.heading.lower()).strip("_")
        return f"claim_{self.number}" if self.number else f"about_{slug}"

    @property
    def shown_controls(self) -> Sequence[Judged]:
        """The controls, if there is an effect to explain."""
        return self.controls if any(item.outcome in (SUPPORTED, CONTRADICTED) for item in self.judged) else ()


@dataclass(frozen=True)
class Page:
    """The report of a folder.

    Args:
        title: heading of the page.
        question: a sentence or two below it.
        preset: name of the preset that gave the numbers.
        claims: the primary claims; those that no fold judges are shown as not measured.
        commands: by name of a claim, the command that would measure it.
    """

    title: str
    question: str
    preset: str
    claims: Sequence[Claim] = ()
    commands: Mapping[str, str] = field(default_factory=dict)
