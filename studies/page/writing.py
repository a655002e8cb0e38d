"""Writing the pages of a folder; a study whose tables cannot be used has a line there instead of its folds."""

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secondorder.errors import InputError
from studies.draw import mini
from studies.draw.saving import save
from studies.judge import Judged
from studies.messages import one_line
from studies.page.claims import OVERVIEW, ClaimRow, Column, claim_row, columns, overview
from studies.page.outcomes import FILE, Outcome, beside, outcome_of, outcomes_table
from studies.page.parts import INDEX, PERFORMANCE, Fold, Page
from studies.page.rendering import html, inline, markdown, style
from studies.results import Provenance, table_file, write_file

Study = Callable[[Path], Sequence[Fold]]
SMALL = 154
"""Width of a small picture in CSS pixels."""


def write_page(folder: Path, page: Page, studies: Mapping[str, Study], must: Collection[str] = ()) -> tuple[Path, Path]:
    """Write pictures, tables, ``claims.csv``, ``report.md`` and ``index.html`` of a folder; return the paths of both pages.

    A study whose results cannot be used (left by another version, or damaged) has a line on the page instead of its folds, and
    one on stderr. InputError with that line, once everything else is written, when it is one of those in `must`.

    Args:
        folder: has the tables of the studies, and gets the pages.
        page: title, claims and the folds of no study.
        studies: by name, what makes the folds of a study from the tables in the folder; those without ``<name>.csv`` (or
            ``.csv.gz``) there are left out.
        must: names of the studies that were just run.
    """
    report = _Report(
        folder, page, {FILE, OVERVIEW, *(f"claim_{int(claim.primary)}" for claim in page.claims)}, set(studies)
    )
    failed: dict[str, str] = {}
    for fold in page.folds:
        report.add(fold, "")
    for name in (name for name in studies if table_file(folder, name) is not None):
        try:
            with usable_tables(folder / name):
                report.add_all(studies[name](folder), name)
        except InputError as error:
            failed[name] = f"the results of {name} could not be reported: {error}"
    report.write([words.replace(f"{folder}{os.sep}", "") for words in failed.values()])
    for name in (name for name in failed if name not in must):
        print(one_line(f"warning: {failed[name]}"), file=sys.stderr, flush=True)
    for name in (name for name in failed if name in must):
        raise InputError(failed[name])
    return folder / "report.md", folder / "index.html"


@contextmanager
def usable_tables(study: Path) -> Iterator[None]:
    """InputError for whatever fails inside: a wrong value in a table can fail anywhere in the code that reads it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"the tables of {study} cannot be used ({reason}); run the study again") from error


@dataclass
class _Report:
    """The folds of a page, each with the name of its study, whose pictures and tables are written."""

    folder: Path
    page: Page
    taken: set[str]
    studies: set[str]
    folds: list[tuple[Fold, str]] = field(default_factory=list)

    def add_all(self, folds: Sequence[Fold], study: str) -> None:
        """Add the folds of a study, or none of them if one fails."""
        before, taken = list(self.folds), set(self.taken)
        try:
            for fold in folds:
                self.add(fold, study)
        except BaseException:
            self.folds, self.taken = before, taken
            raise

    def add(self, fold: Fold, study: str) -> None:
        """Write the pictures and tables of a fold, and add it once it can be rendered."""
        names = [*(picture.name for picture in fold.pictures), *(table.name for table in fold.tables)]
        for name in names:
            if name in self.taken or names.count(name) > 1:
                raise InputError(f"two pictures or tables are named {name!r}; rename one")
        if records := self.studies & {table.name for table in fold.tables}:
            raise InputError(
                f"the table {min(records)!r} would replace the records of the study of that name; rename it"
            )
        self.taken.update(names)
        for picture in fold.pictures:
            save(picture.figure, self.folder, picture.name)
        for table in fold.tables:
            write_file(self.folder / f"{table.name}.csv", table.data.to_csv(index=False, lineterminator="\n"))
        here = [outcome_of(item) for item in fold.judged]
        if here and here[0].primary:
            self._row(fold.judged, here, [Column(outcome.dataset) for outcome in here])
        for render in (html, markdown):
            render("fold", **self._values(fold, study, here))
        self.folds.append((fold, study))

    def write(self, failed: Sequence[str]) -> None:
        """Write the pages and ``claims.csv``."""
        told = {fold.about.name for fold, _ in self.folds if fold.about is not None}
        self.folds += [(Fold(claim=claim), "") for claim in self.page.claims if claim.name not in told]
        self.folds.sort(key=lambda item: item[0].number or sys.maxsize)
        judged = [item for fold, _ in self.folds for item in fold.judged]
        here = [outcome_of(item) for item in judged]
        others, lines = beside(self.folder, {outcome.dataset for outcome in here})
        outcomes = [*here, *(outcome for found in others.values() for outcome in found)]
        across = columns(here, others, self.folder)
        rows = self._rows(judged, outcomes, across)
        pictures = self._small_pictures(rows)
        every = overview(rows, judged)
        if every is not None:
            save(every.pictures[0].figure, self.folder, OVERVIEW)
            self.folds.insert(0, (every, ""))
        if here:
            further = [outcome_of(item) for fold, _ in self.folds for item in (*fold.controls, *fold.exploratory)]
            write_file(
                self.folder / f"{FILE}.csv", outcomes_table([*here, *further]).to_csv(index=False, lineterminator="\n")
            )
        costs = any(fold.page == PERFORMANCE for fold, _ in self.folds)
        shared = {"rows": rows, "columns": across, "pictures": pictures, "performance": costs, "back": False}
        self._page(INDEX, "report", self.page.title, outcomes, shared | {"lines": [*failed, *lines]})
        if costs:
            nothing = {"rows": [], "columns": [], "pictures": {}, "performance": False, "back": True, "lines": []}
            self._page(PERFORMANCE, PERFORMANCE, f"Performance: what it costs ({self.page.preset})", outcomes, nothing)

    def _rows(self, judged: Sequence[Judged], outcomes: Sequence[Outcome], across: Sequence[Column]) -> list[ClaimRow]:
        """The table of primary claims: those of the page, and others that a study judged."""
        claims = {claim.name: claim for claim in (*self.page.claims, *(item.claim for item in judged)) if claim.primary}
        return [
            claim_row(
                claim, [item for item in judged if item.claim.name == name], outcomes, across, self._command(name)
            )
            for name, claim in sorted(claims.items(), key=lambda item: item[1].primary)
        ]

    def _command(self, claim: str) -> str:
        return self.page.commands.get(claim, "")

    def _row(self, judged: Sequence[Judged], outcomes: Sequence[Outcome], across: Sequence[Column]) -> None:
        """Fails where the row of a claim cannot be drawn."""
        mini(claim_row(judged[0].claim, judged, outcomes, across, "").margins)

    def _small_pictures(self, rows: Sequence[ClaimRow]) -> dict[str, str]:
        """Write the small picture of every row with an estimate; their addresses, by anchor."""
        drawn = {row.anchor: row.margins for row in rows if row.cells}
        drawn = {anchor: table for anchor, table in drawn.items() if np.isfinite(table.estimate).any()}
        for anchor, table in drawn.items():
            save(mini(table, SMALL / 96), self.folder, anchor)
        return {anchor: inline(self.folder, anchor) for anchor in drawn}

    def _values(self, fold: Fold, study: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """What the template of a fold needs; `outcomes` are those of its claim on all data sets."""
        tables = [("Outcome", outcomes, False)] if outcomes else []
        tables += [
            (caption, [outcome_of(item) for item in items], True)
            for caption, items in (
                ("Controls", fold.shown_controls),
                ("Exploratory, without a verdict", fold.exploratory),
            )
            if items
        ]
        measured = [item for item in fold.judged if item.estimate is not None]
        command = self._command(fold.about.name) if fold.about is not None and not measured else ""
        told = measured if command else fold.judged  # the command says what else would be said
        outcomes = [outcome for outcome in outcomes if outcome.dataset]
        return {
            "fold": fold,
            "study": study,
            "cells": outcomes if fold.number else [],
            "sentences": [*(item.sentence for item in told if item.sentence), *fold.sentences],
            "command": command,
            "comparisons": tables,
            "origin": origin(fold.provenance) if fold.provenance is not None else "",
            "pictures": {picture.name: inline(self.folder, picture.name) for picture in fold.pictures},
            "opened": fold.page == PERFORMANCE,
        }

    def _page(
        self, which: str, name: str, heading: str, outcomes: Sequence[Outcome], shared: Mapping[str, Any]
    ) -> None:
        """Write one of the pages, as HTML and as Markdown."""
        folds = [(fold, study) for fold, study in self.folds if fold.page == which]
        values = []
        for fold, study in folds:
            about = [outcome for outcome in outcomes if fold.about is not None and outcome.claim == fold.about.name]
            values.append(self._values(fold, study, about))
        common = {
            "page": self.page,
            "heading": heading,
            "contents": [fold for fold, _ in folds],
            "small": SMALL,
            "style": style(),
            **shared,
        }
        for kind, file in ((html, which), (markdown, name)):
            text = kind("page", folds=[kind("fold", **value) for value in values], **common)
            write_file(self.folder / f"{file}.{'html' if kind is html else 'md'}", f"{text.strip()}\n")


def origin(provenance: Provenance) -> str:
    """Where numbers come from, in a sentence."""
    p = provenance
    commits = ", ".join(c[:12] + "+changes" * c.endswith("+changes") for c in p.git_commit.split())
    versions = ", ".join(f"{package} {version}" for package, version in p.versions.items())
    return (
        f"Measured with {versions}; commit {commits}; {p.device}, {p.processes} process(es) with {p.threads} thread(s); "
        f"{p.seconds:.0f} s; seeds {', '.join(map(str, p.seeds))}."
    )
