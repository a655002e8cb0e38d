"""From folds to HTML and Markdown: every value is text, whoever wrote it; only the templates are markup."""

import base64
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from studies.draw.palette import OUTCOME_COLORS
from studies.messages import printable
from studies.page.markdown import LOCAL, Markdown, code, folded, text

HERE = Path(__file__).parent


@cache
def template(name: str) -> jinja2.Template:
    """A template of this folder, ``.html.jinja`` or ``.md.jinja``; what an expression gives is escaped for its kind."""
    html = ".html." in name
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=html,
        finalize=_printable if html else text,
    )
    environment.filters |= {"code": code, "folded": folded, "linked": linked}
    return environment.get_template(name)


def _printable(value: object) -> object:
    """What `Markup` is not as one line without control characters; the environment escapes it."""
    return value if isinstance(value, Markup) else printable(str(value))


def linked(name: object) -> bool:
    """Whether a name can be that of a file or a folder in a link."""
    return LOCAL.fullmatch(str(name)) is not None


def html(name: str, **values: Any) -> Markup:
    """The HTML of a template."""
    return Markup(template(f"{name}.html.jinja").render(**values))


def markdown(name: str, **values: Any) -> Markdown:
    """The Markdown of a template, without the empty lines that it leaves where there is nothing."""
    return Markdown(re.sub(r"\n{3,}", "\n\n", template(f"{name}.md.jinja").render(**values)))


def style() -> Markup:
    """The style sheet, with the colours of the outcomes."""
    words = "".join(f".{word.replace(' ', '-')} {{ --tint: {color}; }}\n" for word, color in OUTCOME_COLORS.items())
    return Markup((HERE / "page.css").read_text(encoding="utf-8") + words)


def inline(folder: Path, name: str) -> Markup:
    """The address of a picture that stands in the page itself: the smaller of ``<name>.svg`` and ``<name>.png``."""
    contents = {
        kind: (folder / f"{name}.{suffix}").read_bytes() for suffix, kind in (("svg", "svg+xml"), ("png", "png"))
    }
    kind = min(contents, key=lambda kind: len(contents[kind]))
    return Markup(f"data:image/{kind};base64,{base64.b64encode(contents[kind]).decode()}")


class _Words(HTMLParser):
    """The words that a page shows."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = False
        self.count = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """What is inside a style sheet is not shown."""
        self.hidden = tag in ("style", "title")

    def handle_endtag(self, tag: str) -> None:
        """What follows is shown."""
        self.hidden = False

    def handle_data(self, data: str) -> None:
        """Words and numbers: whatever holds a letter or a digit, between white space."""
        if not self.hidden:
            self.count += sum(any(letter.isalnum() for letter in word) for word in data.split())


def word_count(page: str) -> int:
    """How many words and numbers a page in HTML shows, folds included."""
    words = _Words()
    words.feed(page)
    words.close()
    return words.count
