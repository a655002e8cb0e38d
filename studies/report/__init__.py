"""The report: sections of all studies found in a folder, as Markdown and as one self-contained HTML page."""

import base64
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jinja2
import pandas as pd
from markdown_it import MarkdownIt

from secondorder.errors import InputError
from studies.report.section import Section
from studies.report.style import save
from studies.results import write_file

HERE = Path(__file__).parent


def write_report(folder: Path, sections: Mapping[str, Callable[[Path], Section]], preset: str) -> tuple[Path, Path]:
    """Write figures, tables, ``report.md`` and ``index.html`` for every study with results in `folder`; return both paths."""
    found: dict[str, Section] = {}
    failed: dict[str, str] = {}
    for name, section in sections.items():
        if (folder / f"{name}.csv").exists():
            try:
                found[name] = section(folder)
            except InputError as error:  # of one study, left there by another version: the others are still reported
                failed[name] = str(error)
    for part in found.values():
        for picture in part.pictures:
            save(picture.figure, folder, picture.name)
        for table in part.tables:
            write_file(folder / f"{table.name}.csv", table.data.to_csv(index=False, lineterminator="\n"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # the Markdown is made of our own words and numbers; the HTML is made from it by markdown-it
    )
    environment.filters["markdown_table"] = markdown_table
    markdown = environment.get_template("report.md.jinja").render(sections=found, failed=failed, preset=preset)
    body = _with_inline_figures(MarkdownIt("commonmark").enable("table").render(markdown), folder)
    style = (HERE / "page.css").read_text(encoding="utf-8")
    page = environment.get_template("page.html.jinja").render(body=body, style=style, preset=preset)
    write_file(folder / "report.md", markdown)
    write_file(folder / "index.html", page)
    return folder / "report.md", folder / "index.html"


def markdown_table(table: pd.DataFrame) -> str:
    """A data frame as a Markdown table, numbers with 4 digits; `|` in cells is escaped."""

    def row(cells: list[object]) -> str:
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    return "\n".join(
        [row(list(table.columns)), row(["---"] * table.shape[1]), *(row(list(v)) for v in table.to_numpy())]
    )


def _with_inline_figures(html: str, folder: Path) -> str:
    """Replace image addresses of SVG files by data, so that the page stands alone: those of the smaller of SVG and PNG."""

    def inline(match: re.Match[str]) -> str:
        kinds = {"svg+xml": f"{match.group(1)}.svg", "png": f"{match.group(1)}.png"}
        contents = {kind: (folder / file).read_bytes() for kind, file in kinds.items() if (folder / file).exists()}
        kind = min(contents, key=lambda kind: len(contents[kind]))
        return f'src="data:image/{kind};base64,{base64.b64encode(contents[kind]).decode()}"'

    return re.sub(r'src="([\w.-]+)\.svg"', inline, html)
