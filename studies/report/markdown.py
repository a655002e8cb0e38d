"""Markdown of which only our own template is markup: every value that is put into it is text, whoever wrote it.

`template` escapes what an expression gives, unless a filter made `Markdown` of it. `page_body` makes HTML of the result: raw HTML
is text there but for the lines that fold a table, links and pictures lead to files beside the page and nowhere else.
"""

import html
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

from studies.messages import printable

HERE = Path(__file__).parent
MARKUP = re.compile(
    r"[\\`*|]|<(?! )|~(?=~)|(?<=~)~"  # escapes, code, emphasis, cells, tags and addresses, struck text
    r"|\](?=[(\[:])|!(?=\[)|:(?=//)"  # what makes a link or a picture of brackets; addresses, which some viewers link
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis: an underscore that is not inside a word
    r"|&(?=#?\w+;)"  # a character by its name
)
LINE_START = re.compile(r"^(?=>|#{1,6}(?: |$)|[-+] |=+$|-+$)|^(\d{1,9})(?=[.)] )")
"""What makes a heading, a quotation or a list of a line."""
FOLDED = re.compile(r"<details><summary>([^<>]*)</summary>\n?")
LOCAL = re.compile(r"[\w-][\w.-]*")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def text(value: object) -> Markdown:
    """A value as one line of Markdown that shows its characters and nothing else."""
    if isinstance(value, Markdown):
        return value
    escaped = MARKUP.sub(r"\\\g<0>", printable(str(value)))
    return Markdown(LINE_START.sub(lambda start: f"{start.group(1) or ''}\\", escaped))


def code(value: object) -> Markdown:
    """A value as code, in which there is no other markup."""
    return Markdown("`" + printable(str(value)).replace("`", "'").replace("|", "¦") + "`")


def folded(caption: object) -> Markdown:
    """The line that begins a part shown when asked for; ``</details>`` on a line of its own ends it."""
    return Markdown(f"<details><summary>{html.escape(printable(str(caption)))}</summary>")


def markdown_table(table: pd.DataFrame) -> Markdown:
    """A data frame as a Markdown table, numbers with 4 digits."""

    def row(cells: list[object]) -> str:
        texts = (f"{cell:.4g}" if isinstance(cell, float) else text(cell) for cell in cells)
        return "| " + " | ".join(texts) + " |"

    line = "| " + " | ".join(["---"] * table.shape[1]) + " |"
    return Markdown("\n".join([row(list(table.columns)), line, *(row(list(values)) for values in table.to_numpy())]))


@cache
def template(name: str) -> jinja2.Template:
    """The template of the report in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # HTML is made of the Markdown, in which `finalize` escapes every value
        finalize=text,
    )
    environment.filters |= {"code": code, "folded": folded, "markdown_table": markdown_table}
    return environment.get_template(name)


def page(body: str, style: str, preset: str) -> str:
    """A whole HTML page around a body that is HTML already."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), trim_blocks=True, autoescape=True)
    return environment.get_template("page.html.jinja").render(body=body, style=style, preset=preset)


def page_body(markdown: str) -> str:
    """The HTML of the report's Markdown."""
    parser = MarkdownIt("commonmark", {"html": True}, renderer_cls=_OwnMarkup).enable("table")
    parser.validateLink = lambda url: LOCAL.fullmatch(url) is not None  # type: ignore[method-assign]
    found: str = parser.render(markdown)
    return found


class _OwnMarkup(RendererHTML):
    """Raw HTML is text, but for what `folded` makes."""

    def html_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """The lines that fold a table."""
        content = tokens[idx].content
        own = FOLDED.fullmatch(content) or content.strip() == "</details>"
        return content if own else f"<p>{html.escape(content)}</p>\n"

    def html_inline(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """None is ours."""
        return html.escape(tokens[idx].content)
