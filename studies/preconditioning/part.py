"""What each of the five parts contributes to the section of the report."""

from dataclasses import dataclass, field

from studies.report.section import Claim, Picture, Table


@dataclass(frozen=True)
class Part:
    """Verdicts, words, figures and tables of one part."""

    claims: list[Claim]
    """Each with the part's title as `group` and a `meaning`."""
    remarks: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
