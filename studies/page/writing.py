"""Writing the pages of a folder; a study whose tables cannot be used has a line there instead of its folds."""

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secondorder.errors import InputError
from studies.draw import mini
from studies.draw.frame import save
from studies.draw.palette import OUTCOME_COLORS
from studies.messages import one_line
from studies.page.claims import OVERVIEW, agreement, claim_rows, columns, overview
from studies.page.outcomes import FILE, Outcome, beside, outcome_of, outcomes_table
from studies.page.parts import INDEX, PERFORMANCE, Fold, Page
from studies.page.rendering import render
from studies.results import table_file, write_file

Study = Callable[[Path], Sequence[Fold]]
SMALL = 154
"""Width of a small picture in CSS pixels."""


def write_page(folder: Path, page: Page, studies: Mapping[str, Study], must: Collection[str] = ()) -> tuple[Path, Path]:
    """Write pictures, tables, ``claims.csv``, ``report.md`` and ``index.html`` of a folder; return the paths of both pages.

    A study whose results cannot be used (left by another version, or damaged) has a line on the page instead of its folds, and
    one on stderr. InputError with that line, once everything else is written, when it is one of those in `must`.

    Args:
        folder: has the tables of the studies, and gets the pages.
        page: title and claims.
        studies: by name, what makes the folds of a study from the tables in the folder; those without ``<name>.csv`` (or
            ``.csv.gz``) there are left out.
        must: names of the studies that were just run.
    """
    folds: list[Fold] = []
    failed: dict[str, str] = {}
    taken = {f"{FILE}.csv", f"{OVERVIEW}.png", *(f"{name}.csv" for name in studies)}
    taken.update(f"claim_{int(claim.primary)}.png" for claim in page.claims)
    for name in (name for name in studies if table_file(folder, name) is not None):
        try:
            with usable_tables(folder / name):
                made = list(studies[name](folder))
                taken |= _write_parts(folder, page, made, taken)
                folds += made
        except InputError as error:
            failed[name] = f"the results of {name} could not be reported: {error}"
    _write_pages(folder, page, folds, [words.replace(f"{folder}{os.sep}", "") for words in failed.values()])
    for name, words in sorted(failed.items(), key=lambda item: item[0] in must):
        if name in must:
            raise InputError(words)
        print(one_line(f"warning: {words}"), file=sys.stderr, flush=True)
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


def _write_parts(folder: Path, page: Page, folds: Sequence[Fold], taken: Collection[str]) -> set[str]:
    """Write the pictures and tables of a study; return the names of their files. Fails where one cannot be shown."""
    files = [f"{picture.name}.png" for fold in folds for picture in fold.pictures]
    files += [f"{table.name}.csv" for fold in folds for table in fold.tables]
    for file in files:
        if file in taken or files.count(file) > 1:
            raise InputError(f"{file} would replace another part of the page, or the records of a study; rename it")
    for fold in folds:
        for picture in fold.pictures:
            save(picture.figure, folder, picture.name)
        for table in fold.tables:
            write_file(folder / f"{table.name}.csv", table.data.to_csv(index=False, lineterminator="\n"))
        outcomes = [outcome_of(item) for item in fold.judged]
        for kind in ("html", "md"):
            render("fold", kind, **_values(folder, page, fold, outcomes))
    judged = [item for fold in folds for item in fold.judged]
    overview(claim_rows(page, judged, [*map(outcome_of, judged)]))
    return set(files)


def _write_pages(folder: Path, page: Page, folds: Sequence[Fold], failed: Sequence[str]) -> None:
    """Write the pages and ``claims.csv``."""
    told = {fold.about.name for fold in folds if fold.about is not None}
    folds = [*folds, *(Fold(claim=claim) for claim in page.claims if claim.name not in told)]
    folds.sort(key=lambda fold: fold.number or sys.maxsize)
    judged = [item for fold in folds for item in fold.judged]
    here = [outcome_of(item) for item in judged]
    found, lines = beside(folder, {outcome.dataset for outcome in here})
    outcomes = [*here, *found]
    rows = claim_rows(page, judged, outcomes)
    for row in (row for row in rows if row.drawn):
        save(mini(row.margins, SMALL / 96), folder, row.anchor)
    if here:
        further = [outcome_of(item) for fold in folds for item in (*fold.controls, *fold.exploratory)]
        table = outcomes_table([*here, *further])
        write_file(folder / f"{FILE}.csv", table.to_csv(index=False, lineterminator="\n"))
    every = overview(rows)
    if every is not None:
        save(every.pictures[0].figure, folder, OVERVIEW)
        folds.insert(0, every)
    common = {
        "page": page,
        "rows": rows,
        "agreement": agreement(rows),
        "columns": columns(outcomes),
        "lines": [*failed, *lines],
        "with_page": {file.parent.name for file in folder.resolve().parent.glob("*/index.html")},
        "costs": any(fold.page == PERFORMANCE for fold in folds),
        "folder": folder,
        "small": SMALL,
        "colors": OUTCOME_COLORS,
    }
    for which, name in ((INDEX, "report"), (PERFORMANCE, PERFORMANCE)):
        mine = [fold for fold in folds if fold.page == which]
        for kind, file in (("html", which), ("md", name)) if mine or which == INDEX else ():
            shown = [render("fold", kind, **_values(folder, page, fold, outcomes)) for fold in mine]
            text = render("page", kind, which=which, contents=mine, folds=shown, **common)
            write_file(folder / f"{file}.{kind}", f"{text.strip()}\n")


def _values(folder: Path, page: Page, fold: Fold, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the template of a fold needs; those of the `outcomes` that are about its claim are shown."""
    claim = fold.about.name if fold.about is not None else None
    measured = any(item.estimate is not None for item in fold.judged)
    command = "" if claim is None or measured else page.commands.get(claim, "")
    # a command says what else would be said
    sentences = [] if command else [item.sentence for item in fold.judged if item.sentence]
    own = [outcome for outcome in outcomes if outcome.claim == claim]
    comparisons = {
        "Outcome": own,
        "Controls": [outcome_of(item) for item in fold.shown_controls],
        "Exploratory, without a verdict": [outcome_of(item) for item in fold.exploratory],
    }
    return {
        "folder": folder,
        "fold": fold,
        "outcomes": [outcome for outcome in own if outcome.dataset] if fold.number else [],
        "sentences": [*sentences, *fold.sentences],
        "command": command,
        "comparisons": {caption: rows for caption, rows in comparisons.items() if rows},
    }
