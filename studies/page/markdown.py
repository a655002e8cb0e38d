"""Markdown of which only our own templates are markup: every value that is put into them is text, whoever wrote it."""

import html
import re

from studies.messages import printable

MARKUP = re.compile(
    r"[\\`*|]|<(?! )|~(?=~)|(?<=~)~"  # escapes, code, emphasis, cells, tags and addresses, struck text
    r"|\](?=[(\[:])|!(?=\[)|:(?=//)"  # what makes a link or a picture of brackets; addresses, which some viewers link
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis: an underscore that is not inside a word
    r"|&(?=#?\w+;)"  # a character by its name
)
LINE_START = re.compile(r"^(?=>|#{1,6}(?: |$)|[-+] |=+$|-+$)|^(\d{1,9})(?=[.)] )")
"""What makes a heading, a quotation or a list of a line."""
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
