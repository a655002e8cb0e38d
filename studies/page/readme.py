"""``python -m studies.page.readme``: the table of results on the first page of the repository, from the committed reports."""

from collections.abc import Mapping
from pathlib import Path

from studies.draw.palette import OUTCOME_COLORS, label
from studies.judge import NOT_MEASURED, PRIMARY
from studies.page.outcomes import Outcome, read_outcomes

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
FOLDERS = ("quick", "cifar10")
"""Folders of reports, a column each."""


def results_table(reports: Path) -> str:
    """The nine primary claims with the outcome in each folder of reports, as Markdown, and a sentence for each before them."""
    outcomes = {name: {o.claim: o for o in read_outcomes(reports / name)} for name in FOLDERS}
    places = {name: label(next(iter(found.values())).dataset) for name, found in outcomes.items()}
    head = " | ".join(f"[{place}](reports/{name}/report.md)" for name, place in places.items())
    lines = [f"| | claim | {head} |", "| --- " * (2 + len(FOLDERS)) + "|"]
    for claim in PRIMARY:
        cells = [found.get(claim.name, Outcome(claim.name, 0, "", NOT_MEASURED)) for found in outcomes.values()]
        words = [
            f"**{cell.outcome}**, {cell.numbers}, {cell.seeds}" if cell.numbers else cell.outcome for cell in cells
        ]
        lines.append(f"| {claim.primary} | {claim.statement} | {' | '.join(words)} |")
    return "\n".join([*map(_sentence, places.values(), outcomes.values()), "", *lines])


def _sentence(place: str, outcomes: Mapping[str, Outcome]) -> str:
    """What came out on one data set, by outcome."""
    claims: dict[str, list[str]] = {}
    for claim in PRIMARY:
        outcome = outcomes[claim.name].outcome if claim.name in outcomes else NOT_MEASURED
        claims.setdefault(outcome, []).append(str(claim.primary))
    words = [f"{outcome} {', '.join(claims[outcome])}" for outcome in OUTCOME_COLORS if outcome in claims]
    return f"Of the paper's nine claims, on {place}: {'; '.join(words)}."


if __name__ == "__main__":
    print(results_table(Path("reports")))
