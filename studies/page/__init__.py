"""The report of a folder: a table of the primary claims, then a fold for each, as HTML and as Markdown.

``index.html`` stands alone, its pictures inside; ``report.md`` shows the PNG files beside it. Costs have a page of their own,
``performance.html`` and ``performance.md``.
"""

from studies.page.outcomes import outcome_of, outcomes_table, read_outcomes
from studies.page.parts import Fold, Page, Picture, Provenance, Table
from studies.page.writing import write_page

__all__ = [
    "Fold",
    "Page",
    "Picture",
    "Provenance",
    "Table",
    "outcome_of",
    "outcomes_table",
    "read_outcomes",
    "write_page",
]
