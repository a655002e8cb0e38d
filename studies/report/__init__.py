"""The report: sections of all studies found in a folder, as Markdown and as one self-contained HTML page."""

import base64
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from secondorder.errors import InputError
from studies.messages import one_line
from studies.report.markdown import HERE, markdown_table, page, page_body, template
from studies.report.section import Section
from studies.report.style import save
from studies.results import write_file

__all__ = ["markdown_table", "write_report"]


def write_report(
    folder: Path, sections: Mapping[str, Callable[[Path], Section]], preset: str, must: Collection[str] = ()
) -> tuple[Path, Path]:
    """Write figures, tables, ``report.md`` and ``index.html`` for every study with results in `folder`; return both paths.

    A study whose results cannot be used (left by another version, or damaged) has a line in the report instead of its section,
    and on stderr. InputError with that line, once everything else is written, when it is one of those in `must`.
    """
    found: dict[str, Section] = {}
    failed: dict[str, str] = {}
    for name in (name for name in sections if os.path.lexists(folder / f"{name}.csv")):
        try:
            found[name] = _drawn(folder, name, sections[name](folder), preset)
        except InputError as error:
            failed[name] = str(error)
        except Exception as error:  # a wrong type or value in a table can fail anywhere in the code that reads it
            reason = f"{type(error).__name__}: {error}"
            failed[name] = f"the tables of {folder / name} cannot be used ({reason}); run the study again"
    markdown = template("report.md.jinja").render(sections=found, failed=failed, preset=preset)
    style = (HERE / "page.css").read_text(encoding="utf-8")
    write_file(folder / "report.md", markdown)
    write_file(folder / "index.html", page(_with_inline_figures(page_body(markdown), folder), style, preset))
    lines = {name: f"the results of {name} could not be reported: {words}" for name, words in failed.items()}
    for name in (name for name in lines if name not in must):
        print(one_line(f"warning: {lines[name]}"), file=sys.stderr, flush=True)
    for name in (name for name in lines if name in must):
        raise InputError(lines[name])
    return folder / "report.md", folder / "index.html"


def _drawn(folder: Path, name: str, section: Section, preset: str) -> Section:
    """The section, whose figures and tables are written, and which the template can print."""
    for picture in section.pictures:
        save(picture.figure, folder, picture.name)
    for table in section.tables:
        write_file(folder / f"{table.name}.csv", table.data.to_csv(index=False, lineterminator="\n"))
    template("report.md.jinja").render(sections={name: section}, failed={}, preset=preset)
    return section


def _with_inline_figures(html: str, folder: Path) -> str:
    """Replace image addresses of SVG files by data, so that the page stands alone: those of the smaller of SVG and PNG."""

    def inline(match: re.Match[str]) -> str:
        kinds = {"svg+xml": f"{match.group(1)}.svg", "png": f"{match.group(1)}.png"}
        contents = {kind: (folder / file).read_bytes() for kind, file in kinds.items() if (folder / file).exists()}
        kind = min(contents, key=lambda kind: len(contents[kind]))
        return f'src="data:image/{kind};base64,{base64.b64encode(contents[kind]).decode()}"'

    return re.sub(r'src="([\w.-]+)\.svg"', inline, html)
