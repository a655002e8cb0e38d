"""``python -m studies.page.readme``: the table of results on the first page of the repository, from the committed reports."""

from pathlib import Path

from studies.draw.palette import label
from studies.judge import PRIMARY
from studies.page.outcomes import Outcome, read_outcomes

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
FOLDERS = ("quick", "cifar10")
"""Folders of reports, a column each."""


def results_table(reports: Path) -> str:
    """The nine primary claims with the outcome in each folder of reports, as Markdown."""
    outcomes = {name: {o.claim: o for o in read_outcomes(reports / name)} for name in FOLDERS}
    places = {name: label(next(iter(found.values())).dataset) for name, found in outcomes.items()}
    head = " | ".join(f"[{place}](reports/{name}/report.md)" for name, place in places.items())
    lines = [f"| | claim | {head} |", "| --- " * (2 + len(FOLDERS)) + "|"]
    for claim in PRIMARY:
        cells = (_cell(found.get(claim.name)) for found in outcomes.values())
        lines.append(f"| {claim.number} | {claim.statement} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(outcome: Outcome | None) -> str:
    if outcome is None or not outcome.numbers:
        return "not measured" if outcome is None else outcome.outcome
    return f"**{outcome.outcome}**, {outcome.numbers}"


if __name__ == "__main__":
    print(results_table(Path("reports")))
