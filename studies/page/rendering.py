"""From folds to HTML and Markdown: every value is text, whoever wrote it; only the templates are markup."""

import base64
import html
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from studies.draw.palette import label
from studies.messages import printable

SIGNS = re.compile(
    r"[\\`*|]|<(?! )|~(?=~)|(?<=~)~"  # escapes, code, emphasis, cells, tags and addresses, struck text
    r"|\](?=[(\[:])|!(?=\[)|:(?=//)"  # what makes a link or a picture of brackets; addresses, which some viewers link
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis: an underscore that is not inside a word
    r"|&(?=#?\w+;)"  # a character by its name
)
LINE_START = re.compile(r"^(?=>|#{1,6}(?: |$)|[-+] |=+$|-+$)|^(\d{1,9})(?=[.)] )")
"""What makes a heading, a quotation or a list of a line."""


def _line(value: object) -> object:
    """What `Markup` is not as one line without control characters; the environment escapes it."""
    return value if isinstance(value, Markup) else printable(str(value))


def _text(value: object) -> Markup:
    """A value as one line of Markdown that shows its characters and nothing else; what is marked as Markdown stays."""
    if isinstance(value, Markup):
        return value
    escaped = SIGNS.sub(r"\\\g<0>", printable(str(value)))
    return Markup(LINE_START.sub(lambda start: f"{start.group(1) or ''}\\", escaped))


def _code(value: object) -> Markup:
    """A value as code, in which there is no other markup."""
    return Markup("`" + printable(str(value)).replace("`", "'").replace("|", "¦") + "`")


def _folded(caption: object) -> Markup:
    """The line that begins a part shown when asked for; ``</details>`` on a line of its own ends it."""
    return Markup(f"<details><summary>{html.escape(printable(str(caption)))}</summary>")


def _cell(value: object) -> str:
    """A cell of a table as a reader sees it, numbers with 4 digits."""
    if not isinstance(value, float):
        return str(value)
    return "–" if math.isnan(value) else f"{value:.4g}".replace("-", "−")


def _linked(name: object) -> bool:
    """Whether a name can be that of a file or a folder in a link."""
    return re.fullmatch(r"[\w-][\w.-]*", str(name)) is not None


def _inline(folder: Path, name: str) -> Markup:
    """The address of a picture that stands in the page itself: the smaller of ``<name>.svg`` and ``<name>.png``."""
    kinds = {"svg+xml": folder / f"{name}.svg", "png": folder / f"{name}.png"}
    contents = {kind: file.read_bytes() for kind, file in kinds.items()}
    kind = min(contents, key=lambda kind: len(contents[kind]))
    return Markup(f"data:image/{kind};base64,{base64.b64encode(contents[kind]).decode()}")


@cache
def _templates(kind: str) -> jinja2.Environment:
    """The templates of this folder of a kind, "html" or "md"; what an expression gives is escaped for it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=kind == "html",
        finalize=_line if kind == "html" else _text,
    )
    filters = (_cell, _code, _folded, _inline, _linked, label)
    environment.filters |= {function.__name__.strip("_"): function for function in filters}
    return environment


def render(name: str, kind: str, **values: Any) -> Markup:
    """The template ``<name>.<kind>.jinja`` with these values, without the empty lines that it leaves where there is nothing."""
    return Markup(re.sub(r"\n{3,}", "\n\n", _templates(kind).get_template(f"{name}.{kind}.jinja").render(**values)))
